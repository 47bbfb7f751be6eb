"""DeepSpeed: ZeRO stages 0 to 3 for the student, and stage 3 for a sharded reference."""

import copy
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
from deepspeed.runtime.config import DeepSpeedConfigError
from pydantic import ValidationError
from torch import Tensor, nn

from megatron_slm.backend import EngineSettings, M, Update, refuse_other_ranks
from megatron_slm.backend.deepspeed_internals import (
    forget_groups,
    forget_modules,
    is_partitioned,
    read_weights,
    skip_shared_memory_extension,
    write_errors_collected,
)
from megatron_slm.backend.stored import StoredWeight
from megatron_slm.dist import World
from megatron_slm.errors import UserError

TAG = "engine"
"""DeepSpeed's name for the folder inside a checkpoint. Ours is the folder around it."""

REFERENCE_KEYS = ("stage3_", "offload_param")
"""Prefixes of the keys of the user's ZeRO section that apply to a model without an optimizer."""


class DeepSpeedBackend:
    """A `Backend` that runs DeepSpeed.

    Args:
        world: this rank.
        settings: the user's `deepspeed:` section; stage 3 unless it sets another.
        precision: dtype of the weights in the forward pass.
    """

    def __init__(self, world: World, settings: dict[str, Any], precision: torch.dtype) -> None:
        self._world = world
        self._settings = copy.deepcopy(settings)
        self._settings.setdefault("zero_optimization", {}).setdefault("stage", 3)
        self._precision = precision
        self._engines: list[Any] = []
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # DeepSpeed calls torch's collectives by their deprecated names, which would warn in every step.
        warnings.filterwarnings("ignore", message=r".torch.distributed.\w+. is deprecated", category=FutureWarning)
        if world.device.type == "cpu":
            skip_shared_memory_extension()
        forget_groups()
        deepspeed.init_distributed(
            "nccl" if world.device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
        )
        # Checked before anything is built, so that an invalid setting is not mistaken for a broken model.
        _refuse_invalid(self.config(), settings)

    @property
    def stage(self) -> int:
        """The ZeRO stage of the student."""
        return int(self._settings["zero_optimization"]["stage"])

    def construct(self, make: Callable[[], M]) -> M:
        if self.stage < 3:
            return make()
        from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

        # Transformers' switch is global to the process. It is on around the student only, because
        # it would also partition a reference that is meant to be replicated.
        switch = HfDeepSpeedConfig(self.config())
        try:
            return make()
        finally:
            del switch
            unset_hf_deepspeed_config()

    def gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[object]:
        if self.stage < 3:
            return nullcontext()
        partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
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
        config = self.config()
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
        if engine in self._engines:  # a replicated module has no engine
            self._engines.remove(engine)
            _destroy(engine)

    def close(self) -> None:
        for engine in self._engines:
            _destroy(engine)
        self._engines.clear()
        forget_modules()
        forget_groups()

    def stored_weights(self, folder: Path) -> dict[str, StoredWeight]:
        return read_weights(folder / TAG)

    def config(self, settings: EngineSettings | None = None) -> dict[str, Any]:
        """Return the user's section with the keys that this package sets; without `settings`, for no optimizer."""
        settings = settings or EngineSettings(1, 1, 0.0, self._precision)
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
    """A `TrainingEngine` that runs DeepSpeed."""

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
        """Step at stage 0, which neither reports the gradient norm nor skips a gradient that is not finite."""
        gradients = [deepspeed.utils.safe_get_full_grad(p) for p in self._engine.module.parameters()]
        norm = float(nn.utils.get_total_norm([g for g in gradients if g is not None]))
        applied = norm < float("inf")
        if not applied:
            self._engine.optimizer.zero_grad(set_to_none=True)
            self._engine.set_gradient_accumulation_boundary(False)
        self._engine.step()
        return Update(applied, norm)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with _without_patterns(folder) as plain, write_errors_collected(self._engine) as failures:
            self._engine.save_checkpoint(str(plain), tag=TAG, save_latest=False)
        if failures:
            raise failures[0]

    def load(self, folder: Path) -> None:
        saved_ranks = len(list((folder / TAG).glob("*zero_pp_rank_*_optim_states.pt")))
        if saved_ranks:
            refuse_other_ranks(folder, self._stage, saved_ranks, self._world.size)
        with _without_patterns(folder) as plain:
            loaded, _ = self._engine.load_checkpoint(str(plain), tag=TAG)
        if loaded is None:
            raise UserError("checkpoint", folder, "it holds no state of DeepSpeed", "Resume from an earlier checkpoint")


def partition(module: nn.Module, config: dict[str, Any], device: torch.device) -> None:
    """Partition parameters that were built whole, one at a time, so that no device ever holds all of them.

    Buffers stay whole; they are moved here, because DeepSpeed does not move those of a partitioned module.
    """
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            setattr(owner, name, buffer.to(device))
    if not all(is_partitioned(parameter) for parameter in module.parameters()):
        deepspeed.zero.Init(module=module, config_dict_or_path=config)


def _destroy(engine: Any) -> None:
    engine.destroy()
    forget_modules(engine.module)


@contextmanager
def _without_patterns(folder: Path) -> Iterator[Path]:
    """Yield a path to the folder without `[`, `]`, `*` and `?`, which DeepSpeed would read as a pattern of `glob`.

    It is Linux's name for the open folder, and is valid in this process only.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _refuse_invalid(config: dict[str, Any], section: dict[str, Any]) -> None:
    """Raise a UserError if DeepSpeed does not accept the configuration made from the user's `deepspeed:` section."""
    try:
        deepspeed.DeepSpeedConfig(config)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        # Pydantic reports the place within a group of settings, without the group.
        for group, settings in config.items():
            if isinstance(settings, dict) and first["loc"][0] in settings:
                name = f"{group}.{name}"
                break
        reason = f"DeepSpeed does not accept it ({first['msg']})"
        raise UserError(f"deepspeed.{name}", first["input"], reason, "Change this key, or remove it") from error
    except (DeepSpeedConfigError, AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError("deepspeed", section, f"DeepSpeed does not accept it ({reason})", "Change it") from error
