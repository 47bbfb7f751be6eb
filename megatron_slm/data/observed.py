"""Observed tokens: a fixed set of tokens whose losses are recorded over training, and the folder that holds them.

FOLDER/tokens.safetensors         the tokens, a row each, in the order of their corpora and offsets
FOLDER/reference.safetensors      their losses under the reference
FOLDER/step_00000500.safetensors  their losses under the student after a step, and which of them its rule selects

All files have the same rows. Each is written whole or not at all, so a recording that was killed resumes.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from megatron_slm.data.corpus import Corpus, open_documents
from megatron_slm.data.loader import EvaluationStream
from megatron_slm.errors import UserError
from megatron_slm.io.files import publish
from megatron_slm.types import Batch

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT_VERSION = 1
TOKENS, REFERENCE = "tokens", "reference"
Columns = dict[str, "NDArray[Any]"]


class ObservedTokens:
    """The scored tokens of some windows of evaluation corpora.

    Each corpus gets the same number of tokens, and its windows are spread evenly over it; what a short corpus does not
    need goes to the others.

    Args:
        corpora: opened corpora by name; all have the same tokenizer.
        num_tokens: number of tokens to observe; rounded up to whole windows.
        seq_length: tokens per window.
        eod: id of the end-of-document token.
        reset_attention: restart positions at each document.
    """

    def __init__(
        self, corpora: Mapping[str, Corpus], num_tokens: int, seq_length: int, eod: int, reset_attention: bool
    ) -> None:
        self._corpora = corpora
        self._num_tokens = num_tokens
        self._seq_length = seq_length
        self._reset_attention = reset_attention
        self._streams = {name: EvaluationStream(c, seq_length, eod, reset_attention) for name, c in corpora.items()}
        windows: dict[str, list[int]] = {}
        for name in sorted(self._streams, key=lambda name: len(self._streams[name])):
            left = num_tokens - seq_length * sum(map(len, windows.values()))
            share = math.ceil(left / (len(corpora) - len(windows)) / seq_length)
            available = len(self._streams[name])
            count = max(1, min(share, available))
            windows[name] = [index * available // count for index in range(count)]
        self._windows = [(name, window) for name in corpora for window in windows[name]]

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self._windows)

    def batch(self, ordinals: range) -> Batch:
        """Return windows as a batch; `sample_index_B` holds their ordinals, and ordinals past the end are padding."""
        names = list(self._streams)
        parts = []
        for ordinal in ordinals:
            past = names[0], len(self._streams[names[0]])
            name, window = self._windows[ordinal] if ordinal < len(self) else past
            part = self._streams[name].batch([window])
            parts.append(dataclasses.replace(part, source_B=torch.tensor([names.index(name)])))
        return dataclasses.replace(Batch.concatenate(parts), sample_index_B=torch.tensor(ordinals))

    def facts(self) -> dict[str, Any]:
        """Return what distinguishes these tokens from others, for the metadata of a folder."""
        return {
            "format_version": FORMAT_VERSION,
            "num_tokens": self._num_tokens,
            "seq_length": self._seq_length,
            "reset_attention": self._reset_attention,
            "corpora": [
                {
                    "name": name,
                    "prefix": corpus.prefix,
                    "sha256": corpus.sha256[".bin"],
                    "windows": sum(of == name for of, _ in self._windows),
                }
                for name, corpus in self._corpora.items()
            ],
            "tokenizer": next(iter(self._corpora.values())).tokenizer_fingerprint,
        }

    def columns(self) -> Columns:
        """Return the columns of `tokens.safetensors`, one row per scored token."""
        parts: list[Columns] = []
        for index, (name, corpus) in enumerate(self._corpora.items()):
            batch = self._streams[name].batch([window for of, window in self._windows if of == name])
            valid_BT = batch.valid_BT
            offset_N = batch.label_offset_BT[valid_BT].numpy()
            documents = open_documents(corpus)
            start_D = documents.starts()
            document_N = np.searchsorted(start_D, offset_N, side="right") - 1
            parts.append(
                {
                    "corpus": np.full(len(offset_N), index, dtype=np.int16),
                    "offset": offset_N,
                    "document": document_N.astype(np.int64),
                    "position": (offset_N - start_D[document_N]).astype(np.int32),
                    "document_length": (documents.length_D[document_N] - 1).astype(np.int32),
                    "token": batch.labels_BT[valid_BT].numpy().astype(np.int32),
                }
            )
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@dataclass(frozen=True)
class Observations:
    """The recorded losses of N observed tokens at S steps, in nats.

    facts           of the tokens: corpora, sequence length, tokenizer
    columns         of `tokens.safetensors`, `[N]` each: corpus, offset, document, position, document_length, token
    steps           S steps in ascending order; 0 is the model before training
    loss_SN         float32
    selected_SN     bool; rows of steps without a selection are False
    has_selection_S bool
    reference_N     float32; None if no reference was recorded
    reference_facts path and fingerprint of the reference
    """

    facts: dict[str, Any]
    columns: Columns
    steps: list[int]
    loss_SN: "NDArray[np.float32]"
    selected_SN: "NDArray[np.bool_]"
    has_selection_S: "NDArray[np.bool_]"
    reference_N: "NDArray[np.float32] | None"
    reference_facts: dict[str, Any]

    @property
    def corpora(self) -> list[str]:
        """The names of the corpora, by the numbers in the column `corpus`."""
        return [corpus["name"] for corpus in self.facts["corpora"]]

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.columns["token"])


class ObservedFolder:
    """The folder of observed tokens. One process writes; readers may read at any time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def exists(self) -> bool:
        """True if the tokens have been chosen."""
        return self._file(TOKENS).exists()

    @property
    def has_reference(self) -> bool:
        """True if the losses of the reference are recorded."""
        return self._file(REFERENCE).exists()

    def steps(self) -> list[int]:
        """Return the recorded steps in ascending order."""
        found = (re.fullmatch(r"step_(\d{8,})\.safetensors", path.name) for path in self.path.glob("step_*"))
        return sorted(int(match[1]) for match in found if match)

    def begin(self, tokens: ObservedTokens) -> None:
        """Write the tokens, or check that the folder holds the same ones.

        Raises:
            UserError: the folder holds other tokens.
            OSError: it cannot be written.
        """
        facts = tokens.facts()
        if self.exists:
            known = self.facts()
            if _identity(known) != _identity(facts):
                raise UserError(
                    "observed tokens",
                    self.path,
                    f"the folder holds losses of other tokens ({_in_words(known)}; now {_in_words(facts)})",
                    "Use the same corpora and number of tokens, or remove the folder",
                )
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._write(TOKENS, tokens.columns(), facts)

    def facts(self) -> dict[str, Any]:
        """Return the metadata of the tokens.

        Raises:
            UserError: the folder cannot be read.
        """
        found = self._metadata(TOKENS)
        if found.get("format_version") != FORMAT_VERSION:
            reason = f"its format version is {found.get('format_version')}, and this program reads {FORMAT_VERSION}"
            raise UserError("observed tokens", self.path, reason, "Remove the folder, and run analyze tokens again")
        return found

    def write_reference(self, loss_N: "NDArray[np.float32]", facts: dict[str, Any]) -> None:
        """Write the losses of the reference; `facts` are its path and fingerprint."""
        self._write(REFERENCE, {"loss": loss_N}, facts)

    def write_step(
        self, step: int, loss_N: "NDArray[np.float32]", selected_N: "NDArray[np.bool_] | None", facts: dict[str, Any]
    ) -> None:
        """Write the losses after a step, and the selection if there is one; `facts` are those of the selection."""
        columns: Columns = {"loss": loss_N} if selected_N is None else {"loss": loss_N, "selected": selected_N}
        self._write(step_name(step), columns, facts)

    def drop_after(self, step: int) -> None:
        """Remove the recordings after a step, to which a run has been cut back."""
        for later in self.steps():
            if later > step:
                self._file(step_name(later)).unlink()

    def read(self) -> Observations:
        """Return everything that is recorded.

        Raises:
            UserError: the folder holds no recording, or cannot be read.
        """
        facts, columns = self.facts(), self._read(TOKENS)
        steps = self.steps()
        if not steps:
            raise UserError("observed tokens", self.path, "no step is recorded", "Run megatron-slm analyze tokens")
        parts = [self._read(step_name(step)) for step in steps]
        none = np.zeros(len(columns["token"]), dtype=bool)
        return Observations(
            facts=facts,
            columns=columns,
            steps=steps,
            loss_SN=np.stack([part["loss"] for part in parts]),
            selected_SN=np.stack([part.get("selected", none) for part in parts]),
            has_selection_S=np.array(["selected" in part for part in parts]),
            reference_N=self._read(REFERENCE)["loss"] if self.has_reference else None,
            reference_facts=self._metadata(REFERENCE) if self.has_reference else {},
        )

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"

    def _write(self, name: str, columns: Columns, facts: dict[str, Any]) -> None:
        path = self._file(name)
        staged = path.with_name(f".{path.name}.new")
        save_file({key: np.ascontiguousarray(column) for key, column in columns.items()}, staged, _encoded(facts))
        publish(staged, path, replace=True)

    def _read(self, name: str) -> Columns:
        try:
            columns: Columns = load_file(self._file(name))
            return columns
        except (OSError, SafetensorError) as error:
            raise self._damaged(name, error) from error

    def _metadata(self, name: str) -> dict[str, Any]:
        try:
            with safe_open(self._file(name), framework="np") as opened:
                return {key: json.loads(value) for key, value in (opened.metadata() or {}).items()}
        except (OSError, ValueError, SafetensorError) as error:
            raise self._damaged(name, error) from error

    def _damaged(self, name: str, error: Exception) -> UserError:
        reason = f"{self._file(name)} cannot be read ({error})"
        return UserError("observed tokens", self.path, reason, "Remove the file, and run megatron-slm analyze tokens")


def step_name(step: int) -> str:
    """Return the name of a step's file, without its suffix."""
    return f"step_{step:08d}"


def _encoded(facts: dict[str, Any]) -> dict[str, str]:
    return {key: json.dumps(value) for key, value in facts.items()}


def _identity(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the facts without the paths of the corpora, which may move."""
    corpora = [{key: value for key, value in corpus.items() if key != "prefix"} for corpus in facts["corpora"]]
    return facts | {"corpora": corpora}


def _in_words(facts: dict[str, Any]) -> str:
    corpora = ", ".join(f"{corpus['windows']} windows of {corpus['prefix']}" for corpus in facts["corpora"])
    return f"{corpora}, {facts['seq_length']} tokens each"
