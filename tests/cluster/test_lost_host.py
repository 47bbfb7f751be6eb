"""Hosts that are lost, and ranks that stand still, on a cluster: what the others say, and how the run resumes."""

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.liveness.heartbeat import BEAT_SECONDS
from tests.cluster.cluster import Cluster, Host, wait_for, why_not
from tests.cluster.test_launchers import (
    LAUNCH,
    STEPS,
    assert_finished,
    gated,
    job_state,
    on_one_host,
    start_torchrun,
    submit,
    tree_of,
    wait_at,
)
from tests.runs import assert_bitwise_equal, records, write_config

REASON = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
__all__ = ["on_one_host"]

TIMEOUT_MINUTES = 0.5


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Return a cluster of three hosts of its own, because the test loses some of them."""
    with Cluster(hosts=3, slurm="slurm" in request.node.name) as running:
        yield running


def config_of(corpora: Path, folder: Path, **training: Any) -> tuple[Path, Path]:
    """Write the configuration of a run that waits at a gate after step 4; return it and the folder of the gate."""
    tree = gated(tree_of(corpora, folder / "run", 2), folder / "gate", step=4)
    tree["training"] |= training
    return write_config(folder / "run.yaml", tree), folder / "gate"


def at_gate(gate: Path) -> dict[int, tuple[str, str]]:
    """Return the host and process of each rank, when all wait at the gate, and their heartbeats have said so."""
    wait_at(gate, ranks=2)
    time.sleep(BEAT_SECONDS + 1)
    return {int(mark.name[4:]): (*mark.read_text().split(),) for mark in gate.glob("rank?")}  # type: ignore[misc]


def starts(run_dir: Path) -> int:
    return len(json.loads((run_dir / "environment.json").read_text())["starts"])


def host_called(cluster: Cluster, name: str) -> Host:
    return next(host for host in cluster.nodes if host.name == name)


def assert_named(text: str, lost: int, host: str) -> None:
    found = re.search(r"error: a collective operation failed: (.*)", text)
    assert found, text[-4000:]
    assert f"rank {lost} on host {host} has been silent" in found[1]
    assert "last heard in phase callbacks of step 4" in found[1]  # at the gate, before the loss
    assert f"rank {1 - lost} on" not in found[1]


def test_after_a_cut_link_all_ranks_end_and_torchrun_resumes_the_run(
    cluster: Cluster, corpora: Path, tmp_path: Path, on_one_host: Callable[[int], Path]
) -> None:
    config, gate = config_of(corpora, tmp_path, timeout_minutes=TIMEOUT_MINUTES)
    hosts = cluster.nodes[:2]
    programs = start_torchrun(hosts, config)
    ranks = at_gate(gate)
    hosts[1].cut_link()
    (gate / "open").touch()
    by_host = {name: rank for rank, (name, _) in ranks.items()}
    for program in programs:
        wait_for(lambda: "error: a collective operation failed" in program.text(), "the end of the ranks", 120)  # noqa: B023
    hosts[1].restore_link()
    for program, host, other in zip(programs, hosts, reversed(hosts), strict=True):
        assert_named(program.text(), by_host[other.name], other.name)
        assert f"rank {by_host[host.name]}" not in program.text().partition("operation failed")[2].partition("\n")[0]
    assert_finished(programs)
    assert starts(tmp_path / "run") == 2
    assert_bitwise_equal(on_one_host(2), tmp_path / "run", STEPS)


def test_a_spare_host_takes_the_place_of_one_without_power(
    cluster: Cluster, corpora: Path, tmp_path: Path, on_one_host: Callable[[int], Path]
) -> None:
    config, gate = config_of(corpora, tmp_path, timeout_minutes=TIMEOUT_MINUTES)
    one, two, spare = cluster.nodes
    programs = start_torchrun([one, two], config)
    ranks = at_gate(gate)
    (waiting,) = start_torchrun([spare], config, NODES="2", RENDEZVOUS=f"{one.name}:29400")
    two.cut_link()  # first, because the system of a host that ends closes its connections
    two.kill()
    (gate / "open").touch()
    assert_finished([programs[0], waiting])
    lost = next(rank for rank, (name, _) in ranks.items() if name == two.name)
    assert_named(programs[0].text(), lost, two.name)
    assert starts(tmp_path / "run") == 2
    assert_bitwise_equal(on_one_host(2), tmp_path / "run", STEPS)


def test_slurm_queues_a_job_again_that_lost_a_host_and_it_resumes_on_a_spare(
    cluster: Cluster, corpora: Path, tmp_path: Path, on_one_host: Callable[[int], Path]
) -> None:
    # Shorter than the time after which Slurm gives up the host and ends the other ranks.
    config, gate = config_of(corpora, tmp_path, timeout_minutes=0.25)
    size = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"]
    output = f"--output={tmp_path / 'job.txt'}"
    job = submit(cluster, output, *size, f"{LAUNCH}/slurm.sbatch", str(config), LOGS=str(tmp_path / "logs"))
    lost = host_called(cluster, at_gate(gate)[1][0])  # not the host of the job's script
    lost.cut_link()
    lost.kill()
    (gate / "open").touch()
    wait_for(lambda: job_state(cluster, job) == "PENDING", "the requeue", 180)
    assert_named((tmp_path / "logs" / "rank-0.txt").read_text(), 1, lost.name)
    cluster.head.run(["scontrol", "update", f"JobId={job}", "StartTime=now"])
    wait_for(lambda: job_state(cluster, job) in ("COMPLETED", "FAILED"), "the end of the job", 240)
    assert job_state(cluster, job) == "COMPLETED", (tmp_path / "job.txt").read_text()
    assert starts(tmp_path / "run") == 2
    assert_bitwise_equal(on_one_host(2), tmp_path / "run", STEPS)


def stop_rank_0(cluster: Cluster, gate: Path, log: Callable[[str], str], run_dir: Path) -> None:
    """Stop rank 0 until the other rank reports it, let it continue, and check what was said."""
    ranks = at_gate(gate)
    name, process = ranks[0]
    host = host_called(cluster, name)
    host.run(["kill", "-STOP", process]).check_returncode()
    (gate / "open").touch()
    other = ranks[1][0]
    wait_for(lambda: f"rank 0 on host {name} has been silent" in log(other), "the report of the other rank", 70)
    host.run(["kill", "-CONT", process]).check_returncode()
    said = next(line for line in log(other).splitlines() if "has been silent" in line)
    assert said.startswith("No progress for ") and "it was last heard in phase callbacks of step 4" in said
    assert f"rank 1 on host {other} waits in phase" in said
    wait_for(lambda: "The run makes progress again" in log(other), "the report of the progress", 70)
    assert "The stacks of its threads" in (run_dir / "log-rank0001.txt").read_text()


def test_a_stopped_rank_0_is_reported_by_the_other_host_under_torchrun(
    cluster: Cluster, corpora: Path, tmp_path: Path, on_one_host: Callable[[int], Path]
) -> None:
    config, gate = config_of(corpora, tmp_path, hang_seconds=10)
    programs = start_torchrun(cluster.nodes[:2], config)
    logs = {host.name: program for host, program in zip(cluster.nodes, programs, strict=False)}
    stop_rank_0(cluster, gate, lambda name: logs[name].text(), tmp_path / "run")
    assert_finished(programs)
    assert records(on_one_host(2)) == records(tmp_path / "run")


def test_a_stopped_rank_0_is_reported_by_the_other_host_under_slurm(
    cluster: Cluster, corpora: Path, tmp_path: Path, on_one_host: Callable[[int], Path]
) -> None:
    config, gate = config_of(corpora, tmp_path, hang_seconds=10)
    size = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"]
    job = submit(
        cluster, f"--output={tmp_path / 'job.txt'}", *size, f"{LAUNCH}/slurm.sbatch", str(config),
        LOGS=str(tmp_path / "logs"),
    )  # fmt: skip
    stop_rank_0(cluster, gate, lambda name: (tmp_path / "logs" / "rank-1.txt").read_text(), tmp_path / "run")
    wait_for(lambda: job_state(cluster, job) in ("COMPLETED", "FAILED"), "the end of the job", 120)
    assert job_state(cluster, job) == "COMPLETED", (tmp_path / "job.txt").read_text()
    assert records(on_one_host(2)) == records(tmp_path / "run")
