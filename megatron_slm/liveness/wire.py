"""Messages between the heartbeats of a run: datagrams of JSON, apart from the connections of the process group.

A datagram never waits for its receiver, so a stopped process or a cut link blocks no other rank. Some may be lost, and
each heartbeat replaces the one before. Every datagram carries a random word of this start, and others are ignored.
"""

import dataclasses
import ipaddress
import os
import socket
import uuid
from contextlib import suppress
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from megatron_slm.dist import World, gather_objects, route_to
from megatron_slm.settings import STRICT

LARGEST = 65_507
"""Bytes of the largest datagram of UDP over IPv4."""
BUFFER = 4 * 1024**2
"""Bytes that the system may hold for a monitor, which hears all ranks; the system may allow less."""


@dataclass(config=STRICT, frozen=True)
class Beat:
    """A heartbeat: the activity of a rank.

    rank, host  of the sender
    step, phase, entered, done  see `Moment`
    idle        seconds since its last progress
    place       where the stack of its training thread stands; "" while it makes progress
    waits       whether that thread waits in a collective operation
    failing     whether a collective operation failed on it, because of another rank
    ended       why the rank ended: an error, or `finished`; "" while it runs
    """

    rank: int
    host: str
    step: int = 0
    phase: str = "start"
    entered: int = 0
    done: int = 0
    idle: float = 0.0
    place: str = ""
    waits: bool = False
    failing: bool = False
    ended: str = ""


@dataclass(config=STRICT, frozen=True)
class Message:
    """One message.

    beat    a heartbeat
    call    asks the receiver for a heartbeat at once
    ask     asks a monitor which ranks are lost
    answer  a monitor's answer: a sentence, "" if all ranks respond
    """

    kind: Literal["beat", "call", "ask", "answer"]
    sender: int
    run: str = ""
    beat: Beat | None = None
    sentence: str = Field(default="", max_length=8192)


_MESSAGE = TypeAdapter(Message)


class Wire:
    """The socket of one rank, and the addresses of all.

    Args:
        opened: a bound datagram socket, which the wire closes.
        run: random word of this start.
        addresses: host and port of every rank, in the order of ranks.
    """

    def __init__(self, opened: socket.socket, run: str, addresses: list[tuple[str, int]]) -> None:
        self._socket = opened
        self._run = run
        self._addresses = addresses
        self._resolved: dict[int, Any] = {}

    def send(self, rank: int, message: Message) -> None:
        """Send a message to a rank, which may not receive it."""
        data = _MESSAGE.dump_json(dataclasses.replace(message, run=self._run))
        # The link may be down, and a name may not be known any more. The next message may arrive.
        with suppress(OSError):
            self._socket.sendto(data, self._address(rank))

    def receive(self, seconds: float) -> Message | None:
        """Return the next message; None if none arrived in time, or it is not one of this start."""
        try:
            self._socket.settimeout(max(seconds, 0.001))
            message = _MESSAGE.validate_json(self._socket.recv(LARGEST))
        except (OSError, ValidationError):
            return None
        is_known = message.run == self._run and 0 <= message.sender < len(self._addresses)
        return message if is_known else None

    def close(self) -> None:
        self._socket.close()

    def _address(self, rank: int) -> Any:
        if rank not in self._resolved:
            host, port = self._addresses[rank]
            self._resolved[rank] = socket.getaddrinfo(host, port, self._socket.family, socket.SOCK_DGRAM)[0][4]
        return self._resolved[rank]


def open_wire(world: World) -> tuple[Wire | None, list[str]]:
    """Open the wires of all ranks; every rank calls it.

    Returns:
        The wire, and the name of the host of each rank. One process has no wire, and opens no port.
    """
    host = socket.gethostname()
    if world.size == 1:
        return None, [host]
    family, address = own_address(os.environ["MASTER_ADDR"])
    opened = socket.socket(family, socket.SOCK_DGRAM)
    with suppress(OSError):
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
    opened.bind(("", 0))
    ranks = gather_objects((host, address, opened.getsockname()[1], uuid.uuid4().hex))
    addresses = [(address, port) for _, address, port, _ in ranks]
    return Wire(opened, ranks[0][3], addresses), [host for host, *_ in ranks]


def own_address(main: str) -> tuple[socket.AddressFamily, str]:
    """Return the address under which other ranks reach this host, and its family.

    It is that of the interface through which this host reaches the host of rank 0. On that host itself it is the name
    by which the other hosts know it.

    Args:
        main: name or address of the host of rank 0.
    """
    try:
        family, address = route_to(main)
    except OSError:
        return socket.AF_INET, main  # a run without heartbeats is better than none
    return family, main if ipaddress.ip_address(address.partition("%")[0]).is_loopback else address
