"""The rehearsal of a run: real optimizer steps of one rank, among ranks that do not exist.

The models, the reference, the selection, the backward and the update are those of `train`. Faked are the other ranks
(torch_internals.join_fake_group), the weights, which are random, and inputs that do not exist yet. Nothing is written.
"""

import dataclasses
from dataclasses import dataclass

import psutil
import torch

from megatron_slm.backend import Backend
from megatron_slm.build.models import make_backend
from megatron_slm.build.objective import objective_at
from megatron_slm.build.outline import Outline
from megatron_slm.build.plan import learning_rate_at
from megatron_slm.build.run import StepParts, build_step
from megatron_slm.data.loader import EvaluationStream, accumulation_steps
from megatron_slm.dist import World
from megatron_slm.errors import UserError, first_line
from megatron_slm.liveness.activity import Activity, Phase
from megatron_slm.planning.measure import PhaseCost, PhaseRecorder, return_freed_memory
from megatron_slm.types import Batch, TokenSignals

STEP = "step: "
"""Beginning of the names of the phases of the second step."""
STEP_PHASES = {
    Phase.REFERENCE_FORWARD: "reference",
    Phase.SELECTION: "forward, selection",
    Phase.STUDENT_FORWARD: "forward, selection",
    Phase.BACKWARD: "backward",
    Phase.OPTIMIZER: "update",
}
"""The names of the phases that a step reports."""


@dataclass(frozen=True)
class Rehearsal:
    """The outcome of a rehearsal.

    Attributes:
        ranks: number of ranks, of which one existed.
        device: type of the device.
        phases: duration and peak memory, by name.
        libraries: bytes in use before the first phase.
        micro_steps: micro-batches of the step.
        loss: mean loss of the student in nats; its weights are random.
        selected: tokens that this rank selected.
        applied: True if the optimizer updated the weights.
        faked: a sentence for each thing that was not real.
    """

    ranks: int
    device: str
    phases: dict[str, PhaseCost]
    libraries: int
    micro_steps: int
    loss: float
    selected: int
    applied: bool
    faked: list[str]

    @property
    def peak_of_step(self) -> int:
        """The peak memory of the second step in bytes, with the libraries."""
        return max(phase.peak for name, phase in self.phases.items() if name.startswith(STEP))

    @property
    def seconds_of_step(self) -> float:
        """The duration of the second step."""
        return sum(phase.seconds for name, phase in self.phases.items() if name.startswith(STEP))


class StepActivity(Activity):
    """The activity of the rehearsed rank, whose reports begin the phases of a recorder.

    Attributes:
        is_recorded: True for the step whose phases count.
    """

    def __init__(self, recorder: PhaseRecorder) -> None:
        super().__init__()
        self._recorder = recorder
        self.is_recorded = False

    def enter(self, phase: Phase) -> None:
        super().enter(phase)
        if self.is_recorded:
            self._recorder.begin(f"{STEP}{STEP_PHASES[phase]}")


class RandomReference:
    """A stand-in for a store that does not exist yet: random losses; see `Reference`."""

    def signals(self, batches: list[Batch], want: tuple[str, ...]) -> list[TokenSignals]:
        return [
            {name: torch.rand(batch.tokens_BT.shape, device=batch.tokens_BT.device) for name in ("loss", *want)}
            for batch in batches
        ]


def rehearse(outline: Outline, world: World, *, returns_memory: bool = True) -> Rehearsal:
    """Build the models of a run, and run two optimizer steps of this rank that select tokens.

    Args:
        outline: of the run.
        world: from `connect_fake`, or the only rank of its group.
        returns_memory: on a CPU, return freed memory to the system at once. This makes the peak that of the memory in
            use, and the step slower.

    Raises:
        UserError: a model cannot be built, does not support the settings of the run, or does not fit on a GPU.
    """
    if world.device.type == "cpu" and returns_memory:
        return_freed_memory()
    config, plan = outline.config, outline.plan
    with PhaseRecorder(world.device) as recorder:
        recorder.begin("libraries")
        activity = StepActivity(recorder)
        backend = make_backend(config, world)
        try:
            built = _build(outline, backend, world, recorder, activity)
            batches = _batches(outline, world)
            # The last step, because the first ones may train on all tokens (selection.start).
            tokens = plan.total_tokens - plan.tokens_per_step
            objective = objective_at(config, plan, outline.rule, outline.min_context, world, tokens)
            rate = learning_rate_at(config.training, plan, tokens)
            # DeepSpeed records the order of the modules in the first step, and gathers ahead and keeps weights from the
            # second step on. Memory and time are those of the second.
            recorder.begin("first step")
            built.step(batches, objective, rate, plan.total_steps)
            activity.is_recorded = True
            result = built.step(batches, objective, rate, plan.total_steps)
            recorder.begin("end")
        except torch.OutOfMemoryError as error:
            reason = (
                f"rank 0 of {world.size} has too little memory in the phase '{recorder.name}' ({first_line(error)})"
            )
            remedy = "Use more ranks, a smaller micro-batch, activation checkpointing, or offload"
            raise UserError("training.micro_batch_size", config.training.micro_batch_size, reason, remedy) from error
        finally:
            backend.close()
    return Rehearsal(
        ranks=world.size,
        device=world.device.type,
        phases={name: phase for name, phase in recorder.phases.items() if name not in ("libraries", "end")},
        libraries=recorder.phases["libraries"].peak,
        micro_steps=len(batches),
        loss=result.loss,
        selected=result.selected_tokens,
        applied=result.update.applied,
        faked=_faked(outline),
    )


def refuse_too_little_memory(expected: int, world: World) -> None:
    """Raise a UserError if a rehearsal on this CPU would need more memory than is free: the system might kill others.

    Args:
        expected: peak of the rank, in bytes.
        world: from `connect_fake`.
    """
    free = psutil.virtual_memory().available
    if world.device.type == "cpu" and expected > free:
        reason = f"one of them needs about {expected / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free here"
        remedy = "Use more ranks, lower deepspeed.zero_optimization.stage3_max_live_parameters, or another machine"
        raise UserError("--ranks", world.size, reason, remedy)


def _build(outline: Outline, backend: Backend, world: World, recorder: PhaseRecorder, activity: Activity) -> StepParts:
    references = [dataclasses.replace(one, is_loaded=False) for one in outline.references]
    references = [
        dataclasses.replace(one, signals=RandomReference()) if one.model is None and one.signals is None else one
        for one in references
    ]
    return build_step(
        outline.config,
        outline.rule,
        outline.student,
        references,
        outline.min_context,
        backend,
        world,
        weights=False,
        activity=activity,
        begin=lambda part: recorder.begin(f"build: {part}"),
    )


def _batches(outline: Outline, world: World) -> list[Batch]:
    """Return the micro-batches of one step: the first windows of the first corpus, or random tokens."""
    config, training = outline.config, outline.config.training
    micro_steps = accumulation_steps(training.global_batch_size, training.micro_batch_size, world.data.size)
    samples = outline.plan.candidates * training.micro_batch_size
    if outline.corpora is None:
        made = [_random_batch(outline, index * samples, samples) for index in range(micro_steps)]
    else:
        corpora, data = outline.corpora, config.data
        stream = EvaluationStream(
            corpora.train[0], data.seq_length, corpora.tokenizer.eos_token_id, data.reset_attention
        )
        starts = range(0, micro_steps * samples, samples)
        made = [stream.batch([n % len(stream) for n in range(start, start + samples)]) for start in starts]
    return [batch.to(world.device) for batch in made]


def _random_batch(outline: Outline, first: int, samples: int) -> Batch:
    length = outline.config.data.seq_length
    text_BS = torch.randint(outline.student.vocab_size, (samples, length + 1))
    index_B = torch.arange(first, first + samples)
    position_BT = torch.arange(length).expand(samples, -1)
    return Batch(
        tokens_BT=text_BS[:, :-1],
        labels_BT=text_BS[:, 1:],
        valid_BT=torch.ones(samples, length, dtype=torch.bool),
        position_ids_BT=position_BT,
        sample_index_B=index_B,
        source_B=torch.zeros(samples, dtype=torch.long),
        label_offset_BT=index_B[:, None] * length + position_BT,
        continued_B=torch.zeros(samples, dtype=torch.long),
    )


def _faked(outline: Outline) -> list[str]:
    """Return a sentence for each thing that is not real in the rehearsal of this run."""
    tokens = "random" if outline.corpora is None else "the beginning of the first corpus"
    stored = any(one.model is None and one.signals is None for one in outline.references)
    return [
        "Collectives return at once, with this rank's values in place of those of the other ranks.",
        "The weights are random: no file of a model is read.",
        f"The tokens are {tokens}, and no index of samples is built.",
        *(["The losses of the store are random."] if stored else []),
        "There is no evaluation and no checkpoint.",
    ]
