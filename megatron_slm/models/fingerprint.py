"""What a pretrained model's files hold, as one number: the same weights have the same, wherever they lie."""

import hashlib
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from megatron_slm.errors import UserError, refuse_missing_folder


def weights_fingerprint(path: str) -> str:
    """sha256 over the configuration and the safetensors files of a model that can be loaded from here.

    Args:
        path: Hugging Face folder, or a hub name.

    Raises:
        UserError: nothing is there, or no safetensors.
    """
    refuse_missing_folder("reference.path", path)
    try:
        folder = (
            Path(path)
            if Path(path).is_dir()
            else Path(snapshot_download(path, allow_patterns=["config.json", "*.safetensors"]))
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        said = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"reference.path is '{path}', which cannot be loaded: {said}.") from error
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"reference.path is '{path}', which holds no *.safetensors: save the model as safetensors.")
    whole = hashlib.sha256()
    for file in (folder / "config.json", *files):
        try:
            with file.open("rb") as stream:
                whole.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise UserError(
                f"reference.path is '{path}', whose {file.name} cannot be read ({error.strerror}): save the model "
                "again."
            ) from error
    return whole.hexdigest()
