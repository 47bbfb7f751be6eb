"""Sentences about a run that stands still: which rank is behind, ahead, silent or lost, and where it stands."""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from megatron_slm.liveness.activity import Phase
from megatron_slm.liveness.wire import Beat

FINISHED = "finished"
SHOWN = 4
"""Groups of ranks that a sentence names at most."""
_NO_COLLECTIVE = frozenset({Phase.DATA, Phase.CALLBACKS})
"""Phases in which a rank usually waits for no other."""


class Heard(NamedTuple):
    """The last heartbeat of a rank, and the seconds since it arrived."""

    beat: Beat
    age: float

    @property
    def idle(self) -> float:
        """Seconds since the rank's last progress that is known."""
        return self.beat.idle + self.age

    @property
    def is_running(self) -> bool:
        return not self.beat.ended

    @property
    def position(self) -> tuple[int, int]:
        """The order of this rank among all: they go through the same phases."""
        return self.beat.step, self.beat.entered


def still_seconds(heard: Sequence[Heard]) -> float:
    """Return the seconds for which no rank made progress, among those that run; at least one does."""
    return min(one.idle for one in heard if one.is_running)


def hang_sentence(heard: Sequence[Heard], silent_seconds: float) -> str:
    """Return which ranks hold up a run that makes no progress.

    Args:
        heard: all ranks.
        silent_seconds: age of the last heartbeat above which a rank is silent.
    """
    still = f"no progress for {still_seconds(heard):.0f} s"
    running = [one for one in heard if one.is_running]
    failed = [one for one in heard if one.beat.ended not in ("", FINISHED)]
    silent = [one for one in running if one.age > silent_seconds]
    if len(heard) == 1:
        return f"{still} in {_phase(heard[0])}; the stack stands at {heard[0].beat.place or 'an unknown place'}."
    if silent or failed:
        rest = [one for one in running if one not in silent]
        return f"{still}: {'; '.join([_lost(silent, failed), *_others(rest)])}."
    return f"{still}: {_culprits(running)}."


def lost_sentence(heard: Sequence[Heard], absent: Sequence[int], own_host: str) -> str:
    """Return which ranks are the reason why a collective operation failed; "" if that is not known.

    Args:
        heard: all ranks.
        absent: ranks that did not answer just now.
        own_host: the host from which they were asked.
    """
    failed = [one for one in heard if one.beat.ended not in ("", FINISHED)]
    lost = [one for one in heard if one.is_running and one.beat.rank in absent]
    if lost or failed:
        hosts = {one.beat.host for one in heard}
        reachable = hosts - {one.beat.host for one in lost}
        sentence = _lost(lost, failed)
        if len(hosts) > 2 and reachable == {own_host}:
            sentence += f"; {own_host} reaches no other host, so it is probably cut off itself"
        return sentence
    # All ranks answer. If some wait no longer, the others are those that did not come to the collective operation.
    missing = [one for one in heard if one.is_running and not one.beat.failing]
    if missing and len(missing) < len(heard):
        return "; ".join(_standing(group) for group in _groups(missing))
    return ""


def _lost(silent: Sequence[Heard], failed: Sequence[Heard]) -> str:
    parts = [f"{_names([one])} ended in {_phase(one)}: {one.beat.ended}" for one in failed]
    for group in _groups(silent, by_place=False):
        age = max(one.age for one in group)
        be, they = ("has", "it was") if len(group) == 1 else ("have", "they were")
        parts.append(f"{_names(group)} {be} been silent for {age:.0f} s; {they} last heard in {_phase(group[0])}")
    return "; ".join(_shortened(parts))


def _culprits(running: Sequence[Heard]) -> str:
    """Return which of the ranks, all of which send heartbeats, hold up the others."""
    first = min(one.position for one in running)
    behind = [one for one in running if one.position == first]
    ahead = [one for one in running if one.position != first]
    if not ahead:
        return _odd_ones(running)
    if _left_out_a_collective(behind, ahead):
        return "; ".join(
            [_blamed(ahead, "ahead of the others, after leaving out a collective operation"), *_others(behind)]
        )
    return "; ".join([_blamed(behind, "behind"), *_others(ahead)])


def _blamed(ranks: Sequence[Heard], how: str) -> str:
    """Return how some ranks differ from the others, and where they stand."""
    groups = _groups(ranks)
    be = "is" if len(ranks) == 1 else "are"
    if len(groups) == 1:
        return f"{_names(ranks)} {be} {how}: {_where(ranks)}"
    return f"{_names(ranks)} {be} {how}: {', '.join(_shortened([_standing(group) for group in groups]))}"


def _left_out_a_collective(behind: Sequence[Heard], ahead: Sequence[Heard]) -> bool:
    if all(one.beat.waits for one in behind):
        return len(ahead) <= len(behind)
    # On GPUs, a rank that waits for a collective operation may stand anywhere.
    return len(ahead) < len(behind) and behind[0].beat.phase not in _NO_COLLECTIVE


def _odd_ones(running: Sequence[Heard]) -> str:
    """Return which ranks, all of which are in the same phase, do not wait as most others do."""
    away = [one for one in running if not one.beat.waits]
    places = [one.beat.place for one in running]
    common = max(places, key=places.count)
    odd = away if len(away) < len(running) else [one for one in running if one.beat.place != common]
    rest = [one for one in running if one not in odd]
    if not odd or len(odd) >= len(running):
        return f"all ranks are in {_phase(running[0])}, at {common}"
    return "; ".join([_blamed(odd, "not where the others wait"), *_others(rest)])


def _others(rest: Sequence[Heard]) -> list[str]:
    """Return where the ranks are that are not at fault, in a few words."""
    parts = []
    for group in _groups(rest):
        at = f" at {group[0].beat.place}" if group[0].beat.place else ""
        wait = "waits" if len(group) == 1 else "wait"
        parts.append(f"{_names(group)} {wait} in {_phase(group[0])}{at}")
    return _shortened(parts)


def _standing(group: Sequence[Heard]) -> str:
    be = "is" if len(group) == 1 else "are"
    return f"{_names(group)} {be} {_where(group)}"


def _where(group: Sequence[Heard]) -> str:
    place = group[0].beat.place
    since = min(one.idle for one in group)
    stands = f", at {place}" if place else ""
    return f"in {_phase(group[0])} for {since:.0f} s{stands}"


def _phase(one: Heard) -> str:
    step = f" of step {one.beat.step}" if one.beat.step else ""
    return f"phase {one.beat.phase}{step}"


def _groups(heard: Sequence[Heard], by_place: bool = True) -> list[list[Heard]]:
    """Return ranks in groups that a sentence describes together: of one host, phase and place."""

    def key(one: Heard) -> tuple[str, tuple[int, int], str, str]:
        return one.beat.host, one.position, one.beat.phase, one.beat.place if by_place else ""

    ordered = sorted(heard, key=lambda one: (*key(one), one.beat.rank))
    return sorted((list(group) for _, group in groupby(ordered, key)), key=lambda group: group[0].beat.rank)


def _names(heard: Sequence[Heard]) -> str:
    """Return ranks with their hosts, such as `ranks 8-15 on host b`."""
    parts = []
    for host, group in groupby(
        sorted(heard, key=lambda one: (one.beat.host, one.beat.rank)), lambda one: one.beat.host
    ):
        ranks = [one.beat.rank for one in group]
        parts.append(f"{'rank' if len(ranks) == 1 else 'ranks'} {_ranges(ranks)} on host {host}")
    return " and ".join(_shortened(parts))


def _ranges(ranks: list[int]) -> str:
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _shortened(parts: list[str]) -> list[str]:
    return parts if len(parts) <= SHOWN else [*parts[:SHOWN], f"{len(parts) - SHOWN} more"]
