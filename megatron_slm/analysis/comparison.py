"""Which figures of several runs may be compared, by stated rules."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_slm.analysis.runs import RunFiles

UNEQUAL = 0.02
"""Relative difference from which tokens or FLOPs count as unequal."""


@dataclass(frozen=True)
class Caveat:
    """A difference between runs that limits what may be compared.

    forbids   the figures that must not be drawn together: `loss` (use bits per byte), `observed`, or nothing
    sets      the evaluation sets that it concerns; all if empty
    sentence  what differs, and what that means
    """

    forbids: str
    sets: tuple[str, ...]
    sentence: str


def caveats(runs: Sequence[RunFiles]) -> list[Caveat]:
    """Return all differences between runs that matter for a comparison, the strictest first."""
    if len(runs) < 2:
        return []
    found = [*_tokenizers(runs), *_evaluation_sets(runs), *_lengths(runs), *_observed(runs)]
    return [*found, *_starts(runs), *_amounts(runs)]


def comparable_unit(found: Sequence[Caveat], evaluation_set: str) -> str | None:
    """Return the unit in which an evaluation set may be compared: loss, bits_per_byte, or None for not at all."""
    forbidden = {caveat.forbids for caveat in found if not caveat.sets or evaluation_set in caveat.sets}
    if "set" in forbidden:
        return None
    return "bits_per_byte" if "loss" in forbidden else "loss"


def configuration_differences(runs: Sequence[RunFiles]) -> list[tuple[str, list[Any]]]:
    """Return each setting that is not the same in all runs, with its value in each run, but for the run directory."""
    flat = [_flatten(dataclasses.asdict(run.config)) for run in runs]
    names = sorted({name for settings in flat for name in settings} - {"run_dir"})
    rows = [(name, [settings.get(name) for settings in flat]) for name in names]
    return [(name, values) for name, values in rows if any(value != values[0] for value in values)]


def _tokenizers(runs: Sequence[RunFiles]) -> list[Caveat]:
    known = [run for run in runs if run.tokenizer is not None]
    if len({run.tokenizer for run in known}) < 2:
        return []
    return [
        Caveat(
            "loss",
            (),
            "The runs have different tokenizers, so a loss per token means something else in each. Held-out results "
            "are shown in bits per byte; training losses are not comparable.",
        )
    ]


def _evaluation_sets(runs: Sequence[RunFiles]) -> list[Caveat]:
    found = []
    for name in sorted({name for run in runs for name in run.evaluation_sets}):
        having = [run for run in runs if name in run.evaluation_sets]
        identities = {_set_identity(run, name) for run in having}
        if len(identities) > 1:
            sentence = f"The runs evaluate different corpora under the name {name}, so it is not compared."
            found.append(Caveat("set", (name,), sentence))
        elif len(having) < len(runs):
            missing = ", ".join(run.name for run in runs if run not in having)
            found.append(Caveat("", (name,), f"{name} was not evaluated by {missing}."))
    return found


def _set_identity(run: RunFiles, name: str) -> str:
    """Return the checksum of an evaluation set, or its path if the run began with a version that kept none."""
    known: dict[str, str] = run.environment.get("evaluation", {})
    return known.get(name) or run.config.data.valid.get(name, "")


def _lengths(runs: Sequence[RunFiles]) -> list[Caveat]:
    lengths = {run.config.data.seq_length for run in runs}
    if len(lengths) < 2:
        return []
    words = " and ".join(map(str, sorted(lengths)))
    sentence = f"data.seq_length is {words}: a longer context lowers the loss by itself. Compare with care."
    return [Caveat("observed", (), sentence)]


def _observed(runs: Sequence[RunFiles]) -> list[Caveat]:
    having = [run for run in runs if run.observed is not None]
    if len({tokens_identity(run) for run in having}) < 2:
        return []
    return [Caveat("observed", (), "The runs observe different tokens, so their token losses are not compared.")]


def tokens_identity(run: RunFiles) -> str:
    """Return what two runs share if they observe the same tokens in the same windows."""
    assert run.observed is not None
    facts = run.observed.facts
    return str([facts["seq_length"], facts["reset_attention"], [(c["sha256"], c["windows"]) for c in facts["corpora"]]])


def _starts(runs: Sequence[RunFiles]) -> list[Caveat]:
    rules: list[tuple[Callable[[RunFiles], object], str]] = [
        (
            lambda run: (run.config.model.path, str(run.config.model.config)),
            "The runs start from different models, so their results differ for that reason too.",
        ),
        (
            lambda run: run.environment.get("order_fingerprint"),
            "The runs train on different samples, or in another order.",
        ),
        (
            lambda run: run.config.seed,
            "The runs have different seeds. A difference between two runs with one seed each may be noise.",
        ),
    ]
    return [Caveat("", (), sentence) for key, sentence in rules if len({str(key(run)) for run in runs}) > 1]


def _amounts(runs: Sequence[RunFiles]) -> list[Caveat]:
    found = []
    for key, words in (("trained_tokens", "trained tokens"), ("flops", "FLOPs")):
        amounts = {run.name: run.last.get(key) for run in runs}
        known = [amount for amount in amounts.values() if amount]
        if known and max(known) > (1 + UNEQUAL) * min(known):
            listed = ", ".join(f"{name} {amount:.3g}" for name, amount in amounts.items() if amount)
            sentence = f"The runs spent unequal {words} ({listed}). Compare curves at the same {words}, not their ends."
            found.append(Caveat("", (), sentence))
    return found


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
