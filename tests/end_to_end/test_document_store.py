"""Training on a store of kind `document`: tokens without enough context do not compete, and the store is checked."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_slm.reference.store import open_store
from tests.end_to_end.test_score import score_in_process, scoring_tree, training_tree, values_of
from tests.gloo import RankError, run_ranks
from tests.runs import assert_bitwise_equal, records, train_in_process

SHORT = {"train_tokens": 10 * 8 * 32, "save_interval": 5, "eval_interval": 100}


@pytest.fixture(scope="module")
def store(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    run_ranks(score_in_process, 1, scoring_tree(corpora, folder / "documents"))
    return folder / "documents"


def run(corpora: Path, run_dir: Path, reference: dict[str, Any], ranks: int = 1, **selection: Any) -> Path:
    """Train with the same pools on any number of ranks, and return the run directory."""
    tree = training_tree(corpora, run_dir)
    tree["training"] |= SHORT | {"micro_batch_size": 4 // ranks}
    run_ranks(train_in_process, ranks, tree | {"reference": reference, "selection": selection})
    return run_dir


def log(run_dir: Path) -> str:
    return (run_dir / "log-rank0000.txt").read_text()


def test_tokens_that_lack_context_are_excluded_from_selection_alone(corpora: Path, store: Path, tmp_path: Path) -> None:
    reference = {"store": str(store), "check_windows": 0}
    every = run(corpora, tmp_path / "every", reference, min_context=0)
    some = run(corpora, tmp_path / "some", reference)
    recorded = yaml.safe_load((some / "config.yaml").read_text())["selection"]["min_context"]
    assert recorded == 8
    for all_compete, few_compete in zip(records(every), records(some), strict=True):
        assert "selection/short_context" not in all_compete
        left_out = few_compete["selection/short_context"]
        assert 0.1 < left_out < 0.3
        # Of 256 tokens, 0.6 of those that compete.
        assert few_compete["selection/ratio"] == pytest.approx(0.6 * (1 - left_out), abs=1 / 256)
    # Before the first update, both see the same losses of all tokens.
    assert records(every)[0]["loss/all"] == records(some)[0]["loss/all"]
    assert records(every)[0]["loss/reference"] == records(some)[0]["loss/reference"]


def test_a_live_reference_and_a_packed_store_ignore_the_setting(corpora: Path, tmp_path: Path) -> None:
    scoring = scoring_tree(corpora, tmp_path / "packed", kind="packed")
    scoring["training"] |= SHORT | {"micro_batch_size": 4}
    run_ranks(score_in_process, 1, scoring)
    references = {"live": {"path": str(corpora / "reference")}, "read": {"store": str(tmp_path / "packed")}}
    for name, reference in references.items():
        default = run(corpora, tmp_path / f"{name}-default", reference)
        assert_bitwise_equal(default, run(corpora, tmp_path / f"{name}-30", reference, min_context=30), 10)


def test_a_run_of_a_version_without_min_context_resumes_without_it(corpora: Path, store: Path, tmp_path: Path) -> None:
    reference = {"store": str(store)}
    whole = run(corpora, tmp_path / "whole", reference, min_context=0)
    run(corpora, tmp_path / "old", reference, min_context=0)
    # As if it had been stopped after step 5 by a version that did not know the setting.
    shutil.rmtree(tmp_path / "old" / "checkpoints" / "step_00000010")
    (tmp_path / "old" / "checkpoints" / "latest").write_text("step_00000005")
    config = tmp_path / "old" / "config.yaml"
    config.write_text("".join(line for line in config.open() if "min_context" not in line))
    assert_bitwise_equal(whole, run(corpora, tmp_path / "old", reference), 10)
    with pytest.raises(RankError, match=r"selection\.min_context was 0 and is now 8"):
        run(corpora, tmp_path / "old", reference, min_context=8)


def test_the_store_is_compared_with_the_model_that_wrote_it(corpora: Path, store: Path, tmp_path: Path) -> None:
    one = run(corpora, tmp_path / "one", {"store": str(store)})
    checks = [line for line in log(one).splitlines() if "store check on" in line]
    assert len(checks) == 1 and "of the same tokens" in checks[0]
    two = run(corpora, tmp_path / "two", {"store": str(store), "shard": False}, ranks=2)
    assert checks[0].partition("store check")[2] == log(two).partition("store check")[2].splitlines()[0]
    assert "store check" not in log(run(corpora, tmp_path / "off", {"store": str(store), "check_windows": 0}))


def test_a_store_that_cannot_be_trusted_logs_a_warning(corpora: Path, store: Path, tmp_path: Path) -> None:
    """Import random losses above the student's, whose model is unknown."""
    draw = np.random.default_rng(0)
    names = [str(tmp_path / f"{name}.npy") for name in ("books", "held_out")]
    for name in names:
        values = values_of(open_store(str(store)), Path(name).stem)[:, 0]
        np.save(name, -(8 + draw.random(len(values), dtype=np.float32)))
    tree = scoring_tree(corpora, tmp_path / "noise")
    del tree["reference"]
    run_ranks(score_in_process, 1, tree, tuple(names))
    said = log(run(corpora, tmp_path / "run", {"store": str(tmp_path / "noise")}))
    assert "WARNING" in said and "no lower than the student's" in said
    assert "of the same tokens" not in said
