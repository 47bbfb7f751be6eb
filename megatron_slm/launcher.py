"""What the launcher told this process, and what it is told in return. Imports nothing heavy."""

import json
import os
import re
import socket
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path


def is_main_process(environment: Mapping[str, str]) -> bool:
    """Rank 0, or no launcher at all: the one that speaks for all ranks."""
    return environment.get("RANK", environment.get("SLURM_PROCID", "0")) == "0"


def tell_launcher(sentence: str) -> None:
    """Why this rank ends: torchrun shows it in its summary, where it would say that nothing is known."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(file).write_text(json.dumps({"message": sentence, "timestamp": int(time.time())}), encoding="utf-8")


def launcher_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of torchrun, whichever launcher started this process.

    DeepSpeed and torch both read them from the environment. A job script may itself run inside
    an allocation, so SLURM's variables count only in a step started by srun.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        defaults = {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
        return {name: environment.get(name, default) for name, default in defaults.items()}
    if "SLURM_PROCID" in environment and environment.get("SLURM_STEP_ID", "").isdigit():
        return _slurm_variables(environment)
    return {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }


def _slurm_variables(environment: Mapping[str, str]) -> dict[str, str]:
    hosts = environment.get("SLURM_STEP_NODELIST", "")
    address = first_host(hosts) if hosts else environment.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    job, step = int(environment.get("SLURM_JOB_ID", "0")), int(environment["SLURM_STEP_ID"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": environment.get("MASTER_ADDR", address),
        # Jobs and steps that share a host must not meet at one port.
        "MASTER_PORT": environment.get("MASTER_PORT", str(20000 + (job + 7919 * step) % 20000)),
    }


def first_host(hosts: str) -> str:
    """The first of Slurm's list of hosts, where rank 0 runs: `gpu[007-009,12],login` is `gpu007` and others."""
    name, bracket, ranges = hosts.partition("[")
    if not bracket or "," in name:
        return name.partition(",")[0]
    return name + re.split("[-,\\]]", ranges)[0]


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
