"""Checks of a model before it is trained: models that would train wrongly without an error are refused."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from megatron_slm.errors import UserError
from megatron_slm.models.causal_lm import CausalLM
from megatron_slm.models.checks import check_dropout, check_dropout_settings, check_head, check_length, check_packing
from tests.unit.test_head import SHAPES, VOCAB, tiny_config

CHANGED_LOGITS = {
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 30.0},
    "cohere": {"num_key_value_heads": 2, "logit_scale": 0.0625},
    "granite": {"num_key_value_heads": 2, "logits_scaling": 8.0},
}


def tiny_model(model_type: str, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(model_type, **options), dtype=dtype)


def refused_head(lm: PreTrainedModel) -> None:
    with pytest.raises(UserError) as caught:
        check_head(lm)
    assert (caught.value.setting, caught.value.value) == ("architecture", type(lm).__name__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", [*SHAPES, "phi"])
def test_models_whose_logits_are_hidden_states_times_the_head_are_accepted(
    model_type: str, tied: bool, dtype: torch.dtype
) -> None:
    check_head(tiny_model(model_type, dtype, tied=tied))


@pytest.mark.parametrize("initializer_range", [1.0, 0.02, 0.0])
@pytest.mark.parametrize("model_type", list(CHANGED_LOGITS))
def test_models_that_cap_or_scale_their_logits_are_refused(model_type: str, initializer_range: float) -> None:
    """The check does not depend on the weights, though a cap has an effect only on large logits."""
    lm = tiny_model(model_type, initializer_range=initializer_range, **CHANGED_LOGITS[model_type])
    refused_head(lm)


def test_dropout_does_not_affect_the_check_of_the_head() -> None:
    lm = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    for _ in range(5):
        check_head(lm)
    assert lm.training


def test_nan_weights_do_not_affect_the_check_of_the_head() -> None:
    lm = tiny_model("llama")
    nn.init.constant_(lm.base_model.norm.weight, torch.nan)
    check_head(lm)


def test_a_layer_between_hidden_states_and_head_is_refused() -> None:
    lm = tiny_model("llama")
    lm.lm_head.register_forward_pre_hook(lambda head, inputs: (1.05 * inputs[0],))
    refused_head(lm)


def test_a_model_without_a_base_model_is_refused() -> None:
    lm = tiny_model("llama")
    lm.base_model_prefix = "nothing"
    refused_head(lm)


def test_a_head_that_does_more_than_a_product_is_refused() -> None:
    class Normed(nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(hidden, nn.functional.normalize(self.weight))

    lm = tiny_model("llama")
    lm.lm_head = Normed(32, VOCAB, bias=False)
    refused_head(lm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", [*SHAPES, "gpt_neox", "phi", "mixtral"])
def test_models_that_restart_at_documents_are_accepted(model_type: str, dtype: torch.dtype) -> None:
    options = {"num_key_value_heads": 2} if model_type == "mixtral" else {}
    lm = tiny_model(model_type, dtype, initializer_range=0.02, **options)
    check_packing(CausalLM(lm), lm)


LEAKY = {
    "bloom": {},
    "falcon_h1": {"num_key_value_heads": 2, "mamba_chunk_size": 16},
    "mamba": {},
    "opt": {"ffn_dim": 64},
    "qwen3_next": {},
    "xglm": {},
}


@pytest.mark.parametrize("model_type", list(LEAKY))
def test_models_that_attend_across_packed_documents_are_refused(model_type: str) -> None:
    lm = tiny_model(model_type, initializer_range=0.02, **LEAKY[model_type])
    with pytest.raises(UserError) as caught:
        check_packing(CausalLM(lm), lm)
    assert (caught.value.setting, caught.value.value) == ("data.reset_attention", True)
    assert type(lm).__name__ in caught.value.reason


def test_a_leak_in_only_the_second_sequence_of_a_batch_is_found() -> None:
    """Some kernels read restarts from the first sequence alone."""
    lm = tiny_model("llama")

    class FirstRowOnly(CausalLM):
        def forward(self, tokens_BT: Any, labels_BT: Any, position_ids_BT: Any, want: Any = ()) -> Any:  # type: ignore[override]
            straight_T = torch.arange(position_ids_BT.shape[1])
            return super().forward(tokens_BT, labels_BT, torch.stack([position_ids_BT[0], straight_T]), want)

    with pytest.raises(UserError) as caught:
        check_packing(FirstRowOnly(lm), lm)
    assert caught.value.setting == "data.reset_attention"


DROPOUTS = [
    ("gpt2", {"resid_pdrop": 0.1}, "resid_pdrop"),
    ("bert", {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.0}, "hidden_dropout_prob"),
    ("bert", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.1}, "attention_probs_dropout_prob"),
    ("opt", {"dropout": 0.0, "layerdrop": 0.1}, "layerdrop"),
    ("mpt", {"attn_config": {"attn_pdrop": 1}}, "attn_config.attn_pdrop"),
]


@pytest.mark.parametrize(("model_type", "options", "name"), DROPOUTS)
def test_dropout_is_found_under_any_name(model_type: str, options: dict[str, Any], name: str) -> None:
    off = SHAPES["gpt2"] if model_type == "gpt2" else {}
    with pytest.raises(UserError) as caught:
        check_dropout_settings(AutoConfig.for_model(model_type, **(off | options)))
    assert caught.value.setting == f"model.config.{name}" and caught.value.value > 0


def test_dropout_of_a_classifier_is_accepted() -> None:
    for model_type in ("gpt2", "gpt_neox"):
        config = tiny_config(model_type)
        assert {"summary_first_dropout": 0.1, "classifier_dropout": 0.1}.items() & config.to_dict().items()
        check_dropout_settings(config)
        check_dropout(AutoModelForCausalLM.from_config(config))


def test_a_dropout_module_is_found_whatever_its_setting_is_called() -> None:
    lm = tiny_model("llama")
    check_dropout(lm)
    lm.model.layers[1].mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.2))
    with pytest.raises(UserError) as caught:
        check_dropout(lm)
    assert "model.layers.1.mlp.act_fn.1" in caught.value.setting and caught.value.value == 0.2


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_sequences_longer_than_a_models_positions_are_refused(model_type: str) -> None:
    config = tiny_config(model_type)
    check_length(config, "model", 64)
    remedies = {
        "model": "Use 64 or less, or set model.config.max_position_embeddings=65",
        "reference": "Use 64 or less",
    }
    for setting, remedy in remedies.items():
        with pytest.raises(UserError) as caught:
            check_length(config, setting, 65)
        assert (caught.value.setting, caught.value.value, caught.value.remedy) == ("data.seq_length", 65, remedy)
        assert f"the {setting} supports at most 64 positions" in caught.value.reason
