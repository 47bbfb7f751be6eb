"""The private and undocumented names of DeepSpeed that this package uses. No other file touches any.

    deepspeed.ops.__compatible_ops__                          extensions that DeepSpeed may compile
    deepspeed.comm.comm.cdb                                   process group of this process
    deepspeed.utils.groups._WORLD_GROUP and others            further process groups, see GROUPS
    deepspeed.runtime.zero.parameter_offload.FWD_MODULE_STACK modules whose forward is running
    PartitionedParameterCoordinator.__params_to_release       a cache that keeps these modules alive
    DeepSpeedEngine._copy_recovery_script, .checkpoint_engine what writes files in `save_checkpoint`
    parameter.ds_id, parameter.ds_shape                       mark of a partitioned parameter, and its whole shape
    deepspeed.checkpoint.constants                            names of a checkpoint's files, and of what they hold
    deepspeed.utils.zero_to_fp32.natural_keys                 order of these files

Checked with DeepSpeed 0.19.8. `tests/contracts/test_private_names.py` fails when one is gone. DeepSpeed is imported
inside the functions, because the import changes torch for the whole process, and `whole_shape` needs none.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_slm.backend.stored import Extent, StoredWeight, extent, read_layout, span, stored

GROUPS: dict[str, Callable[[], Any]] = {
    "_WORLD_GROUP": lambda: None,
    "_ZERO_PARAM_INTRA_PARALLEL_GROUP": lambda: None,
    "_ALL_TO_ALL_GROUP": dict,
    "mesh_device": lambda: None,
}
"""Variables of deepspeed.utils.groups that hold process groups, and their first values."""


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Return whether ZeRO-3 holds a parameter, so that its own shape is [0] outside of a forward."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of a parameter before ZeRO-3 partitioned it, or its own shape if it is whole."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def skip_shared_memory_extension() -> None:
    """Keep DeepSpeed from compiling its CPU collectives at start: a minute, and an error without a compiler."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def forget_groups() -> None:
    """Let DeepSpeed look up the process group of this run; it keeps those of an earlier run of this process.

    They are variables of its modules, and no function clears them.
    """
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    comm.cdb = None
    for name, empty in GROUPS.items():
        if not hasattr(groups, name):
            raise AttributeError(f"deepspeed.utils.groups has no {name}, so this version of DeepSpeed is not supported")
        setattr(groups, name, empty())


def forget_modules(module: nn.Module | None = None) -> None:
    """Remove a module, or every module, from what DeepSpeed keeps for as long as the process lives.

    That is a stack of running modules, which a failed forward leaves filled, and a cache of what each of them releases.
    """
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [] if module is None else [other for other in stack if other is not module]
    release = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    inspect.getclosurevars(release).nonlocals["func"].cache_clear()


@contextmanager
def write_errors_collected(engine: Any) -> Iterator[list[Exception]]:
    """Collect the errors of writing in `save_checkpoint`, so that this rank still reaches the barriers that follow.

    Args:
        engine: a DeepSpeedEngine.

    Yields:
        The list to which the errors are added.
    """
    failures: list[Exception] = []
    with (
        _errors_collected(failures, engine.checkpoint_engine, "save"),
        _errors_collected(failures, engine, "_copy_recovery_script"),
    ):
        yield failures


@contextmanager
def _errors_collected(failures: list[Exception], owner: Any, name: str) -> Iterator[None]:
    write = getattr(owner, name)

    def try_to_write(*args: Any, **kwargs: Any) -> None:
        try:
            write(*args, **kwargs)
        except (OSError, RuntimeError) as error:
            failures.append(error)

    setattr(owner, name, try_to_write)
    try:
        yield
    finally:
        delattr(owner, name)


def read_weights(engine_folder: Path) -> dict[str, StoredWeight]:
    """Return the float32 weights of a checkpoint of any stage, as `deepspeed.utils.zero_to_fp32` puts them together.

    That program holds the whole weights of stages 1 and 2 in memory; this function reads none of them.

    Args:
        engine_folder: the folder that `save_checkpoint` wrote for a tag. Its files are pickles, which can run code.

    Raises:
        ValueError: the layout is not the one that this file reads.
    """
    from deepspeed.checkpoint import constants
    from deepspeed.utils.zero_to_fp32 import natural_keys

    model_files, optimizer_files = (
        sorted(engine_folder.glob("*" + suffix), key=lambda path: natural_keys(path.name))
        for suffix in (constants.MODEL_FILE_SUFFIX, constants.OPTIM_FILE_SUFFIX)
    )
    main_file = model_files[0]
    model = read_layout(main_file, weights_only=False)
    module = model["module"]
    if not optimizer_files:  # stage 0: the module holds whole float32 weights
        return {name: stored(main_file, tensor) for name, tensor in module.items()}
    states = [read_layout(file, weights_only=False)[constants.OPTIMIZER_STATE_DICT] for file in optimizer_files]
    count = states[0][constants.PARTITION_COUNT]
    if (max(count) if isinstance(count, list) else count) != len(optimizer_files):
        raise ValueError(
            f"{engine_folder} holds the optimizer states of {len(optimizer_files)} ranks instead of {count}"
        )
    sharded = states[0].get(constants.ZERO_STAGE, 1) == 3  # the optimizer of bf16 at stage 1 does not write its stage
    key = constants.FP32_FLAT_GROUPS if sharded else constants.SINGLE_PARTITION_OF_FP32_GROUPS
    # By rank, then by group of the optimizer.
    groups = [[extent(file, flat) for flat in state[key]] for file, state in zip(optimizer_files, states, strict=True)]
    shapes = model[constants.PARAM_SHAPES]
    weights = {name: stored(main_file, module[name]) for name in model[constants.BUFFER_NAMES] if name in module}
    if sharded:
        weights |= _weights_of_stage_3(groups, {name: shape for group in shapes for name, shape in group.items()})
    else:
        weights |= _weights_of_stages_1_and_2(groups, shapes, states[0].get(constants.PARAM_ALIGNMENT_PADDINGS))
    frozen_shapes = model.get(constants.FROZEN_PARAM_SHAPES) or {}
    if frozen_shapes:
        # At stage 3 each rank's model file holds a part of the frozen weights; otherwise all files hold them whole.
        held = model_files if sharded else [main_file]
        models = [read_layout(file, weights_only=False)[constants.FROZEN_PARAM_FRAGMENTS] for file in held]
        weights |= _frozen_weights(held, models, frozen_shapes)
    shared = model["shared_params"].items()
    return weights | {name: weights[other] for name, other in shared if other in weights}


def _frozen_weights(
    files: list[Path], models: list[dict[str, torch.Tensor]], shapes: dict[str, torch.Size]
) -> dict[str, StoredWeight]:
    weights: dict[str, StoredWeight] = {}
    for name, shape in shapes.items():
        parts = [extent(file, model[name]) for file, model in zip(files, models, strict=True)]
        weights[name] = StoredWeight(shape, span(parts, 0, shape.numel()))
    return weights


def _weights_of_stage_3(groups: list[list[Extent]], shapes: dict[str, torch.Size]) -> dict[str, StoredWeight]:
    """Return weights of which each rank holds an equal part, padded, in its flat groups one after the other."""
    weights: dict[str, StoredWeight] = {}
    start = 0
    for name, shape in shapes.items():
        part = -(-shape.numel() // len(groups))
        held = [found for rank in groups for found in span(rank, start, start + part)]
        weights[name] = StoredWeight(shape, span(held, 0, shape.numel()))
        start += part
    _refuse_rest(groups[0], start, 1)
    return weights


def _weights_of_stages_1_and_2(
    groups: list[list[Extent]], shapes: list[dict[str, torch.Size]], paddings: list[list[int]] | None
) -> dict[str, StoredWeight]:
    """Return weights that follow each other, padded, in each group, which is cut into equal parts, one per rank."""
    weights: dict[str, StoredWeight] = {}
    for index, group in enumerate(shapes):
        held = [rank[index] for rank in groups]
        padding = paddings[index] if paddings else [0] * len(group)
        start = 0
        for (name, shape), space in zip(group.items(), padding, strict=True):
            weights[name] = StoredWeight(shape, span(held, start, start + shape.numel()))
            start += shape.numel() + space
        _refuse_rest(held, start, 2 * len(groups))
    return weights


def _refuse_rest(held: list[Extent], used: int, alignment: int) -> None:
    """Raise an error if numbers are left over, aside from padding: the layout is not the one that this file reads."""
    there = sum(part.numel for part in held)
    if -(-there // alignment) != -(-used // alignment):
        raise ValueError(f"the checkpoint holds {there} numbers in a group of which {used} were expected")
