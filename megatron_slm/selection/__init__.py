"""Token selection for anyone's training loop: scores in, an exact mask for all ranks out.

Needs torch and nothing else of this package. Data flows through four files in this order:
`score.py` (a column to rank by), `threshold.py` (the exact cut over all ranks), `select.py`
(the mask), `loss.py` (the summed loss and its planned count).
"""

from megatron_slm.selection.loss import selected_loss
from megatron_slm.selection.score import find_score, score
from megatron_slm.selection.select import Selection, plan_k, select_tokens

__all__ = ["Selection", "find_score", "plan_k", "score", "select_tokens", "selected_loss"]
