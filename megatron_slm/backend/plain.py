"""Plain PyTorch: every rank holds the whole model. The DeepSpeed backend is tested against it."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_slm.backend import EngineSettings, M, Update
from megatron_slm.backend.stored import StoredWeight, read_layout, stored
from megatron_slm.dist import World


class PlainBackend:
    """A `Backend` with whole float32 weights on every rank, and gradients averaged parameter by parameter."""

    def __init__(self, world: World) -> None:
        self._world = world

    def construct(self, make: Callable[[], M]) -> M:
        return make()

    def gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[object]:
        return nullcontext()

    def training_engine(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, settings: EngineSettings
    ) -> "PlainEngine":
        return PlainEngine(module, optimizer, settings.clip_grad, self._world)

    def frozen_engine(self, module: nn.Module, *, shard: bool) -> nn.Module:
        return module.to(self._world.device).eval().requires_grad_(False)

    def release(self, engine: nn.Module) -> None:
        """Do nothing; see `Backend`."""

    def close(self) -> None:
        """Do nothing; see `Backend`."""

    def stored_weights(self, folder: Path) -> dict[str, StoredWeight]:
        file = folder / "plain.pt"
        module = read_layout(file, weights_only=True)["module"]
        return {name: stored(file, tensor) for name, tensor in module.items()}


class PlainEngine:
    """A `TrainingEngine` of plain PyTorch."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, clip_grad: float, world: World) -> None:
        self.module = module.to(world.device)
        self._optimizer = optimizer
        self._clip_grad = clip_grad
        self._world = world

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()
        data = self._world.data
        if last and data.size > 1:
            for parameter in self.module.parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad, group=data.group)
                parameter.grad /= data.size

    def step(self, learning_rate: float) -> Update:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        limit = self._clip_grad or float("inf")
        norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), limit))
        applied = norm < float("inf")
        if applied:
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return Update(applied, norm)

    def save(self, folder: Path) -> None:
        if self._world.is_main:
            state = {"module": self.module.state_dict(), "optimizer": self._optimizer.state_dict()}
            torch.save(state, folder / "plain.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "plain.pt", map_location=self._world.device, weights_only=True)
        self.module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(state["optimizer"])
