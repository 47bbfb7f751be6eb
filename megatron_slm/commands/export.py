"""Turn a run's checkpoint into a Hugging Face folder.

Weights in safetensors, tokenizer, generation configuration and model card; `from_pretrained`
loads it to the same losses. DeepSpeed's checkpoints are pickles: export only runs that you trust.
"""

import argparse
import json
import logging
from pathlib import Path

from megatron_slm.config import Config, load_config
from megatron_slm.errors import UserError
from megatron_slm.selection.words import rule_in_words

_EPILOG = """example:
  megatron-slm export runs/slm exported/slm --checkpoint 500
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("run_dir", metavar="RUN_DIR", help="folder of the run")
    parser.add_argument("output", metavar="OUT_DIR", type=Path, help="folder to make")
    parser.add_argument("--checkpoint", metavar="N", type=int, help="the checkpoint of step N; default: the newest")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), help="of the weights; default: the precision that the run trained in"
    )


def run(arguments: argparse.Namespace) -> None:
    """Export in one process."""
    if arguments.output.exists():
        raise UserError(f"OUT_DIR is {arguments.output}, which exists: name a folder that does not.")
    config_file = Path(arguments.run_dir) / "config.yaml"
    if not config_file.exists():
        raise UserError(f"RUN_DIR is {arguments.run_dir}, which holds no config.yaml: name the folder of a run.")
    config = load_config(str(config_file), [f"run_dir={json.dumps(arguments.run_dir)}"])
    _export(config, arguments.output, arguments.checkpoint, arguments.dtype or str(config.training.precision))


def _export(config: Config, output: Path, step: int | None, dtype: str) -> None:
    from megatron_slm.composition.corpora import open_corpora
    from megatron_slm.composition.models import PRECISIONS, make_backend, student_config
    from megatron_slm.dist import connect, disconnect
    from megatron_slm.models.export import fill_model, write_folder
    from megatron_slm.run_folder import RunFolder
    from megatron_slm.training.checkpoints import CheckpointStore, saved_steps

    world = connect()
    try:
        folder = RunFolder(config.run_dir, world).checkpoints
        steps = saved_steps(folder)
        if not steps:
            raise UserError(f"RUN_DIR is {config.run_dir}, which has no checkpoint: train it first.")
        checkpoint = CheckpointStore(folder, world).newest(step)
        if checkpoint is None:
            there = ", ".join(map(str, steps))
            raise UserError(
                f"--checkpoint is {step}, and {config.run_dir} has checkpoints of {there}: name one of them."
            )
        corpora = open_corpora(config)
        weights = make_backend(config, world).consolidate(checkpoint)
        model = fill_model(student_config(config, corpora), weights, PRECISIONS[dtype], config.model.trust_remote_code)
        progress = json.loads((checkpoint / "progress.json").read_text())
        output.parent.mkdir(parents=True, exist_ok=True)
        write_folder(model, corpora.tokenizer, _card(config, progress), output)
        logging.getLogger(__name__).info("%s: the weights of %s", output, checkpoint)
    finally:
        disconnect()


def _card(config: Config, progress: dict[str, int]) -> str:
    """The model card: what was trained, on what, and how tokens were selected."""
    tokens = progress["step"] * config.training.global_batch_size * config.data.seq_length
    rows = {
        "objective": config.objective,
        "starting point": config.model.path or "from scratch",
        "training data": str(config.data.train),
        "tokens": f"{tokens:,}",
        "steps": f"{progress['step']:,}",
    }
    if config.candidates > 1:
        rows["tokens of candidates"] = f"{progress['consumed_samples'] * config.data.seq_length:,}"
    if config.objective == "slm":
        rows |= {
            "reference model": config.reference.in_words() if config.reference else "none",
            "selection": rule_in_words(config.selection),
            "selected tokens": f"{progress['consumed_selected_tokens']:,}",
        }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    title = "Selective Language Modeling" if config.objective == "slm" else "Causal Language Modeling"
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- selective-language-modeling\n---\n\n"
        f"# {Path(config.run_dir).name}\n\nTrained with megatron_slm by {title}.\n\n| | |\n|---|---|\n{table}\n"
    )
