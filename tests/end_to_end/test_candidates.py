"""A run that reads several candidates for each sample that it trains on: lengths, records, resuming, stores."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_slm.config import parse_config
from megatron_slm.data.corpus import Corpus
from megatron_slm.dist import World
from megatron_slm.errors import UserError
from megatron_slm.run_directory import HEADER
from tests.end_to_end.test_dry_run import shown
from tests.end_to_end.test_score import score_in_process
from tests.gloo import RankError, run_ranks
from tests.runs import LLAMA, assert_bitwise_equal, config_tree, records, train_in_process, write_config

TIMES, TOKENS = 3, 8 * 32
"""Candidates a sample, and tokens of a step that are trained on."""


def candidates_tree(corpora: Path, run_dir: Path, times: int = TIMES, **training: Any) -> dict[str, Any]:
    """A run of 10 steps that warms up for 3, whose ratio moves for 5, with a student of the reference's size."""
    length = {"train_tokens": 10 * TOKENS, "warmup_tokens": 3 * TOKENS, "save_interval": 5}
    tree = config_tree(corpora, run_dir, stage=0, **(length | training))
    schedule = {"schedule": "linear", "schedule_tokens": 5 * TOKENS}
    return tree | {"selection": {"candidates": times} | schedule, "model": {"config": LLAMA}}


@pytest.fixture(scope="module")
def run(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on two ranks, with a list of samples left out."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    tree = candidates_tree(corpora, folder)
    tree["data"]["skip_samples"] = [[100, 110]]
    run_ranks(train_in_process, 2, tree)
    return folder


@pytest.fixture(scope="module")
def plain(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Records of the run that trains on all that it reads."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    run_ranks(train_in_process, 2, candidates_tree(corpora, folder, 1))
    return records(folder)


def test_a_run_is_as_long_as_what_it_trains_on_and_schedules_go_by_that(run: Path, plain: list[dict[str, Any]]) -> None:
    found = records(run)
    for name in ("step", "lr", "trained_tokens"):
        assert [record[name] for record in found] == [record[name] for record in plain], name
    kept = [record["consumed_selected_tokens"] for record in found]
    assert kept == [record["consumed_selected_tokens"] for record in plain]
    assert len({record["selection/ratio"] for record in found}) > 5
    assert [record["consumed_samples"] for record in found] == [TIMES * 8 * (n + 1) for n in range(10)]
    config = yaml.safe_load((run / "config.yaml").read_text().removeprefix(HEADER))
    assert config["data"]["order_tokens"] == 10 * TIMES * TOKENS


def model_flops(_: World, corpora: Path) -> float:
    """Of a token's forward, as PaLM counts: student and reference have one shape."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(corpora / "reference")
    weights = sum(parameter.numel() for parameter in model.parameters())  # the head is tied, and counts once
    return 2 * weights + 4 * 2 * 32 * 32


def test_tokens_and_flops_are_counted_by_what_was_run(
    corpora: Path, run: Path, plain: list[dict[str, Any]], tmp_path: Path
) -> None:
    forward = run_ranks(model_flops, 1, corpora)[0]
    whole = candidates_tree(corpora, tmp_path / "step", train_tokens=2 * TOKENS)
    whole["selection"]["pool"] = "step"
    run_ranks(train_in_process, 2, whole)
    causal = candidates_tree(corpora, tmp_path / "clm", train_tokens=2 * TOKENS) | {"objective": "clm"}
    run_ranks(train_in_process, 2, causal)
    for found, scored, reference in (
        (records(run), TIMES, TIMES),
        (plain, 0, 1),
        # Two micro-steps that are ranked together are run without a gradient first.
        (records(tmp_path / "step"), TIMES + 1, TIMES),
        # Under clm nothing is ranked, so no candidates are read.
        (records(tmp_path / "clm"), 0, 0),
    ):
        for number, record in enumerate(found, start=1):
            assert record["scored_tokens"] == number * scored * TOKENS
            assert record["trained_tokens"] == number * TOKENS
            assert record["flops"] == number * TOKENS * forward * (scored + 3 + reference)
    assert records(tmp_path / "clm")[-1]["consumed_tokens"] == 2 * TOKENS


def test_a_run_that_stopped_goes_on_bitwise_and_refuses_another_number(
    corpora: Path, run: Path, tmp_path: Path
) -> None:
    """From the checkpoint in its middle: the later one is taken away."""
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000010")
    tree = candidates_tree(corpora, tmp_path / "run")
    tree["data"]["skip_samples"] = [[100, 110]]
    other = tree | {"selection": tree["selection"] | {"candidates": 2}}
    with pytest.raises(RankError, match=r"selection\.candidates was 3 and is now 2"):
        run_ranks(train_in_process, 2, other)
    run_ranks(train_in_process, 2, tree)
    assert "resuming from the checkpoint of step 5" in (tmp_path / "run" / "log-rank0000.txt").read_text()
    assert_bitwise_equal(run, tmp_path / "run", 10)


def test_what_a_run_cost_before_that_was_counted_is_not_invented(corpora: Path, tmp_path: Path) -> None:
    tree = candidates_tree(corpora, tmp_path / "run", 1, train_tokens=2 * TOKENS)
    run_ranks(train_in_process, 1, tree)
    tree["training"]["train_tokens"] = 3 * TOKENS
    run_ranks(train_without_a_past, 1, tree)
    last = records(tmp_path / "run")[-1]
    assert (last["step"], last["flops"], last["scored_tokens"], last["trained_tokens"]) == (3, None, None, 3 * TOKENS)


def train_without_a_past(world: World, tree: dict[str, Any]) -> None:
    """Resume from a checkpoint that knows nothing of what was spent."""
    from megatron_slm.training.state import RunState

    original = RunState.restore

    def forgetting(self: RunState, progress: dict[str, Any]) -> None:
        original(self, progress | {"carried": {}})

    RunState.restore = forgetting  # type: ignore[method-assign]
    train_in_process(world, tree)


def test_scores_of_samples_are_those_of_the_candidates(corpora: Path, tmp_path: Path) -> None:
    """At the same batch shapes a run on them is bitwise the run with the live reference."""
    live = candidates_tree(corpora, tmp_path / "live", train_tokens=4 * TOKENS)
    live["reference"] |= {"micro_batch_size": 8, "check_windows": 0}
    scoring = live | {"score": {"output": str(tmp_path / "packed"), "kind": "packed", "encoding": "float32"}}
    run_ranks(score_in_process, 1, scoring)
    stored = live | {"run_dir": str(tmp_path / "stored"), "reference": {"store": str(tmp_path / "packed")}}
    found = []
    for tree in (live, stored):
        run_ranks(train_in_process, 1, tree)
        found.append(records(Path(tree["run_dir"])))
    # A stored reference runs no model.
    for record in (*found[0], *found[1]):
        del record["flops"]
    assert found[0] == found[1]
    config = str(write_config(tmp_path / "run.yaml", stored | {"run_dir": str(tmp_path / "new")}))
    status, heard, said = run_ranks(shown, 1, "train", config, "--dry-run")[0]
    assert status == 0, heard
    assert "32 tokens each, the best of 24 candidates" in said
    assert "each rank's best 1/3 of its candidates" in said


@pytest.mark.parametrize(("objective", "steps"), [("slm", 4), ("clm", 12)])
def test_a_pass_reads_every_sample_once(objective: str, steps: int) -> None:
    from megatron_slm.build.corpora import Corpora
    from megatron_slm.build.plan import settle

    tree = candidates_tree(Path("corpora"), Path("run"), train_tokens=None, train_epochs=1.0) | {"objective": objective}
    corpus = Corpus("web", "web", 100, 12 * TOKENS, 1, "t", {})
    corpora = Corpora([corpus], {}, "t", None)
    config, plan = settle(parse_config(tree), corpora, "cpu", reads_document_store=False)
    assert plan.total_steps == steps and config.data.order_tokens == 12 * TOKENS
    with pytest.raises(UserError, match=r"data\.order_tokens is 767, but a step reads 768 tokens"):
        parse_config(tree | {"objective": "slm", "data": tree["data"] | {"order_tokens": 3 * TOKENS - 1}})


def test_the_model_card_separates_trained_tokens_from_candidates() -> None:
    from megatron_slm.commands.export import _model_card

    config = parse_config(candidates_tree(Path("corpora"), Path("run")))
    card = _model_card(config, {"step": 20, "consumed_samples": 480, "consumed_selected_tokens": 9})
    assert f"| tokens | {20 * TOKENS:,} |" in card and f"| tokens of candidates | {480 * 32:,} |" in card


def test_the_samples_of_a_spike_are_all_candidates_of_its_step(corpora: Path, tmp_path: Path) -> None:
    tree = candidates_tree(corpora, tmp_path / "run", train_tokens=2 * TOKENS)
    run_ranks(train_and_note_samples, 2, tree, tmp_path / "noted")
    assert (tmp_path / "noted").read_text().split() == ["0-24", "24-48"]


def train_and_note_samples(world: World, tree: dict[str, Any], path: Path) -> None:
    from megatron_slm.training.metrics import Spikes

    original = Spikes.on_step_end

    def noting(self: Spikes, state: Any, result: Any) -> None:
        original(self, state, result)
        if world.is_main:
            with path.open("a") as stream:
                stream.write(f"{state.first_sample}-{state.next_sample}\n")

    Spikes.on_step_end = noting  # type: ignore[method-assign]
    train_in_process(world, tree)
