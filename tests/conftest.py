"""Environment variables that libraries read when they are imported, and fixtures that many tests share."""

import itertools
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.texts import encode_here

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many processes as cores run at once


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the corpora `web`, `books`, `held_out` and `other`, and the model `reference`; read only."""
    from megatron_slm.data.tokenizer import load_tokenizer, vocabulary_size
    from tests.runs import make_corpora, make_reference

    folder = tmp_path_factory.mktemp("corpora")
    make_corpora(folder)
    make_reference(folder, vocabulary_size(load_tokenizer(str(folder / "web.tokenizer"))))
    return folder


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `prepare` encode in this process, for tests that are not about its worker processes."""
    monkeypatch.setattr("megatron_slm.prepare.prepare.encode_chunks", encode_here)


@pytest.fixture
def ticking_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every event file its own second: they are read in the order of the seconds in their names."""
    from tensorboard.summary.writer import event_file_writer

    monkeypatch.setattr(event_file_writer, "time", SimpleNamespace(time=itertools.count(10**9).__next__))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the path of a sentencepiece model of 330 pieces, for the sentences of `tests/texts.py`."""
    from megatron_slm.data.sentencepiece_model import train_tokenizer
    from tests.texts import sentence

    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    train_tokenizer((sentence(i) for i in range(300)), 330, path)
    return str(path)
