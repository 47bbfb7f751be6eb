"""The chunked head inside of a ZeRO-3 engine: the gradients of the plain model, from partitioned parameters."""

import pytest
import torch

from megatron_slm.backend import EngineSettings
from megatron_slm.backend.deepspeed import DeepSpeedBackend
from megatron_slm.backend.plain import PlainBackend
from megatron_slm.dist import World
from megatron_slm.errors import UserError
from megatron_slm.models.causal_lm import CausalLM, build_student, initialize_weights
from megatron_slm.models.checks import check_head, check_packing
from megatron_slm.models.settings import ModelSettings
from megatron_slm.selection.select import weighted_loss
from tests.gloo import run_ranks
from tests.unit.test_head import VOCAB, close, tiny_config

RANKS, SEQUENCES, LENGTH = 2, 2, 16
SETTINGS = {
    "zero_optimization": {
        "stage": 3,
        # At their defaults a tiny model is never split, or never released.
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    }
}
Gradients = dict[str, torch.Tensor]


def rank_batch(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens, labels (some ignored), and positions of one rank."""
    generator = torch.Generator().manual_seed(rank)
    tokens, labels = torch.randint(VOCAB, (2, SEQUENCES, LENGTH), generator=generator)
    labels[rank, 3:7] = -100
    return tokens, labels, torch.arange(LENGTH).expand(SEQUENCES, LENGTH)


def rank_weights(rank: int) -> list[torch.Tensor]:
    """Return the weights of two steps: some zeros on every rank, then only zeros on rank 1."""
    generator = torch.Generator().manual_seed(10 + rank)
    weights = torch.rand(SEQUENCES, LENGTH, generator=generator)
    sparse = weights.masked_fill(weights < 0.4, 0.0)
    return [sparse, torch.zeros_like(sparse) if rank == 1 else sparse]


def student(backend: PlainBackend | DeepSpeedBackend, model_type: str, tied: bool) -> CausalLM:
    config = tiny_config(model_type, tied=tied)
    settings = ModelSettings(config={"model_type": model_type})
    lm = backend.construct(lambda: build_student(settings, config, torch.float32, torch.device("cpu")))
    initialize_weights(lm, 7, backend.gathered)
    return CausalLM(lm, head_chunk=5)


def plain_gradients(world: World, model_type: str, tied: bool) -> list[Gradients]:
    """For each step, gradients of the plain logits of the whole model on the batches of all ranks.

    In a process of its own: DeepSpeed replaces `F.linear` in those that import its engine.
    """
    lm = student(PlainBackend(world), model_type, tied).lm
    steps = []
    for step in range(2):
        lm.zero_grad()
        for rank in range(RANKS):
            tokens, labels, positions = rank_batch(rank)
            logits = lm(input_ids=tokens, position_ids=positions, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            (loss.view(labels.shape) * rank_weights(rank)[step]).sum().backward()
        steps.append({name: parameter.grad.clone() for name, parameter in lm.named_parameters()})
    return steps


def sharded_gradients(world: World, model_type: str, tied: bool) -> list[Gradients]:
    """Return the same gradients, from an engine that holds half of every parameter."""
    from deepspeed.utils import safe_get_full_grad

    backend = DeepSpeedBackend(world, SETTINGS, torch.float32)
    module = student(backend, model_type, tied)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    engine = backend.training_engine(module, optimizer, EngineSettings(SEQUENCES, 1, 0.0, torch.float32))
    tokens, labels, positions = rank_batch(world.rank)
    steps = []
    for weights in rank_weights(world.rank):
        assert_split(module)
        loss = engine.module(tokens, labels, positions)["loss"]
        engine.backward(weighted_loss(loss, weights) * world.size, last=True)
        steps.append({name: safe_get_full_grad(parameter) for name, parameter in module.lm.named_parameters()})
        engine.step(0.0)
    return steps


def assert_split(module: CausalLM) -> None:
    for name, parameter in module.named_parameters():
        assert parameter.numel() == 0, f"{name} is whole between steps"
        assert parameter.ds_tensor.numel() == -(-parameter.ds_numel // RANKS), name  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("model_type", "tied"),
    [("llama", False), ("llama", True), ("gpt2", False), ("gpt2", True), ("mistral", False), ("qwen3", True)],
)
def test_partitioned_models_have_the_gradients_of_the_plain_model(model_type, tied):
    (expected,) = run_ranks(plain_gradients, 1, model_type, tied)
    for answer in run_ranks(sharded_gradients, RANKS, model_type, tied):
        for right, actual in zip(expected, answer, strict=True):
            assert actual.keys() == right.keys()
            for name, gradient in actual.items():
                assert right[name].any(), name
                close(gradient, right[name], 1e-5)


def refusals(world: World, model_type: str, tied: bool) -> list[tuple[str, str]]:
    """Return the settings and reasons of the errors of two runs of the checks, between which the student trains."""
    backend = DeepSpeedBackend(world, SETTINGS, torch.float32)
    module = student(backend, model_type, tied)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    engine = backend.training_engine(module, optimizer, EngineSettings(SEQUENCES, 1, 0.0, torch.float32))
    found = []
    for _ in range(2):
        for check in (lambda: check_head(module.lm), lambda: check_packing(engine.module, module.lm)):
            try:
                check()
            except UserError as error:
                found.append((error.setting, error.reason))
        assert_split(module)
        engine.backward(engine.module(*rank_batch(world.rank))["loss"].sum(), last=True)
        engine.step(0.0)
    return found


@pytest.mark.parametrize(
    ("model_type", "tied"), [("llama", False), ("gpt2", True), ("mistral", False), ("qwen3", True)]
)
def test_a_partitioned_model_that_is_right_passes_the_checks(model_type, tied):
    assert run_ranks(refusals, RANKS, model_type, tied) == [[], []]


@pytest.mark.parametrize(
    ("model_type", "setting", "reason"),
    [("gemma2", "architecture", "a soft cap"), ("bloom", "data.reset_attention", "across packed documents")],
)
def test_a_partitioned_model_that_is_wrong_is_refused_on_every_rank(model_type, setting, reason):
    for found in run_ranks(refusals, RANKS, model_type, True):
        assert [found_setting for found_setting, _ in found] == [setting] * 2
        assert all(reason in found_reason for _, found_reason in found)
