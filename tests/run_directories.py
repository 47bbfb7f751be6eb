"""Run directories without runs: records, observed tokens and tokenizers made of numbers, for reports on them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_slm.config import dump_config, parse_config
from megatron_slm.data.observed import TOKENS, ObservedFolder
from tests.runs import LLAMA

HOSTILE = ("</script><img src=x onerror=alert(1)>", "<b>bold</b>", "\"quoted'", "\u202e", "\x1b[31m", "&amp;", "a\nb")
"""Tokens whose text must never become markup."""
CORPORA = ("mathematics", "general")


def write_tokenizer(folder: Path, extra: Sequence[str] = HOSTILE) -> None:
    """Write a tokenizer of bytes, with some whole words and hostile tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate(["<end>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = [
        "the",
        "sum",
        "of",
        "number",
        "is",
        "seven",
        "and",
        "proof",
        "equals",
        "12",
        "3.5",
        "(",
        ")",
        "=",
        "é",
        "数",
    ]
    words = [f" {word}" for word in words]
    tokenizer.add_tokens([*words, *extra])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)


def write_run(
    folder: Path,
    *,
    objective: str = "slm",
    steps: int = 60,
    every: int = 1,
    seed: int = 0,
    ratio: float = 0.6,
    changes: dict[str, Any] | None = None,
    evaluation: dict[str, str] | None = None,
    tokenizer: bool = True,
) -> Path:
    """Write a run directory with records, and return its path; `changes` are further settings by section."""
    folder.mkdir(parents=True)
    changes = changes or {}
    tree = {
        "run_dir": str(folder),
        "objective": objective,
        "model": {"config": LLAMA},
        "data": {"train": "corpus", "valid": dict.fromkeys(CORPORA, "corpus"), "seq_length": 32},
        "training": {"micro_batch_size": 2, "global_batch_size": 4, "train_tokens": steps * 128, "lr": 0.001},
    }
    if objective == "slm":
        tree |= {"reference": {"path": "reference"}, "selection": {"ratio": ratio}}
    for section, settings in changes.items():
        tree[section] = tree.get(section, {}) | settings if isinstance(settings, dict) else settings
    (folder / "config.yaml").write_text(dump_config(parse_config(tree)))
    records = _records(objective, steps, every, ratio, np.random.default_rng(seed))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    environment = {
        "order_fingerprint": "order",
        "evaluation": dict.fromkeys(CORPORA, "checksum") if evaluation is None else evaluation,
        "starts": [{"time": "2026-01-01T00:00:00+00:00", "ranks": 1, "device": "cpu"}],
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    if tokenizer:
        write_tokenizer(folder / "tokenizer")
    return folder


def _records(objective: str, steps: int, every: int, ratio: float, random: np.random.Generator) -> list[dict[str, Any]]:
    records = []
    for step in range(every, steps + 1, every):
        loss = 3 + 4 * np.exp(-3 * step / steps) + 0.1 * float(random.normal())
        record: dict[str, Any] = {
            "step": step, "consumed_samples": 4 * step, "consumed_tokens": 128 * step, "trained_tokens": 128 * step,
            "flops": 1e9 * step, "loss/all": loss, "lr": 1e-3 * (1 - step / steps), "grad_norm": 1 + random.random(),
            "tokens_per_second": 1e4, "step_seconds": 0.0128, "mfu": None, "skipped_updates": 0, "failed_saves": 0,
        }  # fmt: skip
        if objective == "slm":
            record |= {
                "consumed_selected_tokens": round(128 * step * ratio), "loss/selected": loss + 0.5,
                "loss/unselected": loss - 0.7, "loss/reference": 3.2, "selection/threshold": 0.5 - step / steps,
                "selection/ratio": ratio, "selection/ratio/data/web": ratio / 2, "selection/ratio/data/books": ratio,
                "selection/nan": 0, "excess/q10": loss - 5, "excess/q50": loss - 3.5, "excess/q90": loss - 2,
            }  # fmt: skip
        if step % (5 * every) == 0:
            for index, name in enumerate(CORPORA):
                record |= {f"eval/{name}/loss": loss + 0.3 * index, f"eval/{name}/bits_per_byte": loss / 3}
        records.append(record)
    return records


def observe(
    folder: Path,
    *,
    tokens: int = 400,
    steps: Sequence[int] = (0, 15, 30, 45, 60),
    seed: int = 1,
    with_selection: bool = True,
    with_reference: bool = True,
    ids: Sequence[int] | None = None,
    fingerprint: str | None = None,
) -> None:
    """Record losses of observed tokens in a run directory; the same `seed` and `tokens` mean the same tokens."""
    from megatron_slm.data.tokenizer import load_tokenizer, tokenizer_fingerprint

    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    draw = np.random.default_rng(seed)
    half = tokens // 2
    chosen = draw.choice(np.array(ids if ids is not None else range(1, len(tokenizer))), tokens)
    chosen[: len(ids) if ids is not None else 0] = ids if ids is not None else []
    length = 100
    place = np.concatenate([np.arange(half), np.arange(tokens - half)])
    columns = {
        "corpus": np.repeat([0, 1], [half, tokens - half]).astype(np.int16),
        "offset": place.astype(np.int64),
        "document": (place // length).astype(np.int64),
        "position": (place % length).astype(np.int32),
        "document_length": np.full(tokens, length, dtype=np.int32),
        "token": chosen.astype(np.int32),
    }
    corpora = [
        {"name": name, "prefix": name, "sha256": f"{name}{seed}{tokens}", "windows": half // 32} for name in CORPORA
    ]
    facts = {
        "format_version": 1, "num_tokens": tokens, "seq_length": 32, "reset_attention": False, "corpora": corpora,
        "tokenizer": tokenizer_fingerprint(tokenizer) if fingerprint is None else fingerprint,
    }  # fmt: skip
    observed = ObservedFolder(folder / "observed")
    observed.path.mkdir()
    observed._write(TOKENS, columns, facts)
    start, slope = draw.gamma(4, 1, tokens), draw.normal(-0.8, 1, tokens)
    reference = np.maximum(start - 1 + draw.normal(0, 0.5, tokens), 0.01).astype(np.float32)
    if with_reference:
        observed.write_reference(reference, {"path": "reference", "fingerprint": "x"})
    noise = np.random.default_rng(abs(hash(str(folder))) % 2**32 if seed < 0 else seed + len(folder.name))
    for step in steps:
        loss = np.maximum(start + slope * step / max(steps) + noise.normal(0, 0.2, tokens), 0.01).astype(np.float32)
        excess = loss - reference
        selected = excess >= np.quantile(excess, 0.4) if with_selection else None
        observed.write_step(step, loss, selected, {})
