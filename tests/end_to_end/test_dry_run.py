"""`train --dry-run`: everything is looked at, for any number of ranks, and nothing is written."""

import io
import shutil
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.dist import World
from tests.end_to_end.test_bad_input import command_line, sentence_of
from tests.gloo import run_ranks
from tests.runs import config_tree, train_in_process, write_config


def shown(world: World, *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard error and standard output of a command."""
    said = io.StringIO()
    with redirect_stdout(said):
        return *command_line(world, *arguments), said.getvalue()


def dry_run(corpora: Path, run_dir: Path, *arguments: str) -> tuple[int, str, str]:
    config = write_config(run_dir.with_suffix(".yaml"), config_tree(corpora, run_dir))
    return run_ranks(shown, 1, "train", str(config), "--dry-run", *arguments)[0]


def test_a_dry_run_tells_the_plan_for_any_number_of_ranks_and_writes_nothing(corpora: Path, tmp_path: Path) -> None:
    status, heard, said = dry_run(corpora, tmp_path / "run", "--ranks", "4", "training.train_tokens=1024")
    assert status == 0, heard
    lines = {line[:10].strip(): line[11:] for line in said.splitlines()}
    assert lines["plan"].startswith("4 steps of 256 tokens")
    assert lines["step"] == "8 samples = 4 ranks x 2 x 1 micro-steps, 32 tokens each"
    assert lines["selection"] == "top 60% of the tokens by excess; scope global, pool micro_step"
    assert "split over the ranks" in lines["reference"] and "weights" in lines["memory"]
    step, whole = (float(lines["cost"].split()[place]) for place in (0, -3))
    assert whole == pytest.approx(4 * step, rel=0.05)  # both are shown with two digits
    assert lines["run"].endswith("run, new")
    assert "WARNING" not in said
    assert {path.name for path in tmp_path.iterdir()} == {"run.yaml"}


def test_weights_that_are_pickles_are_seen_before_they_are_loaded(corpora: Path, tmp_path: Path) -> None:
    shutil.copytree(corpora / "reference", tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    answer = dry_run(corpora, tmp_path / "run", f"reference.path={tmp_path / 'pickled'}")
    said = sentence_of("train", *answer[:2])
    assert "reference.path" in said and "safetensors" in said


def test_attention_that_rows_cannot_reach_is_seen_before_a_model_is_loaded(corpora: Path, tmp_path: Path) -> None:
    eager = ("model.attn_implementation=eager", "selection.backward=rows")
    answer = dry_run(corpora, tmp_path / "run", *eager)
    assert "model.attn_implementation is eager, but" in sentence_of("train", *answer[:2])
    assert dry_run(corpora, tmp_path / "run", eager[0])[0] == 0


@pytest.fixture(scope="module")
def stopped(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a whole run of two steps on two ranks, with its base and reference the same model."""
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    run_ranks(train_in_process, 2, config_tree(corpora, run_dir, train_tokens=2 * 8 * 32, min_lr=1.0e-5))
    return run_dir


def dry_run_of(stopped: Path, corpora: Path, *arguments: str) -> tuple[int, str, str]:
    tree = config_tree(corpora, stopped, train_tokens=2 * 8 * 32, min_lr=1.0e-5)
    config = write_config(stopped.with_suffix(".yaml"), tree)
    return run_ranks(shown, 1, "train", str(config), "--dry-run", *arguments)[0]


def test_ranks_that_cannot_resume_the_checkpoint_are_seen_before_the_start(stopped: Path, corpora: Path) -> None:
    status, heard, said = dry_run_of(stopped, corpora, "--ranks", "1")
    assert status == 2 and "written by 2 ranks" in heard and not said
    assert dry_run_of(stopped, corpora, "--ranks", "2")[0] == 0


def test_a_longer_run_is_told_how_its_schedule_moves(stopped: Path, corpora: Path) -> None:
    said = dry_run_of(stopped, corpora, "--ranks", "2", "training.train_tokens=1024")[2]
    # Step 3 of 4 ends at three quarters of the cosine from 1e-3 to 1e-5; of 2 steps, both rates are the last.
    assert "learning rate of step 3 is 0.000155" in said and said.count(" 1e-05") == 2
    assert "learning rate" not in dry_run_of(stopped, corpora, "--ranks", "2")[2]


def test_a_reference_that_is_the_starting_point_is_seen(corpora: Path, tmp_path: Path) -> None:
    same = (f"model={{path: {corpora / 'reference'}}}", f"reference.path={tmp_path / 'link'}")
    (tmp_path / "link").symlink_to(corpora / "reference")
    assert "model.path: the excess loss of every token is 0" in dry_run(corpora, tmp_path / "run", *same)[2]
    assert "is also model.path" not in dry_run(corpora, tmp_path / "run", *same, "selection.score=loss_drop")[2]


ORDER = ("--rollback is 5", "it skips 9000 samples")


def test_a_mixture_that_has_no_entropy_is_seen_before_a_model_is_loaded(corpora: Path, tmp_path: Path) -> None:
    mixed = f"reference={{mix: minimum, of: [{{path: {corpora / 'reference'}}}]}}"
    answer = dry_run(corpora, tmp_path / "run", mixed, "selection.score=reference_entropy")
    assert "reference.mix is minimum, but" in sentence_of("train", *answer[:2])


def test_a_dry_run_finds_every_mistake_at_once(corpora: Path, tmp_path: Path) -> None:
    mistakes = ("reference.path=/nowhere/model", "callbacks=[nowhere:Found]", "--ranks", "3", "data.seq_length=128")
    mistakes += ("--rollback", "5", "data.skip_samples=[[0, 9000], [0, 10]]")
    status, heard, _ = dry_run(corpora, tmp_path / "run", *mistakes)
    assert status == 2 and "Traceback" not in heard
    for expected in (
        "reference.path is",
        "callbacks is nowhere:Found",
        "times 3 ranks",
        "at most 64 positions",
        *ORDER,
    ):
        assert expected in heard
    assert not (tmp_path / "run").exists()


def test_a_model_whose_code_needs_real_memory_is_no_mistake(corpora: Path, tmp_path: Path) -> None:
    mamba = ("model.config={model_type: mamba, hidden_size: 32, num_hidden_layers: 2}", "objective=clm")
    status, heard, said = dry_run(corpora, tmp_path / "run", *mamba)
    assert status == 0, heard
    assert "cannot be estimated for this model" in said and "plan" in said


def test_a_dry_run_sees_what_a_resume_would_refuse(corpora: Path, tmp_path: Path) -> None:
    tree: dict[str, Any] = config_tree(corpora, tmp_path / "run", stage=0, train_tokens=256)
    run_ranks(train_in_process, 1, tree)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    config = str(write_config(tmp_path / "run.yaml", tree))
    assert "run, resumes" in run_ranks(shown, 1, "train", config, "--dry-run")[0][2]
    status, heard, _ = run_ranks(shown, 1, "train", config, "--dry-run", "seed=5")[0]
    assert "seed was 1234 and is now 5" in sentence_of("train", status, heard)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("arguments", [("--ranks", "2"), ("--dry-run", "--ranks", "0")])
def test_a_number_of_ranks_belongs_to_a_dry_run(corpora: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    config = write_config(tmp_path / "run.yaml", config_tree(corpora, tmp_path / "run"))
    answer = run_ranks(command_line, 1, "train", str(config), *arguments)[0]
    assert "--ranks is" in sentence_of("train", *answer)
