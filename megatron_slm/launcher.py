"""The variables that describe a rank and its network, and the launcher's error file. Imports nothing heavy."""

import json
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from megatron_slm.errors import AgreedError, UserError

DEFAULT_PORT = "29500"
"""The port of rank 0 unless MASTER_PORT is set; PyTorch's default."""

_ONE_PROCESS = "Start the ranks with one launcher, or unset these variables to run one process"


class _Mpi(NamedTuple):
    """The variables by which one family of `mpirun` describes a rank.

    rank, size  among all ranks
    local_rank  rank on this host; the first name that is set counts
    local_size  ranks on this host
    """

    name: str
    rank: str
    size: str
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]


_MPI = (
    _Mpi(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    # Hydra (MPICH, Intel MPI), and PALS on Cray systems.
    _Mpi(
        "MPICH or Intel MPI",
        "PMI_RANK",
        "PMI_SIZE",
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE"),
    ),
)


def is_main_process(environment: Mapping[str, str]) -> bool:
    """Return whether this process is rank 0, or was started without a launcher."""
    ranks = ["RANK", *(mpi.rank for mpi in _MPI), *(["SLURM_PROCID"] if _is_slurm_step(environment) else [])]
    return next((environment[name] for name in ranks if name in environment), "0") == "0"


def tell_launcher(sentence: str) -> None:
    """Write the error that ends this rank to the file from which torchrun's summary shows it, if there is one."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(file).write_text(json.dumps({"message": sentence, "timestamp": int(time.time())}), encoding="utf-8")


def one_process() -> dict[str, str]:
    """Return the variables of the only rank of a run, whatever launcher started this process."""
    return {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }


def launcher_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, whichever launcher started this process.

    DeepSpeed and torch both read these from the environment. The first launcher of this list whose variables are set
    describes the ranks: torchrun and the deepspeed launcher, `mpirun`, `srun`. `mpirun` comes before `srun`, because
    under Slurm it starts its own daemons with `srun`, whose variables its ranks inherit.

    Raises:
        UserError: the variables of a launcher are incomplete, or this process runs alone inside a Slurm allocation of
            several tasks.
    """
    found = _launched(environment)
    if found is None:
        _refuse_allocation(environment)
        return one_process()
    return found


def ranks_started(environment: Mapping[str, str]) -> str:
    """Return the number of ranks that a launcher started, as the text of its variable; 1 without a launcher.

    Raises:
        UserError: the variables of a launcher are incomplete.
    """
    return (_launched(environment) or {"WORLD_SIZE": "1"})["WORLD_SIZE"]


def is_launched(environment: Mapping[str, str]) -> bool:
    """Return whether a launcher started this process.

    Raises:
        UserError: the variables of a launcher are incomplete.
    """
    return _launched(environment) is not None


def refuse_several_ranks(command: str, environment: Mapping[str, str]) -> None:
    """Raise a UserError if a launcher started several ranks of a command that runs as one process.

    Raises:
        AgreedError: there are several.
        UserError: the variables of a launcher are incomplete.
    """
    ranks = ranks_started(environment)
    if ranks != "1":
        raise AgreedError("number of ranks", ranks, f"{command} runs as one process", "Start it without a launcher")


def _launched(environment: Mapping[str, str]) -> dict[str, str] | None:
    if "RANK" in environment:
        return _torch_variables(environment)
    for mpi in _MPI:
        # `srun --mpi=pmi2` sets these too, but without the rank on the host, which only Slurm's variables hold.
        if mpi.rank in environment and not (_is_slurm_step(environment) and not _first(environment, mpi.local_rank)):
            return _mpi_variables(environment, mpi)
    if _is_slurm_step(environment):
        return _slurm_variables(environment)
    if environment.get("WORLD_SIZE", "1") != "1":
        raise UserError("WORLD_SIZE", environment["WORLD_SIZE"], "RANK is not set", _ONE_PROCESS)
    return None


def _torch_variables(environment: Mapping[str, str]) -> dict[str, str]:
    size = environment.get("WORLD_SIZE")
    if size is None:
        raise UserError("RANK", environment["RANK"], "WORLD_SIZE is not set", _ONE_PROCESS)
    defaults = {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": DEFAULT_PORT}
    # Without LOCAL_RANK, all ranks of a host would use its first device.
    if size != "1" and "LOCAL_RANK" not in environment:
        remedy = (
            "Start the ranks with a launcher that sets it, such as torchrun, or export it: the number of the rank on "
            "its host, from 0"
        )
        raise UserError("WORLD_SIZE", size, "LOCAL_RANK is not set", remedy)
    return {name: environment.get(name, default) for name, default in defaults.items()} | {
        "RANK": environment["RANK"],
        "WORLD_SIZE": size,
    }


def _mpi_variables(environment: Mapping[str, str], mpi: _Mpi) -> dict[str, str]:
    # The deepspeed launcher exports WORLD_SIZE to the ranks that it starts through MPICH.
    size = environment.get(mpi.size) or environment.get("WORLD_SIZE")
    local_rank = _first(environment, mpi.local_rank)
    if size is None or local_rank is None:
        missing = mpi.size if size is None else mpi.local_rank[0]
        reason = f"{missing} is not set, so the variables of {mpi.name} are incomplete"
        raise UserError(mpi.rank, environment[mpi.rank], reason, _ONE_PROCESS)
    address = environment.get("MASTER_ADDR")
    if address is None and _first(environment, mpi.local_size) != size:
        remedy = (
            "Pass the host of rank 0 to all ranks: mpirun -x MASTER_ADDR=HOST (Open MPI) or mpirun -genv MASTER_ADDR "
            "HOST (MPICH, Intel MPI); under the deepspeed launcher, in --launcher_args"
        )
        raise UserError("MASTER_ADDR", None, f"mpirun ({mpi.name}) started {size} ranks on several hosts", remedy)
    return {
        "RANK": environment[mpi.rank],
        "WORLD_SIZE": size,
        "LOCAL_RANK": local_rank,
        "MASTER_ADDR": address or "127.0.0.1",
        "MASTER_PORT": environment.get("MASTER_PORT", DEFAULT_PORT),
    }


def _is_slurm_step(environment: Mapping[str, str]) -> bool:
    """Return whether `srun` started this process.

    A job script also runs inside an allocation, but the id of its step is not a number.
    """
    return "SLURM_PROCID" in environment and environment.get("SLURM_STEP_ID", "").isdigit()


def _slurm_variables(environment: Mapping[str, str]) -> dict[str, str]:
    size = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS")
    local_rank = environment.get("SLURM_LOCALID")
    if size is None or local_rank is None:
        missing = "SLURM_STEP_NUM_TASKS" if size is None else "SLURM_LOCALID"
        reason = f"{missing} is not set, so Slurm's variables are incomplete"
        remedy = "Start the ranks with srun, or unset SLURM_PROCID to run one process"
        raise UserError("SLURM_PROCID", environment["SLURM_PROCID"], reason, remedy)
    hosts = environment.get("SLURM_STEP_NODELIST", "")
    address = first_host(hosts) if hosts else environment.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    job, step = int(environment.get("SLURM_JOB_ID", "0")), int(environment["SLURM_STEP_ID"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": local_rank,
        "MASTER_ADDR": environment.get("MASTER_ADDR", address),
        # Jobs and steps that share a host must not use the same port.
        "MASTER_PORT": environment.get("MASTER_PORT", str(20000 + (job + 7919 * step) % 20000)),
    }


def _refuse_allocation(environment: Mapping[str, str]) -> None:
    """Raise a UserError if several tasks were allocated, but `srun` did not start this process.

    This is the case in the shell of `salloc`, in a job script, and in a notebook inside a job.
    """
    for name in ("SLURM_NTASKS", "SLURM_JOB_NUM_NODES"):
        if environment.get(name, "1") != "1":
            raise UserError(
                name,
                environment[name],
                "this process was not started by srun, so it would run alone",
                "Start it with srun, or with torchrun on each node. To run one process on purpose, set RANK=0 "
                "WORLD_SIZE=1",
            )


def _first(environment: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    return next((environment[name] for name in names if name in environment), None)


def first_host(hosts: str) -> str:
    """Return the first host of Slurm's list, where rank 0 runs: `gpu007` of `gpu[007-009,12],login`."""
    return expand_hosts(hosts)[0]


def expand_hosts(hosts: str) -> list[str]:
    """Return the hosts of Slurm's list: `gpu007`, `gpu008` and `login` of `gpu[007-008],login`."""
    entries = re.findall(r"(?:[^,\[]|\[[^\]]*\])+", hosts)
    return [host for entry in entries for host in _expand_entry(entry)]


def _expand_entry(entry: str) -> list[str]:
    """Return the hosts of one entry, which may have several ranges: `rack[1-2]node[01-16]`."""
    name, bracket, rest = entry.partition("[")
    if not bracket:
        return [entry]
    ranges, _, suffix = rest.partition("]")
    numbers: list[str] = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]
    return [name + number + end for number in numbers for end in _expand_entry(suffix)]


def interfaces_named(environment: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the network interfaces that the variables of gloo and NCCL name, by variable.

    GLOO_SOCKET_IFNAME lists whole names. NCCL_SOCKET_IFNAME lists beginnings of names, `=` before it whole names, and
    `^` interfaces to avoid, which need not exist.
    """
    named = {name: environment.get(name, "") for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
    return {name: text.lstrip("=").split(",") for name, text in named.items() if text and not text.startswith("^")}


def refuse_missing_interface(environment: Mapping[str, str], existing: Sequence[str] | None = None) -> None:
    """Raise a UserError if GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names an interface that this host does not have.

    Args:
        environment: of this process.
        existing: the interfaces of this host; None to ask the system.

    Raises:
        UserError: with the interfaces that exist.
    """
    if existing is None:
        existing = [name for _, name in socket.if_nameindex()]
    for variable, names in interfaces_named(environment).items():
        whole = variable == "GLOO_SOCKET_IFNAME" or environment[variable].startswith("=")
        missing = [n for n in names if not any(one == n or (one.startswith(n) and not whole) for one in existing)]
        # gloo opens every interface of its list; NCCL uses those that exist.
        if missing and (variable == "GLOO_SOCKET_IFNAME" or len(missing) == len(names)):
            reason = f"{socket.gethostname()} has no interface {missing[0]}; it has {', '.join(existing)}"
            raise UserError(variable, environment[variable], reason, "Name one of these, or unset the variable")


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
