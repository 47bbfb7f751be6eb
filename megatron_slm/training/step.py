"""The optimizer step of Selective Language Modeling (Rho-1, section 2.2)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_slm.backend import TrainingEngine, Update
from megatron_slm.dist import World, gather_objects
from megatron_slm.errors import AgreedError
from megatron_slm.liveness.activity import Activity, Phase
from megatron_slm.models.student import ExactStudent, Student, Tape
from megatron_slm.reference.references import NoReference, Reference
from megatron_slm.signals import columns_of, named_signals
from megatron_slm.training.candidates import Candidates, MicroBatch
from megatron_slm.training.cost import StepTokens
from megatron_slm.training.objective import Objective
from megatron_slm.training.state import Requested
from megatron_slm.training.statistics import StepStatistics
from megatron_slm.types import Batch, TokenSignals, TokenWeights


@dataclass(frozen=True)
class StepResult:
    """The outcome of a step, over all ranks.

    selected_tokens  number of selected tokens
    loss             mean student loss over all valid tokens, in nats; NaN if no token is valid
    requested        requests to save or stop, from any rank
    statistics       the step's sums, reduced; its tokens are those of this rank
    tokens           the step's tokens, for the count of FLOPs
    """

    selected_tokens: int
    learning_rate: float
    loss: float
    requested: Requested
    update: Update
    statistics: StepStatistics
    tokens: StepTokens


class Pool:
    """This rank's part of the tokens that are ranked together: one micro-batch, or the whole step."""

    def __init__(self, micro_batches: list[MicroBatch]) -> None:
        self.micro_batches = micro_batches
        self.batch = Batch.concatenate([micro_batch.batch for micro_batch in micro_batches])


class TrainingStep:
    """One optimizer step per call, on this rank's micro-batches.

    Args:
        engine: the student's engine.
        reference: the source of reference signals.
        student: how a selective step scores and runs the backward; default: `ExactStudent`.
        seed: the run's, for the signal `uniform`.
        num_sources: number of entries in the blend.
        world: the place of this process among all ranks.
        candidates: chooses the samples to train on from larger batches; None to train on all samples.
        activity: receives the phases of this rank.
    """

    def __init__(
        self,
        engine: TrainingEngine,
        reference: Reference,
        student: Student | None = None,
        *,
        seed: int,
        num_sources: int,
        world: World,
        candidates: Candidates | None = None,
        activity: Activity | None = None,
    ) -> None:
        self._engine = engine
        self._exact = student if isinstance(student, ExactStudent) else ExactStudent(engine)
        self._selective: Student = student or self._exact
        self._reference = reference
        self._seed = seed
        self._num_sources = num_sources
        self._world = world
        self._candidates = candidates
        self._enter = (activity or Activity()).enter

    def __call__(
        self,
        batches: list[Batch],
        objective: Objective,
        learning_rate: float,
        step: int,
        collect_requests: Callable[[], Requested] = Requested,
    ) -> StepResult:
        """Run one optimizer step; every rank passes the same number of micro-batches.

        Args:
            batches: micro-batches of this rank; with `candidates`, they hold several candidates per sample to train on.
            objective: decides which tokens count toward the loss; the same on all ranks.
            learning_rate: learning rate of the update.
            step: number of the step, for error messages.
            collect_requests: returns the requests of this rank; the result holds those of all ranks.

        Raises:
            AgreedError: a loss on any rank is not finite. The weights have not been updated.
        """
        self._engine.module.train()
        micro_batches = self._prepare(batches, objective)
        if objective.pools_whole_step:
            pools = [Pool(micro_batches)]
        else:
            pools = [Pool([micro_batch]) for micro_batch in micro_batches]

        self._enter(Phase.SELECTION)
        # K is the divisor N * k% of equation 5, over all ranks and micro-batches. It depends on the labels alone, so
        # each backward can run as soon as its pool is selected.
        K = int(objective.plan([pool.batch for pool in pools]).sum())
        # The engine averages gradients over the data-parallel ranks. Multiplying by their number makes this a sum over
        # all ranks, divided once by K. A mean per rank would give too much weight to ranks with few selected tokens.
        scale = self._world.data.size / max(K, 1)
        share = 1 / len(micro_batches)

        student = self._selective if objective.selects else self._exact
        statistics = StepStatistics(self._num_sources, self._world)
        for pool in pools:
            # L_theta, and L_RM where the objective needs it (equations 1 and 3).
            signals, tapes = self._score(student, pool, columns_of("student", objective.needs))
            # I_k%, the indicator of equation 4. It is a constant: the signals are detached, so no gradient flows
            # through the selection.
            self._enter(Phase.SELECTION)
            choice = objective.choose(pool.batch, signals)
            statistics.add(pool.batch, signals, choice)
            # A rank without a selected token runs the backward too: under ZeRO-3, every backward needs all ranks.
            self._enter(Phase.BACKWARD)
            terms = _backward(student, tapes, choice.weights, scale, share, last_pool=pool is pools[-1])
            statistics.add_terms(terms)
            # Free the graph, or the keys and values of replay, before the next pool or the update needs the memory.
            del tapes

        # Before the update, so that a loss that is not finite never reaches the weights of any rank.
        self._enter(Phase.OPTIMIZER)
        requested = self._agree(statistics, collect_requests(), step)
        update = self._engine.step(learning_rate)
        loss, selected = statistics.mean_loss, int(statistics.sums["selected"])
        tokens = self._count(batches, micro_batches, selected, objective)
        return StepResult(selected, learning_rate, loss, requested, update, statistics, tokens)

    def _prepare(self, batches: list[Batch], objective: Objective) -> list[MicroBatch]:
        """Return the micro-batches to train on, with the reference's columns."""
        if objective.selects:
            self._enter(Phase.REFERENCE_FORWARD)
        reference = self._reference if objective.selects else NoReference()
        if self._candidates is not None:
            return self._candidates.choose(batches, reference)
        columns = reference.signals(batches, columns_of("reference", objective.needs))
        return [MicroBatch(batch, of_batch) for batch, of_batch in zip(batches, columns, strict=True)]

    def _score(self, student: Student, pool: Pool, want: tuple[str, ...]) -> tuple[TokenSignals, list[Tape]]:
        """Return all signals of a pool, and a tape for each of its micro-batches.

        A pool of one micro-batch keeps its forward for the backward. The graphs of a whole step would not fit in
        memory, so the backward of a larger pool runs each forward again.
        """
        parts: list[TokenSignals] = []
        tapes: list[Tape] = []
        for micro_batch in pool.micro_batches:
            self._enter(Phase.STUDENT_FORWARD)
            columns, tape = student.score(micro_batch.batch, want, keep=len(pool.micro_batches) == 1)
            parts.append(named_signals(micro_batch.batch, columns, micro_batch.reference, self._seed))
            tapes.append(tape)
        signals = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return signals, tapes

    def _agree(self, statistics: StepStatistics, requested: Requested, step: int) -> Requested:
        """Reduce the statistics and the requests over all ranks, by one small all-reduce.

        Raises:
            AgreedError: a loss on any rank is not finite.
        """
        save, stop = statistics.reduce(requested.save, requested.stop)
        if statistics.sums["not_finite"]:
            bad_samples = gather_objects(statistics.bad_samples())
            where = "; ".join(f"rank {rank}, samples {found}" for rank, found in enumerate(bad_samples) if found)
            raise AgreedError(
                "loss",
                "not finite",
                f"step {step} needs finite losses of the student and the reference ({where}). The weights were not "
                "updated and the last checkpoint is untouched",
                "Inspect these samples, or export the checkpoint and continue in another run_dir with a lower "
                "training.lr",
            )
        return Requested(save > 0, stop > 0)

    def _count(self, read: list[Batch], trained: list[MicroBatch], selected: int, objective: Objective) -> StepTokens:
        """Return the step's tokens over all ranks; each data-parallel rank has the same number of samples."""
        num_read = self._world.data.size * sum(batch.tokens_BT.numel() for batch in read)
        num_trained = self._world.data.size * sum(micro_batch.batch.tokens_BT.numel() for micro_batch in trained)
        return StepTokens(
            candidates=num_read if self._candidates else 0,
            trained=num_trained,
            selected=selected if objective.selects else None,
            reference=num_read if objective.selects else 0,
            ranked_first=objective.pools_whole_step and len(trained) > 1,
        )


def _backward(
    student: Student, tapes: list[Tape], weights: TokenWeights, scale: float, share: float, *, last_pool: bool
) -> list[dict[str, Tensor]]:
    """Run the backward of each micro-batch of a pool, and return the student's own terms for each.

    Each backward adds its part of the gradient of equation 5: `scale` times the sum of weight times loss.
    """
    terms = []
    start = 0
    for tape in tapes:
        stop = start + len(tape.batch.tokens_BT)
        own_weights = {name: weight_BT[start:stop] for name, weight_BT in weights.items()}
        last = last_pool and tape is tapes[-1]
        terms.append(student.backward(tape, own_weights, scale, last=last, share=share))
        start = stop
    return terms
