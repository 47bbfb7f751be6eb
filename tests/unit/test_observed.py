"""Which tokens are observed, and the folder that holds their losses."""

from pathlib import Path

import numpy as np
import pytest

from megatron_slm.data.corpus import load_corpus_tokenizer, map_tokens, open_corpus, open_documents
from megatron_slm.data.observed import ObservedFolder, ObservedTokens
from megatron_slm.errors import UserError

LENGTH = 32


def observed_tokens(corpora: Path, num_tokens: int = 320, **names: str) -> ObservedTokens:
    named = names or {"web": "web", "held_out": "held_out"}
    opened = {name: open_corpus(str(corpora / prefix)) for name, prefix in named.items()}
    eod = load_corpus_tokenizer(next(iter(opened.values()))).eos_token_id
    return ObservedTokens(opened, num_tokens, LENGTH, eod, reset_attention=False)


def test_each_token_is_described_as_its_corpus_holds_it(corpora: Path) -> None:
    columns = observed_tokens(corpora).columns()
    assert set(columns["corpus"].tolist()) == {0, 1}
    for row in range(len(columns["token"])):
        corpus = open_corpus(str(corpora / ("web", "held_out")[columns["corpus"][row]]))
        offset = int(columns["offset"][row])
        assert columns["token"][row] == map_tokens(corpus)[offset]
        documents = open_documents(corpus)
        start = documents.starts()[columns["document"][row]]
        assert columns["position"][row] == offset - start
        assert columns["document_length"][row] == documents.length_D[columns["document"][row]] - 1
        assert 0 <= columns["position"][row] < columns["document_length"][row], "end tokens are not scored"


def test_a_short_corpus_leaves_its_share_to_the_others(corpora: Path) -> None:
    short = open_corpus(str(corpora / "held_out")).num_tokens
    windows = {c["name"]: c["windows"] for c in observed_tokens(corpora, 4 * short).facts()["corpora"]}
    assert windows["held_out"] == -(-(short - 1) // LENGTH), "all of it"
    assert sum(windows.values()) == -(-4 * short // LENGTH)


def test_windows_are_spread_over_the_whole_corpus(corpora: Path) -> None:
    columns = observed_tokens(corpora, 10 * LENGTH, web="web").columns()
    total = open_corpus(str(corpora / "web")).num_tokens
    assert columns["offset"].min() <= LENGTH
    assert columns["offset"].max() > 0.85 * total


def test_what_is_written_is_read_again(corpora: Path, tmp_path: Path) -> None:
    tokens = observed_tokens(corpora)
    folder = ObservedFolder(tmp_path / "observed")
    folder.begin(tokens)
    number = len(tokens.columns()["token"])
    losses = np.random.default_rng(0).random((3, number)).astype(np.float32)
    folder.write_step(20, losses[1], losses[1] > 0.5, {"ratio": 0.5})
    folder.write_step(5, losses[0], None, {})
    folder.write_reference(losses[2], {"paths": ["model"]})
    found = folder.read()
    assert found.steps == [5, 20]
    assert (found.loss_SN == losses[:2]).all()
    assert found.has_selection_S.tolist() == [False, True]
    assert (found.selected_SN[1] == (losses[1] > 0.5)).all()
    assert found.reference_N is not None
    assert (found.reference_N == losses[2]).all()
    assert found.corpora == ["web", "held_out"]
    folder.drop_after(5)
    assert folder.read().steps == [5]


def test_other_tokens_are_refused_and_nothing_is_lost(corpora: Path, tmp_path: Path) -> None:
    folder = ObservedFolder(tmp_path / "observed")
    folder.begin(observed_tokens(corpora))
    before = {path.name: path.read_bytes() for path in folder.path.iterdir()}
    folder.begin(observed_tokens(corpora))
    with pytest.raises(UserError, match="other tokens"):
        folder.begin(observed_tokens(corpora, 640))
    assert {path.name: path.read_bytes() for path in folder.path.iterdir()} == before


def test_a_damaged_file_is_named(corpora: Path, tmp_path: Path) -> None:
    folder = ObservedFolder(tmp_path / "observed")
    tokens = observed_tokens(corpora)
    folder.begin(tokens)
    with pytest.raises(UserError, match="no step is recorded"):
        folder.read()
    folder.write_step(5, np.zeros(len(tokens.columns()["token"]), dtype=np.float32), None, {})
    (folder.path / "step_00000005.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match=r"step_00000005\.safetensors cannot be read"):
        folder.read()
