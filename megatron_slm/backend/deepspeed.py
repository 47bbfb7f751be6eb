"""DeepSpeed: ZeRO stages 0 to 3 for the student, stage 3 for a sharded reference."""

import copy
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from pydantic import ValidationError
from torch import Tensor, nn

from megatron_slm.backend import EngineSettings, M, Update, refuse_other_ranks
from megatron_slm.dist import World
from megatron_slm.errors import UserError

TAG = "engine"
"""DeepSpeed's name for the folder inside a checkpoint. Ours is the folder around it."""

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
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # Once a step otherwise: DeepSpeed calls torch's collectives by their former names.
        warnings.filterwarnings("ignore", message=r".torch.distributed.\w+. is deprecated", category=FutureWarning)
        if world.device.type == "cpu":
            # It would be compiled at start: a minute, and an error where there is no compiler.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
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
        return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0)

    def training_engine(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, settings: EngineSettings
    ) -> "DeepSpeedEngine":
        config = self.config(settings)
        if self.stage == 3:
            partition(module, config, self._world.device)
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
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
        engine, *_ = deepspeed.initialize(model=module, config=config)
        engine.eval()
        return engine

    def consolidate(self, folder: Path) -> dict[str, Tensor]:
        """DeepSpeed's checkpoints are pickles: only consolidate a run folder that you trust."""
        states = list((folder / TAG).glob("*_optim_states.pt"))
        if states:
            with redirect_stdout(None):  # it prints what it finds
                weights = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG)
        else:
            weights = torch.load(folder / TAG / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)[
                "module"
            ]
        return {name: weight.float() for name, weight in weights.items()}

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
        with _kept(failures, engine.checkpoint_engine, "save"), _kept(failures, engine, "_copy_recovery_script"):
            engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
        if failures:
            raise failures[0]

    def load(self, folder: Path) -> None:
        self._refuse_other_world_size(folder)
        loaded, _ = self._engine.load_checkpoint(str(folder), tag=TAG)
        if loaded is None:
            raise UserError(f"The checkpoint {folder} holds no DeepSpeed state: resume from an earlier one.")

    def _refuse_other_world_size(self, folder: Path) -> None:
        saved = len(list((folder / TAG).glob("*zero_pp_rank_*_optim_states.pt")))
        if saved:
            refuse_other_ranks(folder, self._stage, saved, self._world.size)


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
