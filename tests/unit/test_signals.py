"""Every declared signal is known to the check of scores, to the model that computes it, and to the store."""

import dataclasses
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_slm.build.objective import make_rule
from megatron_slm.config import parse_config
from megatron_slm.dist import World
from megatron_slm.errors import UserError
from megatron_slm.models.causal_lm import CausalLM
from megatron_slm.models.student import ExactStudent
from megatron_slm.reference.references import LiveReference, StoredReference
from megatron_slm.reference.settings import ScoreSettings
from megatron_slm.reference.store import ScoreFile
from megatron_slm.selection import score
from megatron_slm.signals import (
    BATCH_SIGNALS,
    COLUMNS,
    ENCODINGS,
    MODELS,
    SIGNALS,
    columns_of,
    decode,
    encode,
    named_signals,
    stored_columns,
)
from megatron_slm.types import Batch, TokenSignals
from tests.unit.test_head import tiny_config
from tests.unit.test_store import write_scores

B, T = 3, 8
OTHERS = tuple(name for name in COLUMNS if name != "loss")
STORED = [name for name, column in COLUMNS.items() if column.stored_if is not None]


@pytest.fixture
def batch() -> Batch:
    tokens_BT = torch.arange(B * T).view(B, T)
    position_BT = torch.arange(T).expand(B, T)
    zero_B = torch.zeros(B, dtype=torch.long)
    valid_BT = torch.ones(B, T, dtype=torch.bool)
    return Batch(tokens_BT, tokens_BT + 1, valid_BT, position_BT, torch.arange(B), zero_B, tokens_BT, zero_B)


def expected_columns(lm: torch.nn.Module, batch: Batch) -> TokenSignals:
    """Return every column as its declaration computes it, from the model's own logits."""
    with torch.no_grad():
        logprobs_BTV = lm(input_ids=batch.tokens_BT).logits.log_softmax(-1)
    flat = logprobs_BTV.flatten(0, 1), batch.labels_BT.flatten()[:, None]
    return {name: column.compute(*flat).view(B, T) for name, column in COLUMNS.items()}


def test_a_name_has_its_model_and_a_column_of_it_or_is_a_signal_of_the_batch() -> None:
    assert len(set(SIGNALS)) == len(SIGNALS)
    for name in SIGNALS:
        model, _, column = name.partition(".")
        assert name in BATCH_SIGNALS or (model in MODELS and column in COLUMNS)


@pytest.mark.parametrize("name", SIGNALS)
def test_a_score_may_need_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("scores_of_this_test")
    module.known = score(needs=(name,))(lambda signals: signals[name])  # type: ignore[attr-defined]
    module.unknown = score(needs=(f"{name}s",))(lambda signals: signals[name])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    tree = {
        "run_dir": "run",
        "model": {"config": {"model_type": "llama"}},
        "reference": {"path": "reference"},
        "data": {"train": "corpus", "seq_length": 8},
        "training": {"global_batch_size": 1, "train_tokens": 8},
    }
    config = parse_config(tree | {"selection": {"score": f"{module.__name__}:known"}})
    rule = make_rule(config, World(0, 1, 0, torch.device("cpu")))
    assert rule is not None and rule.needs == (name,)
    config = parse_config(tree | {"selection": {"score": f"{module.__name__}:unknown"}})
    with pytest.raises(UserError, match=f"{name}s"):
        make_rule(config, World(0, 1, 0, torch.device("cpu")))


def test_student_and_reference_compute_every_column_as_it_is_declared(batch: Batch) -> None:
    lm = AutoModelForCausalLM.from_config(tiny_config("llama")).eval()
    module, expected = CausalLM(lm, head_chunk=5), expected_columns(lm, batch)
    assert all(columns_of(model, SIGNALS) == OTHERS for model in MODELS)
    live = LiveReference(module, 2).signals([batch], columns_of("reference", SIGNALS))[0]
    student, _ = ExactStudent(SimpleNamespace(module=module)).score(batch, columns_of("student", SIGNALS), keep=True)
    for found in (live, student):
        assert found.keys() == expected.keys()
        for name, column_BT in found.items():
            assert torch.allclose(column_BT, expected[name], atol=1e-5)
            assert (column_BT >= 0).all()
    signals = named_signals(batch, student, live, seed=3)
    assert signals.keys() == set(SIGNALS)
    assert all(column_BT.shape == (B, T) and column_BT.dtype == torch.float32 for column_BT in signals.values())


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_store_returns_every_column_that_it_holds(batch: Batch, tmp_path: Path, encoding: str) -> None:
    lm = AutoModelForCausalLM.from_config(tiny_config("llama")).eval()
    expected = expected_columns(lm, batch)
    flags = {column.stored_if: True for column in COLUMNS.values() if column.stored_if}
    assert flags.keys() <= {field.name for field in dataclasses.fields(ScoreSettings) if field.default is False}
    columns = stored_columns(ScoreSettings("scores", **flags))  # type: ignore[arg-type]
    assert columns == STORED
    assert stored_columns(ScoreSettings("scores")) == ["loss"]
    write_scores(tmp_path / "order", torch.stack([expected[name].flatten() for name in columns], -1).numpy(), encoding)
    file = ScoreFile(tmp_path / "order", B * T, len(columns), encoding)
    found = StoredReference([file], columns, packed=True).signals([batch], tuple(columns[1:]))[0]
    assert list(found) == columns
    for name, column_BT in found.items():
        assert (column_BT - expected[name]).abs().max() <= ENCODINGS[encoding].max_error + 1e-6


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_encoding_holds_values_up_to_its_largest_within_its_error(encoding: str) -> None:
    kind = ENCODINGS[encoding]
    values = np.linspace(0, min(kind.largest, 40.0), 1000, dtype=np.float32)
    assert np.abs(decode(encode(values, encoding), encoding) - values).max() <= kind.max_error
