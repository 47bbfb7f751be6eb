"""Comparison of the chunked head with full logits and torch's cross-entropy."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from megatron_slm.models.causal_lm import CausalLM
from megatron_slm.models.head import token_loss

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}
TOKENS, HIDDEN, VOCAB = 50, 16, 97
SHAPES = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


def tiny_config(model_type: str, *, tied: bool = False, **options) -> PretrainedConfig:
    """Return the configuration of two layers of 32, with weights large enough for gradients that differ visibly."""
    return AutoConfig.for_model(
        model_type,
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        **({} if model_type == "gpt2" else {"intermediate_size": 48}),
        **({"initializer_range": 0.2} | SHAPES.get(model_type, {}) | options),
    )


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Assert equality relative to the largest entry, because a small entry may be a difference of large ones."""
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance * scale)


def head_inputs(dtype: torch.dtype, with_bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).mul(0.5).to(dtype).requires_grad_()
    bias = torch.randn(VOCAB, generator=generator).to(dtype).requires_grad_() if with_bias else None
    return hidden, weight, bias


def some_labels(count: int = TOKENS) -> torch.Tensor:
    labels = torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(1))
    labels[3::7] = -100
    labels[4] = -1
    return labels


def some_upstream(count: int = TOKENS) -> torch.Tensor:
    upstream = torch.randn(count, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return upstream.masked_fill(torch.arange(count) % 3 == 0, 0.0)


def full_loss(hidden, weight, bias, labels) -> tuple[torch.Tensor, torch.Tensor]:
    """Return losses and entropies from all logits at once, in float64."""
    logits = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    loss = F.cross_entropy(logits, labels.masked_fill(labels < 0, -100), ignore_index=-100, reduction="none")
    return loss, torch.distributions.Categorical(logits=logits).entropy()


@pytest.mark.parametrize("chunk", [1, 7, 64, None])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_losses_and_gradients_are_those_of_full_logits(dtype, with_entropy, with_bias, chunk):
    inputs, labels, upstream = head_inputs(dtype, with_bias), some_labels(), some_upstream()
    wanted = [value for value in inputs if value is not None]
    hidden, weight, bias = inputs
    want = ("entropy",) if with_entropy else ()
    loss, *others = token_loss(hidden, weight, labels, bias_V=bias, want=want, chunk=chunk)
    expected_loss, expected_entropy = full_loss(*inputs, labels)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(loss, expected_loss, TOLERANCE[dtype])
    if with_entropy:
        close(others[0], expected_entropy, TOLERANCE[dtype])
        assert not others[0].requires_grad
    else:
        assert not others
    actual = torch.autograd.grad((loss * upstream.to(loss.dtype)).sum(), wanted)
    expected = torch.autograd.grad((expected_loss * upstream).sum(), wanted)
    for value, gradient, right in zip(wanted, actual, expected, strict=True):
        assert gradient.dtype == value.dtype
        close(gradient, right, TOLERANCE[dtype])


@pytest.mark.parametrize("upstream", [0.0, -0.0])
def test_without_upstream_gradient_all_gradients_are_zero(upstream):
    inputs = head_inputs(torch.float32, True)
    (loss,) = token_loss(inputs[0], inputs[1], some_labels(), bias_V=inputs[2], chunk=7)
    for gradient in torch.autograd.grad((loss * upstream).sum(), inputs):
        assert not gradient.any()


def test_an_ignored_label_has_no_loss_and_no_gradient_for_any_upstream_gradient():
    hidden, weight, _ = head_inputs(torch.float32, False)
    labels = some_labels()
    (loss,) = token_loss(hidden, weight, labels, chunk=7)
    assert not loss[labels < 0].any()
    upstream = torch.zeros(TOKENS).masked_fill(labels < 0, math.nan)
    for gradient in torch.autograd.grad(loss, (hidden, weight), upstream):
        assert not gradient.any()


def test_a_nan_in_the_upstream_gradient_reaches_the_gradients():
    hidden, weight, bias = head_inputs(torch.float32, True)
    (loss,) = token_loss(hidden, weight, some_labels(), bias_V=bias, chunk=7)
    upstream = torch.zeros(TOKENS)
    upstream[5] = math.nan
    grad_hidden, grad_weight, grad_bias = torch.autograd.grad(loss, (hidden, weight, bias), upstream)
    assert grad_hidden[5].isnan().all()
    assert not grad_hidden[:5].any()
    assert grad_weight.isnan().all()
    assert grad_bias.isnan().all()


def test_a_frozen_head_passes_on_the_gradient_of_the_hidden_states():
    hidden, weight, bias = head_inputs(torch.float32, True)
    (loss,) = token_loss(hidden, weight.detach(), some_labels(), bias_V=bias.detach(), chunk=7)
    (gradient,) = torch.autograd.grad(loss.sum(), hidden)
    (expected,) = torch.autograd.grad(full_loss(hidden, weight, bias, some_labels())[0].sum(), hidden)
    close(gradient, expected, 2e-5)


def test_frozen_hidden_states_do_not_change_the_gradient_of_the_head():
    hidden, weight, _ = head_inputs(torch.float32, False)
    (loss,) = token_loss(hidden.detach(), weight, some_labels(), chunk=7)
    (gradient,) = torch.autograd.grad(loss.sum(), weight)
    (expected,) = torch.autograd.grad(full_loss(hidden, weight, None, some_labels())[0].sum(), weight)
    close(gradient, expected, 2e-5)


def test_losses_are_the_same_without_recording_gradients():
    hidden, weight, bias = head_inputs(torch.float32, True)
    with torch.no_grad():
        loss, entropy = token_loss(hidden, weight, some_labels(), bias_V=bias, want=("entropy",), chunk=7)
    assert not loss.requires_grad
    expected = token_loss(hidden, weight, some_labels(), bias_V=bias, want=("entropy",), chunk=7)
    assert torch.equal(loss, expected[0])
    assert torch.equal(entropy, expected[1])


def test_zero_tokens_are_accepted():
    hidden, weight, _ = head_inputs(torch.float32, False)
    loss, entropy = token_loss(hidden[:0], weight, some_labels()[:0], want=("entropy",))
    assert loss.shape == entropy.shape == (0,)
    assert not torch.autograd.grad(loss.sum(), weight)[0].any()


def test_large_logits_stay_finite():
    hidden, weight, _ = head_inputs(torch.float32, False)
    loss, entropy = token_loss(hidden * 1e4, weight, some_labels(), want=("entropy",), chunk=7)
    expected_loss, _ = full_loss(hidden * 1e4, weight, None, some_labels())
    close(loss, expected_loss, 2e-5)
    assert entropy.isfinite().all()


def test_the_weight_gradient_of_bf16_is_summed_in_float32():
    """One large and eight small gradients, one token per chunk: a sum in bf16 would lose the small ones."""
    hidden = torch.ones(9, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    (loss,) = token_loss(hidden, weight, torch.zeros(9, dtype=torch.int64), chunk=1)
    loss.backward(torch.tensor([256.0, *[1.0] * 8]))
    assert weight.grad.flatten().tolist() == [-132.0, 132.0]


class Recorder(TorchDispatchMode):
    """A mode that records the shapes of all tensors that are created."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[str, torch.Size]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.shapes += [(func.overloadpacket.__name__, value.shape) for value in _tensors(result)]
        return result


def _tensors(result: object) -> list[torch.Tensor]:
    return [value for value in (result if isinstance(result, tuple | list) else [result]) if torch.is_tensor(value)]


def test_at_most_one_chunk_of_logits_exists_at_a_time():
    hidden, weight = (torch.randn(size, 4, requires_grad=True) for size in (TOKENS, VOCAB))
    with Recorder() as made:
        loss, _ = token_loss(hidden, weight, some_labels(), want=("entropy",), chunk=7)
        loss.sum().backward()
    assert max(shape.numel() for _, shape in made.shapes) <= 7 * VOCAB


def test_the_backward_recomputes_only_tokens_with_a_gradient():
    hidden, weight, _ = head_inputs(torch.float32, False)
    labels, upstream = some_labels(), some_upstream().float()
    (loss,) = token_loss(hidden, weight, labels, chunk=7)
    with Recorder() as made:
        loss.backward(upstream)
    exponentials = sum(shape.numel() for name, shape in made.shapes if name == "exp_")
    assert exponentials == ((upstream != 0) & (labels >= 0)).sum() * VOCAB


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", list(SHAPES))
def test_losses_entropies_and_gradients_of_a_model_are_those_of_its_logits(model_type, tied):
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(tiny_config(model_type, tied=tied))
    assert (lm.get_output_embeddings().weight is lm.get_input_embeddings().weight) == tied
    tokens, labels = torch.randint(VOCAB, (2, 3, 16))
    labels[0, 5:9] = -100
    positions = torch.arange(16).expand(3, 16)
    upstream = some_upstream(48).float().view(3, 16)

    logits = lm(input_ids=tokens, position_ids=positions, use_cache=False).logits.float()
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(3, 16)
    (expected * upstream).sum().backward()
    gradients = {name: parameter.grad for name, parameter in lm.named_parameters()}
    lm.zero_grad()

    signals = CausalLM(lm, head_chunk=5)(tokens, labels, positions, ("entropy",))
    close(signals["loss"], expected.detach(), 1e-5)
    close(signals["entropy"], torch.distributions.Categorical(logits=logits.detach()).entropy(), 1e-5)
    (signals["loss"] * upstream).sum().backward()
    for name, parameter in lm.named_parameters():
        assert gradients[name].any(), name
        close(parameter.grad, gradients[name], 2e-5)


def test_a_head_with_a_bias_is_supported():
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(tiny_config("phi"))
    torch.nn.init.normal_(lm.get_output_embeddings().bias)
    tokens = torch.arange(16)[None]
    expected = F.cross_entropy(lm(input_ids=tokens).logits[0], tokens[0], reduction="none")
    close(CausalLM(lm, head_chunk=5)(tokens, tokens, tokens)["loss"][0], expected, 1e-5)


def test_a_column_that_is_not_wanted_is_not_computed():
    module = CausalLM(AutoModelForCausalLM.from_config(tiny_config("llama")))
    tokens = torch.arange(8)[None]
    assert module(tokens, tokens, tokens).keys() == {"loss"}
