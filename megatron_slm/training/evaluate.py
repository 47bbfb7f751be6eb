"""Held-out loss of whole corpora, the same at any number of ranks."""

import math

import torch
from torch import nn

from megatron_slm.data.stream import EvaluationStream
from megatron_slm.dist import World, all_reduce_sum
from megatron_slm.models.causal_lm import score_batch


class Evaluator:
    """Runs the student over every evaluation set.

    Args:
        module: the student, as its engine runs it.
        streams: evaluation sets by name.
        micro_batch_size: windows at a time; on all ranks the same shape, so that the numbers are too.
        world: this process among all.
    """

    def __init__(
        self, module: nn.Module, streams: dict[str, EvaluationStream], micro_batch_size: int, world: World
    ) -> None:
        self._module = module
        self._streams = streams
        self._micro_batch_size = micro_batch_size
        self._world = world

    def evaluate(self) -> dict[str, float | int | None]:
        """`eval/NAME/loss` in nats a scored token and `eval/NAME/bits_per_byte`; every rank calls it."""
        record: dict[str, float | int | None] = {}
        self._module.eval()
        for name, stream in self._streams.items():
            loss, count = self._sums(stream)
            record[f"eval/{name}/loss"] = loss / count if count else None
            record[f"eval/{name}/bits_per_byte"] = loss / math.log(2) / stream.num_bytes
        self._module.train()
        return record

    @torch.no_grad()
    def _sums(self, stream: EvaluationStream) -> tuple[float, float]:
        """Summed loss and scored tokens over all ranks. Window w belongs to batch w // b, batch i to rank i mod W."""
        b, world = self._micro_batch_size, self._world
        rounds = math.ceil(len(stream) / (b * world.size))
        sums = torch.zeros(2, dtype=torch.float64, device=world.device)
        for turn in range(rounds):
            first = (turn * world.size + world.rank) * b
            batch = stream.batch(list(range(first, first + b))).to(world.device)
            loss_BT = score_batch(self._module, batch)["loss"]
            sums += torch.stack([loss_BT[batch.valid_BT].sum(dtype=torch.float64), batch.valid_BT.sum().double()])
        loss, count = all_reduce_sum(sums).tolist()
        return loss, count
