"""Replay: score all tokens without a graph, then run forward and backward on the selected tokens alone.

The first pass leaves the keys and values of every layer; the second attends to them, with those of the selected
tokens in the place of their own. So hidden states, keys and values of all other positions are constants, as in
rows.py: the same gradient, of which only the selected share of the activations is ever held.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_slm.backend import TrainingEngine
from megatron_slm.models.causal_lm import masked_labels, score_batch
from megatron_slm.models.sparse_backward.attention import (
    Attended,
    AttentionCall,
    PackedAttention,
    PackedQueries,
    refuse_compiled,
)
from megatron_slm.models.student import selected_tokens, weighed_columns, weighted_sum
from megatron_slm.types import Batch, TokenSignals, TokenWeights


class KeyValues:
    """Keys and values of every layer, as attention sees them: `[B, G, T, D]`, without a graph."""

    def __init__(self) -> None:
        self._layers: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def attend(self, call: AttentionCall) -> Attended:
        """The layer's own attention; its keys and values are kept."""
        self._layers[call.module] = (alone(call.key), alone(call.value))
        return call.run()

    def of(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        return self._layers[module]


def alone(tensor: Tensor) -> Tensor:
    """Without a graph, and in memory of its own: a view of queries, keys and values in one would hold all three."""
    tensor = tensor.detach()
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


class Replayed:
    """Attention of selected tokens alone, over the keys and values of all.

    Args:
        known: of the first pass.
        queries: where the selected tokens are.
        packed: their attention.
    """

    def __init__(self, known: KeyValues, queries: PackedQueries, packed: PackedAttention) -> None:
        self._known = known
        self._queries = queries
        self._packed = packed

    def attend(self, call: AttentionCall) -> Attended:
        """Queries `[1, H, R, D]`, keys and values `[1, G, R, D]` of the selected tokens -> `[1, R, H, D]`."""
        known, fresh = self._known.of(call.module), (call.key, call.value)
        key, value = (self._queries.merge(old, new) for old, new in zip(known, fresh, strict=True))
        attended_1HRD = self._packed(self._queries, call.query, key, value, call.scale, call.window)
        return attended_1HRD.transpose(1, 2).contiguous(), None  # as of kernels: some models take a view of it


@dataclass(frozen=True)
class ReplayTape:
    """The batch, and what the first pass left of it if that was kept."""

    batch: Batch
    known: KeyValues | None


class ReplayStudent:
    """See `Student`; the backward runs the selected tokens again, over keys and values that are known.

    Args:
        engine: the module (a `CausalLM` whose attention is open) with its optimizer.
        packed: attention of the selected tokens.
    """

    def __init__(self, engine: TrainingEngine, packed: PackedAttention) -> None:
        refuse_compiled(engine.module)
        self._engine = engine
        self._packed = packed

    def score(self, batch: Batch, want: tuple[str, ...], *, keep: bool) -> tuple[TokenSignals, ReplayTape]:
        signals, known = self._first_pass(batch, want)
        return signals, ReplayTape(batch, known if keep else None)

    def backward(
        self, tape: ReplayTape, weights: TokenWeights, scale: float, *, last: bool, share: float = 1.0
    ) -> dict[str, Tensor]:
        output, weights_1R = self.replay(tape, weights)
        self._engine.backward(weighted_sum(output, weights_1R) * scale, last=last)
        return {}

    def replay(self, tape: ReplayTape, weights: TokenWeights) -> tuple[TokenSignals, TokenWeights]:
        """Run the selected tokens again; where none is selected, one of weight 0, because no rank may skip a forward.

        Returns:
            Columns and weights `[1, R]` of the R tokens.
        """
        batch = tape.batch
        known = tape.known or self._first_pass(batch)[1]
        index_R = selected_tokens(weights).flatten().nonzero().squeeze(-1)
        if len(index_R) == 0:
            index_R = index_R.new_zeros(1)
        queries = PackedQueries(index_R, batch.position_ids_BT)
        columns = (batch.tokens_BT, masked_labels(batch), batch.position_ids_BT)
        tokens_1R, labels_1R, position_ids_1R = (column.flatten()[index_R][None] for column in columns)
        weights_1R = {name: weight_BT.flatten()[index_R][None] for name, weight_BT in weights.items()}
        # A mask that is there already: Hugging Face would make one of R x R for what looks like packed documents.
        brought = {
            "selective": Replayed(known, queries, self._packed),
            "attention_mask": torch.zeros(1, 1, 1, 1, device=index_R.device),
        }
        want = weighed_columns(weights)
        return self._engine.module(tokens_1R, labels_1R, position_ids_1R, want, brought), weights_1R

    @torch.no_grad()
    def _first_pass(self, batch: Batch, want: tuple[str, ...] = ()) -> tuple[TokenSignals, KeyValues]:
        known = KeyValues()
        return score_batch(self._engine.module, batch, want, {"selective": known}), known
