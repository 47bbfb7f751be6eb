"""Checks before the first step: that the reference is better than the student, and that its store is plausible."""

import gc
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from megatron_slm.dist import World, all_reduce_sum
from megatron_slm.reference.references import Reference
from megatron_slm.signals import columns_of, named_signals
from megatron_slm.training.evaluation import Evaluator
from megatron_slm.training.objective import Choice, SelectiveLanguageModeling
from megatron_slm.training.state import RunState
from megatron_slm.training.trainer import Callback
from megatron_slm.types import Batch, TokenSignals

FIRST_TOKENS = 128
"""Number of tokens at the beginning of a sample to compare; at most a quarter of the sample."""
HIGH_RATE = 0.12
"""Largest excess of the selected share of these tokens over that of all tokens, if a sample begins in mid-document.

With a pretrained model of 135M parameters, the share was 0.13 to 0.16 higher with a document store at `min_context` 0,
up to 0.10 higher at 64, and 0.02 lower with the live reference."""
LOW_AGREEMENT = 0.5
"""Least agreement with the live reference's selection, on a scale from chance (0) to equality (1)."""


class ReferenceCheck(Callback):
    """Compares the reference with the student before the first step of a new run. It only warns.

    Args:
        student, reference: evaluators over the beginning of the same sets.
        path: path of the reference, for the warning.
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
                "The reference is no better than the student on any evaluation set. Check that %s (reference.path) was "
                "trained on the curated text.",
                self._path,
            )


class StoreCheck(Callback):
    """Compares a store with the student, and with the model that wrote it, before the first step of a new run.

    It only warns.

    Args:
        batches: returns this rank's first micro-batches.
        student: scores them with the student, without gradients.
        stored: the run's reference.
        objective: selects tokens for the comparison.
        open_live: yields the model that wrote the store, or None if it is not available. Every rank calls it.
        seed: the run's, for the signal `uniform`.
        world: the place of this process among all ranks.
    """

    def __init__(
        self,
        batches: Callable[[], list[Batch]],
        student: Reference,
        stored: Reference,
        objective: SelectiveLanguageModeling,
        open_live: Callable[[], AbstractContextManager[Reference | None]],
        seed: int,
        world: World,
    ) -> None:
        self._batches = batches
        self._student = student
        self._stored = stored
        self._objective = objective
        self._open_live = open_live
        self._seed = seed
        self._world = world

    def on_train_start(self, state: RunState) -> None:
        if state.step > 0:
            return
        batches = self._batches()
        needs = self._objective.needs
        student = self._student.signals(batches, columns_of("student", needs))
        stored = self._stored.signals(batches, columns_of("reference", needs))
        with self._open_live() as live:
            live_columns = None if live is None else live.signals(batches, columns_of("reference", needs))
        # The model and its hooks refer to each other, so only a garbage collection frees them.
        del live
        gc.collect()
        chosen = self._choose(batches, student, stored)
        sums = _sums(batches, student, stored, chosen)
        if live_columns is not None:
            sums |= _live_sums(batches, live_columns, chosen, self._choose(batches, student, live_columns))
        totals = all_reduce_sum(torch.stack(list(sums.values())), self._world.data.group).tolist()
        report(dict(zip(sums, totals, strict=True)))

    def _choose(self, batches: list[Batch], student: list[TokenSignals], reference: list[TokenSignals]) -> list[Choice]:
        return [
            self._objective.choose(batch, named_signals(batch, own, other, self._seed))
            for batch, own, other in zip(batches, student, reference, strict=True)
        ]


def _sums(
    batches: list[Batch], student: list[TokenSignals], stored: list[TokenSignals], chosen: list[Choice]
) -> dict[str, Tensor]:
    """Return this rank's sums, float64: tokens by kind, and losses."""
    # The first labels of samples that begin in mid-document: those with less context than `length`.
    length = min(FIRST_TOKENS, batches[0].tokens_BT.shape[1] // 4)
    first = [batch.lacks_context_BT(length) for batch in batches]
    parts = {
        "samples": [torch.tensor(float(len(batch.tokens_BT))) for batch in batches],
        "valid": [batch.valid_BT for batch in batches],
        "student": _losses(batches, student),
        "stored": _losses(batches, stored),
        "competing": [choice.competing_BT for choice in chosen],
        "selected": [choice.mask_BT for choice in chosen],
        "competing_first": [choice.competing_BT & first_BT for choice, first_BT in zip(chosen, first, strict=True)],
        "selected_first": [choice.mask_BT & first_BT for choice, first_BT in zip(chosen, first, strict=True)],
    }
    return {name: _total(values) for name, values in parts.items()}


def _live_sums(
    batches: list[Batch], live: list[TokenSignals], chosen: list[Choice], chosen_live: list[Choice]
) -> dict[str, Tensor]:
    both = [one.mask_BT & other.mask_BT for one, other in zip(chosen, chosen_live, strict=True)]
    return {"live": _total(_losses(batches, live)), "both": _total(both)}


def _losses(batches: list[Batch], signals: list[TokenSignals]) -> list[Tensor]:
    return [columns["loss"] * batch.valid_BT for batch, columns in zip(batches, signals, strict=True)]


def _total(values: list[Tensor]) -> Tensor:
    return torch.stack([value.sum(dtype=torch.float64) for value in values]).sum()


def report(sums: dict[str, float]) -> None:
    """Log the comparison of a store, and warn if the store is implausible.

    Args:
        sums: sums over all ranks. `samples`, `valid`, `competing`, `selected`, `competing_first` and `selected_first`
            are counts; `student`, `stored` and `live` are summed losses of valid tokens; `both` counts the tokens that
            the store and the live reference both select.
    """
    log = logging.getLogger(__name__)
    if not sums["selected"]:
        return
    student, stored = sums["student"] / sums["valid"], sums["stored"] / sums["valid"]
    ratio = sums["selected"] / sums["competing"]
    line = (
        f"store check on {sums['samples']:.0f} samples: mean loss {stored:.4f} stored, {student:.4f} of the student; "
        f"selected {ratio:.0%} of the tokens"
    )
    first = ratio
    if sums["competing_first"]:
        first = sums["selected_first"] / sums["competing_first"]
        line += f", and {first:.0%} of the first ones where a sample begins in the middle of a document"
    agreement = sums["both"] / sums["selected"] if "both" in sums else 1.0
    if "live" in sums:
        live = sums["live"] / sums["valid"]
        line += f"; on these samples, the model that wrote the store has {live:.4f}"
        line += f" and selects {agreement:.0%} of the same tokens"
    log.info(line)
    if stored >= student:
        log.warning(
            "The stored losses are no lower than the student's. Check that the reference was trained on curated text."
        )
    if first > ratio + HIGH_RATE:
        log.warning(
            "The store selects the beginnings of samples, where the student lacks the context that the reference had. "
            "Raise selection.min_context, or score the samples of this run with score.kind=packed."
        )
    if agreement < ratio + LOW_AGREEMENT * (1 - ratio):
        log.warning(
            "The store selects other tokens than the model that wrote it selects here. Score the samples of this run "
            "with score.kind=packed, unless the model in that folder has changed since."
        )
