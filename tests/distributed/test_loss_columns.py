"""A second loss column beside the cross-entropy: only the model's forward and the objective change for it."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_slm.backend import Backend, EngineSettings
from megatron_slm.backend.plain import PlainBackend
from megatron_slm.data.loader import StepLoader
from megatron_slm.dist import World
from megatron_slm.models.causal_lm import CausalLM, initialize_weights
from megatron_slm.models.student import ExactStudent
from megatron_slm.reference.references import NoReference
from megatron_slm.training.objective import Choice
from megatron_slm.training.optimizer import adamw
from megatron_slm.training.settings import TrainingSettings
from megatron_slm.training.step import TrainingStep
from megatron_slm.types import Batch, TokenSignals
from tests.gloo import run_ranks
from tests.steps import LENGTH, TINY_LLAMA, Case, RaggedSamples, gradient, make_backend, ragged

BATCH = 8
COEFFICIENT = 0.25


def uniform_cross_entropy(logits_BTV: Tensor) -> Tensor:
    """Return the cross-entropy with uniform soft targets: float `[B, T]`."""
    return -logits_BTV.float().log_softmax(-1).mean(-1)


class TwoColumns(CausalLM):
    """A model whose forward has the further loss column `soft`, on demand, and the term `size`."""

    def forward(
        self,
        tokens_BT: Tensor,
        labels_BT: Tensor,
        position_ids_BT: Tensor,
        want: tuple[str, ...] = (),
        layer_options: Mapping[str, Any] | None = None,
    ) -> TokenSignals:
        hidden_BTD = self.lm.base_model(input_ids=tokens_BT, position_ids=position_ids_BT).last_hidden_state
        logits_BTV = self.lm.get_output_embeddings()(hidden_BTD)
        loss_BT = torch.nn.functional.cross_entropy(logits_BTV.mT.float(), labels_BT, reduction="none")
        output = {"loss": loss_BT}
        if "soft" in want:
            output["soft"] = uniform_cross_entropy(logits_BTV)
        if torch.is_grad_enabled():
            output["size"] = hidden_BTD.float().square().mean()
        return output


def weights_of(batch: Batch) -> dict[str, Tensor]:
    """Return weights that differ by token and by column, with zeros."""
    sample_B1, place_T = batch.sample_index_B[:, None], torch.arange(LENGTH)
    hard_BT = ((sample_B1 * 5 + place_T * 3) % 4).float() / 2
    soft_BT = ((sample_B1 * 3 + place_T * 7) % 5).float()
    return {"loss": hard_BT * batch.valid_BT, "soft": soft_BT * batch.valid_BT}


class Weighing:
    """An objective that weighs two columns; the number of valid tokens is its divisor."""

    needs = ("student.soft",)
    selects = True

    def __init__(self, pools_whole_step: bool) -> None:
        self.pools_whole_step = pools_whole_step

    def plan(self, pools: list[Batch]) -> Tensor:
        counts_P = torch.stack([pool.valid_BT.sum() for pool in pools])
        torch.distributed.all_reduce(counts_P)
        return counts_P

    def choose(self, pool: Batch, signals: TokenSignals) -> Choice:
        weights = weights_of(pool)
        assert signals.keys() == {"student.loss", "student.soft", "uniform"}
        return Choice(weights["loss"] > 0, weights, torch.tensor(torch.nan), pool.valid_BT)


def tiny_model(backend: Backend) -> Any:
    lm = backend.construct(lambda: AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY_LLAMA)))
    initialize_weights(lm, 1, backend.gathered)
    return lm


def read_batches(world: World, micro_batch_size: int) -> list[Batch]:
    loader = StepLoader(RaggedSamples(), micro_batch_size, BATCH, False, world)
    return [ragged(batch) for batch in loader.load(0)]


def take_step(world: World, stage: int | None, whole_step: bool) -> dict[str, Any]:
    """Run one step of two columns, and return its gradient and the mean of the term."""
    case = Case(stage=stage)
    backend = make_backend(world, case)
    module = TwoColumns(tiny_model(backend))
    training = TrainingSettings(global_batch_size=BATCH, train_tokens=1)
    settings = EngineSettings(2, BATCH // 2 // world.size, 0.0, torch.float32)
    engine = backend.training_engine(module, adamw(module, training, world.device), settings)
    found: dict[str, Any] = {}
    update = engine.step

    def read_then_update(rate: float) -> Any:
        found["gradient"] = {name: gradient(parameter, case) for name, parameter in module.named_parameters()}
        return update(rate)

    engine.step = read_then_update  # type: ignore[method-assign]
    student = ExactStudent(engine, {"size": COEFFICIENT})
    step = TrainingStep(engine, NoReference(), student, seed=0, num_sources=2, world=world)
    result = step(read_batches(world, 2), Weighing(whole_step), 1e-3, 1)
    return found | {"terms": result.statistics.mean_terms}


def brute_force(world: World) -> dict[str, Any]:
    """Return the gradient of both weighted columns and of the term, by autograd on the logits of the whole batch."""
    lm = tiny_model(PlainBackend(world))
    batches = read_batches(world, 2)
    num_valid = sum(int(batch.valid_BT.sum()) for batch in batches)
    total, sizes = torch.zeros(()), []
    for batch in batches:
        output = lm(batch.tokens_BT, position_ids=batch.position_ids_BT, output_hidden_states=True)
        hard_BT = torch.nn.functional.cross_entropy(output.logits.mT.float(), batch.labels_BT, reduction="none")
        weights = weights_of(batch)
        columns = {"loss": hard_BT, "soft": uniform_cross_entropy(output.logits)}
        total = total + sum((weights[name] * columns[name]).sum() for name in columns) / num_valid
        sizes.append(output.hidden_states[-1].square().mean())
    mean_size = torch.stack(sizes).mean()
    (total + COEFFICIENT * mean_size).backward()
    return {
        "gradient": {f"lm.{name}": parameter.grad for name, parameter in lm.named_parameters()},
        "size": float(mean_size.detach()),
    }


@pytest.mark.parametrize("whole_step", [False, True], ids=["kept forward", "forward again"])
@pytest.mark.parametrize(("stage", "ranks"), [(None, 1), (None, 2), (3, 2)])
def test_the_gradient_is_that_of_autograd(stage: int | None, ranks: int, whole_step: bool) -> None:
    expected = run_ranks(brute_force, 1)[0]
    for found in run_ranks(take_step, ranks, stage, whole_step):
        assert found["terms"] == {"size": pytest.approx(expected["size"], rel=1e-5)}
        assert found["gradient"].keys() == expected["gradient"].keys()
        for name, gradient_of_parameter in expected["gradient"].items():
            difference = (found["gradient"][name] - gradient_of_parameter).norm()
            assert difference <= 1e-5 * gradient_of_parameter.norm() + 1e-8, name
