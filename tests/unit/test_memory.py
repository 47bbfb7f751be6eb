"""The estimate of a rank's memory, against the tensors that PyTorch keeps."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from megatron_slm.planning.memory import REDUCE_BUCKET, MemorySettings, RankMemory, rank_memory
from megatron_slm.training.cost import ModelSize, TokenFlops, model_size

MODELS = {
    "llama": {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 64, "n_head": 4, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "qwen3": {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2},
}
SIZE = ModelSize(
    (600, 200, 100, 100),
    900,
    4,
    layer_bytes=50,
    boundary_bytes=10,
    cache_bytes=4,
    head_bytes=7,
    head=100,
    flops=TokenFlops(0.0, 0.0),
)


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


def memory_of(references: Sequence[bool] = (), each: int = 4, **options: Any) -> RankMemory:
    """The memory of a run of `SIZE`, with a reference of the same size per entry, sharded or not."""
    common: dict[str, Any] = {"ranks": 1, "zero": {"stage": 3}, "checkpointing": False}
    return rank_memory(SIZE, [(SIZE, shard) for shard in references], MemorySettings(each=each, **common | options))


def test_replay_holds_keys_and_values_of_all_and_the_activations_of_its_share() -> None:
    def activations(**options: Any) -> int:
        return memory_of(zero={"stage": 0}, **options).phases["forward, backward"]["activations"]

    # The head works on 7 bytes and a gradient of 100 numbers, more than the 50 bytes of a layer.
    assert activations() == 4 * 50
    assert activations(replayed=0.5) == 4 * (25 + 4)
    assert activations(replayed=0.5, checkpointing=True) == 4 * (5 + 4)


def test_stages_partition_what_their_name_says() -> None:
    def held(stage: int) -> dict[str, int]:
        zero = {"stage": stage, "reduce_bucket_size": 10, "stage3_param_persistence_threshold": 0}
        parts = memory_of(ranks=4, each=2, zero=zero).phases["forward, backward"]
        return {name: size for name, size in parts.items() if name in ("weights", "gradients", "optimizer", "buffers")}

    assert held(0) == {"weights": 2000, "gradients": 4000, "optimizer": 8000}
    assert held(1) == held(0) | {"optimizer": 3000}
    assert held(2) == held(1) | {"gradients": 1000}
    assert held(3) == held(2) | {"weights": 500, "buffers": 40}


def test_small_weights_stay_whole_on_every_rank_but_the_only_one() -> None:
    zero = {"stage": 3, "stage3_param_persistence_threshold": 100}
    assert memory_of(ranks=4, zero=zero).device["weights"] == 4 * (250 + 200)
    assert memory_of(ranks=1, zero=zero).device["weights"] == 4 * 1000


def test_gathered_weights_grow_to_the_limit_and_by_one_weight() -> None:
    def gathered(**zero: int) -> int:
        settings = {"stage": 3, "stage3_param_persistence_threshold": 0} | zero
        return memory_of(ranks=4, zero=settings).phases["forward, backward"]["gathered weights"]

    assert gathered() == 4 * 1000
    assert gathered(stage3_max_live_parameters=200) == 4 * (200 + 600)


def test_a_full_bucket_is_copied_while_the_rest_of_the_layers_waits() -> None:
    zero = {"stage": 3, "reduce_bucket_size": 250, "stage3_param_persistence_threshold": 0}
    parts = memory_of(ranks=4, zero=zero).phases["reduction"]
    # A quarter of the model has passed: three quarters of 4 layers of 50 bytes wait, and one more layer works.
    assert parts["activations"] == 150 + 50
    assert parts["reduction"] == 4 * (250 + 600) and parts["buffers"] == 4 * 250
    assert "reduction" not in memory_of(ranks=1, zero=zero).phases["reduction"]


def test_an_update_on_a_cpu_makes_a_flat_gradient_and_two_tensors_of_its_largest_group() -> None:
    def update(stage: int, **zero: int) -> int:
        return memory_of(ranks=4, zero={"stage": stage} | zero, on_cpu=True).phases["update"].get("update", 0)

    # Weights with decay are a group of 900, divided among 4 ranks.
    assert [update(stage) for stage in (0, 1, 2, 3)] == [0, 8 * 225, 8 * 225, 12 * 225]
    assert update(3, sub_group_size=100) == 12 * 100
    assert memory_of(ranks=4).phases["update"]["update"] == 4 * 225


def test_a_cpu_holds_no_bucket_beyond_the_model() -> None:
    assert memory_of().device["buffers"] == 4 * REDUCE_BUCKET
    assert memory_of(on_cpu=True).device["buffers"] == 4 * 1000


def test_offload_moves_to_the_host_and_a_sharded_reference_is_divided() -> None:
    def at(*shard: bool, **zero: object) -> RankMemory:
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0} | zero
        return memory_of(shard, ranks=2, zero=zero, checkpointing=True)

    assert at(False).device["reference"] == 4 * 1000
    assert at(True).device["reference"] == 4 * 500
    assert at(True, False).device["reference"] == 4 * 1500
    assert at(True).phases["reference"]["gathered weights"] == 4 * 1000
    assert "gathered weights" not in at(False).phases["reference"]
    assert "reference" not in at().phases and "reference" not in at().device
    offloaded = at(True, offload_optimizer={"device": "cpu"}, offload_param={"device": "none"})
    assert offloaded.host == {"optimizer": 6000, "gradients": 2000}
    assert "optimizer" not in offloaded.device and "weights" in offloaded.device
