"""The losses and the selection of observed tokens do not depend on the number of ranks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_slm.data.corpus import open_corpus
from megatron_slm.data.observed import ObservedFolder, ObservedTokens
from megatron_slm.dist import World
from megatron_slm.models.causal_lm import CausalLM
from megatron_slm.reference.references import LiveReference
from megatron_slm.selection.rule import Rule
from megatron_slm.selection.settings import SelectionSettings
from megatron_slm.training.objective import CausalLanguageModeling, Objective, SelectiveLanguageModeling
from megatron_slm.training.observer import Recorder, TokenScorer
from tests.gloo import run_ranks
from tests.runs import LLAMA

WINDOWS, LENGTH = 7, 32


def model(seed: int) -> CausalLM:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    return CausalLM(AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA, vocab_size=320))).eval()


def observe(world: World, corpora: dict[str, str], folder: str, score: str) -> dict[str, Any] | None:
    """Record a student at two steps: before selection begins, and while it selects."""
    opened = {name: open_corpus(prefix) for name, prefix in corpora.items()}
    tokens = ObservedTokens(opened, WINDOWS * LENGTH, LENGTH, eod=0, reset_attention=False)
    observed = ObservedFolder(Path(folder))
    if world.is_main:
        observed.begin(tokens)
    rule = Rule(SelectionSettings(score=score, ratio=0.37))
    objectives: list[Objective] = [
        CausalLanguageModeling(world.data.group),
        SelectiveLanguageModeling(rule, 0.37, True, 0, world.data.group),
    ]
    columns = tuple(name.removeprefix("reference.") for name in rule.needs if name.startswith("reference."))
    want = tuple(name for name in columns if name != "loss")
    scorer = TokenScorer(tokens, 2, 1234, world)
    recorder = Recorder(scorer, observed, LiveReference(model(7), 3), {"paths": ["reference"]}, want, world)
    for step, objective in enumerate(objectives):
        recorder.record(model(step), step, objective, {"ratio": 0.37})
    if not world.is_main:
        return None
    found = observed.read()
    return {
        "loss": found.loss_SN,
        "selected": found.selected_SN,
        "has": found.has_selection_S,
        "reference": found.reference_N,
    }


@pytest.mark.parametrize("score", ["excess", "random"])
def test_ranks_with_unequal_numbers_of_windows_record_the_same(corpora: Path, tmp_path: Path, score: str) -> None:
    prefixes = {"books": str(corpora / "books"), "held_out": str(corpora / "held_out")}
    # Seven windows in batches of two: every number of ranks above 1 leaves some ranks with padding alone.
    on = {ranks: run_ranks(observe, ranks, prefixes, str(tmp_path / str(ranks)), score)[0] for ranks in (1, 2, 3, 4)}
    one = on[1]
    assert one["has"].tolist() == [False, True]
    assert one["selected"][1].sum() == int(0.37 * one["loss"].shape[1] + 0.5)
    for ranks, found in on.items():
        assert (found["loss"] == one["loss"]).all(), ranks
        assert (found["reference"] == one["reference"]).all(), ranks
        assert (found["selected"] == one["selected"]).all(), ranks


def test_the_selected_tokens_are_those_of_highest_excess_loss(corpora: Path, tmp_path: Path) -> None:
    prefixes = {"books": str(corpora / "books"), "held_out": str(corpora / "held_out")}
    found = run_ranks(observe, 2, prefixes, str(tmp_path / "two"), "excess")[0]
    excess_N = found["loss"][1] - found["reference"]
    lowest = np.sort(excess_N)[::-1][found["selected"][1].sum() - 1]
    assert (found["selected"][1] == (excess_N >= lowest)).all()
