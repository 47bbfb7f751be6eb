"""The private and undocumented names of DeepSpeed that this package uses. No other file uses them.

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
inside the functions, because the import changes torch for the whole process, and `whole_shape` does not need it.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_slm.backend.stored import Extent, StoredWeight, extent, read_layout, span, stored

GROUPS = ("_WORLD_GROUP", "_ZERO_PARAM_INTRA_PARALLEL_GROUP", "_ALL_TO_ALL_GROUP", "mesh_device")
"""Variables of deepspeed.utils.groups that hold process groups; at first they are empty dicts or None."""


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Return whether ZeRO-3 has partitioned a parameter, so that its own shape is [0] outside of a forward."""
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
    """Make DeepSpeed forget the process groups of an earlier run in this process, and look up those of this run.

    It keeps them in variables of its modules, and clears these only if it destroys the process group itself.
    """
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    comm.cdb = None
    for name in GROUPS:
        if not hasattr(groups, name):
            raise AttributeError(f"deepspeed.utils.groups has no {name}, so this version of DeepSpeed is not supported")
        setattr(groups, name, {} if isinstance(getattr(groups, name), dict) else None)


def forget_modules(module: nn.Module | None = None) -> None:
    """Remove a module, or all modules, from DeepSpeed's state of the process.

    This state is a stack of running modules, which stays filled after a failed forward, and a cache of the parameters
    that each module releases.
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
    """Return the float32 weights of a checkpoint of any stage, by name, as `deepspeed.utils.zero_to_fp32` joins them.

    That program holds all weights of stages 1 and 2 in memory; this function only locates them.

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
    # Indexed by rank, then by group of the optimizer.
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
    """Return the weights of stage 3: every rank holds an equal, padded part of each, in order, in its flat groups."""
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
    """Return the weights of stages 1 and 2: a group holds them in order, padded, in equal parts per rank."""
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
    """Raise a ValueError if more than padding is left over: the layout is not the one that this file reads."""
    there = sum(part.numel for part in held)
    if -(-there // alignment) != -(-used // alignment):
        raise ValueError(f"the checkpoint holds {there} numbers in a group of which {used} were expected")
