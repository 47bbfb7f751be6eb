"""The files beside the weights that a run keeps in its directory, so that export needs nothing else."""

from pathlib import Path

from transformers import PretrainedConfig

from megatron_slm.composition.corpora import Corpora
from megatron_slm.config import Config
from megatron_slm.data.corpus import corpus_tokenizer_path
from megatron_slm.errors import UserError
from megatron_slm.files import whole_folder
from megatron_slm.models.starting_files import copy_model_files, copy_tokenizer_files, starting_folder
from megatron_slm.run_folder import RunFolder


def keep_starting_files(folder: RunFolder, config: Config, corpora: Corpora, hf_config: PretrainedConfig) -> None:
    """Write RUN_DIR/model and RUN_DIR/tokenizer, unless the run has begun with them; rank 0 calls it.

    Raises:
        UserError: they cannot be written.
    """
    # Those of a start that failed before its first record may be of another model.
    if folder.has_begun and folder.holds_starting_files:
        return
    older = sorted({"rope_theta", "rope_scaling"} & config.model.config.keys())
    if folder.has_begun and config.model.path is not None and older:
        raise UserError(
            f"run_dir is {folder.path}, which holds a run that an earlier version began. Then model.config.{older[0]} "
            "had no effect beside model.path, and now it has: take it out of the configuration and of "
            "RUN_DIR/config.yaml to resume as before, or use another run_dir."
        )
    try:
        write_starting_files(folder.path, config, corpora, hf_config)
    except OSError as error:
        raise UserError(
            f"run_dir is {folder.path}, where the files of the starting model and of the tokenizer cannot be written "
            f"({error}): make room, or use another run_dir."
        ) from error


def write_starting_files(path: Path, config: Config, corpora: Corpora, hf_config: PretrainedConfig) -> None:
    """Write the folders `tokenizer` and `model` of models/starting_files.py.

    Args:
        path: folder to make them in.
        config: of the run.
        corpora: whose tokenizer a student from scratch has.
        hf_config: of the student.

    Raises:
        OSError: they cannot be written.
    """
    source = starting_folder(config.model.path) if config.model.path is not None else None
    with whole_folder(path / "tokenizer", replace=True) as tokenizer:
        copy_tokenizer_files(source or corpus_tokenizer_path(corpora.train[0]), tokenizer)
    with whole_folder(path / "model", replace=True) as model:
        found = copy_model_files(source, hf_config, model, trust_remote_code=config.model.trust_remote_code)
    if source is not None:
        found.log(str(path))
