"""Private names of libraries: each is touched in one file alone, and still exists."""

import ast
import importlib
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from megatron_slm import torch_internals
from megatron_slm.backend import deepspeed_internals
from megatron_slm.models import transformers_internals
from megatron_slm.torch_internals import is_compiled, offset_in_file, storage_id

PACKAGE = Path(__file__).parents[2] / "megatron_slm"
ADAPTERS = {"torch_internals.py", "transformers_internals.py", "deepspeed_internals.py", "megatron.py"}
OUR_OWN = {"self", "cls"}
DOCUMENTED = {"sys._current_frames", "os._exit"}
"""Names of Python's library that its documentation describes."""
PUBLIC = {"_replace", "_asdict", "_fields", "_exit", "_ArgumentGroup"}
"""Names of the standard library: documented, but for the type of an argument group, which annotations need."""

NAMES: list[tuple[ModuleType, str, str]] = [
    (torch_internals, "torch", "UntypedStorage._cdata"),
    (torch_internals, "torch", "UntypedStorage._checkpoint_offset"),
    (torch_internals, "torch._subclasses.fake_tensor", "FakeTensorMode"),
    (torch_internals, "torch.nn", "Module._compiled_call_impl"),
    (torch_internals, "torch.testing._internal.distributed.fake_pg", "FakeStore"),
    (transformers_internals, "transformers.masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS"),
    (transformers_internals, "transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS"),
    (transformers_internals, "transformers", "PretrainedConfig._attn_implementation"),
    (transformers_internals, "transformers", "PreTrainedModel._init_weights"),
    (transformers_internals, "transformers", "PreTrainedModel.loss_function"),
    (transformers_internals, "transformers", "PreTrainedModel.get_expanded_tied_weights_keys"),
    (transformers_internals, "transformers.models.mixtral.modeling_mixtral", "load_balancing_loss_func"),
    (transformers_internals, "transformers.pytorch_utils", "Conv1D"),
    (deepspeed_internals, "deepspeed.ops", "__compatible_ops__"),
    (deepspeed_internals, "deepspeed.comm.comm", "cdb"),
    *((deepspeed_internals, "deepspeed.utils.groups", name) for name in deepspeed_internals.GROUPS),
    (deepspeed_internals, "deepspeed.runtime.zero.parameter_offload", "FWD_MODULE_STACK"),
    (
        deepspeed_internals,
        "deepspeed.runtime.zero.partitioned_param_coordinator",
        "PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release",
    ),
    (deepspeed_internals, "deepspeed", "DeepSpeedEngine._copy_recovery_script"),
    (deepspeed_internals, "deepspeed.utils.zero_to_fp32", "natural_keys"),
    *(
        (deepspeed_internals, "deepspeed.checkpoint.constants", name)
        for name in (
            *("MODEL_FILE_SUFFIX", "OPTIM_FILE_SUFFIX", "OPTIMIZER_STATE_DICT", "PARTITION_COUNT", "ZERO_STAGE"),
            *("FP32_FLAT_GROUPS", "SINGLE_PARTITION_OF_FP32_GROUPS", "PARAM_SHAPES", "BUFFER_NAMES"),
            *("PARAM_ALIGNMENT_PADDINGS", "FROZEN_PARAM_SHAPES", "FROZEN_PARAM_FRAGMENTS"),
        )
    ),
]


@pytest.mark.parametrize(("adapter", "module", "path"), NAMES, ids=[f"{module}.{path}" for _, module, path in NAMES])
def test_a_private_name_exists_and_its_adapter_lists_it(adapter: ModuleType, module: str, path: str) -> None:
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        assert hasattr(found, name), f"{module}.{path} is gone, so {adapter.__name__} does not support this version"
        found = getattr(found, name)
    listed = inspect.getdoc(adapter) or ""
    if module.endswith(("constants", "groups")):
        assert module in listed
    else:
        assert name.removeprefix("_PartitionedParameterCoordinator") in listed


def test_a_loaded_tensor_has_its_place_in_the_file_and_others_have_none(tmp_path: Path) -> None:
    torch.save(torch.tensor([3.0, 4.0]), tmp_path / "saved.pt")
    offset = offset_in_file(torch.load(tmp_path / "saved.pt", map_location="meta"))
    assert offset is not None
    held = (tmp_path / "saved.pt").read_bytes()[offset : offset + 8]
    assert torch.frombuffer(bytearray(held), dtype=torch.float32).tolist() == [3.0, 4.0]
    assert offset_in_file(torch.ones(1)) is None


def test_views_share_the_storage_of_their_tensor_also_without_data() -> None:
    for device in ("cpu", "meta"):
        tensor = torch.ones(4, device=device)
        assert storage_id(tensor[1:]) == storage_id(tensor) != storage_id(tensor + 1)


def test_a_compiled_module_is_found() -> None:
    plain, compiled = nn.Sequential(nn.Linear(1, 1)), nn.Sequential(nn.Linear(1, 1))
    assert not is_compiled(plain) and is_compiled(torch.compile(plain))
    compiled[0].compile()
    assert is_compiled(compiled)


def test_a_replaced_token_loss_is_put_back() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=11, **shape))
    tokens_BT = torch.arange(4)[None]
    expected = lm(tokens_BT, labels=tokens_BT).loss
    with transformers_internals.token_loss_replaced(lm, lambda logits, *_, **__: logits.sum() * 0):
        assert lm(tokens_BT, labels=tokens_BT).loss == 0
    assert lm(tokens_BT, labels=tokens_BT).loss == expected and "_loss_function" not in vars(lm)
    assert transformers_internals.tied_weights(lm) == transformers_internals.weights_to_tie(lm) == {}


def test_deepspeed_marks_a_partitioned_parameter_by_the_names_that_are_read() -> None:
    """The tests of ZeRO-3 read the values; this one reports the name if DeepSpeed changes it."""
    from deepspeed import DeepSpeedEngine
    from deepspeed.runtime.zero import partition_parameters

    source = inspect.getsource(partition_parameters)
    for name in ("ds_id", "ds_shape"):
        assert f"param.{name} =" in source, f"DeepSpeed does not set {name} on a partitioned parameter"
    assert "self.checkpoint_engine" in inspect.getsource(DeepSpeedEngine)
    deepspeed_internals.forget_modules()


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_other_files_touch_no_private_name(path: Path) -> None:
    if path.name in ADAPTERS:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = node.value
            is_documented = ast.unparse(node) in DOCUMENTED
            is_own = isinstance(owner, ast.Name) and owner.id in OUR_OWN
            assert is_documented or is_own, f"{path}:{node.lineno}: {node.attr}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for module in modules:
                private = any(is_private(part) for part in f"{module}".split("."))
                assert not private or f"{module}".startswith("megatron_slm."), f"{path}:{node.lineno}: {module}"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC
