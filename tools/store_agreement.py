"""Agreement of the selection from a store with that from a live reference, by the length of samples.

    python tools/store_agreement.py --corpus data/web --student models/base --reference models/reference

For each length, student and reference score the same samples, and the reference scores the corpus document by document.
The live selection is compared with the selection from a packed store, and with that from a document store at several
values of selection.min_context. Prints two Markdown tables: the selections, and the losses by position in the sample.

The corpus should be small, because all of it is scored at each length. Runs as one process, on the CPU or one GPU.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from common import option_parser
from torch import Tensor

from megatron_slm.data.corpus import Corpus, corpus_tokenizer_path, open_corpus
from megatron_slm.data.loader import make_batch
from megatron_slm.data.samples import build_samples
from megatron_slm.data.settings import DataSettings
from megatron_slm.data.tokenizer import load_tokenizer
from megatron_slm.dist import World
from megatron_slm.models.causal_lm import CausalLM
from megatron_slm.models.pretrained import load_pretrained
from megatron_slm.reference.references import LiveReference
from megatron_slm.reference.scoring import DocumentWork, ModelSource
from megatron_slm.reporting.tables import markdown_table
from megatron_slm.selection.select import select_tokens
from megatron_slm.signals import decode, encode
from megatron_slm.training.objective import competing_tokens
from megatron_slm.types import Batch

BATCH_TOKENS = 4096
CONTEXTS = (0, 16, 32, 64, 128, 256)
POSITIONS = (1, 16, 64, 128, 256, 512, 1024)
"""The first positions of the rows of the second table."""
SELECTION_TITLES = (
    "samples",
    "store",
    "min_context",
    "masked",
    "agreement",
    "student loss, selected",
    "live excess, selected",
)
POSITION_TITLES = ("samples", "tokens before, in the sample", "share", "student", "live", "document")


class Losses(NamedTuple):
    """Losses of the same samples, float32 `[B, T]`: of the student, of the live reference, and from both stores."""

    batch: Batch
    student: Tensor
    live: Tensor
    packed: Tensor
    document: Tensor


def main() -> None:
    options = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = World(0, 1, 0, device)
    corpus = open_corpus(options.corpus)
    models = {
        name: CausalLM(load_pretrained(path, name, False, dtype=torch.float32)).eval().to(device)
        for name, path in (("student", options.student), ("reference", options.reference))
    }
    selections, positions = [], []
    for length in options.lengths:
        losses = score(corpus, models, length, options.tokens, world)
        selections += selection_rows(losses, length, options.ratio)
        positions += position_rows(losses, length)
        sys.stderr.write(f"done: samples of {length} tokens\n")
    print(markdown_table(SELECTION_TITLES, selections), end="\n\n")
    print(markdown_table(POSITION_TITLES, positions))


def parse_arguments() -> argparse.Namespace:
    parser = option_parser(__doc__)
    parser.add_argument("--corpus", required=True, metavar="PREFIX", help="a prepared corpus of some 10,000 tokens")
    parser.add_argument("--student", required=True, metavar="DIR", help="a Hugging Face folder")
    parser.add_argument("--reference", required=True, metavar="DIR", help="a Hugging Face folder")
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 1024, 2048], help="default: %(default)s")
    parser.add_argument(
        "--tokens", type=int, default=40_960, help="tokens in the samples of each length; default: %(default)s"
    )
    parser.add_argument("--ratio", type=float, default=0.6, help="share to select; default: %(default)s")
    return parser.parse_args()


def score(corpus: Corpus, models: dict[str, CausalLM], length: int, tokens: int, world: World) -> Losses:
    """Score the first samples of an order of this length."""
    count = max(1, tokens // length)
    settings = DataSettings(train=corpus.prefix, seq_length=length)
    with tempfile.TemporaryDirectory() as folder:
        build = partial(build_samples, settings, [corpus], seed=1234, order_tokens=count * length, world=world)
        samples = build(total_samples=count, cache=Path(folder))
        batch = make_batch([samples[n] for n in range(count)], list(range(count)), False).to(world.device)
    at_once = max(1, BATCH_TOKENS // length)
    student, live = (LiveReference(models[name], at_once).signals([batch], ())[0]["loss"] for name in models)
    packed = torch.from_numpy(decode(encode(live.cpu().numpy(), "fixed16"), "fixed16")).to(world.device)
    eod = load_tokenizer(str(corpus_tokenizer_path(corpus))).eos_token_id
    work = DocumentWork(corpus, eod, length, BATCH_TOKENS, 1 << 40)
    stored = ModelSource(models["reference"], work, ["loss"], world).values(0, lambda done: None).values_NC[:, 0]
    document = torch.from_numpy(stored[batch.label_offset_BT.cpu().numpy()]).to(world.device)
    return Losses(batch, student, live, packed, document)


def selection_rows(losses: Losses, length: int, ratio: float) -> list[list[str]]:
    """Return a row for the packed store, and one for each `min_context` of the document store."""
    rows = [selection_row(losses, losses.packed, 0, length, ratio, "packed")]
    contexts = [least for least in CONTEXTS if least < length]
    return rows + [selection_row(losses, losses.document, least, length, ratio, "document") for least in contexts]


def selection_row(losses: Losses, stored: Tensor, least: int, length: int, ratio: float, kind: str) -> list[str]:
    competing = competing_tokens(losses.batch, least)
    chosen, chosen_live = (
        select(losses.student - reference, competing, length, ratio) for reference in (stored, losses.live)
    )
    excess = losses.student - losses.live

    def compared(values: Tensor) -> str:
        return f"{values[chosen].mean():.3f}, live {values[chosen_live].mean():.3f}"

    agreement = (chosen & chosen_live).sum() / chosen.sum()
    masked = 1 - competing.float().mean()
    shown = "-" if kind == "packed" else str(least)
    return [str(length), kind, shown, f"{masked:.1%}", f"{agreement:.1%}", compared(losses.student), compared(excess)]


def select(scores: Tensor, competing: Tensor, length: int, ratio: float) -> Tensor:
    """Select from pools of `BATCH_TOKENS` tokens, as micro-steps do."""
    at_once = max(1, BATCH_TOKENS // length)
    pools = zip(scores.split(at_once), competing.split(at_once), strict=True)
    return torch.cat([select_tokens(*pool, ratio).mask for pool in pools])


def position_rows(losses: Losses, length: int) -> list[list[str]]:
    """Return mean losses of documents that began before the sample, by position in it, and of other documents."""
    preceding = torch.arange(1, length + 1, device=losses.student.device).expand_as(losses.student)
    continued = preceding < losses.batch.continued_B[:, None]
    ends = [*(end for end in POSITIONS[1:] if end < length), length + 1]
    parts = [
        (f"{begin} to {end - 1}", continued & (preceding >= begin) & (preceding < end))
        for begin, end in zip(POSITIONS, ends, strict=False)
    ]
    parts.append(("document begins in the sample", ~continued))
    return [
        [str(length), name, f"{part.float().mean():.1%}"]
        + [f"{column[part].mean():.3f}" for column in (losses.student, losses.live, losses.document)]
        for name, part in parts
        if part.any()
    ]


if __name__ == "__main__":
    main()
