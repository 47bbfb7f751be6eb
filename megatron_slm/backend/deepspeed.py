"""DeepSpeed: ZeRO stages 0 to 3 for the student, stage 3 for a sharded reference."""

import copy
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint import constants
from deepspeed.comm import comm
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import groups
from deepspeed.utils.zero_to_fp32 import natural_keys
from pydantic import ValidationError
from torch import Tensor, nn

from megatron_slm.backend import EngineSettings, M, Update, refuse_other_ranks
from megatron_slm.backend.stored import Extent, StoredWeight, extent, read_layout, span, stored
from megatron_slm.dist import World
from megatron_slm.errors import UserError

TAG = "engine"
"""DeepSpeed's name for the folder inside a checkpoint. Ours is the folder around it."""

GROUPS: dict[str, Callable[[], Any]] = {
    "_WORLD_GROUP": lambda: None,
    "_ZERO_PARAM_INTRA_PARALLEL_GROUP": lambda: None,
    "_ALL_TO_ALL_GROUP": dict,
    "mesh_device": lambda: None,
}
"""Variables of deepspeed.utils.groups that hold process groups, and what they are at first."""

REFERENCE_KEYS = ("stage3_", "offload_param")
"""What of the user's ZeRO section makes sense without an optimizer."""


class DeepSpeedBackend:
    """See `Backend`.

    Args:
        world: this process among all.
        settings: the user's `deepspeed:` section; the stage is 3 unless it says otherwise.
        precision: of the weights in the forward pass.
    """

    def __init__(self, world: World, settings: dict[str, Any], precision: torch.dtype) -> None:
        self._world = world
        self._settings = copy.deepcopy(settings)
        self._settings.setdefault("zero_optimization", {}).setdefault("stage", 3)
        self._precision = precision
        self._engines: list[Any] = []
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # Once a step otherwise: DeepSpeed calls torch's collectives by their former names.
        warnings.filterwarnings("ignore", message=r".torch.distributed.\w+. is deprecated", category=FutureWarning)
        if world.device.type == "cpu":
            # It would be compiled at start: a minute, and an error where there is no compiler.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        _forget_groups()
        deepspeed.init_distributed(
            "nccl" if world.device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
        )
        _refuse_invalid(self.config(EngineSettings(1, 1, 0.0, precision)))

    @property
    def stage(self) -> int:
        return int(self._settings["zero_optimization"]["stage"])

    def construct(self, make: Callable[[], M]) -> M:
        if self.stage < 3:
            return make()
        from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

        # Transformers' switch is global to the process: on around the student only, or a
        # reference that is meant to be replicated would be partitioned too.
        switch = HfDeepSpeedConfig(self.config(EngineSettings(1, 1, 0.0, self._precision)))
        try:
            return make()
        finally:
            del switch
            unset_hf_deepspeed_config()

    def gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[object]:
        if self.stage < 3:
            return nullcontext()
        partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
        whole: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0)
        return whole

    def training_engine(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, settings: EngineSettings
    ) -> "DeepSpeedEngine":
        config = self.config(settings)
        if self.stage == 3:
            partition(module, config, self._world.device)
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        self._engines.append(engine)
        return DeepSpeedEngine(engine, self.stage, self._world)

    def frozen_engine(self, module: nn.Module, *, shard: bool) -> nn.Module:
        module = module.eval().requires_grad_(False)
        if not shard:
            return module.to(self._world.device)
        config = self.config(EngineSettings(1, 1, 0.0, self._precision))
        config["zero_optimization"] = {
            **{key: value for key, value in config["zero_optimization"].items() if key.startswith(REFERENCE_KEYS)},
            "stage": 3,
        }
        partition(module, config, self._world.device)
        engine: nn.Module = deepspeed.initialize(model=module, config=config)[0]
        self._engines.append(engine)
        engine.eval()
        return engine

    def release(self, engine: nn.Module) -> None:
        if engine in self._engines:  # a replicated module is none
            self._engines.remove(engine)
            _take_down(engine)

    def close(self) -> None:
        for engine in self._engines:
            _take_down(engine)
        self._engines.clear()
        parameter_offload.FWD_MODULE_STACK.clear()  # where a run failed in the middle of a forward
        _forget_groups()

    def stored_weights(self, folder: Path) -> dict[str, StoredWeight]:
        """DeepSpeed's checkpoints are pickles: only read a run directory that you trust."""
        return _stored_weights(folder / TAG)

    def config(self, settings: EngineSettings) -> dict[str, Any]:
        """The user's section and the keys that this system owns; DeepSpeed's own defaults are not relied on."""
        return copy.deepcopy(self._settings) | {
            "train_micro_batch_size_per_gpu": settings.micro_batch_size,
            "gradient_accumulation_steps": settings.accumulation,
            "gradient_clipping": settings.clip_grad,
            "bf16": {"enabled": settings.precision == torch.bfloat16},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": sys.maxsize,
        }


class DeepSpeedEngine:
    """See `TrainingEngine`."""

    def __init__(self, engine: Any, stage: int, world: World) -> None:
        self.module: nn.Module = engine
        self._engine = engine
        self._stage = stage
        self._world = world

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)
        if not last:
            self._engine.step()

    def step(self, learning_rate: float) -> Update:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if self._stage == 0:
            return self._step_unpartitioned()
        self._engine.step()
        return Update(self._engine.was_step_applied(), float(self._engine.get_global_grad_norm()))

    def _step_unpartitioned(self) -> Update:
        """Stage 0 neither reports the norm nor skips a gradient that is not finite, so both are done here."""
        gradients = [deepspeed.utils.safe_get_full_grad(p) for p in self._engine.module.parameters()]
        norm = float(nn.utils.get_total_norm([g for g in gradients if g is not None]))
        applied = norm < float("inf")
        if not applied:
            self._engine.optimizer.zero_grad(set_to_none=True)
            self._engine.set_gradient_accumulation_boundary(False)
        self._engine.step()
        return Update(applied, norm)

    def save(self, folder: Path) -> None:
        failures: list[Exception] = []
        engine = self._engine
        folder.mkdir(parents=True, exist_ok=True)
        with (
            _without_patterns(folder) as plain,
            _kept(failures, engine.checkpoint_engine, "save"),
            _kept(failures, engine, "_copy_recovery_script"),
        ):
            engine.save_checkpoint(str(plain), tag=TAG, save_latest=False)
        if failures:
            raise failures[0]

    def load(self, folder: Path) -> None:
        self._refuse_other_world_size(folder)
        with _without_patterns(folder) as plain:
            loaded, _ = self._engine.load_checkpoint(str(plain), tag=TAG)
        if loaded is None:
            raise UserError(f"The checkpoint {folder} holds no DeepSpeed state: resume from an earlier one.")

    def _refuse_other_world_size(self, folder: Path) -> None:
        saved = len(list((folder / TAG).glob("*zero_pp_rank_*_optim_states.pt")))
        if saved:
            refuse_other_ranks(folder, self._stage, saved, self._world.size)


def _forget_groups() -> None:
    """Let DeepSpeed find the process group of this run: it keeps those of an earlier run of this process.

    They lie in variables of its modules, with no function to clear them; checked with DeepSpeed 0.19.8.
    """
    comm.cdb = None
    for name, empty in GROUPS.items():
        if not hasattr(groups, name):
            raise AttributeError(f"deepspeed.utils.groups has no {name}: this version of DeepSpeed is not known here")
        setattr(groups, name, empty())


def _take_down(engine: Any) -> None:
    """Remove an engine's hooks, and what DeepSpeed keeps of its module for as long as the process lives.

    That is a stack of the modules that run, and a cache of what they release; checked with DeepSpeed 0.19.8.
    """
    engine.destroy()
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if module is not engine.module]
    release = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    inspect.getclosurevars(release).nonlocals["func"].cache_clear()


@contextmanager
def _without_patterns(folder: Path) -> Iterator[Path]:
    """Yield a path to the folder without `[`, `]`, `*` and `?`, which DeepSpeed would take for patterns of `glob`.

    That is the name that Linux gives to an open folder; it belongs to this process alone.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


@contextmanager
def _kept(failures: list[Exception], owner: Any, name: str) -> Iterator[None]:
    """Keep what a method that writes raises, so that this rank still comes to the barriers that follow it."""
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


def partition(module: nn.Module, config: dict[str, Any], device: torch.device) -> None:
    """Split parameters that were built whole, one at a time, so that no device ever holds them all.

    Buffers stay whole; DeepSpeed leaves those of a partitioned module where they are.
    """
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            owner._buffers[name] = buffer.to(device)
    if any(not hasattr(parameter, "ds_id") for parameter in module.parameters()):
        deepspeed.zero.Init(module=module, config_dict_or_path=config)


def _refuse_invalid(config: dict[str, Any]) -> None:
    """Ask DeepSpeed before anything is built, so that what it refuses is not mistaken for a broken model."""
    try:
        deepspeed.DeepSpeedConfig(config)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        # pydantic knows the place within a group, and not the group.
        groups = (f"{key}." for key, group in config.items() if isinstance(group, dict) and first["loc"][0] in group)
        raise UserError(
            f"deepspeed.{next(groups, '')}{name} is {first['input']!r}: DeepSpeed says '{first['msg']}'; mend it or "
            "leave it out."
        ) from error
    except (DeepSpeedConfigError, AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        said = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"DeepSpeed does not accept the section deepspeed: {said}.") from error


def _stored_weights(engine: Path) -> dict[str, StoredWeight]:
    """Return the float32 weights of a checkpoint of any stage, as `deepspeed.utils.zero_to_fp32` puts them together.

    That program holds whole weights of stages 1 and 2 in memory. The layout was checked with DeepSpeed 0.19.8.
    """
    model_files = sorted(engine.glob("*" + constants.MODEL_FILE_SUFFIX), key=lambda path: natural_keys(path.name))
    main = model_files[0]
    model = read_layout(main, weights_only=False)
    module = model["module"]
    files = sorted(engine.glob("*" + constants.OPTIM_FILE_SUFFIX), key=lambda path: natural_keys(path.name))
    if not files:
        return {name: stored(main, tensor) for name, tensor in module.items()}
    states = [read_layout(file, weights_only=False)[constants.OPTIMIZER_STATE_DICT] for file in files]
    count = states[0][constants.PARTITION_COUNT]
    if (max(count) if isinstance(count, list) else count) != len(files):
        raise ValueError(f"{engine} holds the optimizer states of {len(files)} ranks, and {count} wrote it")
    sharded = states[0].get(constants.ZERO_STAGE, 1) == 3  # the optimizer of bf16 at stage 1 does not write its stage
    key = constants.FP32_FLAT_GROUPS if sharded else constants.SINGLE_PARTITION_OF_FP32_GROUPS
    groups = [[extent(file, flat) for flat in state[key]] for file, state in zip(files, states, strict=True)]
    shapes = model[constants.PARAM_SHAPES]
    weights = {name: stored(main, module[name]) for name in model[constants.BUFFER_NAMES] if name in module}
    if sharded:
        weights |= _weights_of_stage_3(groups, {name: shape for group in shapes for name, shape in group.items()})
    else:
        weights |= _weights_of_stages_1_and_2(groups, shapes, states[0].get(constants.PARAM_ALIGNMENT_PADDINGS))
    weights |= _frozen_weights(model_files if sharded else [main], model.get(constants.FROZEN_PARAM_SHAPES) or {})
    shared = model["shared_params"].items()
    return weights | {name: weights[other] for name, other in shared if other in weights}


def _frozen_weights(model_files: list[Path], shapes: dict[str, torch.Size]) -> dict[str, StoredWeight]:
    """Return weights that are not trained: the ranks' model files hold a part each at stage 3, else all hold them."""
    if not shapes:
        return {}
    models = [read_layout(file, weights_only=False)[constants.FROZEN_PARAM_FRAGMENTS] for file in model_files]
    weights: dict[str, StoredWeight] = {}
    for name, shape in shapes.items():
        held = [extent(file, model[name]) for file, model in zip(model_files, models, strict=True)]
        weights[name] = StoredWeight(shape, span(held, 0, shape.numel()))
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
    """Return weights that lie one after the other, padded, in each group, which is cut into equal parts, one a rank."""
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
    """Raise where numbers are left over, aside from padding: the layout is not the one that this file reads."""
    there = sum(part.numel for part in held)
    if -(-there // alignment) != -(-used // alignment):
        raise ValueError(f"the checkpoint holds {there} numbers in a group of which {used} were expected")
