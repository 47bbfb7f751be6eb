"""The public names, verbs and settings, listed here so that a change to them is a decision."""

import argparse
import re
import shlex
import subprocess
import sys
from importlib import import_module

import pytest

import megatron_slm
from megatron_slm.__main__ import main
from megatron_slm.config import setting_names
from tests.contracts.test_house import PACKAGE

PUBLIC_NAMES = {"Callback", "Selection", "UserError", "plan_k", "score", "select_tokens", "selected_loss", "train"}
VERBS = {
    "analyze",
    "check-device",
    "demo",
    "doctor",
    "export",
    "filter",
    "plan",
    "prepare",
    "report",
    "score",
    "train",
    "watch",
}
SETTINGS = """
run_dir objective seed callbacks deepspeed
model.path model.config model.trust_remote_code model.attn_implementation model.make_vocab_size_divisible_by
reference.path reference.store reference.micro_batch_size reference.shard reference.trust_remote_code reference.mix
reference.of.path reference.of.store reference.of.weight reference.of.micro_batch_size reference.of.shard
reference.of.trust_remote_code
filter.base filter.reference filter.keep filter.output
score.output score.kind score.encoding score.entropy score.shard_tokens
selection.score selection.ratio selection.scope selection.pool selection.backward selection.quantiles
selection.combine selection.of.score selection.of.ratio selection.unit selection.sequence_ratio
selection.weighting selection.temperature
selection.min_context selection.candidates selection.schedule selection.schedule_tokens selection.ratio_steps
selection.start
data.train data.valid data.split data.seq_length data.reset_attention data.order_tokens data.cache data.skip_samples
data.keep
reference.check_windows training.spike_sigma training.profile_steps
training.observe.corpus training.observe.tokens training.observe.interval
training.micro_batch_size training.global_batch_size training.train_tokens training.train_epochs
training.lr training.min_lr training.warmup_tokens training.schedule training.weight_decay training.clip_grad
training.adam_beta1 training.adam_beta2 training.adam_eps training.precision training.activation_checkpointing
training.loggers training.log_interval training.eval_interval training.save_interval training.keep_checkpoints
training.histogram_interval training.token_table_interval
training.backend training.max_skipped_updates training.timeout_minutes training.hang_seconds
"""


def test_the_settings_are_these() -> None:
    names = set(setting_names())
    groups = {name.rpartition(".")[0] for name in names}
    assert names - groups == set(SETTINGS.split())


def test_every_setting_is_explained_and_the_page_of_settings_is_that_of_the_code() -> None:
    """A setting is explained in the docstring of its class, on a line `name  meaning [unit; origin]`."""
    program = [sys.executable, str(PACKAGE.parent / "tools" / "config_page.py")]
    page = subprocess.run(program, capture_output=True, text=True, check=False)
    assert page.returncode == 0, f"a setting lacks its line: {page.stderr}"
    expected = (PACKAGE.parent / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page.stdout == expected, "run: python tools/config_page.py > docs/configuration.md"


def test_the_public_names_are_these() -> None:
    assert set(megatron_slm.__all__) == PUBLIC_NAMES
    for name in PUBLIC_NAMES:
        assert getattr(megatron_slm, name) is not None
    with pytest.raises(AttributeError):
        megatron_slm.unknown  # noqa: B018


def test_the_verbs_are_these_and_each_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert {path.stem.replace("_", "-") for path in (PACKAGE / "commands").glob("[!_]*.py")} == VERBS
    for verb in VERBS:
        with pytest.raises(SystemExit) as end:
            main([verb, "--help"])
        assert end.value.code == 0
        shown = capsys.readouterr().out
        assert "example" in shown and f"megatron-slm {verb}" in shown


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_the_examples_of_a_verb_are_shown_as_commands_that_it_takes(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    shown = capsys.readouterr().out.replace("\\\n", "")
    examples = re.findall(
        r"^  +(?:.* )?megatron[-_]slm ([\w-]+) (.*)$", shown[shown.index("\nexample") :], re.MULTILINE
    )
    assert verb in [name for name, _ in examples]
    for name, arguments in examples:
        parser = argparse.ArgumentParser(exit_on_error=False)
        import_module(f"megatron_slm.commands.{name.replace('-', '_')}").add_arguments(parser)
        parser.parse_intermixed_args(shlex.split(arguments))


def test_an_unknown_verb_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["trian"])
    assert end.value.code == 2
    assert "train" in capsys.readouterr().err
