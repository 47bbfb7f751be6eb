"""Comparison of rows and replay with plain autograd that detaches all unselected positions in every layer."""

import dataclasses
import gc
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from megatron_slm.backend import Update
from megatron_slm.build.models import make_learner
from megatron_slm.dist import World
from megatron_slm.errors import UserError
from megatron_slm.models.causal_lm import CausalLM
from megatron_slm.models.sparse_backward import attention as packed_attention
from megatron_slm.models.sparse_backward.attention import (
    BLOCK,
    FlexAttention,
    PackedQueries,
    attend_by_sequence,
    block_mask,
    open_attention,
    refuse_compiled,
)
from megatron_slm.models.sparse_backward.replay import ReplayStudent
from megatron_slm.models.sparse_backward.rows import Rows, RowStudent
from megatron_slm.models.student import ExactStudent, Student
from megatron_slm.reference.references import NoReference
from megatron_slm.training.step import TrainingStep
from megatron_slm.types import Batch, TokenSignals
from tests.steps import Case, make_objective
from tests.unit.test_head import VOCAB, tiny_config

SEQUENCES, LENGTH = 3, 24
FAMILIES = {
    "llama": {},
    "qwen3": {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1},
    "mistral": {"sliding_window": 7},
    "gpt2": {},
    "gpt_neox": {},
    "granite": {"attention_multiplier": 0.6},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2},
}
KERNEL = "rows, by the kernel's own backward"
WAYS = ("rows", KERNEL, "replay")


class Engine:
    """An engine of one process, without an optimizer."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()


def make_module(family: str, dtype: torch.dtype = torch.float64) -> CausalLM:
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(tiny_config(family, **FAMILIES[family]), attn_implementation="sdpa")
    if family == "olmoe":
        lm.set_experts_implementation("eager")  # the fused experts do not support float64
    return CausalLM(lm.to(dtype).train(), head_chunk=11)


def student_of(way: str, module: CausalLM) -> Student:
    if way == "exact":
        return ExactStudent(Engine(module))
    open_attention(module.lm)
    if way == "replay":
        return ReplayStudent(Engine(module), attend_by_sequence)
    return RowStudent(Engine(module), module.lm.base_model, None if way == KERNEL else attend_by_sequence)


def make_batch(*, packed: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(VOCAB, (SEQUENCES, LENGTH + 1), generator=generator)
    position = torch.arange(LENGTH).repeat(SEQUENCES, 1)
    if packed:
        position = torch.where(
            position >= torch.tensor([[9], [24], [17]]), position - torch.tensor([[9], [24], [17]]), position
        )
    valid = torch.arange(LENGTH) < torch.tensor([[LENGTH], [LENGTH - 5], [LENGTH]])
    sample = torch.arange(SEQUENCES)
    return Batch(text[:, :-1], text[:, 1:], valid, position, sample, sample * 0, position, sample * 0)


def some_weights(batch: Batch, share: float, empty: tuple[int, ...] = ()) -> Tensor:
    """Return random weights for a share of the tokens; sequences in `empty` have none."""
    generator = torch.Generator().manual_seed(5)
    kept = torch.rand(batch.valid_BT.shape, generator=generator) < share
    weights = (torch.rand(batch.valid_BT.shape, generator=generator) + 0.5) * (kept & batch.valid_BT)
    weights[list(empty)] = 0
    return weights


def gradient(module: CausalLM, way: str, batch: Batch, weights: Tensor, *, keep: bool = True) -> dict[str, Tensor]:
    module.zero_grad()
    student = student_of(way, module)
    _, tape = student.score(batch, (), keep=keep)
    student.backward(tape, {"loss": weights}, 0.5, last=True)
    return {name: p.grad.clone() if p.grad is not None else p.detach() * 0 for name, p in module.named_parameters()}


def detached(module: CausalLM, batch: Batch, weights: Tensor) -> dict[str, Tensor]:
    """Return the gradient by its definition: layer inputs, keys and values are constants where the weight is 0."""
    selected_BT = weights != 0

    def attention(layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any):
        place_BGTD = selected_BT[:, None, :, None]
        key, value = (torch.where(place_BGTD, tensor, tensor.detach()) for tensor in (key, value))
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
        scores = query @ key.mT * (options.get("scaling") or 1 / math.sqrt(query.shape[-1]))
        index = torch.arange(LENGTH)
        start = (index - batch.position_ids_BT)[:, None, :, None]
        window = options.get("sliding_window") or LENGTH
        seen = (index <= index[:, None]) & (index > index[:, None] - window) & (index >= start)
        return (scores.masked_fill(~seen, -math.inf).softmax(-1) @ value).transpose(1, 2), None

    AttentionInterface.register("oracle", attention)
    module.zero_grad()
    kernel, module.lm.config._attn_implementation = module.lm.config._attn_implementation, "oracle"
    try:
        with rows_detached(module, selected_BT):
            labels = batch.labels_BT.masked_fill(~batch.valid_BT, -100)
            loss = module(batch.tokens_BT, labels, batch.position_ids_BT)["loss"]
    finally:
        module.lm.config._attn_implementation = kernel
    (0.5 * (loss * weights).sum()).backward()
    return {name: p.grad.clone() if p.grad is not None else p.detach() * 0 for name, p in module.named_parameters()}


@contextmanager
def rows_detached(module: CausalLM, selected_BT: Tensor) -> Iterator[None]:
    def detach(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (torch.where(selected_BT[..., None], inputs[0], inputs[0].detach()), *inputs[1:])

    layers = next(child for child in module.modules() if isinstance(child, nn.ModuleList))
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(detach).remove)
        yield


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert actual.keys() == expected.keys()
    scale = max(float(tensor.abs().max()) for tensor in expected.values())
    assert scale > 0
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_equals_that_of_autograd_with_all_other_rows_detached(way: str, family: str) -> None:
    module, batch = make_module(family), make_batch()
    weights = some_weights(batch, 0.5)
    assert_same(gradient(module, way, batch, weights), detached(module, batch, weights))


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_is_exact_if_all_valid_tokens_are_selected(way: str) -> None:
    module, batch = make_module("qwen3"), make_batch()
    weights = some_weights(batch, 1.1)
    assert_same(gradient(module, way, batch, weights), gradient(module, "exact", batch, weights))


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_is_exact_in_the_last_layer_and_approximate_below(way: str) -> None:
    module, batch = make_module("llama"), make_batch()
    weights = some_weights(batch, 0.5)
    found, exact = gradient(module, way, batch, weights), gradient(module, "exact", batch, weights)
    assert_same(
        {"q": found["lm.model.layers.1.self_attn.q_proj.weight"]},
        {"q": exact["lm.model.layers.1.self_attn.q_proj.weight"]},
    )
    first = "lm.model.layers.0.mlp.up_proj.weight"
    assert (found[first] - exact[first]).norm() > 1e-3 * exact[first].norm()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("empty", [(0,), (1, 2), (0, 1, 2)], ids=str)
def test_sequences_without_a_selected_token_do_not_change_the_gradient(way: str, empty: tuple[int, ...]) -> None:
    module, batch = make_module("llama"), make_batch()
    weights = some_weights(batch, 0.4, empty)
    found = gradient(module, way, batch, weights)
    if len(empty) == SEQUENCES:
        assert all(float(tensor.abs().max()) == 0 for tensor in found.values())
    else:
        assert_same(found, detached(module, batch, weights))


@pytest.mark.parametrize("way", WAYS)
def test_packed_documents_do_not_attend_to_each_other(way: str) -> None:
    module, batch = make_module("llama"), make_batch(packed=True)
    weights = some_weights(batch, 0.5)
    assert_same(gradient(module, way, batch, weights), detached(module, batch, weights))


@pytest.mark.parametrize("way", ["exact", *WAYS])
def test_a_forward_that_was_not_kept_is_repeated_with_the_same_gradient(way: str) -> None:
    module, batch = make_module("llama"), make_batch()
    weights = some_weights(batch, 0.5)
    assert_same(gradient(module, way, batch, weights, keep=False), gradient(module, way, batch, weights))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("way", WAYS)
def test_activation_checkpointing_changes_no_gradient(way: str, family: str) -> None:
    module, batch = make_module(family), make_batch()
    weights = some_weights(batch, 0.5)
    expected = gradient(module, way, batch, weights)
    module.lm.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(gradient(module, way, batch, weights), expected)


@pytest.mark.parametrize("way", WAYS)
def test_the_bf16_gradient_is_the_float64_one_up_to_rounding(way: str) -> None:
    batch = make_batch()
    weights = some_weights(batch, 0.5)
    expected = gradient(make_module("llama"), way, batch, weights)
    found = gradient(make_module("llama", torch.bfloat16), way, batch, weights.float())
    one, other = (torch.cat([tree[name].flatten().double() for name in expected]) for tree in (found, expected))
    assert torch.cosine_similarity(one, other, dim=0) > 0.99


@pytest.mark.parametrize("way", WAYS)
def test_scores_equal_those_of_the_exact_student(way: str) -> None:
    module, batch = make_module("llama"), make_batch()
    expected = student_of("exact", module).score(batch, ("entropy",), keep=False)[0]
    found = student_of(way, module).score(batch, ("entropy",), keep=True)[0]
    assert found.keys() == expected.keys()
    for name, column in expected.items():
        torch.testing.assert_close(found[name], column, rtol=0, atol=1e-13)
        assert not found[name].requires_grad


@pytest.mark.parametrize("window", [None, 5])
def test_flex_attention_equals_attention_by_sequence(window: int | None) -> None:
    batch = make_batch(packed=True)
    index_R = some_weights(batch, 0.5).flatten().nonzero().squeeze(-1)
    queries = PackedQueries(index_R, batch.position_ids_BT)
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(*shape, dtype=torch.float64) for shape in ((1, 4, len(index_R), 8), (2, 72, 8), (2, 72, 8))
    )
    one = attend_by_sequence(queries, query, key, value, 0.3, window)
    other = FlexAttention(compiled=False)(queries, query, key, value, 0.3, window)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("together", [1, 4, 128])
def test_attention_by_sequence_does_not_depend_on_the_block_size(
    together: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_attention, "BLOCK", together)
    batch = make_batch(packed=True)
    index_R = some_weights(batch, 0.5).flatten().nonzero().squeeze(-1)
    queries = PackedQueries(index_R, batch.position_ids_BT)
    shapes = [(1, 4, len(index_R), 8), (2, 72, 8), (2, 72, 8), (1, 4, len(index_R), 8)]
    torch.manual_seed(0)
    query, key, value, upstream = (torch.randn(*shape, dtype=torch.float64) for shape in shapes)
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    found = attend_by_sequence(queries, *inputs, 0.3, window)  # type: ignore[call-arg]
    first_R = queries.first_R(window)
    seen_RN = (torch.arange(72) >= first_R[:, None]) & (torch.arange(72) <= index_R[:, None])
    key_HND, value_HND = (tensor.repeat_interleave(2, 0) for tensor in (key, value))
    scores_1HRN = (0.3 * query @ key_HND.mT).masked_fill(~seen_RN, -math.inf)
    expected = scores_1HRN.softmax(-1) @ value_HND
    torch.testing.assert_close(found, expected)
    for one, other in zip(*(torch.autograd.grad(out, inputs, upstream) for out in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("window", [None, 700])
def test_the_block_mask_skips_blocks_without_a_query_and_does_not_mask_whole_ones(window: int | None) -> None:
    length = 1000
    position = torch.arange(length).repeat(2, 1)
    position[1, 400:] -= 400
    chosen = torch.rand(2, length, generator=torch.Generator().manual_seed(0)) < 0.4
    chosen[:, 900:] = True
    index_R = chosen.flatten().nonzero().squeeze(-1)
    queries = PackedQueries(index_R[: len(index_R) // BLOCK * BLOCK], position)
    found = block_mask(queries, window)
    expected = create_block_mask(found.mask_mod, None, None, len(queries.index_R), 2 * length, device="cpu")
    assert 0 < found.sparsity() == expected.sparsity()
    assert torch.equal(found.to_dense(), expected.to_dense())
    assert torch.equal(found.full_kv_num_blocks, expected.full_kv_num_blocks) and found.full_kv_num_blocks.sum() > 0


def test_replay_keeps_the_selected_share_of_the_activations() -> None:
    module, batch = make_module("llama"), make_batch()

    def kept(way: str, share: float) -> int:
        sizes: dict[int, int] = {}
        weights = some_weights(batch, share)
        student = student_of(way, module)
        own = {p.untyped_storage()._cdata for p in module.parameters()}

        def see(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage()._cdata not in own:
                sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
            return tensor

        alive: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
            _, tape = student.score(batch, (), keep=True)
            student.backward(tape, {"loss": weights}, 1.0, last=True)
        return sum(sizes.values())

    assert kept("replay", 0.25) < 0.5 * kept("replay", 1.1)
    assert kept("replay", 0.25) < 0.5 * kept("rows", 0.25)


@pytest.mark.parametrize("way", ["exact", "rows", "replay"])
def test_a_tape_is_freed_before_the_next_pool_is_scored_and_before_the_update(way: str) -> None:
    module = make_module("llama", torch.float32)
    student, tapes = student_of(way, module), []

    class Watched(Engine):
        def step(self, learning_rate: float) -> Update:
            assert [tape() for tape in tapes] == [None] * 2
            return Update(True, 0.0)

    def watched(*args: Any, **options: Any) -> tuple[TokenSignals, Any]:
        assert all(tape() is None for tape in tapes)
        signals, tape = score(*args, **options)
        tapes.append(weakref.ref(tape))
        return signals, tape

    score, student.score = student.score, watched
    world = World(0, 1, 0, torch.device("cpu"))
    step = TrainingStep(Watched(module), NoReference(), student, seed=0, num_sources=1, world=world)
    gc.disable()
    try:
        step([make_batch(), make_batch(packed=True)], make_objective(Case(score="student_loss")), 0.0, 1)
    finally:
        gc.enable()


def test_rows_gathers_and_scatters_the_selected_rows_only() -> None:
    rows = Rows(make_batch().position_ids_BT, None)
    mask = torch.rand(SEQUENCES, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.3
    rows.select(mask)
    tensor = torch.randn(SEQUENCES, LENGTH, 5)
    assert torch.equal(rows.gather(tensor), tensor[mask])
    assert torch.equal(rows.scatter(rows.gather(tensor)), tensor * mask[..., None])


def test_linears_are_restored_after_a_step_and_after_an_error() -> None:
    module, batch = make_module("llama"), make_batch()
    gradient(module, "rows", batch, some_weights(batch, 0.5))
    with pytest.raises(IndexError):
        unknown = dataclasses.replace(batch, tokens_BT=batch.tokens_BT + VOCAB)
        student_of("rows", module).score(unknown, (), keep=True)
    assert all("forward" not in vars(child) for child in module.modules())


def learner_of(way: str, module: CausalLM) -> Any:
    return make_learner(way, module, Engine(module), LENGTH)


def refused_learner(way: str, module: CausalLM, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        learner_of(way, module)
    assert (caught.value.setting, caught.value.value) == ("architecture", type(module.lm).__name__)
    assert reason in caught.value.reason and "selection.backward=exact" in caught.value.remedy


def fresh_module(family: str, **options: Any) -> CausalLM:
    """Return a float32 model with small initial weights, whose losses hardly depend on its attention."""
    torch.manual_seed(0)
    config = tiny_config(family, **{"initializer_range": 0.02} | options)
    return CausalLM(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_supported_families_pass_the_checks(family: str, dtype: torch.dtype) -> None:
    learner_of("replay", make_module(family, dtype))
    assert learner_of("rows", make_module(family, dtype))._packed is attend_by_sequence
    learner_of("replay", CausalLM(fresh_module(family, **FAMILIES[family]).lm.to(dtype)))


def test_a_model_that_mixes_positions_outside_of_attention_is_refused() -> None:
    module = make_module("llama")
    mlp = module.lm.model.layers[1].mlp
    mlp.forward = lambda hidden: type(mlp).forward(mlp, hidden + hidden.roll(1, 1))
    for way in ("rows", "replay"):
        refused_learner(way, module, "outside of its attention")


def test_an_unusual_attention_is_refused_by_replay_and_not_packed_by_rows() -> None:
    module = fresh_module("llama")
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    AttentionInterface.register("capped", lambda *inputs, **options: (3 * sdpa(*inputs, **options)[0], None))
    AttentionMaskInterface.register("capped", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    module.lm.config._attn_implementation = "capped"
    refused_learner("replay", module, "softmax of scaled products")
    assert learner_of("rows", module)._packed is None


@pytest.mark.parametrize("family", ["phimoe", "qwen2_moe"])
def test_a_window_that_is_not_passed_to_attention_is_detected_in_longer_sequences(family: str) -> None:
    options = {"num_local_experts": 4, "num_key_value_heads": 2, "sliding_window": LENGTH - 8}
    options |= {"use_sliding_window": True, "max_window_layers": 1, "num_experts": 4} if family == "qwen2_moe" else {}
    module = fresh_module(family, **options)
    refused_learner("replay", module, "window")
    assert learner_of("rows", module)._packed is None


def test_a_model_that_ignores_position_ids_is_refused_by_replay() -> None:
    module = fresh_module("marian")
    refused_learner("replay", module, "position_ids")


def test_a_model_that_reads_the_name_of_its_kernel_is_refused() -> None:
    module = make_module("llama")
    mlp, config = module.lm.model.layers[1].mlp, module.lm.config
    mlp.forward = lambda hidden: type(mlp).forward(mlp, hidden) * (2 if config._attn_implementation == "sdpa" else 1)
    refused_learner("rows", module, "reads the name")


def test_a_linear_with_its_own_forward_keeps_it() -> None:
    module, batch = make_module("llama"), make_batch()

    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    module.lm.model.layers[0].mlp.up_proj.__class__ = Scaled
    down = module.lm.model.layers[1].mlp.down_proj
    own = down.forward = lambda hidden: 3 * nn.Linear.forward(down, hidden)
    weights = some_weights(batch, 0.5)
    assert_same(gradient(module, "rows", batch, weights), detached(module, batch, weights))
    assert down.forward is own


def test_replay_supports_a_model_that_views_the_output_of_its_attention() -> None:
    learner_of("replay", fresh_module("afmoe", num_key_value_heads=2, head_dim=8, num_experts=4, num_dense_layers=2))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_backward_of_rows_costs_the_selected_share(family: str) -> None:
    module, batch = make_module(family), make_batch()

    def cost(way: str) -> int:
        student = student_of(way, module)
        _, tape = student.score(batch, (), keep=True)
        with FlopCounterMode(display=False) as counted:
            student.backward(tape, {"loss": some_weights(batch, 0.25)}, 1.0, last=True)
        return counted.get_total_flops()

    assert cost("rows") < 0.4 * cost("exact")


def test_linears_whose_input_has_another_order_of_rows_use_their_own_backward() -> None:
    module, batch = make_module("llama"), make_batch()
    mlp = module.lm.model.layers[0].mlp
    mlp.forward = lambda hidden: type(mlp).forward(mlp, hidden.flatten(0, 1).flip(0)).flip(0).view_as(hidden)
    weights = some_weights(batch, 0.5)
    assert_same(gradient(module, "rows", batch, weights), detached(module, batch, weights))


def test_kept_keys_and_values_do_not_retain_the_memory_of_fused_queries() -> None:
    for family in ("gpt2", "phi3"):
        module, batch = make_module(family) if family in FAMILIES else fresh_module(family), make_batch()
        student = student_of("replay", module)
        assert isinstance(student, ReplayStudent)
        _, tape = student.score(batch, (), keep=True)
        kept = [tensor for layer in tape.known.layers.values() for tensor in layer]
        assert sum(tensor.untyped_storage().nbytes() for tensor in kept) == sum(tensor.nbytes for tensor in kept)


def test_an_attention_that_is_not_registered_is_refused() -> None:
    module = make_module("llama")
    module.lm.config._attn_implementation = "eager"
    with pytest.raises(UserError) as caught:
        open_attention(module.lm)
    assert (caught.value.setting, caught.value.value) == ("model.attn_implementation", "eager")
    assert "model.attn_implementation=sdpa" in caught.value.remedy


@pytest.mark.parametrize("compiled", [torch.compile, lambda module: module.compile() or module], ids=["wrapped", "own"])
def test_a_compiled_student_is_refused(compiled: Callable[[nn.Module], nn.Module]) -> None:
    module = make_module("llama")
    open_attention(module.lm)
    with pytest.raises(UserError) as caught:
        refuse_compiled(compiled(module), "replay")
    assert (caught.value.setting, caught.value.value) == ("selection.backward", "replay")
    assert "torch.compile" in caught.value.reason
