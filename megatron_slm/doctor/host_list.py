"""The host list of a launch: DeepSpeed's and Open MPI's hostfile, and Slurm's list. Imports nothing heavy."""

import re
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from megatron_slm.errors import Mistakes, UserError
from megatron_slm.launcher import expand_hosts

_LINE = re.compile(r"(\S+)\s+slots=(\d+)(\s+max_slots=\d+)?\s*(#.*)?")
_OPTION = "--hostfile"


class ListedHost(NamedTuple):
    """A line of a hostfile: the name of a host, its number of ranks, and the number of the line."""

    name: str
    slots: int
    line: int


def read_hostfile(path: Path) -> list[ListedHost]:
    """Read a hostfile of lines such as `node1 slots=8`.

    Raises:
        UserError: all mistakes that were found: a malformed line, a host named twice, unequal slots, no host at all.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(_OPTION, path, f"it cannot be read ({reason})", "Check the path") from error
    mistakes = Mistakes()
    hosts: list[ListedHost] = []
    for number, text in enumerate(lines, start=1):
        if text.strip() and not text.strip().startswith("#"):
            with mistakes.collect():
                hosts.append(_read_line(path, number, text.strip(), hosts))
    with mistakes.collect():
        _refuse_unequal_slots(path, hosts)
    if not hosts and not mistakes.errors:
        raise UserError(_OPTION, path, "it names no host", "Write one line per host, such as `node1 slots=8`")
    mistakes.raise_any()
    return hosts


def _read_line(path: Path, number: int, text: str, before: list[ListedHost]) -> ListedHost:
    match = _LINE.fullmatch(text)
    if match is None or int(match[2]) < 1:
        remedy = "Write the name of a host and its number of ranks, such as `node1 slots=8`"
        raise UserError(f"{path}, line {number},", text, "it is not a host with its slots", remedy)
    for other in before:
        if other.name == match[1]:
            reason = f"line {other.line} names the same host"
            raise UserError(f"{path}, line {number},", text, reason, "Remove one of the two lines")
    return ListedHost(match[1], int(match[2]), number)


def _refuse_unequal_slots(path: Path, hosts: list[ListedHost]) -> None:
    counts = [host.slots for host in hosts]
    usual = max(counts, key=counts.count, default=0)
    for host in hosts:
        if host.slots != usual:
            reason = f"the other hosts have {usual}" if counts.count(usual) > 1 else f"another host has {usual}"
            remedy = f"Give all hosts the same number of slots, or leave {host.name} out"
            raise UserError(f"slots of {host.name} ({path}, line {host.line})", host.slots, reason, remedy)


def check_hosts(path: Path, hosts: list[ListedHost], port: int, seconds: float) -> None:
    """Check that all hosts of a hostfile resolve, are different, and answer on the port of ssh.

    All hosts are asked at once, so that this takes no longer than one of them.

    Args:
        path: of the hostfile, for errors.
        hosts: its hosts.
        port: the port of ssh.
        seconds: how long to wait for an answer.

    Raises:
        UserError: all mistakes that were found.
    """
    mistakes = Mistakes()
    owners: dict[str, ListedHost] = {}
    with ThreadPoolExecutor(min(64, len(hosts))) as pool:
        for host, answer in zip(hosts, pool.map(lambda one: _ask(one.name, port, seconds), hosts), strict=True):
            setting = f"{path}, line {host.line},"
            with mistakes.collect():
                if isinstance(answer, UserError):
                    raise UserError(setting, host.name, answer.reason, answer.remedy)
                other = owners.setdefault(answer, host)
                if other is not host:
                    reason = f"it is the same host as {other.name} in line {other.line} ({answer})"
                    raise UserError(setting, host.name, reason, "Remove one of the two lines")
    mistakes.raise_any()


def _ask(name: str, port: int, seconds: float) -> str | UserError:
    """Return the address of a host that answers, or the error of one that does not."""
    try:
        address = str(socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        remedy = "Correct the name, or add it to the DNS or to /etc/hosts"
        return UserError(_OPTION, name, f"its name does not resolve ({error.strerror})", remedy)
    try:
        socket.create_connection((address, port), seconds).close()
    except OSError as error:
        reason = f"it does not answer at {address}, port {port} of ssh ({error.strerror or error})"
        remedy = f"Start the host or its sshd (`ssh {name} true` must work), or remove the line"
        return UserError(_OPTION, name, reason, remedy)
    return address


def expected_hosts(environment: Mapping[str, str], hostfile: list[ListedHost]) -> list[str]:
    """Return the hosts on which the launcher was to start ranks; empty if unknown."""
    if hostfile:
        return [host.name for host in hostfile]
    listed = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    return expand_hosts(listed) if listed and "SLURM_PROCID" in environment else []


def absent_hosts(
    expected: Sequence[str], came: Sequence[str], address_of: Callable[[str], str | None] | None = None
) -> list[str]:
    """Return the expected hosts from which no rank came.

    Hosts may be listed by another name than they use for themselves: a name with or without its domain is the same, and
    so are names of one address.

    Args:
        expected: as the launcher's list names them.
        came: the names, and the addresses, of the hosts that came.
        address_of: returns the address of a name, None if it has none; by default, asks the resolver.
    """
    address_of = address_of or _address
    present = {name.partition(".")[0] if not name[:1].isdigit() else name for name in came} | set(came)
    return [
        name
        for name in expected
        if name not in present and name.partition(".")[0] not in present and address_of(name) not in present
    ]


def _address(name: str) -> str | None:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return None
