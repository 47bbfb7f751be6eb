"""Write the curated text of a reference as JSON lines, one {"text": ...} per line, from public datasets.

    python examples/curated.py math curated-math.jsonl
    python examples/curated.py general curated-general.jsonl

The paper names the kinds of data but has not released them all (Rho-1, section 3.1), so the choice of sets is ours:
solutions of mathematical problems (MetaMathQA, MathInstruct), and instructions with answers (Tulu 2, OpenHermes 2.5).
All tokens of a text count, as in the paper; the turns of a conversation are joined by empty lines.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import datasets

Row = Mapping[str, Any]

SETS: dict[str, dict[str, Callable[[Row], list[str]]]] = {
    "math": {
        "meta-math/MetaMathQA": lambda row: [row["query"], row["response"]],
        "TIGER-Lab/MathInstruct": lambda row: [row["instruction"], row["output"]],
    },
    "general": {
        "allenai/tulu-v2-sft-mixture": lambda row: [turn["content"] for turn in row["messages"]],
        "teknium/OpenHermes-2.5": lambda row: [turn["value"] for turn in row["conversations"]],
    },
}


def texts(subject: str) -> Iterator[str]:
    """Yield the texts of a subject, set after set."""
    for name, turns in SETS[subject].items():
        for row in datasets.load_dataset(name, split="train", streaming=True):
            yield "\n\n".join(turn.strip() for turn in turns(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=SETS)
    parser.add_argument("output", help="file to create")
    arguments = parser.parse_args()
    with open(arguments.output, "x", encoding="utf-8") as output:
        output.writelines(json.dumps({"text": text}) + "\n" for text in texts(arguments.subject))


if __name__ == "__main__":
    main()
