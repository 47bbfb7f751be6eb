"""A few optimizer steps of a tiny model on any number of ranks, with records of the values that tests compare."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from megatron_slm.backend import Backend, EngineSettings, Update
from megatron_slm.backend.plain import PlainBackend
from megatron_slm.build.models import make_learner
from megatron_slm.data.loader import StepLoader, accumulation_steps
from megatron_slm.data.samples import Sample
from megatron_slm.dist import World, gather_objects
from megatron_slm.models.causal_lm import CausalLM, build_student, initialize_weights
from megatron_slm.models.router import find_router_loss
from megatron_slm.models.settings import ModelSettings
from megatron_slm.reference.references import LiveReference, NoReference
from megatron_slm.selection import Rule, SelectionSettings, score
from megatron_slm.selection.settings import RankedScore
from megatron_slm.training.candidates import Candidates
from megatron_slm.training.cost import StepTokens
from megatron_slm.training.objective import CausalLanguageModeling, Choice, SelectiveLanguageModeling
from megatron_slm.training.optimizer import adamw
from megatron_slm.training.settings import TrainingSettings
from megatron_slm.training.state import Requested
from megatron_slm.training.statistics import StepStatistics
from megatron_slm.training.step import StepResult, TrainingStep
from megatron_slm.types import Batch, TokenSignals

LENGTH, VOCABULARY = 16, 97
REALLY_SHARDED = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
"""Settings under which a tiny model is partitioned; at DeepSpeed's defaults it is not."""


@dataclass(frozen=True)
class Case:
    """A training run.

    stage       stage of ZeRO; None for the plain backend
    initial     weights to begin with; None for random ones
    candidates  None for a run that does not choose among candidates
    """

    steps: int = 1
    micro_batch_size: int = 4
    global_batch_size: int = 8
    objective: str = "slm"
    score: str = "excess"
    ratio: float = 0.6
    scope: str = "global"
    rule: dict[str, Any] = field(default_factory=dict)
    pool: str = "micro_step"
    stage: int | None = 3
    shard: bool = True
    reference_micro_batch_size: int = 3
    precision: torch.dtype = torch.float32
    checkpointing: bool = False
    backward: str = "exact"
    lr: float = 1e-3
    model: dict[str, Any] = field(default_factory=lambda: dict(TINY_LLAMA))  # type: ignore[has-type]
    initial: dict[str, Tensor] | None = None
    candidates: int | None = None
    min_context: int = 0


TINY_LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.2,
}


class RaggedSamples:
    """Samples with a learnable pattern and some noise; `valid_length` makes the counts of ranks unequal."""

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, ordinal: int) -> Sample:
        noise = np.random.default_rng(ordinal)
        text = (np.arange(LENGTH + 1) * (1 + ordinal % 5) + ordinal) % VOCABULARY
        noisy = noise.random(LENGTH + 1) < 0.3
        text = np.where(noisy, noise.integers(0, VOCABULARY, LENGTH + 1), text)
        places = np.arange(LENGTH + 1)
        return Sample(text, places + ordinal, places, ordinal % 2, continued_length(ordinal))


def continued_length(ordinal: int) -> int:
    """Return the number of tokens of a sample that continue a document: none in some samples, all in others."""
    return (ordinal * 5) % (LENGTH + 2)


def valid_length(sample_index_B: Tensor) -> Tensor:
    """Return the number of valid labels of each sample. Samples differ, and some have none."""
    return (sample_index_B * 7) % (LENGTH + 1)


def ragged(batch: Batch) -> Batch:
    places_T = torch.arange(LENGTH)
    return dataclasses.replace(batch, valid_BT=places_T < valid_length(batch.sample_index_B)[:, None])


class Recorder:
    """An objective that records scores, masks and thresholds by sample."""

    def __init__(self, objective: Any) -> None:
        self._objective = objective
        self.needs, self.pools_whole_step = objective.needs, objective.pools_whole_step
        self.selects = objective.selects
        self.planned: list[int] = []
        self.chosen: dict[int, dict[str, Any]] = {}

    def plan(self, pools: list[Batch]) -> Tensor:
        planned_P = self._objective.plan(pools)
        self.planned.append(int(planned_P.sum()))
        return planned_P

    def choose(self, pool: Batch, signals: TokenSignals) -> Choice:
        choice = self._objective.choose(pool, signals)
        for row, sample in enumerate(pool.sample_index_B.tolist()):
            self.chosen[sample] = {
                "mask": choice.mask_BT[row].numpy().copy(),
                "weights": choice.weights["loss"][row].numpy().copy(),
                "threshold": float(choice.threshold) if choice.threshold.ndim == 0 else None,
                **{name: column[row].numpy().copy() for name, column in signals.items()},
            }
        return choice


def run_steps(world: World, case: Case) -> dict[str, Any]:
    """Train, and return on every rank weights before and after, the first gradient, and the selection of each step."""
    backend = make_backend(world, case)
    module, hf_config = make_student(backend, case)
    write_weights(backend, module, case.initial or {})
    training = TrainingSettings(global_batch_size=case.global_batch_size, train_tokens=1, lr=case.lr)
    accumulation = accumulation_steps(case.global_batch_size, case.micro_batch_size, world.data.size)
    settings = EngineSettings(case.micro_batch_size, accumulation, 1.0, case.precision)
    engine = backend.training_engine(module, adamw(module, training, world.device), settings)
    objective = Recorder(make_objective(case, world))
    result: dict[str, Any] = {"updates": [], "planned": objective.planned, "selected": [], "losses": [], "sums": []}
    reference = make_reference(world, backend, case, hf_config)
    candidates, ranked = make_candidates(engine, case)
    result |= {"tokens": [], "ranked": ranked, "router": []}
    learner = make_learner(case.backward, module, engine, LENGTH)
    step = TrainingStep(engine, reference, learner, seed=5, num_sources=2, world=world, candidates=candidates)
    times = case.candidates or 1
    loader = StepLoader(RaggedSamples(), times * case.micro_batch_size, times * case.global_batch_size, False, world)
    result["before"] = weights(backend, module)
    keep_first_gradient(engine, module, case, result)
    for number in range(case.steps):
        batches = [ragged(batch) for batch in loader.load(number * times * case.global_batch_size)]
        outcome = step(batches, objective, case.lr, number + 1)
        result["updates"].append(outcome.update)
        result["selected"].append(outcome.selected_tokens)
        result["losses"].append(outcome.loss)
        result["sums"].append(outcome.statistics.sums)
        result["tokens"].append(outcome.tokens)
        result["router"] += outcome.statistics.mean_terms.values()
    result["after"] = weights(backend, module)
    merged: dict[int, dict[str, Any]] = {}
    for chosen in gather_objects(objective.chosen):
        merged |= chosen
    return result | {"chosen": merged}


@score(needs=("student.entropi",))
def unknown_signal(signals: TokenSignals) -> Tensor:
    """Return a signal that does not exist."""
    return signals["student.entropi"]


def make_backend(world: World, case: Case) -> Backend:
    if case.stage is None:
        return PlainBackend(world)
    from megatron_slm.backend.deepspeed import DeepSpeedBackend

    zero = {"stage": case.stage} | (REALLY_SHARDED if case.stage == 3 else {})
    return DeepSpeedBackend(world, {"zero_optimization": zero}, case.precision)


def make_student(backend: Backend, case: Case) -> tuple[CausalLM, PretrainedConfig]:
    options = dict(case.model)
    hf_config = AutoConfig.for_model(options.pop("model_type"), **options)
    settings = ModelSettings(config=case.model)
    lm = backend.construct(lambda: build_student(settings, hf_config, case.precision, torch.device("cpu")))
    initialize_weights(lm, 1, backend.gathered)
    if case.checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    return CausalLM(lm, head_chunk=5, router=find_router_loss(lm)), hf_config


def make_objective(case: Case, world: World | None = None) -> Any:
    group = None if world is None else world.data.group
    if case.objective == "clm":
        return CausalLanguageModeling(group)
    rule = case.rule | {"of": [RankedScore(**part) for part in case.rule.get("of", [])]}
    settings = SelectionSettings(score=case.score, ratio=case.ratio, scope=case.scope, **rule)
    return SelectiveLanguageModeling(Rule(settings), case.ratio, case.pool == "step", case.min_context, group)


def make_reference(world: World, backend: Backend, case: Case, hf_config: PretrainedConfig) -> Any:
    if case.objective == "clm":
        return NoReference()
    lm = build_student(ModelSettings(config=case.model), hf_config, case.precision, torch.device("cpu"))
    initialize_weights(lm, 2, PlainBackend(world).gathered)
    return LiveReference(
        backend.frozen_engine(CausalLM(lm, head_chunk=5), shard=case.shard), case.reference_micro_batch_size
    )


def make_candidates(engine: Any, case: Case) -> tuple[Candidates | None, list[tuple[TokenSignals, Tensor]]]:
    """Return the choice among candidates, if the case has one, and the list in which it records its signals."""
    ranked: list[tuple[TokenSignals, Tensor]] = []
    if case.candidates is None:
        return None, ranked
    rule = make_objective(case)._rule
    original = rule.rank_sequences

    def recording(signals: TokenSignals, valid_BT: Tensor) -> Tensor:
        ranked.append((signals, valid_BT))
        return original(signals, valid_BT)

    rule.rank_sequences = recording
    student = LiveReference(engine.module, case.micro_batch_size)
    return Candidates(student, rule, case.micro_batch_size, 5, case.min_context), ranked


def keep_first_gradient(engine: Any, module: CausalLM, case: Case, result: dict[str, Any]) -> None:
    """Record the averaged gradient between the last backward of the first step and its update."""
    step = engine.step

    def read_then_step(learning_rate: float) -> Any:
        if "gradient" not in result:
            result["gradient"] = {name: gradient(p, case) for name, p in module.named_parameters()}
        return step(learning_rate)

    engine.step = read_then_step


def gradient(parameter: torch.nn.Parameter, case: Case) -> Tensor:
    if case.stage in (None, 0):
        return parameter.grad.float().clone()
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter).float().clone()


def weights(backend: Backend, module: CausalLM) -> dict[str, Tensor]:
    parameters = dict(module.named_parameters())
    with backend.gathered(parameters.values()):
        return {name: parameter.detach().float().clone() for name, parameter in parameters.items()}


def write_weights(backend: Backend, module: CausalLM, values: dict[str, Tensor]) -> None:
    parameters = dict(module.named_parameters())
    with backend.gathered(parameters.values()), torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


def result_of_step(step: int) -> StepResult:
    """Return a result with the losses of 2 x 8 tokens; the excess loss begins at `step`, and grows by 0.5 per token."""
    excess = step + torch.arange(16.0).view(2, 8) / 2
    ids = torch.arange(16).view(2, 8)
    batch = Batch(
        ids, ids + 1, torch.ones(2, 8, dtype=torch.bool), ids, ids[:, 0] // 8, ids[:, 0] // 8, ids, ids[:, 0] * 0
    )
    statistics = StepStatistics(2, World(0, 1, 0, torch.device("cpu")))
    signals = {"student.loss": excess + 1, "reference.loss": torch.ones(2, 8)}
    statistics.add(
        batch,
        signals,
        Choice(excess > step + 3, {"loss": (excess > step + 3).float()}, torch.tensor(3.0), batch.valid_BT),
    )
    statistics.reduce()
    tokens = StepTokens(candidates=0, trained=16, selected=8, reference=16)
    return StepResult(8, 1e-3, 1.0, Requested(), Update(True, 1.0), statistics, tokens)


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def assert_same_run(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Assert that masks, step-1 gradients and final weights agree, up to the order of summation."""
    assert one["planned"] == other["planned"]
    assert flipped(one["chosen"], other["chosen"]) == (0, 0)
    gradient_one, gradient_other = flat(one["gradient"]), flat(other["gradient"])
    assert (gradient_one - gradient_other).norm() <= 1e-5 * gradient_one.norm()
    moved = (flat(one["after"]) - flat(one["before"])).norm()
    assert moved > 0
    assert torch.equal(flat(one["before"]), flat(other["before"]))
    assert (flat(one["after"]) - flat(other["after"])).norm() <= 1e-4 * moved


def flipped(one: dict[int, Any], other: dict[int, Any]) -> tuple[int, int]:
    """Return how many selections differ: farther than 1e-5 from the threshold, and closer."""
    assert one.keys() == other.keys()
    far = near = 0
    for sample, first in one.items():
        differs = first["mask"] != other[sample]["mask"]
        margin = np.abs(first["student.loss"] - first["reference.loss"] - (first["threshold"] or 0.0))
        far += int((differs & (margin > 1e-5)).sum())
        near += int((differs & (margin <= 1e-5)).sum())
    return far, near
