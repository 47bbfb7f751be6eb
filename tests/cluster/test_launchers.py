"""The scripts in `examples/launch` on a cluster: each run equals the run of as many ranks on one host."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.prepare.prepare import prepare_corpus
from tests.cluster.cluster import SEARCH, Cluster, Host, Program, wait_for, why_not
from tests.gloo import run_ranks
from tests.runs import assert_bitwise_equal, config_tree, records, train_in_process, write_config
from tests.texts import contents, sentence, write_jsonl

REASON = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

STEPS = 6
LAUNCH = "examples/launch"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(hosts=3) as running:
        yield running


def tree_of(corpora: Path, run_dir: Path, ranks: int) -> dict[str, Any]:
    batch = 4 * ranks
    return config_tree(corpora, run_dir, global_batch_size=batch, train_tokens=STEPS * batch * 32, save_interval=3)


@pytest.fixture(scope="module")
def on_one_host(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Return a function that returns the run directory of an uninterrupted run of some ranks on this machine."""
    folder = tmp_path_factory.mktemp("one-host")

    def run_directory(ranks: int) -> Path:
        if not (folder / str(ranks)).exists():
            run_ranks(train_in_process, ranks, tree_of(corpora, folder / str(ranks), ranks))
        return folder / str(ranks)

    return run_directory


def gated(tree: dict[str, Any], folder: Path, step: int) -> dict[str, Any]:
    """Return the configuration of a run that waits after a step until the file `open` exists in the folder."""
    folder.mkdir()
    return tree | {"callbacks": [{"class": "tests.cluster.gate:Gate", "args": {"folder": str(folder), "step": step}}]}


def wait_at(gate: Path, ranks: int) -> None:
    """Return when all ranks wait at the gate."""
    wait_for(lambda: len(list(gate.glob("rank?"))) == ranks, f"the arrival of all ranks at {gate}", 200)


def assert_finished(programs: list[Program]) -> None:
    statuses = [program.wait() for program in programs]
    assert statuses == [0] * len(programs), "\n".join(program.text()[-4000:] for program in programs)


def start_torchrun(hosts: list[Host], config: Path, **env: str) -> list[Program]:
    rendezvous = {"NODES": str(len(hosts)), "RANKS_PER_NODE": "1", "RENDEZVOUS": f"{hosts[0].name}:29400"}
    return [host.start([f"{LAUNCH}/torchrun.sh", str(config)], rendezvous | env) for host in hosts]


@pytest.mark.parametrize("ranks", [2, 3])
def test_torchrun_over_hosts_trains_as_one_host_does(
    cluster: Cluster, corpora: Path, tmp_path: Path, on_one_host: Callable[[int], Path], ranks: int
) -> None:
    config = write_config(tmp_path / "run.yaml", tree_of(corpora, tmp_path / "run", ranks))
    assert_finished(start_torchrun(cluster.nodes[:ranks], config))
    # Not the checkpoints: the sizes of parameters are no multiples of 3, and DeepSpeed pads the last rank's part with
    # uninitialized memory.
    assert records(on_one_host(ranks)) == records(tmp_path / "run")


def test_torchrun_restarts_a_run_after_the_death_of_a_rank_and_it_resumes_bitwise(
    cluster: Cluster, corpora: Path, tmp_path: Path, on_one_host: Callable[[int], Path]
) -> None:
    gate = tmp_path / "gate"
    config = write_config(tmp_path / "run.yaml", gated(tree_of(corpora, tmp_path / "run", 2), gate, step=4))
    programs = start_torchrun(cluster.nodes[:2], config)
    wait_at(gate, ranks=2)
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2, 3, 4]
    # The rank that does not host the rendezvous, whose death torchrun must notice over the network.
    victim, pid = next(mark.read_text().split() for mark in gate.glob("rank?") if "node2" in mark.read_text())
    (gate / "open").touch()
    killed = next(host for host in cluster.nodes if host.name == victim).run(["kill", "-KILL", pid])
    assert killed.returncode == 0, killed.stderr
    assert_finished(programs)
    assert len(json.loads((tmp_path / "run" / "environment.json").read_text())["starts"]) == 2
    assert_bitwise_equal(on_one_host(2), tmp_path / "run", STEPS)


def test_a_finished_run_exits_at_once_when_it_is_started_again(
    cluster: Cluster, corpora: Path, tmp_path: Path, on_one_host: Callable[[int], Path]
) -> None:
    shutil.copytree(on_one_host(2), tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    config = write_config(tmp_path / "run.yaml", tree_of(corpora, tmp_path / "run", 2))
    assert_finished(start_torchrun(cluster.nodes[:2], config))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def write_hostfile(path: Path, hosts: list[Host]) -> str:
    path.write_text("".join(f"{host.name} slots=1\n" for host in hosts))
    return str(path)


def test_deepspeed_over_ssh_trains_as_one_host_does(
    cluster: Cluster, corpora: Path, tmp_path: Path, on_one_host: Callable[[int], Path]
) -> None:
    (cluster.folder / "home" / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\nHF_HUB_OFFLINE=1\n")
    config = write_config(tmp_path / "run.yaml", tree_of(corpora, tmp_path / "elsewhere", 2))
    hostfile = write_hostfile(tmp_path / "hostfile", cluster.nodes[:2])
    # An override with braces and spaces must survive the shells between the launcher and the rank.
    overrides = [f"run_dir={tmp_path / 'run'}", "data.valid={held_out: " + str(corpora / "held_out") + "}"]
    command = [f"{LAUNCH}/deepspeed.sh", str(config), *overrides]
    assert_finished([cluster.nodes[0].start(command, {"HOSTFILE": hostfile})])
    assert_bitwise_equal(on_one_host(2), tmp_path / "run", STEPS)


def test_deepspeed_without_ssh_trains_as_one_host_does(
    cluster: Cluster, corpora: Path, tmp_path: Path, on_one_host: Callable[[int], Path]
) -> None:
    config = write_config(tmp_path / "run.yaml", tree_of(corpora, tmp_path / "run", 2))
    hosts = cluster.nodes[:2]
    env = {"HOSTFILE": write_hostfile(tmp_path / "hostfile", hosts), "MASTER_ADDR": hosts[0].name}
    command = [f"{LAUNCH}/deepspeed.sh", str(config)]
    assert_finished([host.start(command, env | {"NODE_RANK": str(rank)}) for rank, host in enumerate(hosts)])
    assert_bitwise_equal(on_one_host(2), tmp_path / "run", STEPS)


@pytest.mark.skipif(
    shutil.which("mpirun", path=SEARCH) is None, reason="mpirun is missing: apt-get install openmpi-bin"
)
def test_mpirun_trains_as_one_host_does(
    cluster: Cluster, corpora: Path, tmp_path: Path, on_one_host: Callable[[int], Path]
) -> None:
    config = write_config(tmp_path / "run.yaml", tree_of(corpora, tmp_path / "run", 2))
    env = {"HOSTFILE": write_hostfile(tmp_path / "hostfile", cluster.nodes[:2])}
    env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    assert_finished([cluster.nodes[0].start([f"{LAUNCH}/mpirun.sh", str(config)], env)])
    assert_bitwise_equal(on_one_host(2), tmp_path / "run", STEPS)


def submit(cluster: Cluster, *arguments: str, **env: str) -> str:
    submitted = cluster.head.run(["sbatch", "--parsable", *arguments], env)
    assert submitted.returncode == 0, submitted.stderr
    return submitted.stdout.strip()


def job_state(cluster: Cluster, job: str) -> str:
    shown = cluster.head.run(["scontrol", "show", "job", "--oneliner", job]).stdout
    return dict(part.split("=", 1) for part in shown.split() if "=" in part).get("JobState", "unknown")


def test_a_preempted_slurm_job_saves_queues_itself_again_and_ends_bitwise(
    cluster: Cluster, corpora: Path, tmp_path: Path, on_one_host: Callable[[int], Path]
) -> None:
    gate, log = tmp_path / "gate", tmp_path / "job.txt"
    config = write_config(tmp_path / "run.yaml", gated(tree_of(corpora, tmp_path / "run", 2), gate, step=4))
    size = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"]
    job = submit(
        cluster, "--partition=low", f"--output={log}", *size, f"{LAUNCH}/slurm.sbatch", str(config),
        LOGS=str(tmp_path / "logs"),
    )  # fmt: skip
    wait_at(gate, ranks=2)
    urgent = submit(cluster, "--partition=high", "--output=/dev/null", "--exclusive", *size, "--wrap", "sleep 1")
    wait_for(lambda: "told to save and stop" in log.read_text(), "the signal of the preemption", 30)
    (gate / "open").touch()
    wait_for(lambda: job_state(cluster, job) == "PENDING", "the requeue", 60)
    # The signal arrived during step 5, between two regular checkpoints.
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2, 3, 4, 5]
    assert (tmp_path / "run" / "checkpoints" / "step_00000005").is_dir()
    wait_for(lambda: job_state(cluster, urgent) == "COMPLETED", "the end of the other job", 60)
    cluster.head.run(["scontrol", "update", f"JobId={job}", "StartTime=now"]).check_returncode()
    wait_for(lambda: job_state(cluster, job) in ("COMPLETED", "FAILED"), "the end of the job", 200)
    assert job_state(cluster, job) == "COMPLETED", log.read_text()
    assert len(json.loads((tmp_path / "run" / "environment.json").read_text())["starts"]) == 2
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["rank-0.txt", "rank-1.txt"]
    assert_bitwise_equal(on_one_host(2), tmp_path / "run", STEPS)


def test_a_slurm_array_prepares_shards_and_the_dependent_job_merges_them_or_names_those_that_lack(
    cluster: Cluster, model: str, tmp_path: Path
) -> None:
    """All tasks of the first array end well. The second array lacks a task, which is submitted later."""
    for number in range(5):
        write_jsonl(tmp_path / f"{number}.jsonl", [sentence(100 * number + i) for i in range(30 + number)])
    files = [str(tmp_path / f"{number}.jsonl") for number in range(5)]
    prepare_corpus(files, str(tmp_path / "whole"), tokenizer=model)
    options = ["--partition=low", "--cpus-per-task=1"]

    def submit_shards(tasks: str, output: Path, **env: str) -> Path:
        """Submit an array and its merge; return the log of the merge when it has ended."""
        job = submit(
            cluster, *options, f"--array={tasks}", f"--output={tmp_path}/shard-%a.txt", f"{LAUNCH}/shards.sbatch",
            "prepare", "--input", *files, "--tokenizer", model, "--workers", "1", "--output", str(output), **env,
        )  # fmt: skip
        log = tmp_path / f"merge-{job}.txt"
        merge = f"python -m megatron_slm prepare --merge --output {output}"
        merged = submit(cluster, *options, f"--output={log}", f"--dependency=afterany:{job}", "--wrap", merge)
        wait_for(lambda: job_state(cluster, merged) in ("COMPLETED", "FAILED"), "the end of the merge", 300)
        return log

    log = submit_shards("1-3", tmp_path / "web")
    assert contents(tmp_path / "web") == contents(tmp_path / "whole"), log.read_text()
    log = submit_shards("0,2", tmp_path / "late", SHARDS="3")
    assert "1 of its 3 shards are missing: 1" in log.read_text() and not (tmp_path / "late.json").exists()
    log = submit_shards("1", tmp_path / "late", SHARDS="3")
    assert contents(tmp_path / "late") == contents(tmp_path / "whole"), log.read_text()


def test_a_job_that_is_told_to_stop_at_its_start_does_not_queue_itself_for_ever(
    cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "python").write_text(RANK)
    (tmp_path / "python").chmod(0o755)
    environment = {"LOGS": str(tmp_path / "logs"), "PATH": f"{tmp_path}:{SEARCH}"}
    size = ["--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1"]
    log = tmp_path / "job.txt"
    job = submit(cluster, f"--output={log}", *size, f"{LAUNCH}/slurm.sbatch", "run.yaml", **environment)
    started = tmp_path / "logs" / "rank-0.txt"
    wait_for(lambda: started.exists() and "start 0" in started.read_text(), "the start", 90)
    # As Slurm does when less time is left than --signal names.
    cluster.head.run(["scancel", "--batch", "--signal=USR1", job]).check_returncode()
    wait_for(lambda: job_state(cluster, job) in ("COMPLETED", "FAILED", "PENDING"), "the end of the job", 90)
    assert job_state(cluster, job) == "COMPLETED"
    assert "is not queued again" in log.read_text() and "--signal" in log.read_text()


RANK = """#!/bin/sh
# Stands in for python: a rank that stops with status 0 after a signal, as a run does that has saved.
trap 'echo stopped; exit 0' TERM USR2
echo "start ${SLURM_RESTART_COUNT:-0}"
while true; do sleep 0.1; done
"""


@contextmanager
def slurm_without(cluster: Cluster, line: str) -> Iterator[None]:
    """Run Slurm without a line of its configuration."""
    configuration = cluster.folder / "slurm" / "slurm.conf"
    before = configuration.read_text()
    try:
        configuration.write_text(before.replace(line, ""))
        cluster.head.run(["scontrol", "reconfigure"]).check_returncode()
        yield
    finally:
        configuration.write_text(before)
        cluster.head.run(["scontrol", "reconfigure"]).check_returncode()


@pytest.mark.parametrize("tells_shell", [False, True], ids=["TERM to the ranks", "USR1 to the shell"])
def test_a_slurm_job_queues_itself_again_however_slurm_preempts_it(
    cluster: Cluster, tmp_path: Path, tells_shell: bool
) -> None:
    (tmp_path / "python").write_text(RANK)
    (tmp_path / "python").chmod(0o755)
    size = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"]
    environment = {"LOGS": str(tmp_path / "logs"), "PATH": f"{tmp_path}:{SEARCH}"}
    logs = [tmp_path / "logs" / f"rank-{rank}.txt" for rank in range(2)]
    with slurm_without(cluster, "" if tells_shell else "SlurmctldParameters=preempt_send_user_signal"):
        output = f"--output={tmp_path / 'job.txt'}"
        job = submit(cluster, "--partition=low", output, *size, f"{LAUNCH}/slurm.sbatch", "run.yaml", **environment)
        wait_for(lambda: all(log.exists() and "start 0" in log.read_text() for log in logs), "the start", 90)
        submit(cluster, "--partition=high", "--output=/dev/null", "--exclusive", *size, "--wrap", "true")
        wait_for(lambda: job_state(cluster, job) == "PENDING", "the requeue", 90)
        cluster.head.run(["scancel", job]).check_returncode()
        wait_for(lambda: job_state(cluster, job) == "CANCELLED", "the end of the job", 90)
    assert all("stopped" in log.read_text() for log in logs)
    assert ("told to save" in (tmp_path / "job.txt").read_text()) == tells_shell
