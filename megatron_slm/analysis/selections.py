"""The observed tokens that a run selects, and how its selection changes (Rho-1, Figures 8, 13, 14)."""

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from megatron_slm.analysis.texts import KINDS, kind_of
from megatron_slm.data.observed import Observations

if TYPE_CHECKING:
    from numpy.typing import NDArray

POSITIONS = (0, 1, 16, 64, 256, 1024, 4096)
LENGTHS = (0, 128, 512, 2048, 8192, 32768)
"""Lower edges of the groups of positions in a document, and of document lengths, in tokens."""
LEAST_COUNT = 20
"""Occurrences that a token needs to be listed among the most or least selected."""


@dataclass(frozen=True)
class Selections:
    """The selections of K steps among N tokens.

    steps    K steps, ascending
    mask_KN  bool
    """

    steps: list[int]
    mask_KN: "NDArray[np.bool_]"


class Group(NamedTuple):
    """A group of tokens: its name, its size, and the selected share of it at each step."""

    name: str
    num_tokens: int
    share_K: list[float]


def recorded(observed: Observations) -> Selections:
    """Return the selections that the run's own rule made."""
    has_S = observed.has_selection_S
    return Selections(
        [step for step, has in zip(observed.steps, has_S, strict=True) if has], observed.selected_SN[has_S]
    )


def highest(score_N: "NDArray[np.float32]", ratio: float) -> "NDArray[np.bool_]":
    """Return the mask of the highest scores: `floor(ratio * N + 0.5)` of them, the first ones if scores are equal."""
    count = int(np.floor(ratio * len(score_N) + 0.5))
    mask_N = np.zeros(len(score_N), dtype=bool)
    mask_N[np.argsort(-score_N, kind="stable")[:count]] = True
    return mask_N


def perplexities(selections: Selections, loss_SN: "NDArray[np.float32]") -> "NDArray[np.float64]":
    """Return the perplexity at each step of the tokens that each step selects, `[K, S]` (Figure 8)."""
    counts_K = selections.mask_KN.sum(1)
    sums_KS = np.stack([loss_SN[:, mask_N].sum(1, dtype=np.float64) for mask_N in selections.mask_KN])
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.exp(sums_KS / counts_K[:, None]))


def by_corpus(observed: Observations, selections: Selections) -> list[Group]:
    """Return the selected share of each corpus."""
    return _groups(observed.columns["corpus"], observed.corpora, selections)


def by_kind(texts: list[str], selections: Selections) -> list[Group]:
    """Return the selected share of each kind of token."""
    kinds = {text: KINDS.index(kind_of(text)) for text in set(texts)}
    return _groups(np.array([kinds[text] for text in texts]), list(KINDS), selections)


def by_position(observed: Observations, selections: Selections) -> list[Group]:
    """Return the selected share by the number of tokens before it in its document."""
    return _binned(observed.columns["position"], POSITIONS, selections)


def by_document_length(observed: Observations, selections: Selections) -> list[Group]:
    """Return the selected share by the length of the document, in tokens."""
    return _binned(observed.columns["document_length"], LENGTHS, selections)


def by_token(observed: Observations, texts: list[str], selections: Selections) -> list[Group]:
    """Return the selected share of each token of the vocabulary that occurs often enough, the highest mean first."""
    token_N, first_V, inverse_N, count_V = np.unique(
        observed.columns["token"], return_index=True, return_inverse=True, return_counts=True
    )
    share_KV = np.stack([np.bincount(inverse_N, mask_N, len(token_N)) / count_V for mask_N in selections.mask_KN])
    often = np.flatnonzero(count_V >= LEAST_COUNT)
    order = often[np.argsort(-share_KV[:, often].mean(0), kind="stable")]
    return [Group(texts[first_V[v]], int(count_V[v]), share_KV[:, v].tolist()) for v in order]


def overlaps(one_KN: "NDArray[np.bool_]", other_KN: "NDArray[np.bool_]") -> "NDArray[np.float64]":
    """Return the overlap of each pair of selections, `[K, L]`: tokens in both, as a share of those in either."""
    one, other = one_KN.astype(np.float32), other_KN.astype(np.float32)
    both = (one @ other.T).astype(np.float64)
    either = one.sum(1, dtype=np.float64)[:, None] + other.sum(1, dtype=np.float64)[None, :] - both
    return np.asarray(np.divide(both, either, out=np.ones_like(both), where=either > 0))


def _binned(column_N: "NDArray[np.int32]", edges: tuple[int, ...], selections: Selections) -> list[Group]:
    names = [f"{low:,}" if high == low + 1 else f"{low:,} to {high - 1:,}" for low, high in pairwise(edges)]
    return _groups(np.digitize(column_N, edges) - 1, [*names, f"{edges[-1]:,} and more"], selections)


def _groups(index_N: "NDArray[np.integer]", names: list[str], selections: Selections) -> list[Group]:
    """Return the groups that hold tokens, in the order of their names."""
    count_G = np.bincount(index_N, minlength=len(names))
    share_KG = [np.bincount(index_N, mask_N, len(names)) / np.maximum(count_G, 1) for mask_N in selections.mask_KN]
    return [
        Group(name, int(count_G[g]), [float(share_G[g]) for share_G in share_KG])
        for g, name in enumerate(names)
        if count_G[g]
    ]
