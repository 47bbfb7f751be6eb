"""Configuration files and overrides: repeated keys, comments, paths, callbacks, and several errors at once."""

from pathlib import Path

import pytest
import yaml

from megatron_slm.config import dump_config, load_config
from megatron_slm.errors import UserError

CONFIG = """\
run_dir: runs/a
model:
  config: {model_type: llama}
data: {train: web}
training:
  global_batch_size: 1
  train_tokens: 10
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return path


def refused(file: Path, *overrides: str) -> UserError:
    with pytest.raises(UserError) as caught:
        load_config(str(file), list(overrides))
    return caught.value


def test_a_group_given_twice_is_named_with_both_lines(file: Path) -> None:
    file.write_text(CONFIG + "training: {lr: 1.0e-3}\n")
    error = refused(file)
    assert error.setting == "training" and "lines 5 and 8" in error.reason


def test_a_setting_given_twice_is_named_with_its_group_and_both_lines(file: Path) -> None:
    file.write_text(CONFIG + "  lr: 1.0e-3\n  lr: 2.0e-3\n")
    error = refused(file)
    assert (error.setting, error.value) == ("training.lr", "2.0e-3") and "lines 8 and 9" in error.reason


def test_a_key_given_twice_is_found_in_lists_and_in_groups_of_other_libraries(file: Path) -> None:
    file.write_text(CONFIG + "selection: {combine: union, of: [{score: excess, ratio: 0.5, ratio: 0.6}]}\n")
    assert refused(file).setting == "selection.of.ratio"
    file.write_text(CONFIG + "deepspeed: {zero_optimization: {stage: 1, stage: 3}}\n")
    assert refused(file).setting == "deepspeed.zero_optimization.stage"


def test_anchors_and_merges_are_no_duplicates(file: Path) -> None:
    file.write_text(CONFIG + "reference:\n  of:\n  - &one {path: a, weight: 2}\n  - {<<: *one, path: b}\n")
    reference = load_config(str(file), []).reference
    assert reference is not None
    assert [(part.path, part.weight) for part in reference.of] == [("a", 2.0), ("b", 2.0)]


@pytest.mark.parametrize(
    ("overrides", "setting"),
    [
        (("reference={path: a, path: b}",), "reference.path"),
        (("training.lr=1", "training.lr=2"), "override"),
        (("training.lr=1", "training={train_tokens: 2, global_batch_size: 1}"), "override"),
    ],
)
def test_an_override_that_replaces_another_is_refused(file: Path, overrides: tuple[str, ...], setting: str) -> None:
    assert refused(file, *overrides).setting == setting


def test_a_group_may_be_given_and_then_refined(file: Path) -> None:
    config = load_config(str(file), ["reference={path: a}", "reference.micro_batch_size=3", "training.lr=1"])
    assert config.reference is not None and config.reference.micro_batch_size == 3


def test_a_number_sign_in_an_override_is_no_comment(file: Path) -> None:
    assert load_config(str(file), ["run_dir=runs/b #1"]).run_dir == "runs/b #1"
    assert load_config(str(file), ["run_dir=#1"]).run_dir == "#1"
    assert "YAML" in refused(file, "reference={path: a} # dropped").reason


def test_every_error_of_a_configuration_is_reported_at_once(file: Path) -> None:
    error = refused(file, "training.lr=fast", "training.lrr=1", "data.seq_length=0")
    assert [(e.setting, e.value) for e in (error, *error.others)] == [
        ("training.lrr", 1),
        ("data.seq_length", 0),
        ("training.lr", "fast"),
    ]
    assert error.remedy == "Did you mean training.lr?" and error.others[0].reason == "it must be above 0"


def test_a_setting_in_the_wrong_group_is_found(file: Path) -> None:
    assert refused(file, "seq_length=64").remedy == "Did you mean data.seq_length?"
    assert refused(file, "data.warmup_tokens=64").remedy == "Did you mean training.warmup_tokens?"


def test_an_unknown_key_that_is_not_text_is_named(file: Path) -> None:
    file.write_text(CONFIG + "5: 6\n")
    assert refused(file).setting == "[5]"


def test_callbacks_are_names_or_groups_with_arguments(file: Path) -> None:
    entries = ["a.b:C", {"class": "a:B", "args": {"every": 8, "rate": 1e-3}}, {"class": "a:B", "args": {}}]
    config = load_config(str(file), ["callbacks=[a.b:C, {class: 'a:B', args: {every: 8, rate: 1e-3}}, {class: 'a:B'}]"])
    assert config.callbacks == entries
    file.write_text(dump_config(config))
    assert load_config(str(file), []).callbacks == entries


@pytest.mark.parametrize(
    "override",
    [
        "run_dir={}",
        "model.path={}",
        "reference={{path: '{}'}}",
        "reference={{store: '{}'}}",
        "reference={{of: [{{path: '{}'}}]}}",
        "data.train={}",
        "data.train=[0.5, web, 0.5, '{}']",
        "data.valid={{held_out: '{}'}}",
        "data.keep={}",
        "data.cache={}",
        "score.output={}",
        "filter={{base: a, reference: b, output: '{}'}}",
        "deepspeed={{zero_optimization: {{offload_optimizer: {{device: nvme, nvme_path: '{}'}}}}}}",
    ],
)
def test_every_path_is_expanded_recorded_in_full_and_never_empty(
    file: Path, monkeypatch: pytest.MonkeyPatch, override: str
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("SCRATCH", "/scratch/x")
    monkeypatch.delenv("MISSING", raising=False)
    for written, expanded in (
        ("~/a", "/home/somebody/a"),
        ("$SCRATCH/a", "/scratch/x/a"),
        ("${SCRATCH}b", "/scratch/xb"),
    ):
        recorded = dump_config(load_config(str(file), [override.format(written)]))
        assert expanded in recorded and written not in recorded
        assert yaml.safe_load(recorded)["run_dir"]
    missing = refused(file, override.format("$MISSING/a"))
    assert missing.value == "$MISSING/a" and "MISSING" in missing.reason
    name = override.partition("=")[0]
    for error in (
        missing,
        refused(file, override.format("~nobody-of-this-name/a")),
        refused(file, override.format(" ") if "'" in override else f"{name}=''"),
    ):
        assert error.setting.startswith(name) and error.reason and error.remedy
