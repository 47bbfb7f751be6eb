"""What a pretrained model's files hold, as one number: the same weights have the same, wherever they lie."""

import hashlib
from pathlib import Path

from huggingface_hub import snapshot_download

from megatron_slm.errors import UserError


def weights_fingerprint(path: str) -> str:
    """sha256 over the configuration and the safetensors files of a model that can be loaded from here.

    Args:
        path: Hugging Face folder, or a hub name that is in the local cache.

    Raises:
        UserError: there are no safetensors.
    """
    folder = Path(path) if Path(path).is_dir() else Path(snapshot_download(path, local_files_only=True))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"reference.path is '{path}', which holds no *.safetensors: save the model as safetensors.")
    whole = hashlib.sha256()
    for file in (folder / "config.json", *files):
        with file.open("rb") as stream:
            whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()
