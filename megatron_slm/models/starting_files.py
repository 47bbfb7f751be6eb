"""The files beside a model's weights, copied into the run directory so that export needs no other folder.

RUN_DIR/tokenizer/                     the files of the tokenizer, unchanged
RUN_DIR/model/config.json              the student's configuration, as the run resolved it
              generation_config.json   and other small files of the starting model, unchanged
              starting_model.json      the names of copied files, and of files that were not copied, by reason
"""

import json
import logging
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "starting_model.json"
TEMPLATES = "additional_chat_templates"
CONFIG, CARD, THEIR_CARD = "config.json", "README.md", "README.starting-model.md"
LARGEST_EXTRA = 16 << 20
"""Bytes. Larger files that do not belong to the tokenizer are taken for weights or data with an unknown name."""

TOKENIZER_NAMES = (
    *("tokenizer*", "vocab*", "merges*", "special_tokens_map*", "added_tokens*", "chat_template*"),
    *(f"{TEMPLATES}/*", "*.jinja", "*.model", "*.tiktoken", "*.spm", "spiece*", "tekken*"),
)
WEIGHT_NAMES = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.gguf"),
    *("*.ggml", "*.tflite", "*.npz", "*.npy", "*.pkl", "*.pickle", "*.ot", "*.mlmodel", "*.nemo", "*.distcp"),
    *("*.zip", "*.tar", "*.tar.gz", "*.index.json", "adapter_*"),
)
TEXT_NAMES = ("*.json", "*.jinja", "*.txt", "*.md", "*.model", "*.tiktoken", "*.spm", "*.py", "LICENSE*", "NOTICE*")
"""Files to download from the hub. The weights were downloaded when the model was loaded."""


@dataclass
class StartingFiles:
    """The names of the files beside the weights: `carried` files were copied; `left` holds the others, by reason."""

    carried: list[str] = field(default_factory=list)
    left: dict[str, list[str]] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def leave(self, name: str, reason: str) -> None:
        """Add a file that is not copied."""
        self.left.setdefault(reason, []).append(name)

    def log(self, where: str) -> None:
        """Log the copied files in one line, and the others in a second line."""
        logger.info("%s: copied from the starting model: %s", where, _listed(self.carried) or "nothing")
        if self.left:
            reasons = "; ".join(f"{_listed(names)} ({reason})" for reason, names in self.left.items())
            logger.info("%s: not copied: %s", where, reasons)


def read_starting_files(model: Path) -> StartingFiles:
    """Return the names that `copy_model_files` wrote to this folder."""
    return StartingFiles(**json.loads((model / MANIFEST).read_text(encoding="utf-8")))


def starting_folder(path: str) -> Path | None:
    """Return the folder with the files of `model.path`: the path itself, or a hub name's snapshot in the cache.

    It tries to download small files that the snapshot lacks. It returns None if there is no snapshot.
    """
    if Path(path).is_dir():
        return Path(path)
    try:
        snapshot = Path(snapshot_download(path, local_files_only=True))
    except Exception as error:
        logger.warning("model.path is %s, but the files beside its weights cannot be found: %s", path, _short(error))
        return None
    try:
        # The folder's name is the revision whose weights were loaded.
        snapshot_download(path, revision=snapshot.name, allow_patterns=list(TEXT_NAMES), ignore_patterns="*/*")
    except Exception as error:
        logger.warning("model.path is %s, but only its files in the cache can be copied: %s", path, _short(error))
    return snapshot


def copy_tokenizer_files(source: Path, folder: Path) -> None:
    """Copy the files of a tokenizer, unchanged, and the `config.json` from which `AutoTokenizer` reads its class.

    Raises:
        OSError: a file cannot be read or written.
    """
    for name in _names(source):
        if name == CONFIG or _kind(name) == "tokenizer":
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)


def copy_model_files(
    source: Path | None, config: PretrainedConfig, folder: Path, *, trust_remote_code: bool
) -> StartingFiles:
    """Write the student's configuration, and copy the starting model's files other than weights and tokenizer.

    Args:
        source: folder of the starting model; None if there is none.
        config: configuration of the student, as the run resolved it.
        folder: empty folder to write to.
        trust_remote_code: copy Python files too.

    Returns:
        The names of the files that were copied, and of those that were not, such as files that cannot be read.

    Raises:
        OSError: a file cannot be written.
    """
    found = StartingFiles()
    names = _names(source, python=trust_remote_code) if source else []
    for name in names:
        kind = _kind(name)
        if kind == "tokenizer":
            found.carried.append(name)
        elif kind == "folder":
            found.leave(name, "a folder")
        elif kind == "weights":
            found.leave(name, "weights")
        elif kind == "python" and not trust_remote_code:
            found.leave(name, "Python, and model.trust_remote_code is false")
        elif name != CONFIG and not (name == THEIR_CARD and CARD in names):
            assert source is not None
            _copy_small(source / name, folder / (THEIR_CARD if name == CARD else name), name, found)
    config.to_json_file(folder / CONFIG)
    _point_to_local_code(folder)
    (folder / MANIFEST).write_text(json.dumps(asdict(found), indent=2) + "\n", encoding="utf-8")
    return found


def copy_into_export(run: Path, folder: Path) -> StartingFiles:
    """Copy the files of RUN_DIR/tokenizer and RUN_DIR/model over those that `save_pretrained` wrote.

    Returns:
        The names of the files that the run copied from its starting model.
    """
    for part in ("tokenizer", "model"):
        for name in _names(run / part, python=True):
            if name not in (CONFIG, MANIFEST):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(run / part / name, folder / name)
    return read_starting_files(run / "model")


def _copy_small(source: Path, target: Path, name: str, found: StartingFiles) -> None:
    try:
        size = source.stat().st_size
        content = source.read_bytes() if size <= LARGEST_EXTRA else None
    except OSError as error:
        found.leave(name, f"cannot be read: {error.strerror}")
        return
    if content is None:
        found.leave(name, f"{size / 1e6:,.0f} MB, more than {LARGEST_EXTRA / 1e6:.0f} MB")
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        found.carried.append(name)


def _names(folder: Path, *, python: bool = False) -> list[str]:
    """Return the relative names of a model's files, and of its subfolders, which end in a slash.

    A model's folder can hold anything, so subfolders are searched only for files that belong to models. Hidden names
    (`.git`, `.cache`) are skipped.

    Args:
        folder: folder of the model.
        python: search subfolders for Python files.
    """
    names = []
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if not path.is_dir():
            names.append(path.name)
            continue
        inside: list[Path] = []
        if path.name == TEMPLATES:
            inside = list(path.glob("*"))
        elif python:
            inside = list(path.rglob("*.py"))
        found = [file.relative_to(folder).as_posix() for file in inside if file.is_file()]
        names += found or [f"{path.name}/"]
    return sorted(names)


def _kind(name: str) -> str:
    if name.endswith("/"):
        return "folder"
    if _matches(name, WEIGHT_NAMES):
        return "weights"
    if name.endswith(".py"):
        return "python"
    return "tokenizer" if _matches(name, TOKENIZER_NAMES) else "extra"


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name.lower(), pattern.lower()) for pattern in patterns)


def _point_to_local_code(folder: Path) -> None:
    """Replace references to Python files in other repositories by those in the configuration's own folder."""
    path = folder / CONFIG
    tree = json.loads(path.read_text(encoding="utf-8"))

    def local(reference: object) -> object:
        if isinstance(reference, list):
            return [local(item) for item in reference]
        if not isinstance(reference, str) or "--" not in reference:
            return reference
        name = reference.split("--")[-1]
        return name if (folder / f"{name.split('.')[0]}.py").exists() else reference

    if isinstance(tree.get("auto_map"), dict):
        tree["auto_map"] = {key: local(value) for key, value in tree["auto_map"].items()}
        path.write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def _short(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
