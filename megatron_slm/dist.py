"""The rank and world size of this process, its device, and the few small collectives that the package needs."""

import datetime
import os
import socket
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore, PrefixStore, Store, rendezvous  # type: ignore[attr-defined]

from megatron_slm.errors import AgreedError, UserError
from megatron_slm.launcher import (
    launcher_variables,
    one_process,
    refuse_missing_interface,
    refuse_several_ranks,
)
from megatron_slm.torch_internals import join_fake_group

T = TypeVar("T")

COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")
"""Folders of the code that runs collective operations."""
COLLECTIVE_SOURCES = ("/gloo/", "NCCL error", "ProcessGroup")
"""Words by which torch's errors name gloo, NCCL, and what uses them."""


@dataclass(frozen=True)
class DataParallel:
    """The ranks among which each token of a step appears exactly once, and the position of this rank among them.

    Samples are divided among these ranks, and sums over tokens run over them. If several ranks hold the same tokens,
    each belongs to a different group, at the same position.

    rank, size  of this rank in the group, and of the group
    group       process group; None for all ranks
    """

    rank: int
    size: int
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class World:
    """This process among all ranks: `rank` of `size`, `local_rank` on its host, and its device.

    `data_parallel` is the group of ranks that hold different tokens; by default, all ranks do.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    data_parallel: DataParallel | None = None

    @property
    def data(self) -> DataParallel:
        return self.data_parallel or DataParallel(self.rank, self.size)

    @property
    def replicas(self) -> int:
        """The number of ranks that hold the same tokens."""
        return self.size // self.data.size

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def connect(timeout_minutes: float = 30.0, store: Store | None = None) -> World:
    """Join the process group that the launcher describes, and return this process's rank, size and device.

    The description is in the variables of torchrun and the deepspeed launcher (RANK, WORLD_SIZE, LOCAL_RANK,
    MASTER_ADDR, MASTER_PORT), mpirun (OMPI_COMM_WORLD_*, PMI_*) or srun (SLURM_*). Without a launcher, the group is
    this process alone.

    Args:
        timeout_minutes: how long a collective may wait for a silent rank before the run stops.
        store: a store that all ranks have joined already; None to meet at MASTER_ADDR.

    Raises:
        UserError: the launcher's variables are incomplete or contradict each other, the ranks cannot connect, or a
            variable names a network interface that does not exist.
    """
    os.environ.update(launcher_variables(os.environ))
    return _join(timeout_minutes, store)


def connect_alone(command: str) -> World:
    """Create a process group of this process alone, for a command that runs as one process.

    Raises:
        AgreedError: a launcher started several processes.
    """
    refuse_several_ranks(command, os.environ)
    os.environ.update(one_process())
    return _join(timeout_minutes=30.0)


def connect_fake(command: str, ranks: int) -> World:
    """Become rank 0 of `ranks` whose other ranks do not exist, for a command that rehearses a run as one process.

    Raises:
        AgreedError: a launcher started several processes.
    """
    refuse_several_ranks(command, os.environ)
    os.environ.update(one_process() | {"WORLD_SIZE": str(ranks)})
    device = _device(0)
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    join_fake_group(ranks)
    return World(0, ranks, 0, device)


def _join(timeout_minutes: float, store: Store | None = None) -> World:
    rank, size, local_rank = place_of(os.environ)
    refuse_missing_interface(os.environ)
    device = _device(local_rank)
    # DeepSpeed searches for an accelerator when it is imported, and warns if there is none.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    timeout = datetime.timedelta(minutes=timeout_minutes)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            rank=rank,
            world_size=size,
            store=_rendezvous(rank, size, timeout) if store is None else store,
            timeout=timeout,
        )
    except dist.DistError as error:
        raise UserError(
            "MASTER_ADDR",
            os.environ["MASTER_ADDR"],
            f"the ranks cannot connect there at MASTER_PORT {os.environ['MASTER_PORT']} "
            f"({' '.join(str(error).split())})",
            f"Start all {size} ranks with one launcher, at a port that is free",
        ) from error
    return World(rank, size, local_rank, device)


def _rendezvous(rank: int, size: int, timeout: datetime.timedelta) -> Store:
    if size == 1:
        return HashStore()
    store: Store = next(rendezvous("env://", rank, size, timeout=timeout))[0]
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return store_of_this_start(store, rank, size, timeout)
    return store


def store_of_this_start(store: Store, rank: int, size: int, timeout: datetime.timedelta) -> Store:
    """Return the part of a store that only the ranks of this start use.

    torchrun keeps one store while it restarts the ranks, and the addresses of the dead ranks stay in it: a rank that
    reads one of these fails to connect (pytorch/pytorch#135712). TORCHELASTIC_RESTART_COUNT cannot tell starts apart,
    because each host counts for itself. So rank 0 names the start, and gives the name to each rank in exchange for a
    random word of that rank, which it cannot have from an earlier start.

    Args:
        store: shared by all starts.
        rank, size: of this process, and of the run.
        timeout: how long to wait for the other ranks.

    Raises:
        torch.distributed.DistStoreError: a rank did not come; rank 0 names the missing ranks.
    """
    starts = PrefixStore("megatron_slm/starts", store)
    word = uuid.uuid4().hex
    if rank != 0:
        starts.set(f"word/{rank}", word)
        starts.wait([f"name/{word}"], timeout)
        name = starts.get(f"name/{word}").decode()
        starts.set(f"{name}/joined/{rank}", "")
        return PrefixStore(name, starts)
    name, missing, deadline = word, set(range(1, size)), time.monotonic() + timeout.total_seconds()
    while missing:
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"ranks {sorted(missing)} did not come within {timeout}")
        for other in sorted(missing):
            # The word of an earlier start is answered, too; the rank of this start will replace it.
            if starts.check([f"word/{other}"]):
                starts.set(f"name/{starts.get(f'word/{other}').decode()}", name)
            if starts.check([f"{name}/joined/{other}"]):
                missing.remove(other)
        time.sleep(0.02)
    return PrefixStore(name, starts)


def place_of(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """Return rank, world size and local rank from RANK, WORLD_SIZE and LOCAL_RANK.

    Raises:
        UserError: one is not a number, or the rank is not below the world size.
    """
    rank, size, local_rank = (_number(environment, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if not 0 <= rank < size:
        raise UserError("RANK", rank, f"WORLD_SIZE is {size}", "Start all ranks with one launcher")
    return rank, size, local_rank


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError as error:
        raise UserError(name, environment[name], "it must be a number", "Start the ranks with a launcher") from error


def disconnect() -> None:
    """Leave the process group if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def all_reduce_sum(value: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the sum over the ranks of a group, as a new tensor; the value itself if there is no process group.

    `group` is `World.data.group` for sums over tokens; None stands for all ranks.
    """
    if not dist.is_initialized():
        return value
    value = value.clone()
    dist.all_reduce(value, group=group)
    return value


def gather_objects(value: T) -> list[T]:
    """Return one small value per rank, in the order of ranks, on every rank.

    Values are pickled, which is safe only between the ranks of one run.
    """
    if not dist.is_initialized():
        return [value]
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def route_to(host: str) -> tuple[socket.AddressFamily, str]:
    """Return the address of this host from which packets to another host leave, and its family.

    Args:
        host: name or address of the other host.

    Raises:
        OSError: the name does not resolve, or there is no route.
    """
    family, *_, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # sends nothing: it chooses the interface
        return family, str(probe.getsockname()[0])


def is_collective_failure(error: BaseException) -> bool:
    """Return whether an error, or one that it follows from, came out of a collective operation.

    Gloo and NCCL raise several classes, so the traceback decides, and the source that a message names: an operation
    that runs beside others fails where its result is awaited, and that call has no frame of its own.
    """
    if not isinstance(error, Exception) or isinstance(error, UserError):
        return False
    following = error.__cause__ or error.__context__
    frames = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__))
    return (
        isinstance(error, dist.DistError)
        or any(source in str(error) for source in COLLECTIVE_SOURCES)
        or any(folder in file for file in frames for folder in COLLECTIVES)
        or (following is not None and is_collective_failure(following))
    )


def agree(work: Callable[[], T]) -> T:
    """Run `work` on every rank, and raise an error on all ranks if it fails on one.

    Otherwise, the other ranks would wait for the one that failed. `work` must not use collectives.

    Returns:
        What `work` returned on this rank.

    Raises:
        AgreedError: the user error of the lowest rank that had one.
        RuntimeError: another rank failed with any other error, which that rank raises itself.
    """
    result: T | None = None
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    message = None if failure is None else str(failure)
    found = gather_objects(failure.args if isinstance(failure, UserError) else message)
    for other in found:
        if isinstance(other, tuple):
            raise AgreedError(*other) from failure
    if failure is not None:
        raise failure
    for rank, other in enumerate(found):
        if other is not None:
            raise RuntimeError(f"rank {rank} failed: {other}")
    return result  # type: ignore[return-value]
