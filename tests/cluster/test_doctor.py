"""`doctor` on a cluster: under each launcher, and with a fault that it must name."""

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.cluster import SEARCH, Cluster, Host, why_not
from tests.runs import config_tree, write_config

REASON = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

DOCTOR = ["python", "-m", "megatron_slm", "doctor"]
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(hosts=3) as running:
        yield running


def hostfile_of(folder: Path, *hosts: Host) -> str:
    (folder / "hostfile").write_text("".join(f"{host.name} slots=1\n" for host in hosts))
    return str(folder / "hostfile")


def srun(cluster: Cluster, *command: str) -> tuple[int, str]:
    """Run a command with one rank on each host, and return its highest exit status and its output."""
    ran = cluster.head.run(["srun", "--nodes=3", "--ntasks-per-node=1", *command])
    return ran.returncode, ran.stdout + ran.stderr


def finding(text: str, level: str) -> str:
    """Return the only line with a finding of this level."""
    [line] = [line for line in text.splitlines() if line.startswith(level)]
    return line


def assert_examined(text: str) -> None:
    """Check that the report shows three hosts on their network; a busy machine may look like a slow host."""
    assert "3 ranks on 3 hosts" in text, text
    assert re.search("verdict: (PASS|WARN)", text), text
    for number in (1, 2, 3):
        assert re.search(rf"node{number} .*eth0 10\.77\.0\.{number} ", text), text
    assert text.count("all-reduce of 4 bytes") == 4  # three pairs, and all ranks together


def test_under_torchrun(cluster: Cluster, tmp_path: Path) -> None:
    options = ["--nnodes=3", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=node1:29400"]
    command = ["torchrun", *options, "-m", "megatron_slm", "doctor", f"--directory={tmp_path}"]
    programs = [host.start(command) for host in cluster.nodes]
    assert [program.wait() for program in programs] == [0, 0, 0], [program.text() for program in programs]
    assert_examined("".join(program.text() for program in programs))


def test_under_srun(cluster: Cluster, corpora: Path, tmp_path: Path) -> None:
    tree = config_tree(corpora, tmp_path / "run", global_batch_size=12, train_tokens=12 * 32)
    config = write_config(tmp_path / "run.yaml", tree)
    status, text = srun(cluster, *DOCTOR, str(config))
    assert status == 0, text
    assert_examined(text)


def test_under_deepspeed(cluster: Cluster, tmp_path: Path) -> None:
    (cluster.folder / "home" / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\n")
    hostfile = hostfile_of(tmp_path, *cluster.nodes)
    options = ["--hostfile", hostfile, "--launcher", "pdsh", "--no_local_rank", "--module"]
    ran = cluster.nodes[0].run(["deepspeed", *options, "megatron_slm", "doctor", f"--directory={tmp_path}"])
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert_examined(ran.stdout)


@pytest.mark.skipif(
    shutil.which("mpirun", path=SEARCH) is None, reason="mpirun is missing: apt-get install openmpi-bin"
)
def test_under_mpirun(cluster: Cluster, tmp_path: Path) -> None:
    options = ["--hostfile", hostfile_of(tmp_path, *cluster.nodes), "--map-by", "slot", "--bind-to", "none"]
    for name in ("MASTER_ADDR=node1", "PATH", "PYTHONPATH", "OMP_NUM_THREADS"):
        options += ["-x", name]
    ran = cluster.nodes[0].run(["mpirun", *options, *DOCTOR, f"--directory={tmp_path}"], AS_ROOT)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert_examined(ran.stdout)


def test_a_host_that_never_comes_under_srun_is_named(cluster: Cluster) -> None:
    start = time.monotonic()
    # The interpreter of node3 hangs, as on a dead file server.
    command = '[ "$(hostname)" = node3 ] && exec sleep 40; exec "$@"'
    status, text = srun(cluster, "bash", "-c", command, "bash", *DOCTOR, "--wait", "20")
    assert status == 2 and time.monotonic() - start < 100, text
    assert "rank 2 did not come within 20 seconds, and no rank came from node3" in text


@contextmanager
def cut(host: Host) -> Iterator[None]:
    host.cut_link()
    try:
        yield
    finally:
        host.restore_link()


def test_a_host_without_a_network_is_named_by_its_host_list_and_under_deepspeed(
    cluster: Cluster, tmp_path: Path
) -> None:
    hostfile = hostfile_of(tmp_path, *cluster.nodes)
    checked = cluster.nodes[0].run([*DOCTOR, "--hostfile", hostfile])
    assert checked.returncode == 0 and "All hosts answer: node1, node2, node3." in checked.stdout, checked.stderr
    with cut(cluster.nodes[2]):
        start = time.monotonic()
        checked = cluster.nodes[0].run([*DOCTOR, "--hostfile", hostfile])
        assert checked.returncode == 2 and time.monotonic() - start < 30
        assert "line 3, is node3, but it does not answer" in checked.stderr
        options = ["--hostfile", hostfile, "--launcher", "pdsh", "--no_local_rank", "--module", "megatron_slm"]
        ran = cluster.nodes[0].run(["deepspeed", *options, "doctor", "--hostfile", hostfile, "--wait", "20"])
        assert ran.returncode != 0
        assert "rank 2 did not come within 20 seconds, and no rank came from node3" in ran.stdout + ran.stderr


def test_a_host_with_a_slow_link_stands_out(cluster: Cluster, tmp_path: Path) -> None:
    node3 = cluster.nodes[2]
    shaped = "tc qdisc add dev eth0 root tbf rate 100mbit burst 64kbit latency 400ms"
    node3.run(shaped.split()).check_returncode()
    try:
        status, text = srun(cluster, *DOCTOR, f"--directory={tmp_path}")
    finally:
        node3.run(["tc", "qdisc", "del", "dev", "eth0", "root"]).check_returncode()
    assert status == 0, text
    named = [line for line in text.splitlines() if line.startswith("WARN network")]
    # Not that no other host is named: on a busy machine, the latency of any of them may stand out.
    assert any("node3 reaches its best partner" in line for line in named), text
    assert "node3" not in text.partition("without a finding of their own:")[2].partition("\n")[0]


def test_a_host_that_cannot_reach_another_is_named(cluster: Cluster) -> None:
    cluster.nodes[1].run(["ip", "route", "add", "blackhole", "10.77.0.3/32"]).check_returncode()
    try:
        status, text = srun(cluster, *DOCTOR, "--wait", "60")
    finally:
        cluster.nodes[1].run(["ip", "route", "del", "blackhole", "10.77.0.3/32"]).check_returncode()
    assert status == 2, text
    assert "node2 cannot connect to node3 at 10.77.0.3, eth0" in text


def test_a_host_with_a_run_directory_of_its_own_is_named_by_doctor_and_by_train(
    cluster: Cluster, corpora: Path, tmp_path: Path
) -> None:
    (tmp_path / "runs").mkdir()
    tree = config_tree(corpora, tmp_path / "runs" / "run", global_batch_size=12, train_tokens=12 * 32)
    config = str(write_config(tmp_path / "run.yaml", tree))
    cluster.nodes[2].run(["mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "runs")]).check_returncode()
    try:
        status, text = srun(cluster, *DOCTOR, config)
        assert status == 1 and "node3 is not that of the other hosts" in finding(text, "FAIL files"), text
        assert not list((tmp_path / "runs").iterdir())
        status, text = srun(cluster, "python", "-m", "megatron_slm", "train", config)
        assert status == 2 and "node3 does not see the files that rank 0 writes there" in text, text
    finally:
        cluster.nodes[2].run(["umount", str(tmp_path / "runs")]).check_returncode()
