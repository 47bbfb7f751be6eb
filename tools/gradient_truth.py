"""The gradient of `selection.backward: rows` and `replay` against the exact one, part by part of the model.

    python tools/gradient_truth.py RUN_DIR --models base=models/base middle=models/middle --output gradients.json

RUN_DIR is the run directory of a selective run with a stored reference; the samples come from the end of its order.
For weights from scratch and for each model, every micro-batch is scored once, its tokens are selected by that score,
and the same tokens go through each backward. For scale, `other batch` compares the exact gradients of two batches, and
`all tokens` compares the exact gradient with that of CLM on the same micro-batch.
"""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import option_parser, show_log_lines, spread
from torch import Tensor
from transformers import PreTrainedModel

from megatron_slm.backend.plain import PlainBackend, PlainEngine
from megatron_slm.build.corpora import Corpora, make_samples, open_run_corpora
from megatron_slm.build.models import make_learner
from megatron_slm.build.plan import settle
from megatron_slm.build.references import check_reference, make_reference
from megatron_slm.config import Config, load_config
from megatron_slm.data.loader import StepLoader
from megatron_slm.dist import World, connect, disconnect
from megatron_slm.io.progress import Meter
from megatron_slm.models.causal_lm import CausalLM, build_student, initialize_weights
from megatron_slm.models.pretrained import load_pretrained
from megatron_slm.models.settings import ModelSettings
from megatron_slm.reporting.tables import markdown_table
from megatron_slm.selection.rule import Rule
from megatron_slm.types import Batch

SCRATCH = "scratch"
WHOLE = "whole"
PARTS = (
    (r"\.layers\.(\d+)\..*(?:attn|attention|input_layernorm)", r"layer {} attention"),
    (r"\.layers\.(\d+)\.", "layer {} MLP"),
    (r"embed_tokens", "embedding"),
    (r"", "head and last norm"),
)
"""Parts of models of Llama's family: the first pattern that matches a parameter's name determines its part."""

Gradient = dict[str, Tensor]


class ScoredBatch(NamedTuple):
    """A micro-batch with its reference signals."""

    batch: Batch
    reference: dict[str, Tensor]


def part_of(name: str) -> str:
    found, title = next((found, title) for pattern, title in PARTS if (found := re.search(pattern, name)))
    return title.format(*(int(number) + 1 for number in found.groups()))


def scored_batches(config: Config, corpora: Corpora, world: World, count: int) -> list[ScoredBatch]:
    """Return the last micro-batches of the run's order, one per step."""
    config, plan = settle(config, corpora, world.device.type, reads_document_store=False)
    samples = make_samples(config.data, config.seed, corpora, plan, Path(config.run_dir) / "cache", world)
    settings = config.training
    loader = StepLoader(samples, settings.micro_batch_size, plan.global_batch_size, config.data.reset_attention, world)
    assert config.reference is not None
    references = [check_reference(part, corpora, plan.seq_length) for part in config.reference.parts]
    reference, _ = make_reference(config, references, PlainBackend(world))
    starts = [loader.end(0, step) for step in range(plan.total_steps - count, plan.total_steps)]
    batches = [loader.load(start)[0] for start in starts]
    return [ScoredBatch(batch, reference.signals([batch], ())[0]) for batch in batches]


def students(lm: PreTrainedModel, world: World, seq_length: int) -> dict[str, Any]:
    module = CausalLM(lm.train())
    engine = PlainEngine(module, torch.optim.SGD(module.parameters()), 0.0, world)
    return {way: make_learner(way, module, engine, seq_length) for way in ("exact", "rows", "replay")}


def gradient(lm: PreTrainedModel, student: Any, batch: Batch, weights_BT: Tensor) -> Gradient:
    """Return the flat gradient of the mean loss of the tokens of weight 1, by part and for the whole model."""
    lm.zero_grad()
    _, tape = student.score(batch, (), keep=True)
    student.backward(tape, {"loss": weights_BT}, 1 / float(weights_BT.sum()), last=True)
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for name, parameter in lm.named_parameters():
        parts[part_of(name)].append(parameter.grad.flatten().clone())
    joined = {part: torch.cat(tensors) for part, tensors in parts.items()}
    return joined | {WHOLE: torch.cat(list(joined.values()))}


def compared(
    lm: PreTrainedModel, scored: list[ScoredBatch], ratio: float, settings: Any, world: World
) -> Iterator[dict[str, Gradient]]:
    """Yield the gradients of each kind of backward, for each micro-batch."""
    ways, rule = students(lm, world, scored[0].batch.tokens_BT.shape[1]), Rule(settings)
    for batch, reference in scored:
        loss_BT = ways["exact"].score(batch, (), keep=False)[0]["loss"]
        signals = {"student.loss": loss_BT, "reference.loss": reference["loss"]}
        chosen = rule.choose(signals, batch.valid_BT, ratio, position=batch.token_position_BT)
        found = {way: gradient(lm, student, batch, chosen.weights) for way, student in ways.items()}
        yield found | {"all tokens": gradient(lm, ways["exact"], batch, batch.valid_BT.float())}


def measured(gradients: Iterator[Mapping[str, Gradient]], reach: Callable[[int], None]) -> dict[str, Any]:
    """Return cosines with the exact gradient and ratios of norms by part, for each micro-batch and for their sum.

    `reach` is called with the number of micro-batches that are done.
    """
    found: dict[str, Any] = defaultdict(lambda: defaultdict(list))
    total: dict[str, Gradient] = {}
    before: Gradient | None = None
    for number, ways in enumerate(gradients, start=1):
        for part, exact in ways["exact"].items():
            _add(found[part], {way: gradient[part] for way, gradient in ways.items()}, exact)
            if before is not None:
                found[part]["other batch cosine"].append(cosine(before[part], exact))
        before = ways["exact"]
        total = {way: _sum(total.get(way), gradient) for way, gradient in ways.items()}
        reach(number)
    for part, exact in total["exact"].items():
        found[part]["sum of batches"] = defaultdict(list)
        _add(found[part]["sum of batches"], {way: gradient[part] for way, gradient in total.items()}, exact)
    return found


def _add(found: dict[str, list[float]], ways: Mapping[str, Tensor], exact: Tensor) -> None:
    for way in ("rows", "replay", "all tokens"):
        found[f"{way} cosine"].append(cosine(ways[way], exact))
        found[f"{way} norm"].append(float(ways[way].norm() / exact.norm()))
    found["replay from rows"].append(float((ways["replay"] - ways["rows"]).norm() / ways["rows"].norm()))


def _sum(total: Gradient | None, more: Gradient) -> Gradient:
    return more if total is None else {part: tensor + more[part] for part, tensor in total.items()}


def cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=0))


def load(path: str | None, like: str, config: Config, world: World) -> PreTrainedModel:
    """Load a model; without a path, build one in the shape of the model in `like`, with weights from scratch."""
    model = load_pretrained(path or like, "model", False, dtype=torch.float32)
    if path is None:
        shape = ModelSettings(path=None, config={"model_type": model.config.model_type})
        model = build_student(shape, model.config, torch.float32, world.device)
        initialize_weights(model, config.seed, PlainBackend(world).gathered)
    return model


TITLES = ("part", "rows cosine", "rows norm", "summed", "other batch", "all tokens")


def table(found: dict[str, Any]) -> str:
    """Return Markdown with a table for each model and ratio."""
    lines: list[str] = []
    for name, ratios in found.items():
        for ratio, parts in ratios.items():
            rows = [_row(part, values) for part, values in parts.items()]
            lines += [f"\n{name}, ratio {ratio}\n", markdown_table(TITLES, rows)]
    return "\n".join(lines) + "\n"


def _row(part: str, values: dict[str, Any]) -> list[str]:
    pair = [spread(values[f"rows {what}"]) for what in ("cosine", "norm")]
    summed = values["sum of batches"]["rows cosine"][0]
    rest = [spread(values[f"{what} cosine"]) for what in ("other batch", "all tokens")]
    return [part, *pair, f"{summed:.3f}", *rest]


def parse_arguments() -> argparse.Namespace:
    parser = option_parser(__doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="run directory of a selective run with a stored reference")
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=DIR", help="Hugging Face folders")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.3, 0.5, 0.7], help="default: 0.3 0.5 0.7")
    parser.add_argument("--batches", type=int, default=8, help="micro-batches; default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    show_log_lines()
    config = load_config(f"{options.run_dir}/config.yaml", [f"run_dir={options.run_dir}"])
    paths: dict[str, str | None] = {SCRATCH: None, **dict(model.split("=", 1) for model in options.models)}
    like = options.models[0].split("=", 1)[1]
    world = connect()
    try:
        corpora = open_run_corpora(config.data)
        scored = scored_batches(config, corpora, world, options.batches)
        found: dict[str, Any] = {}
        with Meter(len(paths) * len(options.ratios) * len(scored), "micro-batches") as meter:
            done = 0
            for name, path in paths.items():
                lm, found[name] = load(path, like, config, world), {}
                for ratio in options.ratios:
                    gradients = compared(lm, scored, ratio, config.selection, world)
                    found[name][str(ratio)] = measured(gradients, meter.after(done))
                    done += len(scored)
    finally:
        disconnect()
    options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
