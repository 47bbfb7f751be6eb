"""The configurations of the paper's runs: each is planned and rehearsed, with true hidden sizes and fewer layers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SHAPES: dict[str, dict[str, Any]] = {
    "tinyllama": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
    "mistral": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    },
}
RUNS = [
    ("tinyllama_1b_math/slm", "tinyllama"),
    ("mistral_7b_math/slm", "mistral"),
    ("general_80b/slm_1b", "tinyllama"),
    ("general_80b/slm_7b", "mistral"),
]
REFERENCES = [
    ("tinyllama_1b_math/reference", "tinyllama"),
    ("mistral_7b_math/reference", "mistral"),
    ("general_80b/reference", "tinyllama"),
]


def plan(name: str, shape: str, layers: int, *arguments: str) -> dict[str, Any]:
    """Return the plan of an example on 32 GPUs; the shape stands for the model, which lies on a hub."""
    config = SHAPES[shape] | {"num_hidden_layers": layers, "vocab_size": 32000, "tie_word_embeddings": False}
    command = [sys.executable, "-m", "megatron_slm", "plan", str(EXAMPLES / f"{name}.yaml"), "--ranks", "32"]
    command += ["--device", "h100-80gb", "--json", f"model={json.dumps({'config': config})}", *arguments]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape"), RUNS, ids=[name for name, _ in RUNS])
def test_a_run_of_the_paper_is_planned_and_rehearsed(name: str, shape: str) -> None:
    small = ("data.seq_length=32", "training.global_batch_size=32", "training.micro_batch_size=1")
    found = plan(name, shape, 1, "--rehearse", *small)
    assert found["rehearsal"]["applied"] and found["rehearsal"]["selected"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape"), [*RUNS, *REFERENCES], ids=[name for name, _ in [*RUNS, *REFERENCES]])
def test_a_run_of_the_paper_fits_and_takes_what_its_readme_says(name: str, shape: str) -> None:
    is_reference = name.endswith("reference")
    tokens = ["training.train_tokens=1.5B", "training.train_epochs=null"] if is_reference else []
    found = plan(name, shape, {"tinyllama": 22, "mistral": 32}[shape], *tokens)
    assert found["peak_bytes"] < 0.7 * 80e9
    if not is_reference:
        readme = (EXAMPLES / name).parent.joinpath("README.md").read_text(encoding="utf-8")
        hours = next(line for line in readme.splitlines() if line.startswith("| GPU-hours"))
        assert f"{found['device_hours']:,.0f}" in hours
