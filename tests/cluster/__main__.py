"""Start a cluster, and run a command on its login node, or open a shell there.

    python -m tests.cluster --hosts 3                      # as root; the cluster ends with the shell
    python -m tests.cluster --hosts 3 sbatch --wait job.sbatch

From the login node, `ssh node1` reaches the first host. In a script, give srun and ssh `< /dev/null`: they read
standard input. The hosts have two CPUs and no GPU, so jobs ask for --gpus-per-node=0 --cpus-per-task=1.

To lose a host, use another terminal of this machine, outside the cluster; PID is the printed process of the host:

    kill -KILL PID                                          # cuts its power; it does not come back
    nsenter --target PID --net ip link set eth0 down        # cuts it off; `up` brings it back
"""

import argparse
import logging
import os
import shlex
import subprocess
import sys

from tests.cluster.cluster import Cluster, why_not


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="default: bash")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    reason = why_not()
    if reason is not None:
        parser.error(reason)
    with Cluster(hosts=arguments.hosts) as cluster:
        for host in [cluster.head, *cluster.nodes]:
            logging.info("%s at %s: process %d", host.name, host.address, host.pid)
        env = {"TERM": os.environ.get("TERM", "dumb")}
        logging.info("another shell on the login node: %s", shlex.join(cluster.head.entered(["bash"], env)))
        return subprocess.run(cluster.head.entered(arguments.command or ["bash"], env)).returncode


if __name__ == "__main__":
    sys.exit(main())
