"""What is selected, token by token: a passage that the step has just learned from."""

from typing import TYPE_CHECKING, Any

from megatron_slm.reporting.escaping import escape_html
from megatron_slm.reporting.table import tokens_table
from megatron_slm.reporting.tokens import Token, token_texts
from megatron_slm.training.callbacks.callback import Callback
from megatron_slm.training.state import RunState
from megatron_slm.training.statistics import Pool
from megatron_slm.training.step import StepResult

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

MAX_TOKENS = 128


class TokenTable(Callback):
    """Shows the beginning of the step's first sequence in TensorBoard. For rank 0; runs no model.

    Args:
        interval: steps between tables.
        writer: of the run's event files.
        tokenizer: of the corpora.
        sources: names of the blend's entries.
    """

    def __init__(self, interval: int, writer: "SummaryWriter", tokenizer: Any, sources: list[str]) -> None:
        self._interval = interval
        self._writer = writer
        self._tokenizer = tokenizer
        self._sources = sources

    def on_step_end(self, state: RunState, result: StepResult) -> None:
        pool = result.statistics.first_pool
        if pool is None or not state.is_due(self._interval):
            return
        sample, source = int(pool.batch.sample_index_B[0]), self._sources[int(pool.batch.source_B[0])]
        title = escape_html(f"Sample {sample} of the run, from {source}: selected tokens are bold.")
        table = tokens_table(first_tokens(pool, self._tokenizer, MAX_TOKENS))
        self._writer.add_text("tokens", f"<p>{title}</p>\n\n{table}", state.step)


def first_tokens(pool: Pool, tokenizer: Any, limit: int) -> list[Token]:
    """The beginning of the pool's first sequence. Its very first token is context alone, and has no loss."""
    labels, valid, selected, student = (
        column_BT[0, : limit - 1].tolist()
        for column_BT in (pool.batch.labels_BT, pool.batch.valid_BT, pool.choice.mask_BT, pool.signals["student.loss"])
    )
    reference: list[float | None] = [None] * len(labels)
    if "reference.loss" in pool.signals:
        reference = pool.signals["reference.loss"][0, : limit - 1].tolist()
    first, *texts = token_texts(tokenizer, [int(pool.batch.tokens_BT[0, 0]), *labels])
    rows = zip(texts, valid, student, reference, selected, strict=True)
    return [Token(first)] + [Token(text, *losses) if is_valid else Token(text) for text, is_valid, *losses in rows]
