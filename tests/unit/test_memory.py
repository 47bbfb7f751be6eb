"""The estimate of a rank's memory, against the tensors that PyTorch keeps."""

from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from megatron_slm.training.cost import ModelSize, TokenFlops, model_size, rank_memory

MODELS = {
    "llama": {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 64, "n_head": 4, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "qwen3": {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2},
}
SIZE = ModelSize(1000, 4, layer_bytes=50, boundary_bytes=10, cache_bytes=4, head_bytes=7, flops=TokenFlops(0.0, 0.0))


def make(name: str, layers: int) -> PretrainedConfig:
    return AutoConfig.for_model(name, **MODELS[name], vocab_size=100, num_hidden_layers=layers)


def really_kept(name: str, layers: int, samples: int, seq_length: int) -> int:
    """Return the bytes of all tensors, without weights, that a real forward keeps for its backward."""
    model = AutoModelForCausalLM.from_config(make(name, layers))
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def see(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(see, lambda tensor: tensor):
        output = model.base_model(input_ids=torch.zeros(samples, seq_length, dtype=torch.long), use_cache=False)
        assert output is not None
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_sized_as_it_really_is(name: str) -> None:
    size = model_size(make(name, 6), samples=3, seq_length=40, precision=torch.float32)
    truth = AutoModelForCausalLM.from_config(make(name, 6))
    assert size.parameters == sum(parameter.numel() for parameter in truth.parameters())
    assert size.boundary_bytes == 3 * 40 * 64 * 4
    layer = really_kept(name, 2, 3, 40) - really_kept(name, 1, 3, 40)
    assert size.layer_bytes == pytest.approx(layer, rel=0.25)
    assert model_size(make(name, 6), 3, 40, torch.bfloat16).layer_bytes < size.layer_bytes
    width = {"llama": 2 * 16, "gpt2": 4 * 16, "qwen3": 2 * 128}[name]
    assert size.cache_bytes == 2 * 3 * 40 * width * 4


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_one_layer_is_sized_too(name: str) -> None:
    one, two = (model_size(make(name, layers), 1, 8, torch.float32) for layers in (1, 2))
    assert one.layers == 1 and one.layer_bytes == two.layer_bytes and one.parameters < two.parameters


def test_replay_holds_keys_and_values_of_all_and_the_activations_of_its_share() -> None:
    def activations(**options: Any) -> int:
        common = {"ranks": 1, "precision": torch.float32, "zero": {"stage": 0}, "checkpointing": False}
        return rank_memory(SIZE, [], **common | options).device["activations"]

    assert activations() == 4 * 50 + 50
    assert activations(replayed=0.5) == 4 * (25 + 4) + 50
    assert activations(replayed=0.5, checkpointing=True) == 4 * (5 + 4) + 50


def test_stages_partition_what_their_name_says() -> None:
    def at(stage: int) -> dict[str, int]:
        zero = {"stage": stage, "reduce_bucket_size": 10, "stage3_max_live_parameters": 20}
        return rank_memory(SIZE, [], ranks=4, precision=torch.bfloat16, zero=zero, checkpointing=False).device

    def on_a_cpu(stage: int, **zero: int) -> int:
        options: dict[str, Any] = {"ranks": 4, "precision": torch.float32, "checkpointing": False, "fused": False}
        return rank_memory(SIZE, [], zero={"stage": stage} | zero, **options).device.get("update", 0)

    # Without a fused kernel, AdamW makes two tensors as large as what it updates at a time.
    assert [on_a_cpu(stage) for stage in (0, 1, 2, 3)] == [0, 2000, 2000, 2000]
    assert on_a_cpu(3, sub_group_size=100) == 800
    assert "update" not in at(3)
    assert at(0) == {"weights": 2000, "gradients": 4000, "optimizer": 8000, "activations": 250, "head": 7}
    assert at(1) == at(0) | {"optimizer": 3000, "buffers of ZeRO": 20}
    assert at(2) == at(1) | {"gradients": 1000}
    assert at(3) == at(2) | {"weights": 500, "buffers of ZeRO": 60}


def test_offload_moves_to_the_host_and_a_sharded_reference_is_divided() -> None:
    def at(*shard: bool, **zero: object) -> tuple[dict[str, int], dict[str, int]]:
        found = rank_memory(
            SIZE,
            [(SIZE, one) for one in shard],
            ranks=2,
            precision=torch.float32,
            zero={"stage": 3, "stage3_max_live_parameters": 100} | zero,
            checkpointing=True,
        )
        return found.device, found.host

    assert at(False)[0]["reference"] == 4 * 1000 + 50
    assert at(True)[0]["reference"] == 4 * 500 + 4 * 100 + 50
    assert at(True, False)[0]["reference"] == at(True)[0]["reference"] + at(False)[0]["reference"]
    assert "reference" not in at()[0]
    assert at(True)[0]["activations"] == 4 * 10 + 50
    device, host = at(True, offload_optimizer={"device": "cpu"}, offload_param={"device": "none"})
    assert host == {"optimizer": 6000, "gradients": 2000} and "optimizer" not in device and "weights" in device
