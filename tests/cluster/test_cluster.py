"""The test cluster itself."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.cluster import PREFIX, ROOT, Cluster, remove_leftovers, wait_for, why_not

REASON = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


def test_hosts_have_names_processes_and_networks_of_their_own_and_a_power_cut_ends_all() -> None:
    with Cluster(hosts=2, slurm=False) as cluster:
        one, two = cluster.nodes
        assert one.run(["ssh", "node2", "hostname"]).stdout == "node2\n"
        assert one.run(["pdsh", "-R", "ssh", "-w", "node1,node2", "cat /proc/1/comm"]).stdout.count("bash") == 2
        assert one.run(["sh", "-c", "echo $WORD"], {"WORD": "hello"}).stdout == "hello\n"
        two.cut_link()
        assert one.run(["ssh", "-o", "ConnectTimeout=1", "node2", "true"]).returncode == 255
        two.restore_link()
        wait_for(lambda: one.run(["ssh", "node2", "true"]).returncode == 0, "a login", 20)
        sleep = two.start(["sleep", "1000"])
        two.kill()
        assert sleep.process.poll() is not None
        assert one.run(["ssh", "-o", "ConnectTimeout=1", "node2", "true"]).returncode == 255
        assert one.run(["true"]).returncode == 0


HANGS = """
import time
from tests.cluster.cluster import Cluster
with Cluster(hosts=1) as cluster:
    print(cluster.folder, cluster.nodes[0].pid, cluster.head.pid, flush=True)
    time.sleep(1000)
"""


def test_a_cluster_ends_with_its_tests_even_if_they_are_killed() -> None:
    tests = subprocess.Popen([sys.executable, "-c", HANGS], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert tests.stdout is not None
    folder, *hosts = tests.stdout.readline().split()
    assert Path(folder).name.startswith(PREFIX)
    remove_leftovers()
    assert Path(folder).exists(), "a cluster in use was removed"
    tests.send_signal(signal.SIGKILL)
    tests.wait()
    wait_for(lambda: not any(is_alive(int(host)) for host in hosts), "the end of the hosts", 10)
    remove_leftovers()
    assert not Path(folder).exists()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_cluster_is_torn_down_after_a_failure_inside_it() -> None:
    with pytest.raises(ZeroDivisionError), Cluster(hosts=1, slurm=False) as cluster:
        1 / 0  # noqa: B018
    assert not cluster.folder.exists()
    assert all(not is_alive(host.pid) for host in [cluster.head, *cluster.nodes])


def test_a_slurm_job_runs_on_every_host() -> None:
    with Cluster(hosts=2) as cluster:
        ran = cluster.head.run(["srun", "--nodes=2", "--gpus-per-node=8", "hostname"])
        assert sorted(ran.stdout.split()) == ["node1", "node2"], ran.stderr
