"""The pad token, which is treated as any other: samples are packed, and it often is the end token."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_slm.backend.plain import PlainBackend
from megatron_slm.dist import World
from megatron_slm.models.causal_lm import build_student, initialize_weights
from megatron_slm.models.settings import ModelSettings
from tests.gloo import run_ranks
from tests.steps import TINY_LLAMA, Case, flat, run_steps

PAD = 5
EMBEDDING = "lm.model.embed_tokens.weight"


@pytest.mark.parametrize(("stage", "ranks"), [(None, 1), (0, 2), (3, 2)])
def test_a_run_with_a_pad_token_equals_one_without(stage: int | None, ranks: int) -> None:
    """Weights from scratch, gradients and updates, bit for bit; the row of the pad token has a gradient."""
    objective: dict[str, Any] = {"objective": "clm", "stage": stage, "micro_batch_size": 2, "steps": 2}
    with_pad = run_ranks(run_steps, ranks, Case(model=TINY_LLAMA | {"pad_token_id": PAD}, **objective))[0]
    without = run_ranks(run_steps, ranks, Case(**objective))[0]
    assert with_pad["before"][EMBEDDING][PAD].abs().sum() > 0
    assert with_pad["gradient"][EMBEDDING][PAD].abs().sum() > 0
    for moment in ("before", "gradient", "after"):
        assert torch.equal(flat(with_pad[moment]), flat(without[moment])), moment


def gradients(world: World, path: str | None, model: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a student's embedding, its gradient, and the sum of the gradients of the rows that were looked up."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path) if path else AutoConfig.for_model(**model)
    settings = ModelSettings(path=path, config={} if path else model)
    student = build_student(settings, config, torch.float32, torch.device("cpu"))
    if path is None:
        initialize_weights(student, 1, PlainBackend(world).gathered)
    text = torch.tensor([[1, PAD, 2, PAD, PAD, 3]])
    embedding = student.get_input_embeddings()
    rows: list[torch.Tensor] = []

    def remember(_: Any, __: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        rows.append(output)

    embedding.register_forward_hook(remember)
    student(text, labels=text).loss.backward()
    expected = torch.zeros_like(embedding.weight)
    for place, token in enumerate(text[0].tolist()):
        expected[token] += rows[0].grad[0, place]
    return embedding.weight.detach(), embedding.weight.grad, expected


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_pretrained_row_keeps_its_values_and_gets_its_gradient(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = TINY_LLAMA if family == "llama" else {
        **{"model_type": "opt", "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"vocab_size": 97, "max_position_embeddings": 16, "word_embed_proj_dim": 32, "tie_word_embeddings": False},
    }  # fmt: skip
    torch.manual_seed(1)
    model = shape | {"pad_token_id": PAD}
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model))
    lm.get_input_embeddings().weight.data[PAD] = 0.25
    lm.save_pretrained(tmp_path)
    (weight, gradient, expected), = run_ranks(gradients, 1, str(tmp_path), {})  # fmt: skip
    assert torch.equal(weight, lm.get_input_embeddings().weight.detach())
    assert gradient[PAD].abs().sum() > 0 and torch.allclose(gradient, expected, atol=1e-6)
    (weight, gradient, expected), = run_ranks(gradients, 1, None, model)  # fmt: skip
    assert weight[PAD].abs().sum() > 0 and torch.allclose(gradient, expected, atol=1e-6)
