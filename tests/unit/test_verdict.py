"""What is said of a run, and what of several runs may be compared."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_slm.analysis.comparison import caveats, comparable_unit, configuration_differences
from megatron_slm.analysis.quality import ratio_sweeps
from megatron_slm.analysis.runs import RunFiles, read_run, read_runs
from megatron_slm.analysis.verdict import comparisons, verdict
from megatron_slm.errors import UserError
from tests.unit.test_analysis import observations

Tree = dict[str, Any]


def configuration(path: Path, **groups: Any) -> Tree:
    """Return the configuration of a selective run on two sources; `groups` replace groups, or settings in them."""
    tree: Tree = {
        "run_dir": str(path),
        "objective": "slm",
        "model": {"path": "models/base"},
        "reference": {"path": "models/reference"},
        "selection": {"ratio": 0.5},
        "data": {"train": ["data/web", "data/books"], "valid": {"math": "data/math"}, "seq_length": 32},
        "training": {"global_batch_size": 2, "train_tokens": 64 * 30},
    }
    for name, group in groups.items():
        tree[name] = {**tree.get(name, {}), **group} if isinstance(group, dict) else group
    return tree


def record(step: int, **values: Any) -> Tree:
    """Return the record of a step, with `values` in place of the usual ones; `__` in a name stands for a slash."""
    usual = {
        "step": step,
        "trained_tokens": 64 * step,
        "consumed_tokens": 64 * step,
        "consumed_selected_tokens": 32 * step,
        "flops": 1.0e6 * step,
        "step_seconds": 0.5,
        "loss/all": 5.0 - 0.02 * step,
        "loss/selected": 4.0,
        "loss/unselected": 6.0,
        "loss/reference": 5.0,
        "selection/ratio": 0.5,
        "selection/threshold": 0.1,
        "selection/nan": 0,
        "selection/ratio/web": 0.4,
        "selection/ratio/books": 0.6,
        "grad_norm": 1.0,
        "skipped_updates": 0,
        "failed_saves": 0,
    }
    return usual | {name.replace("__", "/"): value for name, value in values.items()}


def write_run(path: Path, records: list[Tree], config: Tree | None = None, environment: Tree | None = None) -> Path:
    """Write a run directory, and return it."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text(yaml.safe_dump(config or configuration(path)))
    (path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    (path / "environment.json").write_text(json.dumps({"starts": [{}], **(environment or {})}))
    return path


def evaluated(losses: list[float], **values: Any) -> list[Tree]:
    """Return records of steps 1, 2, ... with these losses on `math`."""
    return [
        record(step, eval__math__loss=loss, eval__math__bits_per_byte=loss / 3, **values)
        for step, loss in enumerate(losses, start=1)
    ]


HEALTHY = [5.0 - 0.05 * step for step in range(30)]


def run_with(tmp_path: Path, **values: Any) -> RunFiles:
    return read_run(write_run(tmp_path / "run", evaluated(HEALTHY, **values)), "run")


def warnings(run: RunFiles) -> list[str]:
    return [finding.sentence for finding in verdict(run) if finding.level == "warning"]


def test_a_healthy_run_has_no_warning(tmp_path: Path) -> None:
    run = run_with(tmp_path)
    assert warnings(run) == []
    assert any("math improved by 1.450" in finding.sentence for finding in verdict(run))


UNHEALTHY: dict[str, tuple[dict[str, Any], str]] = {
    "a source that is never selected": ({"selection__ratio__web": 0.02}, "source web is seldom selected"),
    "NaN scores": ({"selection__nan": 3}, "score of 90 tokens was NaN"),
    "skipped updates": ({"skipped_updates": 4}, "4 updates were skipped"),
    "failed saves": ({"failed_saves": 2}, "2 checkpoints could not be written"),
}


@pytest.mark.parametrize("name", UNHEALTHY)
def test_each_defect_has_its_sentence(name: str, tmp_path: Path) -> None:
    values, expected = UNHEALTHY[name]
    assert [expected in sentence for sentence in warnings(run_with(tmp_path, **values))] == [True]


def test_a_training_loss_and_a_gradient_that_rise_are_told(tmp_path: Path) -> None:
    records = [
        record(step, loss__all=4.0 + 0.05 * max(0, step - 20), grad_norm=1.0 + step // 20 * 3) for step in range(1, 31)
    ]
    found = warnings(read_run(write_run(tmp_path / "run", records), "run"))
    assert any("training loss rose" in sentence for sentence in found)
    assert any("gradient norm rose from 1.00 to 4.00" in sentence for sentence in found)


@pytest.mark.parametrize("jumps", [True, False])
def test_held_out_losses_that_jump_after_the_start_are_told(tmp_path: Path, jumps: bool) -> None:
    run = read_run(write_run(tmp_path / "run", evaluated([4.0, 3.0, 2.5] if jumps else [1.0, 0.9, 0.8])), "run")
    run = RunFiles(**{**vars(run), "observed": observations()})  # its mean before training is about 2
    assert any("jumped after the start" in sentence for sentence in warnings(run)) is jumps


@pytest.mark.parametrize("jumps", [True, False])
def test_a_training_loss_that_jumps_after_the_start_is_told(tmp_path: Path, jumps: bool) -> None:
    records = [record(step, loss__all=(6.0 - 0.03 * step) if jumps and step > 1 else 4.7) for step in range(1, 41)]
    run = read_run(write_run(tmp_path / "run", records), "run")
    assert any("jumped after the start" in sentence for sentence in warnings(run)) is jumps


def test_a_held_out_loss_that_rises_or_turns_is_told(tmp_path: Path) -> None:
    up = read_run(write_run(tmp_path / "up", evaluated([4.0, 4.5])), "up")
    assert any("math rose by 0.500" in sentence for sentence in warnings(up))
    turned = read_run(write_run(tmp_path / "turned", evaluated([5.0, 4.0, 4.5])), "turned")
    assert any("math was lowest at step 2 (4.000)" in sentence for sentence in warnings(turned))


def test_a_ratio_below_those_of_the_paper_is_told(tmp_path: Path) -> None:
    config = configuration(tmp_path / "run", selection={"ratio": 0.05})
    run = read_run(write_run(tmp_path / "run", evaluated(HEALTHY), config), "run")
    assert any("selection.ratio is 0.05" in sentence for sentence in warnings(run))


@pytest.mark.parametrize("better", [True, False])
def test_the_reference_is_compared_with_the_student_at_its_start(tmp_path: Path, better: bool) -> None:
    observed = observations()
    reference = observed.loss_SN[0] + (-1.0 if better else 1.0)
    run = run_with(tmp_path)
    run = RunFiles(**{**vars(run), "observed": _with(observed, reference.astype(np.float32))})
    assert any("better than the untrained student on nothing" in sentence for sentence in warnings(run)) is not better


def _with(observed: Any, reference_N: Any) -> Any:
    return type(observed)(**{**vars(observed), "reference_N": reference_N})


def two(tmp_path: Path, *, config: dict[str, Any], environment: dict[str, Any] | None = None) -> list[RunFiles]:
    one = write_run(tmp_path / "one", evaluated(HEALTHY))
    other = write_run(
        tmp_path / "other", evaluated(HEALTHY), configuration(tmp_path / "other", **config), environment or {}
    )
    return read_runs([str(one), str(other)])


def test_equal_runs_have_no_caveat(tmp_path: Path) -> None:
    runs = two(tmp_path, config={})
    assert caveats(runs) == []
    assert configuration_differences(runs) == []


def test_another_corpus_under_the_same_name_is_not_compared(tmp_path: Path) -> None:
    found = caveats(two(tmp_path, config={"data": {"valid": {"math": "data/other"}}}))
    assert comparable_unit(found, "math") is None


def test_the_same_corpus_elsewhere_is_compared(tmp_path: Path) -> None:
    same = {"evaluation": {"math": "abc"}}
    one = write_run(tmp_path / "one", evaluated(HEALTHY), environment=same)
    config = configuration(tmp_path / "two", data={"valid": {"math": "moved/math"}})
    other = write_run(tmp_path / "two", evaluated(HEALTHY), config, same)
    assert comparable_unit(caveats(read_runs([str(one), str(other)])), "math") == "loss"


@pytest.mark.parametrize(
    ("config", "environment", "expected"),
    [
        ({"seed": 5}, {}, "different seeds"),
        ({"model": {"path": "models/other"}}, {}, "different models"),
        ({}, {"order_fingerprint": "x"}, "different samples"),
        ({"data": {"seq_length": 64}}, {}, "seq_length is 32 and 64"),
    ],
)
def test_each_difference_has_its_sentence(
    tmp_path: Path, config: dict[str, Any], environment: dict[str, Any], expected: str
) -> None:
    found = caveats(two(tmp_path, config=config, environment=environment))
    assert any(expected in caveat.sentence for caveat in found)


def test_unequal_tokens_are_told(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", evaluated(HEALTHY))
    other = write_run(tmp_path / "other", evaluated(HEALTHY[:10]))
    found = [caveat.sentence for caveat in caveats(read_runs([str(one), str(other)]))]
    assert any("unequal trained tokens (one 1.92e+03, other 640)" in sentence for sentence in found)


def test_runs_are_compared_with_the_first(tmp_path: Path) -> None:
    one = write_run(tmp_path / "clm", evaluated([5.0, 4.5, 4.0, 3.8]))
    other = write_run(tmp_path / "slm", evaluated([4.6, 3.7, 3.6, 3.5]))
    found = comparisons(read_runs([str(one), str(other)]), {"math": "loss"})
    sentence = "math: slm ends 0.300 nats lower than clm, and was level with its end after 50% of its tokens."
    assert [finding.sentence for finding in found] == [sentence]


def test_runs_that_differ_in_the_ratio_alone_are_a_sweep(tmp_path: Path) -> None:
    paths = []
    for ratio in (0.7, 0.3):
        config = configuration(tmp_path / f"r{ratio}", selection={"ratio": ratio})
        paths.append(str(write_run(tmp_path / f"r{ratio}", evaluated(HEALTHY), config)))
    config = configuration(tmp_path / "seed", selection={"ratio": 0.5}, seed=3)
    paths.append(str(write_run(tmp_path / "seed", evaluated(HEALTHY), config)))
    [sweep] = ratio_sweeps(read_runs(paths))
    assert [run.name for run in sweep] == ["r0.3", "r0.7"]


def test_directories_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.yaml"):
        read_run(tmp_path, "run")
    empty = write_run(tmp_path / "empty", [])
    with pytest.raises(UserError, match="has not logged a step yet"):
        read_run(empty, "empty")
    old = write_run(tmp_path / "old", [{"step": 1, "loss/all": 3.0}])
    with pytest.raises(UserError, match="an earlier version"):
        read_run(old, "old")
    with pytest.raises(UserError, match="given twice"):
        read_runs([str(empty), str(empty)])


def test_a_run_that_is_writing_is_read_up_to_its_last_whole_line(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", evaluated(HEALTHY[:3]))
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss')
    run = read_run(path, "run")
    assert run.last["step"] == 3
    assert run.last["seconds"] == pytest.approx(1.5)
    assert any("not finished" in finding.sentence for finding in verdict(run))


SOURCES = ("web", "books", "code")


def run_on_sources(tmp_path: Path, losses: tuple[float, float, float], lengths: tuple[float, float, float]) -> RunFiles:
    """Return a run with these losses by source, whose vocabulary has e^8 entries."""
    by_source = {f"loss__all__{name}": loss for name, loss in zip(SOURCES, losses, strict=True)}
    environment = {"bytes_per_token": dict(zip(SOURCES, lengths, strict=True))}
    run = read_run(write_run(tmp_path / "run", evaluated(HEALTHY, **by_source), environment=environment), "run")
    return RunFiles(**{**vars(run), "vocabulary": 2981})


def test_a_source_that_takes_many_bits_per_byte_is_told(tmp_path: Path) -> None:
    assert warnings(run_on_sources(tmp_path, (4.0, 4.2, 4.4), (3.0, 3.0, 3.0))) == []
    found = warnings(run_on_sources(tmp_path, (4.0, 4.2, 4.4), (3.0, 3.0, 1.5)))
    assert len(found) == 1 and "source code takes 4.23 bits per byte, and the median of the sources is 2.02" in found[0]


def test_a_source_that_is_guessed_is_told_unless_all_are(tmp_path: Path) -> None:
    found = warnings(run_on_sources(tmp_path, (4.0, 7.9, 4.4), (3.0, 3.0, 3.0)))
    assert len(found) == 1 and "source books is predicted no better than by guessing (loss 7.90" in found[0]
    assert warnings(run_on_sources(tmp_path, (7.9, 7.9, 7.9), (3.0, 3.0, 3.0))) == []
