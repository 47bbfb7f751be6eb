"""The shared files: directories that all hosts write to, and inputs that all hosts read."""

import errno
import fcntl
import hashlib
import itertools
import os
import shutil
import statistics
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_slm.dist import World, gather_objects
from megatron_slm.doctor.findings import Finding, far_below, in_bytes, listed

SECONDS_TO_APPEAR = 3.0
"""How long a new file may take to appear on other hosts; NFS caches the entries of a directory for about as long."""

SLOW_READ = 0.5
"""Share of the median speed of reading below which a host is slow."""

_SECONDS_OF_RENAMES = 0.5
_READ_SECONDS, _READ_BYTES, _BLOCK = 1.5, 2**28, 2**22
_ENOUGH_TO_TIME = 2**24  # bytes; reading less is over before its speed can be told
_ENDS = 2**16  # bytes of each end of a file that its fingerprint covers


@dataclass
class DirectoryFacts:
    """The observations of one host about one shared directory; texts are empty if nothing is wrong.

    apart       True if it does not see the folder that rank 0 made there
    unwritable  why the host cannot write to it
    unseen      the hosts whose files it does not see
    renames     what a reader saw while another host replaced a file
    locks       what happened when it took a lock that another host holds
    free        bytes
    speed       bytes per second of reading back a file of its own; 0 if not measured
    """

    apart: bool = False
    unwritable: str = ""
    unseen: list[str] = field(default_factory=list)
    renames: str = ""
    locks: str = ""
    free: int = 0
    speed: float = 0.0


@dataclass
class InputFacts:
    """The observations of one host about one input: its fingerprint, or why there is none; and the speed of reading."""

    fingerprint: str = ""
    problem: str = ""
    speed: float = 0.0


def existing_parent(path: Path) -> Path:
    """Return the nearest folder that exists: the path itself, or the first of its parents."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


def check_directory(world: World, hosts: Sequence[str], path: Path) -> dict[str, DirectoryFacts]:
    """Return the observations of all hosts about a directory; every rank calls it.

    A run directory that does not exist yet is checked at its nearest parent that exists on rank 0. The files are
    written to a folder of their own, which is removed.

    Args:
        world: this rank.
        hosts: the host of each rank; the first rank of each takes part.
        path: the directory.
    """
    name = f".megatron-slm-doctor-{uuid.uuid4().hex[:12]}"
    folder, problem = gather_objects(_make_folder(path, name) if world.is_main else None)[0] or (path, "")
    mine = DirectoryFacts()
    takes_part = hosts.index(hosts[world.rank]) == world.rank
    others = [host for host in dict.fromkeys(hosts) if host != hosts[world.rank]]
    if problem:
        return {hosts[0]: DirectoryFacts(unwritable=problem)}
    for step in (_write_word, _read_words, _rename_or_read, _lock_or_try, _write_and_read):
        if takes_part and not mine.apart and not mine.unwritable:
            try:
                step(world, folder, hosts[world.rank], others, mine)
            except OSError as error:
                mine.unwritable = error.strerror or str(error)
        gather_objects(None)
    found = gather_objects(mine)
    if world.is_main:
        shutil.rmtree(folder, ignore_errors=True)
    return {host: found[hosts.index(host)] for host in dict.fromkeys(hosts)}


def _make_folder(path: Path, name: str) -> tuple[Path, str]:
    folder = existing_parent(path) / name
    try:
        folder.mkdir()
    except OSError as error:
        return folder, error.strerror or str(error)
    return folder, ""


def _write_word(world: World, folder: Path, host: str, others: list[str], mine: DirectoryFacts) -> None:
    mine.apart = not _wait_until(folder.is_dir)
    if not mine.apart:
        mine.free = shutil.disk_usage(folder).free
        (folder / f"word-{host}").write_text(host, encoding="utf-8")


def _read_words(world: World, folder: Path, host: str, others: list[str], mine: DirectoryFacts) -> None:
    mine.unseen = [*others]

    def all_seen() -> bool:
        mine.unseen = [other for other in mine.unseen if _read(folder / f"word-{other}") != other]
        return not mine.unseen

    _wait_until(all_seen)


def _rename_or_read(world: World, folder: Path, host: str, others: list[str], mine: DirectoryFacts) -> None:
    """Replace a file again and again on rank 0, and read it on the other hosts, which must always find a whole one."""
    target, staged = folder / "renamed", folder / "renamed.new"
    texts = ["old" * 1000, "new" * 1000]
    end = time.monotonic() + _SECONDS_OF_RENAMES
    if world.is_main:
        for text in itertools.cycle(texts):
            staged.write_text(text, encoding="utf-8")
            os.replace(staged, target)
            if time.monotonic() > end:
                return
    if not _wait_until(target.exists):
        mine.renames = "the new file does not appear"
    while time.monotonic() < end and not mine.renames:
        found = _read(target)
        if found not in texts:
            mine.renames = "a reader found no file" if found is None else "a reader found a part of a file"


def _lock_or_try(world: World, folder: Path, host: str, others: list[str], mine: DirectoryFacts) -> None:
    """Hold a lock on rank 0 while the other hosts try to take it. Marks in the folder keep the order."""
    held, marks = folder / "lock-held", [folder / f"lock-tried-{other}" for other in others]
    with (folder / "lock").open("a") as file:
        try:
            if world.is_main:
                fcntl.flock(file, fcntl.LOCK_EX)
                held.touch()
                _wait_until(lambda: all(mark.exists() for mark in marks))
            elif _wait_until(held.exists):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine.locks = "it got a lock that rank 0 held"
        except BlockingIOError:
            pass
        except OSError as error:
            mine.locks = f"locks are not supported there ({error.strerror})"
        (folder / f"lock-tried-{host}").touch()


def _write_and_read(world: World, folder: Path, host: str, others: list[str], mine: DirectoryFacts) -> None:
    """Measure the speed of reading back a file of this host."""
    path = folder / f"speed-{host}"
    block = os.urandom(_BLOCK)
    end, written = time.monotonic() + _READ_SECONDS, 0
    with path.open("wb") as file:
        while time.monotonic() < end and written < _READ_BYTES // 4:
            written += file.write(block)
        file.flush()
        os.fsync(file.fileno())
    mine.speed = read_speed(path)


def read_speed(path: Path) -> float:
    """Return the speed of reading a file in bytes per second, without what this host has cached; 0 if it is small."""
    size = path.stat().st_size
    if size < _ENOUGH_TO_TIME:
        return 0.0
    start, done = time.perf_counter(), 0
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        # Different hosts read different parts, so that one does not read what the server cached for another.
        first = int(uuid.uuid4()) % max(1, size - _READ_BYTES) // _BLOCK * _BLOCK
        file.seek(first)
        while done < _READ_BYTES and time.perf_counter() - start < _READ_SECONDS:
            block = file.read(_BLOCK)
            if not block:
                break
            done += len(block)
    return done / max(time.perf_counter() - start, 1e-9)


def check_input(
    world: World, hosts: Sequence[str], paths: Sequence[Path], measure_speed: bool = True
) -> dict[str, InputFacts]:
    """Return the observations of all hosts about the files of one input; every rank calls it.

    Args:
        world: this rank.
        hosts: the host of each rank; the first rank of each takes part.
        paths: files, and folders of files.
        measure_speed: also measure the speed of reading the largest file.
    """
    mine = InputFacts()
    if hosts.index(hosts[world.rank]) == world.rank:
        try:
            mine.fingerprint = _fingerprint(paths)
            largest = max((file for path in paths for file in _files(path)), key=lambda file: file.stat().st_size)
            mine.speed = read_speed(largest) if measure_speed else 0.0
        except OSError as error:
            mine.problem = f"{error.strerror}: {error.filename}"
        except ValueError:
            mine.problem = "it holds no file"
    found = gather_objects(mine)
    return {host: found[hosts.index(host)] for host in dict.fromkeys(hosts)}


def _fingerprint(paths: Sequence[Path]) -> str:
    """Return a hash of the sizes and of both ends of all files."""
    digest = hashlib.sha256()
    for path in paths:
        for file in _files(path):
            size = file.stat().st_size
            digest.update(f"{file.name} {size} ".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(_ENDS))
                stream.seek(max(0, size - _ENDS))
                digest.update(stream.read(_ENDS))
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]


def _read(path: Path) -> str | None:
    """Return the text of a file; None if it does not exist."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        # NFS reports a file that another host replaced between opening and reading; a program would open it again.
        if error.errno == errno.ESTALE:
            return _read(path)
        raise


def _wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + SECONDS_TO_APPEAR
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def judge_directory(path: Path, facts: Mapping[str, DirectoryFacts]) -> list[Finding]:
    """Return the findings about a directory that all hosts write to."""
    found = []

    def where(fails: Callable[[DirectoryFacts], object]) -> tuple[str, ...]:
        return tuple(host for host, one in facts.items() if fails(one))

    share = "Mount the same file system there, or use a directory on one that all hosts share"
    if hosts := where(lambda one: one.apart):
        # If no other host sees what rank 0 wrote, the host of rank 0 is the odd one.
        lost = (next(iter(facts)),) if len(hosts) == len(facts) - 1 > 1 else hosts
        text = f"the {path} of {listed(lost)} is not that of the other hosts"
        found.append(Finding("FAIL", "files", lost, text, share))
    if hosts := where(lambda one: [other for other in one.unseen if _is_in(facts[other])]):
        text = f"{listed(hosts)} did not see within {SECONDS_TO_APPEAR:g} s what other hosts wrote to {path}"
        remedy = "Shorten the time for which its file system caches directories, or use another file system"
        found.append(Finding("FAIL", "files", hosts, text, remedy))
    if hosts := where(lambda one: one.unwritable):
        text = f"{listed(hosts)} cannot write to {path} ({facts[hosts[0]].unwritable})"
        found.append(Finding("FAIL", "files", hosts, text, "Correct its owner, permissions or quota, or use another"))
    if hosts := where(lambda one: one.renames):
        text = f"a rename in {path} is not atomic: on {listed(hosts)}, {facts[hosts[0]].renames}"
        remedy = "Checkpoints need atomic renames: use a shared file system such as NFS, Lustre or GPFS, not a bucket"
        found.append(Finding("FAIL", "files", hosts, text, remedy))
    if hosts := where(lambda one: one.locks):
        text = f"locks in {path} do not reach {listed(hosts)} ({facts[hosts[0]].locks})"
        remedy = (
            "Mount it with locks (NFS without nolock or local_lock, Lustre with flock), or make sure yourself that "
        )
        remedy += "no two runs use one run directory"
        found.append(Finding("WARN", "files", (), text, remedy))
    return found + _slow_readers(str(path), {host: one.speed for host, one in facts.items()})


def _is_in(facts: DirectoryFacts) -> bool:
    """Return True if the host could write to the directory that rank 0 sees."""
    return not facts.apart and not facts.unwritable


def judge_input(setting: str, path: str, facts: Mapping[str, InputFacts]) -> list[Finding]:
    """Return the findings about an input, such as the corpus that a setting names."""
    missing = tuple(host for host, one in facts.items() if one.problem)
    if missing:
        text = f"{listed(missing)} cannot read {path}, {setting} ({facts[missing[0]].problem})"
        remedy = "Mount its file system there, copy it to the same path, or correct the path"
        return [Finding("FAIL", "files", missing, text, remedy)]
    prints = [one.fingerprint for one in facts.values()]
    usual = statistics.mode(prints)
    other = tuple(host for host, one in facts.items() if one.fingerprint != usual)
    found = _slow_readers(path, {host: one.speed for host, one in facts.items()})
    if other:
        text = f"{path}, {setting}, holds other data on {listed(other)} than elsewhere"
        found.append(Finding("FAIL", "files", other, text, "Copy it again, or use a file system that all hosts share"))
    return found


def _slow_readers(path: str, speeds: Mapping[str, float]) -> list[Finding]:
    measured = {host: speed for host, speed in speeds.items() if speed}
    usual = statistics.median(measured.values()) if measured else 0.0
    return [
        Finding(
            "WARN",
            "files",
            (host,),
            f"{host} reads {path} at {in_bytes(measured[host])}/s; the median of all hosts is {in_bytes(usual)}/s",
            "Repeat the doctor. If it is slow again, check its network to the file server, or leave the host out",
        )
        for host in far_below(measured, SLOW_READ)
    ]
