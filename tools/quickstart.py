"""The method on real text, in minutes on a laptop: does selecting tokens help on what the reference knows?

Trains a tokenizer, a base model on noisy general text, and a reference (the base, continued on
curated mathematics). Then, from the same base, on the same data in the same order and for equal
tokens: CLM, SLM, and a random choice of as many tokens. Prints held-out losses of all of them.

    python tools/quickstart.py --data DIR --output runs/quickstart

DIR holds `quickstart/` and `general/` (jsonl.gz); SLM_DATA names it too. A stage that is
finished is not run again.
"""

import argparse
import os
import sys
from pathlib import Path

from stages import MODEL, Stages

FILES = {
    "general": "quickstart/general_noisy.jsonl.gz",
    "curated": "quickstart/curated_math.jsonl.gz",
    "math": "quickstart/eval_math.jsonl.gz",
    "held_out": "general/general_valid.jsonl.gz",
}
VALID = ["math", "held_out"]


def run_stages(stages: Stages, data: Path, ratio: float) -> None:
    """Everything, up to the three runs that are compared."""
    for name, file in FILES.items():
        stages.prepare(name, data / file, tokenizer_of=None if name == "general" else "general")
    stages.train("base", "general", 200, 2.0e-3, VALID, model={"config": MODEL}, split="25,75,0")
    stages.export("base")
    stages.train("reference", "curated", 250, 1.0e-3, VALID)
    stages.export("reference")
    stages.train("clm", "general", 150, 8.0e-4, VALID)
    selective = {"objective": "slm", "reference": {"path": str(stages.folder / "hf-reference")}}
    for name, score in (("slm", "excess"), ("random", "random")):
        selection = {"score": score, "ratio": ratio}
        stages.train(name, "general", 150, 8.0e-4, VALID, **selective, selection=selection)


def overtaking(stages: Stages) -> str:
    """When SLM's loss on held-out mathematics passes below where CLM's ends."""
    key = "eval/math/loss"
    clm, slm = ({r["step"]: r[key] for r in stages.records(name) if key in r} for name in ("clm", "slm"))
    end = clm[max(clm)]
    passed = next((step for step, loss in slm.items() if loss <= end), None)
    when = f"by step {passed}" if passed else "at no step"
    return f"SLM reaches CLM's final loss on held-out mathematics {when} of {max(clm)}."


def plot(stages: Stages, path: Path) -> None:
    """Held-out loss over training tokens, both sets; told apart by line and marker, not by colour alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    looks = {"clm": ("CLM, all tokens", "0.25", "-", "o"), "random": ("random choice", "0.55", ":", "s")}
    looks["slm"] = ("SLM, excess loss", "#0060a0", "--", "^")
    titles = {"math": "Held-out mathematics", "held_out": "Held-out general text"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for name, (label, colour, line, marker) in looks.items():
            points = [r for r in stages.records(name) if f"eval/{key}/loss" in r]
            tokens = [point["consumed_tokens"] / 1e3 for point in points]
            losses = [point[f"eval/{key}/loss"] for point in points]
            axis.plot(tokens, losses, line, color=colour, marker=marker, markersize=4, label=label)
            axis.annotate(
                f"{losses[-1]:.2f}", (tokens[-1], losses[-1]), (4, -3), textcoords="offset points", fontsize=8
            )
        axis.set(title=title, xlabel="training tokens (thousands)", ylabel="loss (nats a token)")
        axis.margins(x=0.1)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("SLM_DATA"), help="folder of quickstart/ and general/")
    parser.add_argument("--output", default="runs/quickstart", type=Path, help="default: %(default)s")
    parser.add_argument("--ranks", default=2, type=int, help="processes a run; default: %(default)s")
    parser.add_argument("--ratio", default=0.5, type=float, help="share of tokens to keep; default: %(default)s")
    arguments = parser.parse_args()
    if not arguments.data or not (Path(arguments.data) / "quickstart").is_dir():
        parser.error("--data (or SLM_DATA) must name the folder that holds quickstart/ and general/")
    stages = Stages(arguments.output, arguments.ranks)
    run_stages(stages, Path(arguments.data), arguments.ratio)
    table = stages.table(["base", "reference", "clm", "random", "slm"], VALID)
    plot(stages, arguments.output / "quickstart.png")
    sys.stdout.write(f"\n{table}\n\n{overtaking(stages)}\nCurves: {arguments.output / 'quickstart.png'}\n")


if __name__ == "__main__":
    main()
