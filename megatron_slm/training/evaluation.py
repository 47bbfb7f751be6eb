"""The held-out loss of whole corpora, the same on any number of ranks."""

import math

import torch
from torch import nn

from megatron_slm.data.loader import EvaluationStream
from megatron_slm.dist import World, all_reduce_sum
from megatron_slm.liveness.activity import Activity, Phase
from megatron_slm.models.causal_lm import score_batch
from megatron_slm.models.checks import evaluating
from megatron_slm.training.state import RunState
from megatron_slm.training.step import StepResult
from megatron_slm.training.trainer import Callback


class Evaluator:
    """Runs a model over all evaluation sets.

    Args:
        module: the student or the reference, as its engine runs it.
        streams: evaluation sets by name.
        micro_batch_size: windows per forward. All forwards have this shape, because the last bits of a matrix product
            depend on it.
        world: the place of this process among all ranks.
        limit: number of windows to run at the beginning of each set, over all ranks; None for all of them.
    """

    def __init__(
        self,
        module: nn.Module,
        streams: dict[str, EvaluationStream],
        micro_batch_size: int,
        world: World,
        limit: int | None = None,
    ) -> None:
        self._module = module
        self._streams = streams
        self._micro_batch_size = micro_batch_size
        self._world = world
        self._limit = limit

    def evaluate(self) -> dict[str, float | int | None]:
        """Return `eval/NAME/loss` in nats per scored token and `eval/NAME/bits_per_byte`; every rank calls it."""
        record: dict[str, float | int | None] = {}
        for name, (loss, count) in self._all_sums().items():
            record[f"eval/{name}/loss"] = loss / count if count else None
            record[f"eval/{name}/bits_per_byte"] = loss / math.log(2) / self._streams[name].num_bytes
        return record

    def losses(self) -> dict[str, float]:
        """Return the loss of each set with scored tokens, in nats per scored token; every rank calls it."""
        return {name: loss / count for name, (loss, count) in self._all_sums().items() if count}

    def _all_sums(self) -> dict[str, tuple[float, float]]:
        with evaluating(self._module):
            return {name: self._sums(stream) for name, stream in self._streams.items()}

    @torch.no_grad()
    def _sums(self, stream: EvaluationStream) -> tuple[float, float]:
        """Return the summed loss and the number of scored tokens over all ranks.

        Window w belongs to batch w // b, and batch i to data-parallel rank i mod W.
        """
        b, data, device = self._micro_batch_size, self._world.data, self._world.device
        windows = min(len(stream), self._limit or len(stream))
        rounds = math.ceil(windows / (b * data.size))
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for turn in range(rounds):
            first = (turn * data.size + data.rank) * b
            # Windows beyond the limit become padding, so that all ranks run the same number of forwards.
            mine = [window if window < windows else len(stream) for window in range(first, first + b)]
            batch = stream.batch(mine).to(device)
            loss_BT = score_batch(self._module, batch)["loss"]
            sums += torch.stack([loss_BT[batch.valid_BT].sum(dtype=torch.float64), batch.valid_BT.sum().double()])
        loss, count = all_reduce_sum(sums, data.group).tolist()
        return loss, count


class Evaluation(Callback):
    """Adds the loss of all evaluation sets, every `eval_interval` steps and after the last one."""

    def __init__(self, evaluator: Evaluator, activity: Activity | None = None) -> None:
        self._evaluator = evaluator
        self._activity = activity or Activity()

    def on_step_end(self, state: RunState, result: StepResult) -> None:
        if state.is_evaluated and state.record is not None:
            self._activity.enter(Phase.EVALUATION)
            state.record |= self._evaluator.evaluate()
            self._activity.enter(Phase.CALLBACKS)
