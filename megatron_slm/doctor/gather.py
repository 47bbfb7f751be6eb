"""The meeting of all ranks, with a time limit: a rank that does not come is named, and so is its host if it is known.

torch's own rendezvous waits for all ranks and then reports how many are missing. Here rank 0 opens the store without
waiting. Each rank leaves its place there and the address at which its host can be reached. Rank 0 waits for all places,
asks the hosts to connect to each other, and leaves the outcome in the store for all.
"""

import json
import os
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from datetime import timedelta

import psutil
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from megatron_slm.dist import World, connect, place_of, route_to, store_of_this_start
from megatron_slm.doctor.findings import listed
from megatron_slm.doctor.host_list import absent_hosts
from megatron_slm.errors import AgreedError, UserError, first_line
from megatron_slm.launcher import launcher_variables, refuse_missing_interface

SECONDS_TO_CONNECT = 5.0
"""How long one host may take to answer another."""

SECONDS_OF_SILENCE = 120.0
"""How long a collective may wait for a silent rank: longer than any check."""

_PAUSE = 0.05
_OUTCOME = "outcome"


@dataclass(frozen=True)
class Place:
    """A rank, its host, and the address under which gloo makes the rank known to the others.

    port    at which the first rank of a host listens, so that other hosts can try to connect; 0 for other ranks
    error   the fields of the user error that this rank met before it came; empty if none
    """

    rank: int
    local_rank: int
    host: str
    interface: str
    address: str
    port: int = 0
    error: tuple[str, ...] = ()


def host_name() -> str:
    """Return the name of this host: Slurm's if a step of Slurm runs here, else the system's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def interface_of(address: str) -> str:
    """Return the name of the network interface with this address; a question mark if there is none."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address.partition("%")[0] == address for found in addresses):
            return name
    return "?"


def gloo_address() -> str:
    """Return the address under which gloo makes this rank known to the others.

    It is that of the interface in GLOO_SOCKET_IFNAME, or else the first address of the host's own name that belongs to
    this host, or else the loopback address, which other hosts cannot reach (ProcessGroupGloo::createDefaultDevice).
    """
    if chosen := os.environ.get("GLOO_SOCKET_IFNAME"):
        found = psutil.net_if_addrs().get(chosen.split(",")[0], [])
        usable = [one.address for family in (socket.AF_INET, socket.AF_INET6) for one in found if one.family == family]
        return usable[0].partition("%")[0] if usable else "127.0.0.1"
    try:
        for family, *_, where in socket.getaddrinfo(socket.gethostname(), 0, type=socket.SOCK_STREAM):
            with closing(socket.socket(family)) as probe:
                try:
                    probe.bind((where[0], 0))
                except OSError:
                    continue
                return str(where[0])
    except OSError:
        pass
    return "127.0.0.1"


def join(wait: float, expected: Sequence[str]) -> World:
    """Join the process group that the launcher describes, as `dist.connect` does, but with a time limit.

    Args:
        wait: seconds for which rank 0 waits for the others, and for which they wait for rank 0.
        expected: the hosts on which ranks were to start, as far as they are known; to name those that do not come.

    Raises:
        UserError: the launcher's variables are wrong, or the ranks cannot meet.
    """
    os.environ.update(launcher_variables(os.environ))
    rank, size, local_rank = place_of(os.environ)
    store = meet(rank, size, local_rank, wait, expected) if size > 1 else None
    return connect(SECONDS_OF_SILENCE / 60, None if store is None else PrefixStore("group", store))


def meet(rank: int, size: int, local_rank: int, wait: float, expected: Sequence[str]) -> Store:
    """Return a store that all ranks share, once all came and all hosts reach each other.

    Args:
        rank, size, local_rank: of this process, as in `World`.
        wait: seconds for which rank 0 waits for the others, and for which they wait for rank 0.
        expected: the hosts on which ranks were to start, as far as they are known; to name those that do not come.

    Raises:
        AgreedError: on every rank that came: ranks are missing, a host cannot reach another, or a network interface
            does not exist.
        UserError: this rank cannot reach rank 0, or rank 0 cannot open its port.
    """
    deadline = time.monotonic() + wait
    store = PrefixStore("megatron_slm/doctor", _open_store(rank, size, deadline))
    with ExitStack() as opened:
        mine = _own_place(rank, local_rank, opened)
        store.set(f"place/{rank}", json.dumps(asdict(mine)))
        if rank != 0:
            _follow(store, mine, wait)
            return store
        texts = _collect(store, "place", range(size), deadline)
        came = [Place(**json.loads(texts[rank])) for rank in sorted(texts)]
        _lead(store, came, _missing(came, size, wait, expected))
        return store


def _open_store(rank: int, size: int, deadline: float) -> Store:
    """Return the store at MASTER_ADDR: torchrun's own, or else that of rank 0."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    seconds = max(1.0, deadline - time.monotonic())
    if rank != 0 or by_torchrun:
        _reach(rank, address, port, deadline)
    try:
        store: Store = TCPStore(
            address,
            port,
            size,
            is_master=rank == 0 and not by_torchrun,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
        )
        return store_of_this_start(store, rank, size, timedelta(seconds=seconds)) if by_torchrun else store
    except dist.DistError as error:
        reason = f"rank {rank} on {host_name()} cannot use port {port} there ({first_line(error)})"
        raise UserError("MASTER_ADDR", address, reason, "Use the address of rank 0, and a port that is free") from error


def _reach(rank: int, address: str, port: int, deadline: float) -> None:
    """Return when a connection to the store succeeds.

    torch's own client would retry as long, but reports neither the reason nor the interface.

    Raises:
        UserError: the name does not resolve, or nothing answers until the deadline.
    """
    started = time.monotonic()
    while True:
        try:
            left = max(0.5, deadline - time.monotonic())
            socket.create_connection((address, port), min(SECONDS_TO_CONNECT, left)).close()
            return
        except socket.gaierror as error:
            reason = f"its name does not resolve on {host_name()} ({error.strerror})"
            remedy = "Correct the name, add it to the DNS or to /etc/hosts, or use the address"
            raise UserError("MASTER_ADDR", address, reason, remedy) from error
        except OSError as error:
            failure = error.strerror or str(error)
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    try:
        _, own = route_to(address)
    except OSError:
        own = "?"
    raise UserError(
        "MASTER_ADDR",
        address,
        f"rank {rank} on {host_name()} cannot connect to port {port} there from {interface_of(own)} ({own}) within "
        f"{deadline - started:.0f} seconds ({failure})",
        "Check that rank 0 runs on that host, and that no firewall closes the port",
    )


def _own_place(rank: int, local_rank: int, opened: ExitStack) -> Place:
    """Return the place of this rank; if it is the first of its host, other hosts can connect until `opened` closes."""
    address, port, error = gloo_address(), 0, ()
    try:
        refuse_missing_interface(os.environ)
        if local_rank == 0:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            # The kernel accepts connections; nobody needs to read them.
            door = opened.enter_context(socket.create_server((address, 0), family=family, backlog=1024))
            port = door.getsockname()[1]
    except UserError as found:
        error = found.args
    return Place(rank, local_rank, host_name(), interface_of(address), address, port, error)


def _lead(store: Store, came: list[Place], missing: UserError | None) -> None:
    """Let the hosts connect to each other, leave the outcome for all ranks that came, and raise its error: rank 0."""
    error = missing or _first_error(came) or same_place(came)
    callers = [place for place in came if place.port] if error is None else []
    doors = {place.host: (place.address, place.port) for place in callers}
    store.set("doors", json.dumps(doors))
    if error is None:
        store.set("closed/0", json.dumps(_closed_doors(doors, came[0].host)))
        texts = _collect(store, "closed", [place.rank for place in callers], time.monotonic() + 4 * SECONDS_TO_CONNECT)
        error = unreachable(callers, {rank: json.loads(text) for rank, text in texts.items()})
    store.set(_OUTCOME, json.dumps(error.args if error else None))
    # The store may end with this process: the others must have read the outcome before.
    _collect(store, "read", [place.rank for place in came[1:]], time.monotonic() + SECONDS_TO_CONNECT)
    if error is not None:
        raise AgreedError(*error.args)


def _follow(store: Store, mine: Place, wait: float) -> None:
    """Connect to the other hosts if this rank is the first of its host, and raise the error that rank 0 leaves."""
    patience = timedelta(seconds=wait + 6 * SECONDS_TO_CONNECT)
    try:
        store.wait(["doors"], patience)
        doors = json.loads(store.get("doors"))
        if mine.host in doors and mine.port:
            store.set(f"closed/{mine.rank}", json.dumps(_closed_doors(doors, mine.host)))
        store.wait([_OUTCOME], patience)
        outcome = json.loads(store.get(_OUTCOME))
        store.set(f"read/{mine.rank}", "")
    except dist.DistError as error:
        reason = f"rank {mine.rank} on {mine.host} lost the connection to rank 0 there ({first_line(error)})"
        raise UserError("MASTER_ADDR", os.environ["MASTER_ADDR"], reason, "See what rank 0 reports") from error
    if outcome is not None:
        raise AgreedError(*outcome)


def _collect(store: Store, name: str, ranks: Sequence[int], deadline: float) -> dict[int, str]:
    """Return what each rank left under a name, without those that did not until the deadline."""
    found: dict[int, str] = {}
    while len(found) < len(ranks):
        for rank in ranks:
            if rank not in found and store.check([f"{name}/{rank}"]):
                found[rank] = store.get(f"{name}/{rank}").decode()
        if time.monotonic() > deadline:
            break
        time.sleep(_PAUSE)
    return found


def _closed_doors(doors: dict[str, tuple[str, int]], own: str) -> dict[str, str]:
    """Return the hosts to which this host cannot connect, and why; of many hosts, it tries the 16 after its own."""
    names = sorted(doors)
    place = names.index(own)
    others = (names[place + 1 :] + names[:place])[:16]
    closed: dict[str, str] = {}
    for name in others:
        try:
            address, port = doors[name]
            socket.create_connection((address, port), SECONDS_TO_CONNECT).close()
        except OSError as error:
            closed[name] = error.strerror or str(error)
            if len(closed) > 2:  # enough to name, and each takes seconds
                break
    return closed


def _missing(came: list[Place], size: int, wait: float, expected: Sequence[str]) -> UserError | None:
    """Return the error if ranks are missing, with the hosts from which none came."""
    missing = sorted(set(range(size)) - {place.rank for place in came})
    if not missing:
        return None
    reason = f"{_ranks(missing)} did not come within {wait:g} seconds"
    absent = absent_hosts(expected, [name for place in came for name in (place.host, place.address)])
    where = listed(absent) or "the missing host"
    if absent:
        reason += f", and no rank came from {where}"
    else:
        reason += f"; the others run on {listed(dict.fromkeys(place.host for place in came))}"
    store = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    remedy = f"Check that {where} is up, can run the command and can connect to {store}, or start without it"
    return UserError("WORLD_SIZE", size, reason, remedy)


def _first_error(came: list[Place]) -> UserError | None:
    """Return the error that a rank met before it came, with the other hosts that met one."""
    failed = {place.host: place for place in reversed(came) if place.error}
    if not failed:
        return None
    first = next(place for place in came if place.error)
    setting, value, reason, remedy = first.error[:4]
    others = [host for host in failed if host != first.host]
    return UserError(setting, value, reason + (f". So it is on {listed(others)}" if others else ""), remedy)


def same_place(came: list[Place]) -> UserError | None:
    """Return the error if two ranks of one host have the same LOCAL_RANK, and would use the same device."""
    owners: dict[tuple[str, int], int] = {}
    for place in came:
        other = owners.setdefault((place.host, place.local_rank), place.rank)
        if other != place.rank:
            reason = f"ranks {other} and {place.rank} both have it on {place.host}"
            remedy = "Start one rank per device with one launcher, and give each host a name of its own"
            return UserError("LOCAL_RANK", place.local_rank, reason, remedy)
    return None


def unreachable(callers: list[Place], closed: dict[int, dict[str, str]]) -> UserError | None:
    """Return the error if a host cannot connect to another, or did not report.

    Args:
        callers: the first rank of each host.
        closed: by rank, the hosts to which it cannot connect, and why.
    """
    place_of = {place.host: place for place in callers}
    failures = [
        f"{caller.host} cannot connect to {name} at {place_of[name].address}, {place_of[name].interface} ({why})"
        for caller in callers
        for name, why in closed.get(caller.rank, {}).items()
    ]
    failures += [f"{caller.host} went silent" for caller in callers if caller.rank not in closed]
    if not failures:
        return None
    chosen = os.environ.get("GLOO_SOCKET_IFNAME")
    remedy = (
        "Open all ports between these addresses, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface "
        "that connects the hosts (`ip -brief address` lists those of a host)"
    )
    return UserError("GLOO_SOCKET_IFNAME", chosen, listed(failures, most=3), remedy)


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {listed(ranks)}"
