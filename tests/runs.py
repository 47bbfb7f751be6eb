"""Small corpora, a reference and whole runs, for tests that start from a configuration."""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml

from megatron_slm.dist import World
from tests.texts import encode_here

WORDS = "the a of number sum proof table river answer is equals plus minus and then therefore seven prime set".split()  # noqa: SIM905
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def write_text(path: Path, documents: int, seed: int) -> Path:
    """Write a jsonl file of short documents, from which a model can learn a little."""
    draw = random.Random(seed)
    lines = [" ".join(draw.choices(WORDS, k=draw.randint(3, 60))) + "." for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def make_corpora(folder: Path) -> None:
    """Prepare `web`, `books` and `held_out` with one tokenizer, and `other` with another.

    `held_out` is small, because every run evaluates all of it several times.
    """
    from megatron_slm.prepare.prepare import prepare_corpus

    with mock.patch("megatron_slm.prepare.prepare.encode_chunks", encode_here):
        web = str(write_text(folder / "web.jsonl", 300, 1))
        prepare_corpus([web], str(folder / "web"), train_size=300)
        for seed, (name, documents) in enumerate((("books", 60), ("held_out", 8)), start=2):
            text = str(write_text(folder / f"{name}.jsonl", documents, seed))
            prepare_corpus([text], str(folder / name), tokenizer=str(folder / "web.tokenizer"))
        prepare_corpus([web], str(folder / "other"), train_size=290)


def make_reference(folder: Path, vocab_size: int) -> None:
    """Write a Hugging Face folder with random weights and the tokenizer of the corpora."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(7)
    config = AutoConfig.for_model(**LLAMA, vocab_size=vocab_size)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "reference")
    AutoTokenizer.from_pretrained(folder / "web.tokenizer").save_pretrained(folder / "reference")


def config_tree(corpora: Path, run_dir: Path, stage: int = 3, **training: Any) -> dict[str, Any]:
    """Return the configuration of a selective run of 20 steps, with 2 micro-steps per step on 2 ranks."""
    return {
        "run_dir": str(run_dir),
        # One layer, because the time of a tiny model under ZeRO-3 is that of hooks per module.
        "model": {"config": LLAMA | {"num_hidden_layers": 1}},
        "reference": {"path": str(corpora / "reference"), "micro_batch_size": 3},
        "data": {
            "train": [0.7, str(corpora / "web"), 0.3, str(corpora / "books")],
            "valid": {"held_out": str(corpora / "held_out")},
            "seq_length": 32,
        },
        "training": {
            "micro_batch_size": 2,
            "global_batch_size": 8,
            "train_tokens": 20 * 8 * 32,
            "lr": 1.0e-3,
            "eval_interval": 10,
            "save_interval": 10,
        }
        | training,
        "deepspeed": {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}},
    }


def write_config(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def train_in_process(world: World, tree: dict[str, Any]) -> dict[str, Any]:
    """Train as `megatron-slm train` does, on a rank that has joined its group, and return the progress."""
    from megatron_slm.build.run import build_run
    from megatron_slm.config import parse_config

    run = build_run(parse_config(tree), world)
    run.trainer.fit(run.state)
    return run.state.progress()


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
"""The number of ranks and the program follow."""


def megatron_slm(*arguments: str, ranks: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, under torchrun if `ranks` is given."""
    launcher = [*TORCHRUN, str(ranks)] if ranks else [sys.executable]
    return in_a_process([*launcher, "-m", "megatron_slm", *arguments], **environment)


def in_a_process(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])} | environment
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=240, check=False)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def records(run_dir: Path) -> list[dict[str, Any]]:
    """Return the records in metrics.jsonl, without the values that depend on the clock."""
    clock = ("tokens_per_second", "step_seconds")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def checkpoint_tensors(run_dir: Path, step: int) -> dict[str, Any]:
    """Return all tensors of a checkpoint, by file and key."""
    found: dict[str, Any] = {}
    for path in sorted((run_dir / "checkpoints" / f"step_{step:08d}").rglob("*.pt")):
        _collect(torch.load(path, weights_only=False), path.name, found)
    return found


def _collect(value: Any, name: str, found: dict[str, Any]) -> None:
    if isinstance(value, torch.Tensor):
        found[name] = value.float()
    elif isinstance(value, dict):
        for key, item in value.items():
            _collect(item, f"{name}/{key}", found)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _collect(item, f"{name}/{index}", found)


def assert_bitwise_equal(one: Path, other: Path, step: int) -> None:
    """Assert that two runs ended in the same state and wrote the same records."""
    assert records(one) == records(other)
    first, second = checkpoint_tensors(one, step), checkpoint_tensors(other, step)
    assert first.keys() == second.keys() and len(first) > 10
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
