"""The stages that the programs beside this file are made of, each in a process of its own, none run twice."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

MODEL = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
"""A Llama of 1.5M parameters at a vocabulary of 2,048."""

SEQ_LENGTH = 256
TOKENS_PER_STEP = 4096


class Stages:
    """Args:
    folder: for everything that is made.
    ranks: processes of each training run.
    """

    def __init__(self, folder: Path, ranks: int) -> None:
        self.folder = folder
        self.ranks = ranks
        folder.mkdir(parents=True, exist_ok=True)

    def prepare(self, name: str, text: Path, tokenizer_of: str | None = None) -> None:
        """The corpus `name`, with the tokenizer of another or one trained on itself."""
        if (self.folder / f"{name}.json").exists():
            return
        tokenizer = ["--train-tokenizer", "2048"]
        if tokenizer_of:
            tokenizer = ["--tokenizer", str(self.folder / f"{tokenizer_of}.tokenizer")]
        self._command("prepare", "--input", str(text), "--output", str(self.folder / name), *tokenizer)

    def train(self, name: str, corpus: str, steps: int, lr: float, valid: list[str], **settings: Any) -> None:
        """One run to its end under torchrun; `settings` replace groups of the configuration."""
        config = {
            "run_dir": str(self.folder / name),
            "objective": "clm",
            "model": {"path": str(self.folder / "hf-base")},
            "data": {
                "train": str(self.folder / corpus),
                "valid": {name: str(self.folder / name) for name in valid},
                "seq_length": SEQ_LENGTH,
                "split": settings.pop("split", None),
            },
            "training": {
                "micro_batch_size": TOKENS_PER_STEP // SEQ_LENGTH // self.ranks,
                "global_batch_size": TOKENS_PER_STEP // SEQ_LENGTH,
                "train_tokens": steps * TOKENS_PER_STEP,
                "warmup_tokens": 10 * TOKENS_PER_STEP,
                "lr": lr,
                "min_lr": lr / 10,
                "log_interval": 10,
                "eval_interval": 25,
                "save_interval": 100,
                "keep_checkpoints": 1,
            },
        } | settings
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks)]
        threads = str(max(1, (os.cpu_count() or 1) // self.ranks))
        subprocess.run(
            [sys.executable, *launcher, "-m", "megatron_slm", "train", str(path)],
            check=True,
            env={"OMP_NUM_THREADS": threads} | os.environ,
        )

    def export(self, name: str) -> None:
        """The run `name` as the Hugging Face folder `hf-NAME`."""
        if not (self.folder / f"hf-{name}").exists():
            self._command("export", str(self.folder / name), str(self.folder / f"hf-{name}"))

    def records(self, name: str) -> list[dict[str, Any]]:
        """What the run `name` logged."""
        return [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]

    def table(self, names: list[str], valid: list[str]) -> str:
        """Held-out losses at the end of each run, as Markdown."""
        columns = [f"{name} {unit}" for name in valid for unit in ("loss", "bits/byte")]
        lines = [f"| run | {' | '.join(columns)} | tokens counted |", "|---" * (len(columns) + 2) + "|"]
        for name in names:
            last = self.records(name)[-1]
            figures = [last[f"eval/{held_out}/{unit}"] for held_out in valid for unit in ("loss", "bits_per_byte")]
            counted = last.get("consumed_selected_tokens", last["consumed_tokens"])
            lines.append(f"| {name} | {' | '.join(f'{figure:.3f}' for figure in figures)} | {counted:,} |")
        return "\n".join(lines)

    def _command(self, *arguments: str) -> None:
        subprocess.run([sys.executable, "-m", "megatron_slm", *arguments], check=True)
