"""The stage that makes the demo's corpora: `python -m megatron_slm.demo.corpora FOLDER GENERAL CURATED HELD_OUT`.

One process for all of them: a start costs more than what it prepares.
"""

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_slm.demo.texts import GENERAL, HELD_OUT, Sizes, write_texts

VOCABULARY = 2048
COUNTS = "texts.json"


def make_corpora(folder: Path, sizes: Sizes) -> None:
    """Write the texts, train a tokenizer on the general ones, and prepare a corpus of each.

    Raises:
        UserError: as `write_texts` and `prepare_corpus`.
    """
    from megatron_slm.data.tokenizer import train_tokenizer
    from megatron_slm.prepare.prepare import prepare_corpus

    folder.mkdir(parents=True, exist_ok=True)
    counts = write_texts(folder, sizes)
    model = folder / "tokenizer.model"
    train_tokenizer(_texts(folder, GENERAL), VOCABULARY, model)
    for name in (*GENERAL, "curated", *HELD_OUT):
        prepare_corpus([str(folder / f"{name}.jsonl")], str(folder / name), tokenizer=str(model))
    (folder / COUNTS).write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")


def _texts(folder: Path, names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        for line in (folder / f"{name}.jsonl").open(encoding="utf-8"):
            yield json.loads(line)["text"]


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    make_corpora(Path(sys.argv[1]), Sizes(*map(int, sys.argv[2:])))
