"""Online choice of whole sequences: many candidates are scored cheaply, and each rank trains on the best of its own.

That no rank waits for another's candidates keeps ranks equal under ZeRO-3: each runs as many forwards and
backwards as the others (RHO-LOSS, Mindermann et al. 2022, on sequences).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from megatron_slm.backend import TrainingEngine, Update
from megatron_slm.dist import World, all_reduce_sum, gather_objects
from megatron_slm.errors import AgreedError
from megatron_slm.models.student import ExactStudent, Student, Tape
from megatron_slm.reference.references import NoReference, Reference
from megatron_slm.selection.rule import Rule
from megatron_slm.signals import columns_of, named_signals
from megatron_slm.training.cost import StepTokens
from megatron_slm.training.objective import Objective, competing_tokens
from megatron_slm.training.state import Asked
from megatron_slm.training.statistics import StepStatistics
from megatron_slm.types import Batch, TokenSignals


class Chosen(NamedTuple):
    """What is left of a step's micro-batches, and what the reference says of it."""

    batches: list[Batch]
    reference: list[TokenSignals]


class Candidates:
    """Keeps the best sequences of each micro-batch of this rank, by their mean score over competing tokens.

    Args:
        student: its scores without gradients.
        rule: whose score ranks them.
        micro_batch_size: sequences to keep of each micro-batch.
        seed: of the column `uniform`.
        min_context: see `competing_tokens`.
    """

    def __init__(self, student: Reference, rule: Rule, micro_batch_size: int, seed: int, min_context: int = 0) -> None:
        self._student = student
        self._rule = rule
        self._micro_batch_size = micro_batch_size
        self._seed = seed
        self._min_context = min_context

    def choose(self, batches: list[Batch], reference: Reference) -> Chosen:
        """Score all micro-batches of the step, then keep; every rank calls it with as many.

        Args:
            batches: candidates of this rank, several times the micro-batch size each.
            reference: asked for its signals once.

        Raises:
            AgreedError: a score returned something else than a score for each token.
        """
        columns = reference.signals(batches, columns_of("reference", self._rule.needs))
        scored = self._student.signals(batches, columns_of("student", self._rule.needs))
        rows = [self._best(*of_one) for of_one in zip(batches, scored, columns, strict=True)]
        return Chosen(
            [batch.pick(row_N) for batch, row_N in zip(batches, rows, strict=True)],
            [
                {name: column[row_N] for name, column in of_one.items()}
                for of_one, row_N in zip(columns, rows, strict=True)
            ],
        )

    def _best(self, batch: Batch, student: TokenSignals, reference: TokenSignals) -> Tensor:
        signals = named_signals(batch, student, reference, self._seed)
        try:
            score_B = self._rule.rank_sequences(signals, competing_tokens(batch, self._min_context))
        except ValueError as error:  # a score of the user's, on every rank
            raise AgreedError(str(error)) from error
        return best_rows(score_B, self._micro_batch_size)


def best_rows(score_B: Tensor, count: int) -> Tensor:
    """int64 `[count]`: rows of the highest scores, in their order; ties go to the earlier, and NaN is below all."""
    order_B = score_B.nan_to_num(-torch.inf, torch.inf, -torch.inf).sort(descending=True, stable=True).indices
    order_B = order_B[score_B[order_B].isnan().long().sort(stable=True).indices]
    return order_B[:count].sort().values


@dataclass(frozen=True)
class StepResult:
    """What a step did: over all ranks, but for the sums that are still to be reduced.

    selected_tokens  that were kept
    loss             mean over all valid tokens; NaN where there is none
    asked            of the run, on any rank
    statistics       this rank's sums
    tokens           over all ranks, by what was run for them
    """

    selected_tokens: int
    learning_rate: float
    loss: float
    asked: Asked
    update: Update
    statistics: StepStatistics
    tokens: StepTokens


class TrainingStep:
    """A call is one optimizer step on this rank's micro-batches.

    Args:
        engine: the student's engine.
        reference: where reference signals come from.
        student: the way in which a selective step scores and runs the backward; default: the exact one.
        seed: of the column `uniform`.
        num_sources: entries of the blend.
        world: this process among all.
        candidates: choose what to train on out of larger batches; None: all of it is trained on.
    """

    def __init__(
        self,
        engine: TrainingEngine,
        reference: Reference,
        student: Student[Any] | None = None,
        *,
        seed: int,
        num_sources: int,
        world: World,
        candidates: Candidates | None = None,
    ) -> None:
        self._engine = engine
        self._whole = student if isinstance(student, ExactStudent) else ExactStudent(engine)
        self._selective: Student[Any] = student or self._whole
        self._reference = reference
        self._seed = seed
        self._num_sources = num_sources
        self._world = world
        self._candidates = candidates

    def __call__(
        self,
        batches: list[Batch],
        objective: Objective,
        learning_rate: float,
        step: int,
        take_asked: Callable[[], Asked] = Asked,
    ) -> StepResult:
        """Run the step on this rank's micro-batches; every rank calls it with as many.

        Args:
            batches: of this rank; candidates, if any are chosen from.
            objective: which tokens count in this step; the same on all ranks.
            learning_rate: of the update.
            step: number of the step, for the error.
            take_asked: what was asked of the run on this rank; the result says what was asked on any.

        Raises:
            AgreedError: a loss is not finite; the weights are as they were before the step.
        """
        self._engine.module.train()
        dealt, (batches, columns) = batches, self._taken(batches, objective)
        pools = [batches] if objective.pools_whole_step else [[batch] for batch in batches]
        joined = [Batch.concatenate(pool) if len(pool) > 1 else pool[0] for pool in pools]
        planned = int(objective.plan(joined).sum())
        # DeepSpeed and the plain backend average gradients over the ranks; one over the global
        # count times the number of ranks makes that the sum over all ranks divided once.
        scale = self._world.size / max(planned, 1)
        student = self._selective if objective.selects else self._whole
        reference = iter(columns)
        statistics = StepStatistics(self._num_sources, self._world.device)
        suspects: list[tuple[Tensor, Tensor]] = []
        for index, (pool, whole) in enumerate(zip(pools, joined, strict=True)):
            known = [next(reference) for _ in pool]
            signals, tapes = self._score(student, pool, known, columns_of("student", objective.needs))
            choice = objective.choose(whole, signals)
            statistics.add(whole, signals, choice)
            suspects.append((whole.sample_index_B, _not_finite(whole, signals)))
            last_pool = index == len(pools) - 1
            for router in _backward(student, tapes, choice.weights_BT, scale, 1 / len(batches), last_pool=last_pool):
                statistics.add_router(router)
            del tapes  # keys and values of replay, which the next pool and the update have no room for
        loss, selected, asked = self._agree(suspects, statistics, take_asked(), step)
        tokens = self._count(dealt, batches, selected, objective)
        return StepResult(selected, learning_rate, loss, asked, self._engine.step(learning_rate), statistics, tokens)

    def _taken(self, batches: list[Batch], objective: Objective) -> Chosen:
        """What is trained on, and what the reference says of it."""
        source = self._reference if objective.selects else NoReference()
        if self._candidates is not None:
            return self._candidates.choose(batches, source)
        return Chosen(batches, source.signals(batches, columns_of("reference", objective.needs)))

    def _count(self, dealt: list[Batch], trained: list[Batch], selected: int, objective: Objective) -> StepTokens:
        """Every rank has as many samples."""
        read, kept = (self._world.size * sum(batch.tokens_BT.numel() for batch in part) for part in (dealt, trained))
        return StepTokens(
            candidates=read if self._candidates else 0,
            trained=kept,
            selected=selected if objective.selects else None,
            reference=read if objective.selects else 0,
            ranked_first=objective.pools_whole_step and len(trained) > 1,
        )

    def _score(
        self, student: Student[Any], pool: list[Batch], reference: list[TokenSignals], want: tuple[str, ...]
    ) -> tuple[TokenSignals, list[Tape]]:
        """All signals of a pool. The forward is kept where the pool is one micro-batch, else it is run again."""
        parts: list[TokenSignals] = []
        tapes: list[Tape] = []
        for batch, columns in zip(pool, reference, strict=True):
            scored, tape = student.score(batch, want, keep=len(pool) == 1)
            tapes.append(tape)
            parts.append(named_signals(batch, scored, columns, self._seed))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, tapes

    def _agree(
        self, suspects: list[tuple[Tensor, Tensor]], statistics: StepStatistics, asked: Asked, step: int
    ) -> tuple[float, int, Asked]:
        """One small all-reduce: loss and kept tokens of all ranks, what was asked of any, a loss that is not finite.

        Before the update, so that a bad loss never reaches the weights of one rank.
        """
        samples_B, bad_B = (torch.cat(parts) for parts in zip(*suspects, strict=True))
        own = torch.tensor([asked.save, asked.stop], dtype=torch.float64, device=bad_B.device)
        sums = all_reduce_sum(torch.cat([bad_B.sum()[None], statistics.loss_and_counts(), own]))
        bad, loss, valid, selected, save, stop = sums.tolist()
        if bad:
            self._refuse(samples_B[bad_B], step)
        return loss / valid if valid else math.nan, int(selected), Asked(save > 0, stop > 0)

    def _refuse(self, samples_B: Tensor, step: int) -> NoReturn:
        found = gather_objects(samples_B.tolist())
        where = "; ".join(f"rank {rank}, samples {samples}" for rank, samples in enumerate(found) if samples)
        raise AgreedError(
            f"A loss of the student or the reference is not finite at step {step} on {where}. The weights were not "
            "updated and the last checkpoint is untouched: look at these samples, or export the checkpoint and go on "
            "in another run_dir with a lower training.lr."
        )


def _backward(
    student: Student[Any], tapes: list[Tape], weights_BT: Tensor, scale: float, share: float, *, last_pool: bool
) -> list[Tensor]:
    """Run the backward of a pool; return the student's own losses, one per micro-batch, if it has any."""
    sizes = [len(tape.batch.tokens_BT) for tape in tapes]
    own = []
    for index, (tape, part_BT) in enumerate(zip(tapes, weights_BT.split(sizes), strict=True)):
        last = last_pool and index == len(tapes) - 1
        own.append(student.backward(tape, part_BT, scale, last=last, share=share))
    return [loss for loss in own if loss is not None]


def _not_finite(pool: Batch, signals: TokenSignals) -> Tensor:
    """bool `[B]`: sequences with a loss, of either model, that is infinite or NaN."""
    losses = [column for name, column in signals.items() if name.endswith(".loss")]
    finite_BT = torch.stack([loss_BT.isfinite() for loss_BT in losses]).all(0)
    return (pool.valid_BT & ~finite_BT).any(-1)
