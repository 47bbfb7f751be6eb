"""Held-out loss of whole corpora, the same at any number of ranks."""

import logging
import math

import torch
from torch import nn

from megatron_slm.data.loader import EvaluationStream
from megatron_slm.dist import World, all_reduce_sum
from megatron_slm.models.causal_lm import score_batch
from megatron_slm.training.state import RunState
from megatron_slm.training.step import StepResult
from megatron_slm.training.trainer import Callback


class Evaluator:
    """Runs a model over every evaluation set.

    Args:
        module: the student, or the reference, as its engine runs it.
        streams: evaluation sets by name.
        micro_batch_size: windows at a time; on all ranks the same shape, so that the numbers are too.
        world: this process among all.
        limit: windows of each set, from its beginning, over all ranks; None for all of them.
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
        """`eval/NAME/loss` in nats a scored token and `eval/NAME/bits_per_byte`; every rank calls it."""
        record: dict[str, float | int | None] = {}
        for name, (loss, count) in self._all_sums().items():
            record[f"eval/{name}/loss"] = loss / count if count else None
            record[f"eval/{name}/bits_per_byte"] = loss / math.log(2) / self._streams[name].num_bytes
        return record

    def losses(self) -> dict[str, float]:
        """Loss by set, in nats a scored token; without the sets in which nothing is scored. Every rank calls it."""
        return {name: loss / count for name, (loss, count) in self._all_sums().items() if count}

    def _all_sums(self) -> dict[str, tuple[float, float]]:
        was_training = self._module.training
        self._module.eval()
        sums = {name: self._sums(stream) for name, stream in self._streams.items()}
        self._module.train(was_training)
        return sums

    @torch.no_grad()
    def _sums(self, stream: EvaluationStream) -> tuple[float, float]:
        """Summed loss and scored tokens over all ranks. Window w belongs to batch w // b, batch i to rank i mod W."""
        b, world = self._micro_batch_size, self._world
        windows = min(len(stream), self._limit or len(stream))
        rounds = math.ceil(windows / (b * world.size))
        sums = torch.zeros(2, dtype=torch.float64, device=world.device)
        for turn in range(rounds):
            first = (turn * world.size + world.rank) * b
            # One beyond the limit is as one beyond the end: padding, so that all ranks run equally often.
            mine = [window if window < windows else len(stream) for window in range(first, first + b)]
            batch = stream.batch(mine).to(world.device)
            loss_BT = score_batch(self._module, batch)["loss"]
            sums += torch.stack([loss_BT[batch.valid_BT].sum(dtype=torch.float64), batch.valid_BT.sum().double()])
        loss, count = all_reduce_sum(sums).tolist()
        return loss, count


class Evaluation(Callback):
    """Runs every evaluation set every `eval_interval` steps and after the last one."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator

    def on_step_end(self, state: RunState, result: StepResult) -> None:
        if state.is_evaluated and state.record is not None:
            state.record |= self._evaluator.evaluate()


class ReferenceCheck(Callback):
    """Compares the reference with the student before the first step of a fresh run. It warns, and changes nothing.

    Args:
        student, reference: evaluators over the beginning of the same sets.
        path: of the reference, for the warning.
    """

    def __init__(self, student: Evaluator, reference: Evaluator, path: str) -> None:
        self._student = student
        self._reference = reference
        self._path = path

    def on_train_start(self, state: RunState) -> None:
        if state.step > 0:
            return
        log = logging.getLogger(__name__)
        students, references = self._student.losses(), self._reference.losses()
        for name, reference in references.items():
            log.info(
                "reference check: %s: loss of the reference %.4f, of the student %.4f", name, reference, students[name]
            )
        if references and not any(reference < students[name] for name, reference in references.items()):
            log.warning(
                "The reference is no better than the student on any evaluation set: was %s (reference.path) trained on "
                "the curated text?",
                self._path,
            )
