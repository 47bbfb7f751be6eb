"""Export a run's checkpoint as a Hugging Face folder.

The folder holds the weights in safetensors, the tokenizer, the generation configuration, a model card, and the small
files of the model that the run started from. Only the run directory is read. Before the folder is published, it is
loaded and compared with the checkpoint. DeepSpeed's checkpoints are pickles, so export only runs that you trust.
"""

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_slm.config import Config, load_run_config
from megatron_slm.errors import UserError
from megatron_slm.io.files import refuse_taken, whole_folder
from megatron_slm.selection.settings import rule_in_words

if TYPE_CHECKING:
    import torch

    from megatron_slm.backend.stored import StoredWeight
    from megatron_slm.run_directory import RunDirectory

logger = logging.getLogger(__name__)

EXAMPLES = """example:
  megatron-slm export runs/slm exported/slm --checkpoint 500
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("run_dir", metavar="RUN_DIR", help="run directory")
    parser.add_argument("output", metavar="OUT_DIR", type=Path, help="folder to write; it must not exist")
    parser.add_argument("--checkpoint", metavar="N", type=int, help="step of the checkpoint; default: the newest")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), help="dtype of the weights; default: the precision of the run"
    )


def run(arguments: argparse.Namespace) -> None:
    """Export a checkpoint, in one process."""
    refuse_taken("OUT_DIR", arguments.output)
    config = load_run_config(arguments.run_dir)
    _export(config, arguments.output, arguments.checkpoint, arguments.dtype or str(config.training.precision))


def _export(config: Config, output: Path, step: int | None, dtype: str) -> None:
    from megatron_slm.build.models import PRECISIONS, make_backend
    from megatron_slm.dist import connect_alone, disconnect
    from megatron_slm.run_directory import RunDirectory
    from megatron_slm.training.checkpoints import CheckpointStore, saved_steps

    world = connect_alone("export")
    try:
        directory = RunDirectory(config.run_dir, world)
        steps = saved_steps(directory.checkpoints)
        if not steps:
            raise UserError("RUN_DIR", config.run_dir, "it holds no checkpoint", "Train the run first")
        checkpoint = CheckpointStore(directory.checkpoints, world).newest(step)
        if checkpoint is None:
            available = ", ".join(map(str, steps))
            reason = f"{config.run_dir} holds no checkpoint of this step"
            raise UserError("--checkpoint", step, reason, f"Use one of {available}")
        weights = make_backend(config, world).stored_weights(checkpoint)
        progress = json.loads((checkpoint / "progress.json").read_text())
        with tempfile.TemporaryDirectory() as scratch:
            source = _starting_files(directory, config, Path(scratch))
            _write_folder(source, config, weights, PRECISIONS[dtype], _model_card(config, progress), output)
        logger.info("%s holds the weights of %s, read back and compared", output, checkpoint)
    finally:
        disconnect()


def _starting_files(directory: "RunDirectory", config: Config, scratch: Path) -> Path:
    """Return the folder that holds `model` and `tokenizer`: the run directory, or `scratch` for an older run."""
    if directory.holds_starting_files:
        return directory.path
    from megatron_slm.build.corpora import open_corpora
    from megatron_slm.build.models import student_config
    from megatron_slm.build.run import write_starting_files

    corpora = open_corpora(config.data)
    write_starting_files(scratch, config, corpora, student_config(config, corpora))
    return scratch


def _write_folder(
    source: Path, config: Config, weights: "dict[str, StoredWeight]", dtype: "torch.dtype", card: str, output: Path
) -> None:
    """Write the folder aside, load it again, compare it with the checkpoint, and only then publish it."""
    from safetensors import SafetensorError
    from transformers.utils.logging import disable_progress_bar

    from megatron_slm.io.progress import Meter
    from megatron_slm.models.export import check_export, empty_model, write_weights
    from megatron_slm.models.pretrained import one_line
    from megatron_slm.models.starting_files import copy_into_export

    trust = config.model.trust_remote_code
    hf_weights = {name.removeprefix("lm."): weight for name, weight in weights.items()}
    model = empty_model(source / "model", hf_weights, dtype, trust)
    total = sum(weight.shape.numel() for weight in hf_weights.values())
    disable_progress_bar()  # Hugging Face would show one bar per shard, and one for reading.
    try:
        with whole_folder(output, replace=False) as aside, Meter(2 * total, "parameters") as meter:
            write_weights(model, hf_weights, dtype, aside, meter.reach)
            carried = copy_into_export(source, aside)
            (aside / "README.md").write_text(card, encoding="utf-8")
            check_export(aside, hf_weights, dtype, trust, meter.after(total))
    except (OSError, SafetensorError) as error:
        reason = f"it cannot be written ({one_line(error)})"
        raise UserError("OUT_DIR", output, reason, "Free disk space, or pass another folder") from error
    if config.model.path is not None:
        carried.log(str(output))
    _warn_about_tokenizer(output)


def _warn_about_tokenizer(output: Path) -> None:
    """Log a warning if AutoTokenizer cannot load the exported tokenizer, or returns other ids than it."""
    from megatron_slm.data.tokenizer import auto_tokenizer_agrees

    try:
        agrees = auto_tokenizer_agrees(output)
    except Exception as error:  # a third-party tokenizer; the weights are exported already
        logger.warning("AutoTokenizer cannot load %s: %s", output, error)
        return
    if not agrees:
        logger.warning(
            "AutoTokenizer.from_pretrained('%s') returns other ids than the tokenizer of the run, because of the model "
            "type in config.json. Load the tokenizer with PreTrainedTokenizerFast.from_pretrained instead.",
            output,
        )


def _model_card(config: Config, progress: dict[str, int]) -> str:
    """Return the model card: objective, data, length, and how tokens were selected."""
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
