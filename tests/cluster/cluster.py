"""A cluster on this machine: hosts out of Linux namespaces, with ssh, pdsh and Slurm.

Each host has its own network, hostname, processes, mounts and shared memory. All hosts see the files of this machine,
as the nodes of a cluster see a shared file system. Nothing outside the namespaces is changed: the bridge is in the
network namespace of the host `head`, and the files of /etc that a host needs are mounted for this host alone.

A host lives as long as its first process, and that process dies with the test that started it. So a cluster leaves no
process, network or mount behind, even if the tests are killed; the next cluster removes the folder that remains.
"""

import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[2]
PREFIX = "megatron-slm-cluster-"
PACKAGES = {
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "ip": "iproute2",
    "nsenter": "util-linux",
}
SEARCH = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# The first process of a host. Bash waits, because the first process has to collect the orphans of its namespace.
FIRST = """
set -e
hostname "$1"
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm
mkdir /run/sshd
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/ssh" /etc/ssh
mount --bind "$2/slurm" /etc/slurm
echo ready
sleep infinity &
wait
"""
SSH_CONFIG = """
Host *
  IdentityFile /etc/ssh/id
  IdentitiesOnly yes
  UserKnownHostsFile /dev/null
  GlobalKnownHostsFile /etc/ssh/known_hosts
  StrictHostKeyChecking yes
  BatchMode yes
  ConnectTimeout 5
"""
SSHD_CONFIG = """
HostKey /etc/ssh/hostkey
AuthorizedKeysFile /etc/ssh/id.pub
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
PidFile none
"""
# The GPUs of a node are null devices, for scripts that ask for some. Jobs in `high` preempt those in `low`; Slurm then
# sends the signal that the preempted job asked for with `--signal`.
SLURM_CONFIG = """
ClusterName=test
SlurmctldHost=head({head})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/slurm/state
SlurmdSpoolDir={folder}/slurm/spool.%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/logs/slurmctld.txt
SlurmdLogFile={folder}/logs/slurmd.%n.txt
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
KillWait=5
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0,bf_continue
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
GresTypes=gpu
PartitionName=low Nodes=ALL Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=high Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF
"""
CGROUP_CONFIG = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nConstrainCores=no\nConstrainRAMSpace=no\n"


def why_not() -> str | None:
    """Return the reason why no cluster can be made here, or None."""
    if os.geteuid() != 0:
        return "the test cluster needs root"
    missing = sorted({package for program, package in PACKAGES.items() if not shutil.which(program, path=SEARCH)})
    return f"the test cluster needs packages: apt-get install {' '.join(missing)}" if missing else None


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    """Return when the condition is true.

    Raises:
        TimeoutError: it did not become true in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {seconds:.0f} seconds")
        time.sleep(0.1)


@dataclass
class Program:
    """A program that runs on a host, and the file with its output."""

    process: subprocess.Popen[bytes]
    log: Path

    def wait(self, seconds: float = 240.0) -> int:
        """Return the exit status; a program that takes longer than `seconds` is killed, and the status is negative."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def text(self) -> str:
        return self.log.read_text(errors="replace")


@dataclass
class Host:
    """A host of a cluster.

    name, address  under which the other hosts reach it
    folder         of the cluster
    process        the parent of the first process of the host
    pid            of the first process, as this machine counts
    """

    name: str
    address: str
    folder: Path
    process: subprocess.Popen[bytes]
    pid: int
    programs: list[Program] = field(default_factory=list)

    def run(
        self, command: Sequence[str], env: Mapping[str, str] | None = None, timeout: float = 240.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the root folder of the repository, and return its status and output."""
        environment = self._environment(env)
        return subprocess.run(self._enter(command), env=environment, capture_output=True, text=True, timeout=timeout)

    def start(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> Program:
        """Start a command in the root folder of the repository."""
        log = self.folder / "logs" / f"{self.name}-{len(self.programs)}-{Path(command[0]).name}.txt"
        with log.open("wb") as output:
            environment = self._environment(env)
            process = subprocess.Popen(
                self._enter(command), env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        self.programs.append(Program(process, log))
        return self.programs[-1]

    def kill(self) -> None:
        """End all processes of the host at once, as a power cut does."""
        # The kernel reports the end of a first process when all processes of its namespace have ended.
        if self.process.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
        self.process.wait()
        for program in self.programs:
            program.process.wait()

    def cut_link(self) -> None:
        """Cut the host off from the network, without a message to anyone."""
        self.run(["ip", "link", "set", "eth0", "down"]).check_returncode()

    def restore_link(self) -> None:
        """Connect the host to the network again."""
        self.run(["ip", "link", "set", "eth0", "up"]).check_returncode()

    def entered(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> list[str]:
        """Return the command line that runs a command on this host, in its environment and no other."""
        variables = [f"{name}={value}" for name, value in self._environment(env).items()]
        return self._enter(["env", "--ignore-environment", *variables, *command])

    def _enter(self, command: Sequence[str]) -> list[str]:
        namespaces = ["--net", "--uts", "--ipc", "--mount", "--pid"]
        return ["nsenter", "--target", str(self.pid), *namespaces, "env", f"--chdir={ROOT}", *command]

    def _environment(self, env: Mapping[str, str] | None) -> dict[str, str]:
        return {
            "PATH": SEARCH,
            "HOME": str(self.folder / "home"),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        } | dict(env or {})


class Cluster:
    """A context manager for a cluster of `node1`, `node2`, ... and `head`, where Slurm's controller runs.

    Args:
        hosts: number of nodes.
        slurm: whether to start Slurm.

    Attributes:
        folder: the temporary folder of the cluster, which all hosts see.
        head: the host of the bridge and of Slurm's controller.
        nodes: the other hosts.
    """

    def __init__(self, hosts: int = 3, slurm: bool = True) -> None:
        self._size = hosts
        self._slurm = slurm
        self._addresses = {f"node{n}": f"10.77.0.{n}" for n in range(1, hosts + 1)} | {"head": "10.77.0.254"}
        self.nodes: list[Host] = []

    def __enter__(self) -> "Cluster":
        remove_leftovers()
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._lock = _lock(self.folder)
        try:
            self._write_files()
            self.head = self._boot("head")
            _as_root_of_network(self.head, "ip link add bridge0 type bridge")
            _as_root_of_network(self.head, f"ip addr add {self.head.address}/24 dev bridge0")
            _as_root_of_network(self.head, "ip link set bridge0 up")
            _as_root_of_network(self.head, "ip link set lo up")
            for number in range(1, self._size + 1):
                self.nodes.append(self._boot(f"node{number}"))
                self._connect(self.nodes[-1], f"port{number}")
                self.nodes[-1].start(["/usr/sbin/sshd", "-D", "-e"])
            wait_for(lambda: all(self._answers(host) for host in self.nodes), "a login to each host")
            if self._slurm:
                self._start_slurm()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for host in [*self.nodes, *([self.head] if hasattr(self, "head") else [])]:
            host.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def _write_files(self) -> None:
        spools = [f"slurm/spool.node{number}" for number in range(1, self._size + 1)]
        for name in ("home", "logs", "ssh", "munge", "slurm/state", *spools):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        ssh, slurm = self.folder / "ssh", self.folder / "slurm"
        for key in ("id", "hostkey"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / key)], check=True)
        kind, public, *_ = (ssh / "hostkey.pub").read_text().split()
        (ssh / "known_hosts").write_text("".join(f"{n},{a} {kind} {public}\n" for n, a in self._addresses.items()))
        (ssh / "ssh_config").write_text(SSH_CONFIG)
        (ssh / "sshd_config").write_text(SSHD_CONFIG)
        hosts = "".join(f"{address} {name}\n" for name, address in self._addresses.items())
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
        nodes = [
            f"NodeName={name} NodeAddr={address} CPUs=2 RealMemory=1000 Gres=gpu:8 State=UNKNOWN\n"
            for name, address in self._addresses.items()
            if name != "head"
        ]
        config = SLURM_CONFIG.format(folder=self.folder, head=self._addresses["head"])
        (slurm / "slurm.conf").write_text(config.replace("PartitionName", "".join(nodes) + "PartitionName", 1))
        (slurm / "gres.conf").write_text(f"Name=gpu File={slurm}/gpu[0-7]\n")
        for number in range(8):
            os.mknod(slurm / f"gpu{number}", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        (slurm / "cgroup.conf").write_text(CGROUP_CONFIG)
        secret = self.folder / "munge" / "key"
        secret.touch(0o600)
        secret.write_bytes(os.urandom(128))

    def _boot(self, name: str) -> Host:
        # `--pdeathsig` ends the host if this process is killed; `--kill-child` ends all processes of the host.
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--uts", "--ipc", "--mount", "--pid"]
        command += ["--fork", "--kill-child", "--mount-proc", "bash", "-c", FIRST, "bash", name, str(self.folder)]
        log = self.folder / "logs" / f"{name}.txt"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, env={"PATH": SEARCH}, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        try:
            wait_for(lambda: "ready" in log.read_text() or process.poll() is not None, f"the start of {name}", 10)
            if process.poll() is not None:
                raise RuntimeError(f"{name} did not start: {log.read_text()}")
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            return Host(name, self._addresses[name], self.folder, process, int(children[0]))
        except BaseException:
            process.kill()
            process.wait()
            raise

    def _connect(self, host: Host, port: str) -> None:
        _as_root_of_network(self.head, f"ip link add {port} type veth peer name eth0 netns {host.pid}")
        _as_root_of_network(self.head, f"ip link set {port} master bridge0 up")
        _as_root_of_network(host, f"ip addr add {host.address}/24 dev eth0")
        _as_root_of_network(host, "ip link set eth0 up")
        _as_root_of_network(host, "ip link set lo up")

    def _answers(self, host: Host) -> bool:
        return self.head.run(["ssh", host.name, "true"]).returncode == 0

    def _start_slurm(self) -> None:
        munge = self.folder / "munge"
        files = [f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")]
        self.head.start(["/usr/sbin/munged", "--foreground", "--force", f"--socket={munge / 'socket'}", *files])
        wait_for((munge / "socket").exists, "the start of munged", 20)
        self.head.start(["/usr/sbin/slurmctld", "-D"])
        for host in self.nodes:
            host.start(["/usr/sbin/slurmd", "-D"])
        wait_for(lambda: len(self._idle()) == self._size, "the start of Slurm", 60)

    def _idle(self) -> list[str]:
        return self.head.run(["sinfo", "-h", "-N", "-p", "low", "-t", "idle"]).stdout.splitlines()


def remove_leftovers() -> None:
    """Remove the folders of clusters whose tests were killed. Their hosts are gone already."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            _lock(folder).close()
        except (BlockingIOError, FileNotFoundError):
            continue
        shutil.rmtree(folder, ignore_errors=True)


def _lock(folder: Path) -> IO[bytes]:
    """Lock the folder of a cluster for as long as the returned file is open.

    Raises:
        BlockingIOError: another process uses the folder.
    """
    file = (folder / "lock").open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise
    return file


def _as_root_of_network(host: Host, command: str) -> None:
    # Only the network namespace, because a process id in the command is one of this machine.
    subprocess.run(["nsenter", "--target", str(host.pid), "--net", *command.split()], check=True, capture_output=True)
