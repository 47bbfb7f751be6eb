"""The evaluation stream: every token is scored once, and attention can be reset at documents."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_slm.data.corpus import describe, open_corpus
from megatron_slm.data.loader import EvaluationStream, make_batch
from megatron_slm.data.samples import Sample
from megatron_slm.models.causal_lm import CausalLM, score_batch
from tests.texts import open_tokens

EOD = 1  # of the tokenizer that tests/runs.py trains
TINY = {
    "llama": {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2, "intermediate_size": 48},
    "mistral": {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2, "intermediate_size": 48},
    "qwen3": {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2, "head_dim": 16},
    "gpt2": {"n_head": 2, "n_layer": 2, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0},
}


def tiny_model(model_type: str) -> CausalLM:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, hidden_size=32, vocab_size=50, initializer_range=0.3, **TINY[model_type])
    return CausalLM(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("length", [7, 32, 100000])
def test_every_token_is_a_label_once(corpora: Path, length: int) -> None:
    stream = EvaluationStream(open_corpus(str(corpora / "held_out")), length, EOD, False)
    tokens = np.fromfile(corpora / "held_out.bin", dtype=np.uint16).astype(np.int64)
    batch = stream.batch(list(range(len(stream) + 1)))
    offsets, labels = batch.label_offset_BT, batch.labels_BT
    assert offsets[offsets >= 0].tolist() == list(range(1, len(tokens)))
    assert (labels[offsets >= 0].numpy() == tokens[1:]).all()
    assert batch.valid_BT.sum() == (tokens[1:] != EOD).sum()
    assert not batch.valid_BT[-1].any(), "a window beyond the end scores nothing"


def test_positions_restart_after_each_document_on_demand(corpora: Path) -> None:
    batch = EvaluationStream(open_corpus(str(corpora / "held_out")), 32, EOD, True).batch([0, 1, 2])
    for tokens, positions in zip(batch.tokens_BT.tolist(), batch.position_ids_BT.tolist(), strict=True):
        expected, position = [], 0
        for token in tokens:
            expected.append(position)
            position = 0 if token == EOD else position + 1
        assert positions == expected


def test_the_mask_decides_what_is_scored_and_the_index_where_documents_begin(corpora: Path, tmp_path: Path) -> None:
    """In chats, turns end with the token that ends documents."""
    for suffix in (".idx", ".tokenizer"):
        (tmp_path / f"qa{suffix}").symlink_to(corpora / f"held_out{suffix}")
    tokens = np.fromfile(corpora / "held_out.bin", dtype=np.uint16)
    tokens[7::10] = EOD
    mask = np.random.default_rng(0).integers(0, 2, len(tokens), dtype=np.uint8)
    tokens.tofile(tmp_path / "qa.bin")
    mask.tofile(tmp_path / "qa.mask")
    described = replace(open_corpus(str(corpora / "held_out")), sha256={".bin": "", ".idx": "", ".mask": ""})
    (tmp_path / "qa.json").write_text(describe(described))
    corpus = open_corpus(str(tmp_path / "qa"))
    stream = EvaluationStream(corpus, 32, EOD, True)
    batch = stream.batch(list(range(len(stream))))
    real = batch.label_offset_BT >= 0
    assert batch.valid_BT[real].tolist() == [m == 1 and t != EOD for m, t in zip(mask[1:], tokens[1:], strict=True)]
    starts = np.cumsum([0, *(len(document) for document in open_tokens(corpus))])
    for window, positions in enumerate(batch.position_ids_BT.tolist()):
        for t, position in enumerate(positions):
            document = max((s for s in starts[:-1] if s <= window * 32 + t), default=0)
            assert position == min(t, window * 32 + t - document)


@pytest.mark.parametrize("model_type", TINY)
def test_reset_attention_gives_each_document_the_losses_it_has_alone(model_type: str) -> None:
    module = tiny_model(model_type)
    draw = np.random.default_rng(0)
    lengths = [5, 1, 9, 3, 7]
    documents = [np.append(draw.integers(3, 50, n), EOD) for n in lengths]
    text, position = np.concatenate(documents), np.concatenate([np.arange(len(d)) for d in documents])
    packed = make_batch([Sample(text, np.arange(len(text)), position, 0)], [0], reset_attention=True)
    losses = score_batch(module, packed)["loss"][0]
    start = 0
    for document in documents:
        places = np.arange(len(document))
        alone = make_batch([Sample(document, places, places, 0)], [0], reset_attention=False)
        expected = score_batch(module, alone)["loss"][0]
        assert torch.allclose(losses[start : start + len(expected)], expected, atol=1e-5)
        start += len(document)
    across = make_batch([Sample(text, np.arange(len(text)), position, 0)], [0], reset_attention=False)
    assert not torch.allclose(score_batch(module, across)["loss"][0], losses, atol=1e-2)


def test_invalid_labels_have_no_loss() -> None:
    module = tiny_model("llama")
    text = np.arange(10)
    batch = make_batch([Sample(text, text, text, 0)], [0], reset_attention=False)
    masked: Any = replace(batch, valid_BT=batch.valid_BT & (torch.arange(9) != 4))
    whole, part = score_batch(module, batch)["loss"][0], score_batch(module, masked)["loss"][0]
    assert part[4] == 0 and whole[4] > 0
    assert torch.equal(part[torch.arange(9) != 4], whole[torch.arange(9) != 4])
