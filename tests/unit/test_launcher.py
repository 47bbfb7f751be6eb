"""The rank of a process from the variables of each launcher, and the sets of variables that are errors."""

import pytest

from megatron_slm.errors import UserError
from megatron_slm.launcher import first_host, is_main_process, launcher_variables, ranks_started

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "7"}
STEP = {"SLURM_JOB_ID": "50007", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "16", "SLURM_NTASKS": "64"}
TASK = STEP | {"SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
BATCH_SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}


def place(environment: dict[str, str]) -> tuple[str, str, str]:
    found = launcher_variables(environment)
    return found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]


def meeting(environment: dict[str, str]) -> tuple[str, str]:
    found = launcher_variables(environment)
    return found["MASTER_ADDR"], found["MASTER_PORT"]


@pytest.mark.parametrize(
    ("hosts", "first"), [("n1", "n1"), ("n1,n2", "n1"), ("n[3-5]", "n3"), ("n[3,5],m", "n3"), ("m,n[3-5]", "m")]
)
def test_rank_0_runs_on_the_first_host_of_slurms_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


def test_the_variables_of_torchrun_come_first() -> None:
    assert launcher_variables(TORCHRUN) == TORCHRUN
    # Also if srun or mpirun started one torchrun per node.
    assert launcher_variables(TORCHRUN | TASK | OPEN_MPI) == TORCHRUN


def test_a_task_of_srun_is_a_rank() -> None:
    assert place(TASK) == ("9", "16", "1")
    assert meeting(TASK) == ("10.0.0.1", str(20000 + (50007 + 2 * 7919) % 20000))
    assert meeting(TASK | {"SLURM_STEP_NODELIST": "gpu[007-009,12]"})[0] == "gpu007"
    assert meeting(TASK | {"MASTER_ADDR": "h", "SLURM_STEP_NODELIST": "n1"})[0] == "h"
    # srun --mpi=pmi2 also sets PMI's variables.
    assert place(TASK | {"PMI_RANK": "9", "PMI_SIZE": "16"}) == ("9", "16", "1")


@pytest.mark.parametrize("mpi", [OPEN_MPI, HYDRA], ids=["open-mpi", "hydra"])
def test_a_process_of_mpirun_is_a_rank(mpi: dict[str, str]) -> None:
    one_host = {name: "4" if name.endswith(("LOCAL_SIZE", "LOCALNRANKS")) else value for name, value in mpi.items()}
    assert place(one_host) == ("3", "4", "1")
    assert meeting(one_host)[0] == "127.0.0.1"
    assert meeting(mpi | {"MASTER_ADDR": "h", "MASTER_PORT": "7"}) == ("h", "7")
    # Under Slurm, mpirun starts its daemons with srun, whose variables do not describe the ranks.
    daemon = TASK | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    assert place(daemon | mpi | {"MASTER_ADDR": "h"}) == ("3", "4", "1")
    assert not is_main_process(daemon | mpi)


def test_under_mpich_the_deepspeed_launcher_sets_the_number_of_ranks() -> None:
    exported = {"PMI_RANK": "3", "MPI_LOCALRANKID": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "h", "MASTER_PORT": "7"}
    assert place(exported) == ("3", "4", "1")


def test_without_a_launcher_a_process_is_alone() -> None:
    for environment in ({}, BATCH_SCRIPT | {"SLURM_NTASKS": "1"}):
        assert place(environment) == ("0", "1", "0")
        assert ranks_started(environment) == "1"
        assert is_main_process(environment)


INCOMPLETE = {
    "RANK alone": ({"RANK": "0"}, "RANK", "WORLD_SIZE is not set"),
    "WORLD_SIZE alone": ({"WORLD_SIZE": "8"}, "WORLD_SIZE", "RANK is not set"),
    "no rank on the host": (
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h"},
        "WORLD_SIZE",
        "LOCAL_RANK is not set",
    ),
    "Slurm without a rank on the host": (
        {k: v for k, v in TASK.items() if k != "SLURM_LOCALID"},
        "SLURM_PROCID",
        "SLURM_LOCALID is not set",
    ),
    "Slurm without a number of ranks": (
        {k: v for k, v in TASK.items() if k not in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")},
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS is not set",
    ),
    "Open MPI without a rank on the host": (
        {k: v for k, v in OPEN_MPI.items() if k != "OMPI_COMM_WORLD_LOCAL_RANK"},
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK is not set",
    ),
    "Open MPI on several hosts": (OPEN_MPI, "MASTER_ADDR", "on several hosts"),
    "PMI without a rank on the host": ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "PMI_RANK", "MPI_LOCALRANKID is not set"),
    "a job script without srun": (BATCH_SCRIPT, "SLURM_NTASKS", "not started by srun"),
    "salloc's shell": ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, "SLURM_NTASKS", "not started by srun"),
    "a notebook in a job of two nodes": (
        {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"},
        "SLURM_JOB_NUM_NODES",
        "not started by srun",
    ),
}


@pytest.mark.parametrize("mistake", INCOMPLETE)
def test_an_incomplete_set_of_variables_is_an_error(mistake: str) -> None:
    environment, variable, reason = INCOMPLETE[mistake]
    with pytest.raises(UserError) as caught:
        launcher_variables(environment)
    assert (caught.value.setting, caught.value.value) == (variable, environment.get(variable))
    assert reason in caught.value.reason


def test_a_command_of_one_process_runs_inside_an_allocation() -> None:
    assert ranks_started(BATCH_SCRIPT) == "1"
    assert ranks_started(TASK) == "16"
