"""The method on real text, in minutes on a laptop: does selecting tokens help on what the reference knows?

Trains a tokenizer, a base model on noisy general text, and a reference (the base, continued on
curated mathematics). Then, from the same base, on the same data in the same order and for equal
tokens: CLM, SLM, and a random choice of as many tokens. Prints held-out losses of all of them.

    python tools/quickstart.py --data DIR --output runs/quickstart

DIR holds `quickstart/` and `general/` (jsonl.gz); SLM_DATA names it too. A stage that is
finished is not run again.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

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
TOKENS_PER_STEP = 4096


class Quickstart:
    """Args:
    data: folder of `quickstart/` and `general/`.
    output: folder for everything that is made.
    ranks: processes of each training run.
    ratio: share of the tokens that SLM and random keep.
    """

    def __init__(self, data: Path, output: Path, ranks: int, ratio: float) -> None:
        self.data, self.output, self.ranks, self.ratio = data, output, ranks, ratio

    def prepare(self) -> None:
        """Four corpora with one tokenizer, trained on the general text."""
        files = {
            "general": "quickstart/general_noisy.jsonl.gz",
            "curated": "quickstart/curated_math.jsonl.gz",
            "math": "quickstart/eval_math.jsonl.gz",
            "held_out": "general/general_valid.jsonl.gz",
        }
        for name, file in files.items():
            if (self.output / f"{name}.json").exists():
                continue
            known = ["--tokenizer", str(self.output / "general.tokenizer")]
            tokenizer = ["--train-tokenizer", "2048"] if name == "general" else known
            self.run("prepare", "--input", str(self.data / file), "--output", str(self.output / name), *tokenizer)

    def train(self, name: str, steps: int, lr: float, **settings: object) -> None:
        """One run, under torchrun at ZeRO-3, to its end."""
        config = {
            "run_dir": str(self.output / name),
            "objective": "clm",
            "model": {"path": str(self.output / "hf-base")},
            "data": {"train": str(self.output / "general"), "seq_length": 256},
            "training": {
                "micro_batch_size": TOKENS_PER_STEP // 256 // self.ranks,
                "global_batch_size": TOKENS_PER_STEP // 256,
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
        config["data"] |= {"valid": {"math": str(self.output / "math"), "general": str(self.output / "held_out")}}
        path = self.output / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks)]
        environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.ranks))}
        subprocess.run(
            [sys.executable, *command, "-m", "megatron_slm", "train", str(path)], check=True, env=environment
        )

    def export(self, name: str) -> None:
        if not (self.output / f"hf-{name}").exists():
            self.run("export", str(self.output / name), str(self.output / f"hf-{name}"))

    def run(self, *arguments: str) -> None:
        subprocess.run([sys.executable, "-m", "megatron_slm", *arguments], check=True)

    def everything(self) -> list[str]:
        """All stages; names of the runs that are compared."""
        self.prepare()
        quarter = {"train": str(self.output / "general"), "seq_length": 256, "split": "25,75,0"}
        self.train("base", 200, 2.0e-3, model={"config": MODEL}, data=quarter)
        self.export("base")
        curated = {"train": str(self.output / "curated"), "seq_length": 256}
        self.train("reference", 250, 1.0e-3, data=curated)
        self.export("reference")
        self.train("clm", 150, 8.0e-4)
        selective = {"objective": "slm", "reference": {"path": str(self.output / "hf-reference")}}
        for name, score in (("slm", "excess"), ("random", "random")):
            self.train(name, 150, 8.0e-4, **selective, selection={"score": score, "ratio": self.ratio})
        return ["base", "reference", "clm", "random", "slm"]

    def table(self, names: list[str]) -> str:
        """Held-out losses at the end of each run, as Markdown."""
        lines = ["| run | math loss | math bits/byte | general loss | general bits/byte | tokens counted |"]
        lines.append("|---|---|---|---|---|---|")
        for name in names:
            records = [json.loads(line) for line in (self.output / name / "metrics.jsonl").read_text().splitlines()]
            last = records[-1]
            figures = [last[f"eval/{s}/{unit}"] for s in ("math", "general") for unit in ("loss", "bits_per_byte")]
            counted = last.get("consumed_selected_tokens", last["consumed_tokens"])
            lines.append(f"| {name} | " + " | ".join(f"{figure:.3f}" for figure in figures) + f" | {counted:,} |")
        return "\n".join([*lines, "", self.overtaking()])

    def overtaking(self) -> str:
        """When SLM's loss on held-out mathematics passes below where CLM's ends."""
        curves = {}
        for name in ("clm", "slm"):
            records = [json.loads(line) for line in (self.output / name / "metrics.jsonl").read_text().splitlines()]
            curves[name] = {r["step"]: r["eval/math/loss"] for r in records if "eval/math/loss" in r}
        end = list(curves["clm"].values())[-1]
        passed = next((step for step, loss in curves["slm"].items() if loss <= end), None)
        return f"SLM reaches CLM's final loss on held-out mathematics by step {passed} of {max(curves['clm'])}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("SLM_DATA"), help="folder of quickstart/ and general/")
    parser.add_argument("--output", default="runs/quickstart", type=Path, help="default: %(default)s")
    parser.add_argument("--ranks", default=2, type=int, help="processes a run; default: %(default)s")
    parser.add_argument("--ratio", default=0.5, type=float, help="share of tokens to keep; default: %(default)s")
    arguments = parser.parse_args()
    if not arguments.data or not (Path(arguments.data) / "quickstart").is_dir():
        parser.error("--data (or SLM_DATA) must name the folder that holds quickstart/ and general/")
    arguments.output.mkdir(parents=True, exist_ok=True)
    quickstart = Quickstart(Path(arguments.data), arguments.output, arguments.ranks, arguments.ratio)
    sys.stdout.write("\n" + quickstart.table(quickstart.everything()) + "\n")


if __name__ == "__main__":
    main()
