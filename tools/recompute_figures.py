"""Recompute the classes of tokens and Figure 8 from tokens.parquet, and compare them with `analyze`'s tables.

    megatron-slm analyze tokens RUN_DIR
    megatron-slm analyze dynamics RUN_DIR --csv tables
    megatron-slm analyze selections RUN_DIR --csv tables
    python tools/recompute_figures.py RUN_DIR tables

It shares no code with the package: numpy fits the lines, and follows the paper's rules (section 2.1, Figures 3 and 8).
"""

import csv
import sys
from pathlib import Path

import numpy as np
from pyarrow import parquet


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    run, tables = Path(sys.argv[1]), Path(sys.argv[2])
    columns = parquet.read_table(run / "observed" / "tokens.parquet").to_pydict()
    steps = sorted(int(name.removeprefix("loss/")) for name in columns if name.startswith("loss/"))
    losses = np.array([columns[f"loss/{step}"] for step in steps], dtype=np.float64)
    slope = np.polyfit(steps, losses, 1)[0]
    change, above = slope * (steps[-1] - steps[0]), losses[-1] > losses[-1].mean()
    flat = abs(change) <= 0.2
    classes = {"H->H": flat & above, "L->H": change > 0.2, "H->L": change < -0.2, "L->L": flat & ~above}
    worst = 0.0
    with (tables / "classes.csv").open() as file:
        for row in csv.DictReader(file):
            share = classes[row["class"]].mean()
            worst = max(worst, abs(share - float(row["share"])))
            sys.stdout.write(f"{row['class']}: {share:.4%} here, {float(row['share']):.4%} by analyze\n")
    with (tables / "perplexity.csv").open() as file:
        for row in csv.DictReader(file):
            for name in list(row)[1:]:
                selected = np.array(columns[f"selected/{name.removeprefix('step ')}"])
                here = np.exp(losses[steps.index(int(row["step"])), selected].mean())
                worst = max(worst, abs(here / float(row[name]) - 1))
    sys.stdout.write(f"The largest difference of a share, and of a perplexity by its value, is {worst:.1e}.\n")
    sys.exit(worst > 1e-6)


if __name__ == "__main__":
    main()
