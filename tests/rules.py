"""Every selection rule, implemented again in plain Python with sorts, sums and loops."""

import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_slm.selection import SelectionSettings
from megatron_slm.selection.settings import RankedScore

INF, NAN = math.inf, math.nan
COLUMNS = ("student.loss", "reference.loss", "student.entropy", "reference.entropy", "uniform")
SCORES = {
    "excess": lambda signal: signal["student.loss"] - signal["reference.loss"],
    "loss_drop": lambda signal: signal["reference.loss"] - signal["student.loss"],
    "student_loss": lambda signal: signal["student.loss"],
    "student_entropy": lambda signal: signal["student.entropy"],
    "reference_loss": lambda signal: -signal["reference.loss"],
    "reference_entropy": lambda signal: -signal["reference.entropy"],
    "random": lambda signal: signal["uniform"],
}
Grid = list[list[Any]]
"""A value per token; rows are sequences."""


@dataclass(frozen=True)
class Case:
    """A rule, and a pool with ties, infinities, NaN and sequences without a valid token."""

    settings: SelectionSettings
    ratio: float
    signals: dict[str, Tensor]
    valid: Tensor
    position: Tensor


def random_case(chance: random.Random) -> Case:
    """Return a random rule and a random small pool."""
    rows, length = chance.randint(0, 9), chance.randint(1, 9)
    awkward = chance.choice((0.0, 0.05))

    def value(name: str) -> float:
        if name == "uniform":
            return (chance.randrange(1 << 23) + 0.5) / (1 << 23)
        return chance.choice((INF, -INF, NAN)) if chance.random() < awkward else chance.randint(-40, 40) / 8

    def column(draw: Any, dtype: torch.dtype) -> Tensor:
        return torch.tensor([[draw() for _ in range(length)] for _ in range(rows)], dtype=dtype).view(rows, length)

    likely = chance.choice((0.2, 0.8, 1.0))
    places = chance.sample(range(rows * length), rows * length)
    return Case(
        random_settings(chance),
        random_ratio(chance),
        {name: column(lambda name=name: value(name), torch.float32) for name in COLUMNS},
        column(lambda: chance.random() < likely, torch.bool),
        torch.tensor(places, dtype=torch.int64).view(rows, length),
    )


def random_ratio(chance: random.Random) -> float:
    return chance.choice((0.5, 1.0, 0.01, 1.0 - chance.random()))


def random_settings(chance: random.Random) -> SelectionSettings:
    unit = chance.choice(("token", "sequence", "both"))
    combine = chance.choice((None, None, "union", "intersection"))
    parts = [RankedScore(chance.choice(list(SCORES)), random_ratio(chance)) for _ in range(chance.randint(1, 3))]
    return SelectionSettings(
        score=chance.choice(list(SCORES)),
        scope=chance.choice(("global", "rank", "sequence") if unit == "token" else ("global", "rank")),
        combine=combine,
        of=parts if combine else [],
        unit=unit,
        sequence_ratio=random_ratio(chance) if unit == "both" else None,
        weighting=chance.choice(("hard", "stochastic") if combine else ("hard", "stochastic", "soft")),
        temperature=chance.choice((1.0, 0.1, 5.0)),
    )


def expected(case: Case, ranks: list[list[int]]) -> tuple[Grid, Grid, int]:
    """Return mask, weights and planned k of a case; `ranks` lists the rows of each rank."""
    together = {
        "global": [[row for rank in ranks for row in rank]],
        "rank": ranks,
        "sequence": [[row] for rank in ranks for row in rank],
    }[case.settings.scope]
    mask: dict[int, list[bool]] = {}
    weights: dict[int, list[float]] = {}
    planned = 0
    for rows in together:
        group = Group(case, rows)
        chosen, raw = group.choose()
        planned += plan(len(group.valid), case.ratio)
        for place, row in enumerate(rows):
            places = [(place, t) for t in range(case.valid.shape[1])]
            mask[row] = [token in chosen for token in places]
            weights[row] = [raw.get(token, 0.0) for token in places]
    total = math.fsum(weight for row in weights.values() for weight in row)
    factor = planned / total if total else 0.0
    rows = range(len(case.valid))
    return [mask[row] for row in rows], [[weight * factor for weight in weights[row]] for row in rows], planned


def plan(count: int, ratio: float) -> int:
    return max(min(count, 1), math.floor(ratio * count + 0.5))


def mean(values: list[float]) -> float:
    odd = {value for value in values if not math.isfinite(value)}
    if odd:
        return odd.pop() if len(odd) == 1 else NAN
    return float32(math.fsum(values) / len(values))


def float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float64).float().item()


class Group:
    """The rows that are ranked together; tokens are (row, place)."""

    def __init__(self, case: Case, rows: list[int]) -> None:
        self.case, self.settings = case, case.settings
        columns = {name: column[rows].tolist() for name, column in case.signals.items()}
        self.uniform, self.position = columns["uniform"], case.position[rows].tolist()
        self.valid = [
            (r, t) for r, row in enumerate(case.valid[rows].tolist()) for t, counts in enumerate(row) if counts
        ]
        self.signals = {(r, t): {name: columns[name][r][t] for name in columns} for r, t in self.valid}

    def choose(self) -> tuple[set, dict]:
        """Return the selected tokens, and their weights before scaling."""
        settings = self.settings
        if settings.combine is None:
            return self.keep(settings.score, self.case.ratio)
        parts = [self.keep(part.score, part.ratio)[0] for part in settings.of]
        chosen = set.union(*parts) if settings.combine == "union" else set.intersection(*parts)
        return chosen, dict.fromkeys(chosen, 1.0)

    def keep(self, name: str, ratio: float) -> tuple[set, dict]:
        scores = {token: float32(SCORES[name](signal)) for token, signal in self.signals.items()}
        sequences = {r: mean([scores[token] for token in self.valid if token[0] == r]) for r, _ in self.valid}
        first = {r: self.position[r][0] for r in sequences}
        k, competing = plan(len(self.valid), ratio), self.valid
        if self.settings.unit == "sequence":
            ranked = {r: self.drawn(value, r, 0) for r, value in sequences.items()}
            kept = highest(ranked, first, plan(len(ranked), ratio))
            chosen = {token for token in self.valid if token[0] in kept}
            return chosen, self.weigh({token: ranked[token[0]] for token in self.valid}, chosen)
        if self.settings.unit == "both":
            kept = highest(sequences, first, plan(len(sequences), self.settings.sequence_ratio))
            competing = [token for token in self.valid if token[0] in kept]
        ranked = {token: self.drawn(scores[token], *token) for token in competing}  # type: ignore[misc]
        chosen = highest(ranked, {(r, t): self.position[r][t] for r, t in competing}, k)
        return chosen, self.weigh(ranked, chosen)

    def drawn(self, score: float, r: int, t: int) -> float:
        if self.settings.weighting != "stochastic":
            return score
        return float32(score / self.settings.temperature - math.log(-math.log(self.uniform[r][t])))

    def weigh(self, ranked: dict, chosen: set) -> dict:
        if self.settings.weighting != "soft" or not chosen:
            return dict.fromkeys(chosen, 1.0)
        values = [ranked[token] for token in chosen]
        cut = -INF if any(map(math.isnan, values)) else min(values)
        return {token: self.sigmoid(value, cut) for token, value in ranked.items()}

    def sigmoid(self, value: float, cut: float) -> float:
        if math.isnan(value):
            return 0.0
        distance = 0.0 if value == cut else (value - cut) / self.settings.temperature
        return 1 / (1 + math.exp(-distance)) if distance > -700 else 0.0


def highest(ranked: dict, position: dict, k: int) -> set:
    """Return the k highest, with NaN last and ties by position."""
    order = sorted(
        ranked,
        key=lambda item: (
            math.isnan(ranked[item]),
            -ranked[item] if not math.isnan(ranked[item]) else 0,
            position[item],
        ),
    )
    return set(order[:k])
