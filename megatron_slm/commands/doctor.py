"""Check the hosts of a cluster, before a model is loaded.

Start it as you will start the run, under torchrun, the deepspeed launcher, srun or mpirun; without a launcher, it
checks this host alone. It compares versions, devices, memory and limits of all ranks, measures the network between the
hosts, a matrix product on each device, the clocks and the reading of files, and checks that all hosts see the same run
directory and corpora, with atomic renames and locks. It takes at most a minute, after all ranks have come. Each finding
has a remedy. The exit status is 0 if the verdict is PASS or WARN, 1 if it is FAIL, and 2 if the ranks cannot meet.
"""

import argparse
import json
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_slm.config import Config, load_config
from megatron_slm.data.corpus import MASK
from megatron_slm.doctor.findings import Finding, passing_hosts, verdict
from megatron_slm.doctor.host_list import ListedHost, check_hosts, expected_hosts, read_hostfile
from megatron_slm.doctor.run_needs import DESCRIPTORS_PER_CORPUS, InputFiles, RunNeeds
from megatron_slm.errors import UserError, first_line
from megatron_slm.io.files import write_durably
from megatron_slm.launcher import is_launched, is_main_process

if TYPE_CHECKING:
    from megatron_slm.dist import World
    from megatron_slm.doctor.report import Measurements

EXAMPLES = """examples:
  megatron-slm doctor --hostfile hostfile
  srun python -m megatron_slm doctor run.yaml
  torchrun --nproc-per-node 8 -m megatron_slm doctor run.yaml --json
  deepspeed --hostfile hostfile --module megatron_slm doctor run.yaml --hostfile hostfile --wait 30
  mpirun --hostfile hostfile python -m megatron_slm doctor --directory /shared/runs --passing good-hosts

Without a launcher, --hostfile checks the list itself: each host must have one line, the same number of slots as the
others, a name that resolves, and an answer on the port of ssh.
"""

logger = logging.getLogger("megatron_slm.doctor")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument(
        "config", metavar="CONFIG.yaml", nargs="?", help="also check whether the hosts suffice for this run"
    )
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", help="settings that override those in the file")
    parser.add_argument(
        "--directory",
        metavar="PATH",
        action="append",
        default=[],
        help="a directory that all hosts write to; repeat it for several (default: the current directory, unless "
        "CONFIG.yaml names a run directory)",
    )
    parser.add_argument(
        "--wait", metavar="SECONDS", type=float, default=60.0, help="time for all ranks to come (default: 60)"
    )
    parser.add_argument(
        "--hostfile",
        metavar="FILE",
        type=Path,
        help="hosts, one `NAME slots=N` per line: names those that do not come; without a launcher, checks the list",
    )
    parser.add_argument("--ssh-port", metavar="N", type=int, default=22, help="port of ssh on the hosts (default: 22)")
    parser.add_argument("--json", action="store_true", help="write the report as JSON")
    parser.add_argument(
        "--passing",
        metavar="FILE",
        type=Path,
        help="write the hosts without a finding of their own there, as a hostfile",
    )


def run(arguments: argparse.Namespace) -> None:
    """Check the host list, or the hosts, and exit with status 1 if a check fails.

    Raises:
        UserError: an option is invalid, the host list is wrong, or the ranks cannot meet.
    """
    if arguments.wait <= 0:
        raise UserError("--wait", arguments.wait, "it must be above 0", "Use the seconds in which all ranks start")
    # Only rank 0 reads the list, so the other hosts need not have it.
    listed = read_hostfile(arguments.hostfile) if arguments.hostfile and is_main_process(os.environ) else []
    if listed and not is_launched(os.environ):
        check_hosts(arguments.hostfile, listed, arguments.ssh_port, seconds=5.0)
        names = ", ".join(host.name for host in listed)
        sys.stdout.write(f"All hosts answer: {names}. They have {listed[0].slots} slots each.\n")
        if arguments.config:
            sys.stdout.write(f"{arguments.config} is not checked: start the doctor under a launcher for that.\n")
    elif not _pass_examination(arguments, listed):
        sys.exit(1)


def _pass_examination(arguments: argparse.Namespace, listed: list[ListedHost]) -> bool:
    """Run all checks, report them on rank 0, and return on every rank whether none failed."""
    from megatron_slm.dist import agree, disconnect, gather_objects
    from megatron_slm.doctor.gather import join
    from megatron_slm.doctor.report import judge, measure

    world = join(arguments.wait, expected_hosts(os.environ, listed))
    try:
        config = agree(lambda: _read(arguments) if world.is_main else None)
        directories, inputs = gather_objects(_places(arguments, config))[0]
        found = measure(world, directories, inputs, logger.info if world.is_main else logger.debug)
        failed = False
        if world.is_main:
            findings = judge(found, _run_needs(config, world) if config else None)
            _write(arguments, found, findings)
            failed = verdict(findings) == "FAIL"
        # The others wait for the report of rank 0, because a launcher ends all ranks once one has failed.
        return not gather_objects(failed)[0]
    finally:
        disconnect()


def _read(arguments: argparse.Namespace) -> Config | None:
    return load_config(arguments.config, arguments.overrides) if arguments.config else None


def _places(arguments: argparse.Namespace, config: Config | None) -> tuple[list[str], list[InputFiles]]:
    """Return the directories that all hosts write to, and the inputs that all hosts read."""
    directories = list(arguments.directory)
    if config is None:
        return directories or ["."], []
    directories += [path for path in (config.run_dir, config.data.cache) if path is not None]
    inputs = [InputFiles(name, prefix, _corpus_files(prefix)) for name, prefix in config.data.corpora()]
    named = [("model.path", config.model.path), ("data.keep", config.data.keep)]
    named += [(f"reference.{'store' if part.store else 'path'}", part.store or part.path) for part in config.references]
    # A name on the hub is no path.
    inputs += [InputFiles(name, path, (path,)) for name, path in named if path is not None and Path(path).exists()]
    return list(dict.fromkeys(directories)), inputs


def _corpus_files(prefix: str) -> tuple[str, ...]:
    mask = [prefix + MASK] if Path(prefix + MASK).exists() else []
    return (f"{prefix}.bin", f"{prefix}.idx", f"{prefix}.json", f"{prefix}.tokenizer", *mask)


def _run_needs(config: Config, world: "World") -> RunNeeds:
    """Return the needs of a run, as a dry run estimates them, or the errors of its configuration."""
    from megatron_slm.build.resolve import resolve
    from megatron_slm.build.sizes import precision_of, run_sizes
    from megatron_slm.planning.disk import checkpoint_bytes
    from megatron_slm.run_directory import RunDirectory
    from megatron_slm.training.checkpoints import list_checkpoints

    corpora = [prefix for _, prefix in config.data.corpora()]
    needs = RunNeeds(config.run_dir, descriptors=DESCRIPTORS_PER_CORPUS * len(corpora))
    directory = RunDirectory(config.run_dir, world)
    try:
        resolved = resolve(config, directory, world)
    except UserError as error:
        return replace(needs, errors=tuple(error.sentences()))
    try:
        sizes = run_sizes(resolved.config, resolved.plan, resolved.student, resolved.references, world)
    except Exception as error:  # some third-party models do not run on the meta device
        logger.warning("the memory of this model cannot be estimated (%s)", first_line(error))
        return needs
    on_gpu = world.device.type == "cuda"
    on_device, on_host = sizes.memory.peak, sum(sizes.memory.host.values())
    return replace(
        needs,
        device_memory=on_device if on_gpu else 0,
        host_memory=on_host if on_gpu else on_host + on_device,
        checkpoint=checkpoint_bytes(sizes.student, precision_of(resolved.config).itemsize),
        # While a checkpoint is written, the disk holds one more than are kept.
        checkpoints=config.training.keep_checkpoints + 1 - len(list_checkpoints(directory.checkpoints)),
    )


def _write(arguments: argparse.Namespace, found: "Measurements", findings: list[Finding]) -> None:
    from megatron_slm.doctor.report import as_json, as_text, host_list

    sys.stdout.write(
        json.dumps(as_json(found, findings), indent=1) + "\n" if arguments.json else as_text(found, findings)
    )
    sys.stdout.flush()
    if arguments.passing:
        write_durably(arguments.passing, host_list(found, passing_hosts(found.hosts, findings)))
