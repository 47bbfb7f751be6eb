"""Recording of the losses of observed tokens: at a step of a run, or for any model."""

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from megatron_slm.data.observed import ObservedFolder, ObservedTokens
from megatron_slm.dist import World, gather_objects
from megatron_slm.liveness.activity import Activity, Phase
from megatron_slm.models.causal_lm import score_batch
from megatron_slm.models.checks import evaluating
from megatron_slm.reference.references import Reference
from megatron_slm.signals import columns_of, named_signals
from megatron_slm.training.objective import Objective
from megatron_slm.training.state import RunState
from megatron_slm.training.step import StepResult
from megatron_slm.training.trainer import Callback
from megatron_slm.types import Batch, TokenSignals

if TYPE_CHECKING:
    from numpy.typing import NDArray


class TokenScorer:
    """Scores observed tokens, and selects from all of them as from one pool; every rank calls every method.

    Window w belongs to batch w // b, and batch i to data-parallel rank i mod W, so the losses are those of one rank.

    Args:
        tokens: the observed tokens.
        micro_batch_size: windows per forward, b.
        seed: the run's, for the signal `uniform`.
        world: the place of this process among all ranks.
    """

    def __init__(self, tokens: ObservedTokens, micro_batch_size: int, seed: int, world: World) -> None:
        b, data = micro_batch_size, world.data
        self._seed = seed
        self._world = world
        self._num_windows = len(tokens)
        # Windows past the end are padding, so that all ranks run the same number of forwards.
        rounds = math.ceil(len(tokens) / (b * data.size))
        firsts = [(turn * data.size + data.rank) * b for turn in range(rounds)]
        self._batches = [tokens.batch(range(first, first + b)) for first in firsts]

    @torch.no_grad()
    def student(self, module: nn.Module, want: tuple[str, ...]) -> list[TokenSignals]:
        """Return the columns `loss` and `want` of the student for each batch of this rank."""
        with evaluating(module):
            return [score_batch(module, batch.to(self._world.device), want) for batch in self._batches]

    def reference(self, reference: Reference, want: tuple[str, ...]) -> list[TokenSignals]:
        """Return the columns `loss` and `want` of a live reference for each batch of this rank."""
        return reference.signals([batch.to(self._world.device) for batch in self._batches], want)

    def select(self, objective: Objective, student: list[TokenSignals], reference: list[TokenSignals]) -> Tensor:
        """Return the mask of the tokens of this rank that the objective of a run selects, bool `[B, T]`."""
        batches = [batch.to(self._world.device) for batch in self._batches]
        parts = [
            named_signals(batch, own, of_reference, self._seed)
            for batch, own, of_reference in zip(batches, student, reference, strict=True)
        ]
        signals = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return objective.choose(Batch.concatenate(batches), signals).mask_BT

    def gather(self, column_BT: Tensor) -> "NDArray[Any]":
        """Return a column of this rank's windows for all observed tokens, in their order: `[N]`."""
        whole = Batch.concatenate(self._batches)
        own_BT, valid_BT = column_BT.cpu().numpy(), whole.valid_BT.numpy()
        rows = {
            ordinal: own_BT[row, valid_BT[row]]
            for row, ordinal in enumerate(whole.sample_index_B.tolist())
            if ordinal < self._num_windows
        }
        # Replicas of a data-parallel rank hold the same windows.
        merged = {ordinal: row for of_rank in gather_objects(rows) for ordinal, row in of_rank.items()}
        return np.concatenate([merged[ordinal] for ordinal in range(self._num_windows)])


class Recorder:
    """Records the losses of observed tokens, and their selection, in a folder; every rank calls every method.

    Args:
        scorer: scores the tokens.
        folder: the folder to write; only rank 0 writes.
        reference: the reference of the run; None if it has none that runs here.
        reference_facts: its path and fingerprint.
        want: its columns that the selection needs besides `loss`.
        world: the place of this process among all ranks.
    """

    def __init__(
        self,
        scorer: TokenScorer,
        folder: ObservedFolder,
        reference: Reference | None,
        reference_facts: dict[str, Any],
        want: tuple[str, ...],
        world: World,
    ) -> None:
        self._scorer = scorer
        self._folder = folder
        self._reference = reference
        self._reference_facts = reference_facts
        self._want = want
        self._world = world
        self._signals: list[TokenSignals] | None = None

    def record_reference(self) -> None:
        """Record the reference, if the run has one and this object has not recorded it; every rank calls it."""
        if self._reference is None or self._signals is not None:
            return
        self._signals = self._scorer.reference(self._reference, self._want)
        reference_N = self._gather_loss(self._signals)
        if self._world.is_main:
            self._folder.write_reference(reference_N, self._reference_facts)

    def record(self, module: nn.Module, step: int, objective: Objective, selection: dict[str, Any]) -> None:
        """Record the student `module` after a step, and the reference if it is not recorded yet.

        Args:
            module: the student.
            step: number of its updates so far.
            objective: the objective of the next step, which selects.
            selection: facts of the selection, for the metadata.

        Raises:
            OSError: rank 0 cannot write.
        """
        student = self._scorer.student(module, columns_of("student", objective.needs))
        selected_N = None
        self.record_reference()
        needs_reference = any(name.startswith("reference.") for name in objective.needs)
        if objective.selects and (self._signals is not None or not needs_reference):
            reference = self._signals or [{} for _ in student]
            selected_N = self._scorer.gather(self._scorer.select(objective, student, reference))
        loss_N = self._gather_loss(student)
        if self._world.is_main:
            self._folder.write_step(step, loss_N, selected_N, selection if selected_N is not None else {})

    def _gather_loss(self, signals: list[TokenSignals]) -> "NDArray[np.float32]":
        return self._scorer.gather(torch.cat([of_batch["loss"] for of_batch in signals]))


class Observer(Callback):
    """Records the observed tokens before the first step, every `interval` steps, and after the last one.

    Args:
        recorder: records them.
        module: the student, as its engine runs it.
        interval: steps between recordings.
        objective: returns the objective of the step that begins after a number of trained tokens.
        selection: returns the facts of its selection.
        activity: receives the phase of this rank.
    """

    def __init__(
        self,
        recorder: Recorder,
        module: nn.Module,
        interval: int,
        objective: Callable[[int], Objective],
        selection: Callable[[int], dict[str, Any]],
        activity: Activity,
    ) -> None:
        self._recorder = recorder
        self._module = module
        self._interval = interval
        self._objective = objective
        self._selection = selection
        self._activity = activity

    def on_train_start(self, state: RunState) -> None:
        if state.step == 0:
            self._record(state)

    def on_step_end(self, state: RunState, result: StepResult) -> None:
        if state.is_due(self._interval):
            self._record(state)

    def _record(self, state: RunState) -> None:
        self._activity.enter(Phase.EVALUATION)
        trained = state.trained_tokens
        try:
            self._recorder.record(self._module, state.step, self._objective(trained), self._selection(trained))
        except OSError as error:
            # Only rank 0 writes, and it has taken part in all collectives by then.
            logging.getLogger(__name__).warning(
                "the observed tokens of step %d are not recorded: %s", state.step, error
            )
        self._activity.enter(Phase.CALLBACKS)
