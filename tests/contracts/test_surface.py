"""What others rely on: adding to it is a decision that shows here."""

import dataclasses
import inspect
import typing
from collections.abc import Iterator

import pytest

import megatron_slm
from megatron_slm.__main__ import main
from megatron_slm.config import Config
from tests.contracts.test_house import PACKAGE

PUBLIC_NAMES = {"Selection", "plan_k", "score", "select_tokens", "selected_loss"}
VERBS = {"export", "prepare", "train"}
SETTINGS = """
run_dir objective seed deepspeed
model.path model.config model.trust_remote_code model.attn_implementation model.make_vocab_size_divisible_by
reference.path reference.micro_batch_size reference.shard reference.trust_remote_code
selection.score selection.ratio selection.scope selection.pool selection.backward selection.quantiles
data.train data.valid data.split data.seq_length data.reset_attention data.order_tokens data.cache data.skip_samples
training.micro_batch_size training.global_batch_size training.train_tokens training.train_epochs
training.lr training.min_lr training.warmup_tokens training.schedule training.weight_decay training.clip_grad
training.adam_beta1 training.adam_beta2 training.adam_eps training.precision training.activation_checkpointing
training.log_interval training.eval_interval training.save_interval training.keep_checkpoints
training.histogram_interval training.token_table_interval
training.backend training.max_skipped_updates training.timeout_minutes
"""


def settings(kind: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Names of all settings, and the class that declares each."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        nested = [c for c in (hints[field.name], *typing.get_args(hints[field.name])) if dataclasses.is_dataclass(c)]
        if nested:
            yield from settings(nested[0], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, kind


def test_the_settings_are_these() -> None:
    assert {name for name, _ in settings(Config)} == set(SETTINGS.split())


def test_every_setting_is_explained_where_it_is_declared() -> None:
    for name, kind in settings(Config):
        words = (inspect.getdoc(kind) or "").replace(",", " ").split()
        assert name.rpartition(".")[2] in words, name


def test_the_public_names_are_these() -> None:
    assert set(megatron_slm.__all__) == PUBLIC_NAMES
    for name in PUBLIC_NAMES:
        assert getattr(megatron_slm, name) is not None
    with pytest.raises(AttributeError):
        megatron_slm.unknown  # noqa: B018


def test_the_verbs_are_these_and_each_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert {path.stem for path in (PACKAGE / "commands").glob("[!_]*.py")} == VERBS
    for verb in VERBS:
        with pytest.raises(SystemExit) as end:
            main([verb, "--help"])
        assert end.value.code == 0
        shown = capsys.readouterr().out
        assert "example" in shown and f"megatron-slm {verb}" in shown


def test_an_unknown_verb_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["trian"])
    assert end.value.code == 2
    assert "train" in capsys.readouterr().err
