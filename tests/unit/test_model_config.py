"""Keys of `model.config`: each has an effect, or is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from megatron_slm.errors import UserError
from megatron_slm.models.configuration import model_config
from megatron_slm.models.settings import ModelSettings
from tests.runs import LLAMA

SPECIAL = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": None}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 32,
}
GEMMA3 = {
    **{"model_type": "gemma3_text", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16},
}


def resolve(config: dict[str, Any], path: Path | None = None, trusted: bool = False) -> Any:
    settings = ModelSettings(path=str(path) if path else None, config=config, trust_remote_code=trusted)
    return model_config(settings, 10, SPECIAL)


def stored(folder: Path, model: dict[str, Any]) -> Path:
    AutoConfig.for_model(**model, vocab_size=20).save_pretrained(folder)
    return folder


def refusal(config: dict[str, Any], path: Path | None = None, trusted: bool = False) -> UserError:
    with pytest.raises(UserError) as caught:
        resolve(config, path, trusted)
    return caught.value


GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_head": 2}
GROUPED = {"model_type": "gemma3", "text_config": {"vocab_size": 20}}


LLAMA_LACKS, GPT2_LACKS = "LlamaConfig has no such attribute", "GPT2Config has no such attribute"
TWO_THETAS = {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}


@pytest.mark.parametrize(
    ("model", "changed", "setting", "reason", "remedy"),
    [
        (LLAMA, {"n_layers": 2}, "n_layers", LLAMA_LACKS, "Did you mean"),
        (LLAMA, {"max_positon_embeddings": 9}, "max_positon_embeddings", LLAMA_LACKS, "max_position_embeddings?"),
        (LLAMA, {"trust_remote_code": True}, "trust_remote_code", LLAMA_LACKS, "Set model.trust_remote_code instead"),
        (LLAMA, {"temperature": 0.5}, "temperature", LLAMA_LACKS, ""),
        (GPT2, {"rope_theta": 5e5}, "rope_theta", f"{GPT2_LACKS}, because its positions are not rotary", "Remove it"),
        (GPT2, {"n_positions": 64, "max_position_embeddings": 32}, "n_positions", "two names of one attribute", ""),
        (LLAMA, TWO_THETAS, "rope_parameters.rope_theta", "two values", "rope_parameters alone"),
        (LLAMA, {"rope_scaling": {"type": "linear", "rope_type": "yarn"}}, "rope_scaling.type", "yarn", ""),
        (
            LLAMA,
            {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            "rope_parameters.",
            "two values",
            "",
        ),
    ],
)
def test_a_key_without_an_effect_is_refused(
    model: dict[str, Any], changed: dict[str, Any], setting: str, reason: str, remedy: str, tmp_path: Path
) -> None:
    for error in (refusal(model | changed), refusal(changed, stored(tmp_path, model))):
        assert error.setting.startswith(f"model.config.{setting}")
        assert reason in error.reason and remedy in error.remedy
        if setting in changed:
            assert error.value == changed[setting]


@pytest.mark.parametrize(
    ("model_type", "remedy"), [("llamma", "Did you mean llama?"), ("a" * 40, "Use one of Hugging Face's model types")]
)
def test_an_unknown_model_type_is_refused(model_type: str, remedy: str) -> None:
    error = refusal({"model_type": model_type})
    assert (error.setting, error.value, error.remedy) == ("model.config.model_type", model_type, remedy)


def test_a_key_in_a_nested_group_is_checked_against_that_group(tmp_path: Path) -> None:
    text = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 20}
    path = stored(tmp_path, {"model_type": "gemma3", "text_config": text})
    error = refusal({"text_config": {"n_layerz": 3}}, path)
    assert (error.setting, error.value) == ("model.config.text_config.n_layerz", 3)
    config = AutoConfig.from_pretrained(path)
    from megatron_slm.models.configuration import _change

    _change(config, {"text_config": {"attention_bias": True}}, "model.config", str(path))
    assert config.text_config.attention_bias is True and config.text_config.hidden_size == 32


def test_a_model_type_that_differs_from_the_path_is_refused(tmp_path: Path) -> None:
    path = stored(tmp_path, LLAMA)
    error = refusal({"model_type": "mistral"}, path)
    assert (error.setting, error.value) == ("model.config.model_type", "mistral")
    assert f"model.path is {path}, a model of type llama" in error.reason
    assert resolve({"model_type": "llama"}, path).hidden_size == 32


@pytest.mark.parametrize(
    "config",
    [
        LLAMA | {"rms_norm_eps": 1e-5, "use_cache": False, "attn_implementation": "eager", "torch_dtype": "float32"},
        {"model_type": "gpt2", "n_embd": 32, "hidden_size": 32, "n_head": 2, "n_positions": 64},
        {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "tie_word_embeddings": False},
        {"model_type": "gpt_neox", "hidden_size": 32, "num_attention_heads": 2, "rotary_pct": 0.5, "pad_token_id": 3},
    ],
)
def test_attributes_that_are_read_are_accepted(config: dict[str, Any]) -> None:
    resolved = resolve(config)
    for key, value in config.items():
        if key not in ("model_type", "attn_implementation", "torch_dtype", "rotary_pct"):
            assert getattr(resolved, key) == value


def test_keys_of_the_stored_configuration_may_be_changed(tmp_path: Path) -> None:
    path = stored(tmp_path, LLAMA)
    tree = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(tree | {"license_of_ours": "a"}))
    assert resolve({"license_of_ours": "b"}, path).license_of_ours == "b"


def test_attributes_of_code_that_comes_with_a_model_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n"
        "class OwnConfig(LlamaConfig):\n"
        "    model_type = 'own'\n"
        "    def __init__(self, own_gate=1, **kwargs):\n"
        "        super().__init__(**kwargs)\n"
        "        self.own_gate = own_gate\n"
    )
    (tmp_path / "modeling_own.py").write_text("def forward(config):\n    return getattr(config, 'own_scale', 1.0)\n")
    tree = {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}, "vocab_size": 20}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    (tmp_path / "__init__.py").write_text("")
    assert resolve({"own_gate": 2}, tmp_path, trusted=True).own_gate == 2
    error = refusal({"own_gait": 2}, tmp_path, trusted=True)
    assert (error.setting, error.value) == ("model.config.own_gait", 2)
    assert "OwnConfig has no such attribute" in error.reason and error.remedy == "Did you mean own_gate?"


DEFAULT = {"rope_type": "default", "rope_theta": 5e5}
LINEAR = {"factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"rope_theta": 5e5}, DEFAULT),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, LINEAR | {"rope_type": "linear"}),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, LLAMA3 | {"rope_theta": 5e5}),
        ({"rope_theta": 5e5, "rope_parameters": LLAMA3}, LLAMA3 | {"rope_theta": 5e5}),
        ({"rope_theta": 5e5, "rope_parameters": DEFAULT}, DEFAULT),
        ({"rope_parameters": {"rope_theta": 5e5}}, DEFAULT),
        ({"rope_scaling": None}, DEFAULT | {"rope_theta": 1e4}),
    ],
)
def test_older_names_of_rotary_positions_are_translated(
    changed: dict[str, Any], expected: dict[str, Any], read: bool, tmp_path: Path
) -> None:
    given = copy.deepcopy(changed)
    resolved = resolve(changed, stored(tmp_path, LLAMA)) if read else resolve(LLAMA | changed)
    assert resolved.rope_parameters == expected
    assert not {"rope_theta", "rope_scaling"} & resolved.to_dict().keys()
    assert changed == given, "the run's own settings are as they were"
    resolved.save_pretrained(tmp_path / "again")
    assert AutoConfig.from_pretrained(tmp_path / "again").rope_parameters == expected


def test_stored_rotary_parameters_stay_unless_they_are_changed(tmp_path: Path) -> None:
    path = stored(tmp_path, LLAMA | {"rope_parameters": LLAMA3 | {"rope_theta": 3e5}})
    assert resolve({"rope_theta": 5e5}, path).rope_parameters == LLAMA3 | {"rope_theta": 5e5}
    other = resolve({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, path).rope_parameters
    assert other == {"rope_type": "linear", "factor": 2.0, "rope_theta": 3e5}


@pytest.mark.parametrize("read", [False, True])
def test_layers_of_several_types_have_rotary_positions_of_their_own(read: bool, tmp_path: Path) -> None:
    def rope(changed: dict[str, Any]) -> dict[str, Any]:
        path = stored(tmp_path, GEMMA3)
        return (resolve(changed, path) if read else resolve(GEMMA3 | changed)).rope_parameters

    near = {"rope_type": "default", "rope_theta": 1e4}
    assert rope({"rope_theta": 5e5}) == {"full_attention": near | {"rope_theta": 5e5}, "sliding_attention": near}
    # As large as that of the other layers already is.
    assert rope({"rope_theta": 1e4}) == {"full_attention": near, "sliding_attention": near}
    far = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    scaled = rope({"rope_scaling": {"rope_type": "linear", "factor": 8.0}})
    assert scaled == {"full_attention": far, "sliding_attention": near}
    assert rope({"rope_parameters": {"full_attention": far, "sliding_attention": near}}) == scaled
