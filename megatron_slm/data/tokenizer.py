"""Tokenizers: load one from any common form, train one, and tell whether two are the same.

A tokenizer.json decides which ids a text gets. transformers rebuilds parts of it from `tokenizer_class` for some
folders, which can change every id.
"""

import hashlib
import io
import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_slm.data.probe_texts import PROBE_TEXTS, PROBE_VERSION
from megatron_slm.data.sentencepiece_model import read_sentencepiece
from megatron_slm.errors import UserError, refuse_missing_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


logger = logging.getLogger(__name__)

_CHOSEN_END = "ends_documents"  # in tokenizer_config.json; its name may not end in _token, which transformers reads
_DOCUMENT_ENDS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<|eos|>",
    "<eos>",
    "</s>",
)
_MAX_LINE = 4000  # characters; sentencepiece skips sentences above 4,192 bytes unless told otherwise


@dataclass(frozen=True)
class TokenizerIdentity:
    """What must be equal for the ids of two tokenizers to mean the same text.

    fingerprint  of the pieces with their ids, and of the ids of bos, eos and unk
    probe        of the ids that fixed texts get; empty where an earlier version did not note it
    """

    fingerprint: str
    probe: str = ""

    def difference(self, other: "TokenizerIdentity") -> str | None:
        """Return in words how the two differ, or None if nothing that both know differs."""
        if self.fingerprint != other.fingerprint:
            return "their pieces or special tokens differ"
        versions = {probe.partition(":")[0] for probe in (self.probe, other.probe)}
        if len(versions) == 1 and self.probe != other.probe:
            return "they have the same pieces and split text differently"
        return None


def load_tokenizer(path: str, end_token: str | None = None) -> "PreTrainedTokenizerFast":
    """Load a tokenizer from a Hugging Face folder, a hub name, or a sentencepiece model file.

    The ids are those of the folder's tokenizer.json, or of sentencepiece itself. Special tokens and the chat template
    are those that transformers reads.

    Args:
        path: folder, name or file.
        end_token: the piece that ends documents, in place of the tokenizer's own.

    Raises:
        UserError: nothing loadable is there, it has no fast form, or it has no end token.
    """
    tokenizer = read_sentencepiece(Path(path)) if Path(path).is_file() else _from_hugging_face(path)
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer {path} has no fast form: give one with a tokenizer.json, or a sentencepiece model")
    if end_token is not None:
        _choose_end(tokenizer, end_token, path)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"tokenizer {path} has no end token, which ends documents: set eos_token in its configuration, or name one "
            "of its pieces with --end-token"
        )
    return tokenizer


def chosen_end_token(tokenizer: "PreTrainedTokenizerFast") -> str | None:
    """Return the end token that was chosen for the tokenizer's documents, or None if it is the tokenizer's own."""
    chosen: str | None = tokenizer.init_kwargs.get(_CHOSEN_END)
    return chosen


def likelier_end_token(tokenizer: "PreTrainedTokenizerFast") -> str | None:
    """Return the piece that ended documents in pretraining, where the end token of a chat model ends its turns.

    None where the tokenizer has no chat template, its template does not write the end token, or the end token was
    chosen, is known to end documents, or is the only such piece.
    """
    own, template = tokenizer.eos_token, str(tokenizer.chat_template or "")
    if chosen_end_token(tokenizer) or own in _DOCUMENT_ENDS or not ("eos_token" in template or own in template):
        return None
    pieces = tokenizer.get_vocab()
    return next((token for token in _DOCUMENT_ENDS if token in pieces), None)


def tokenizer_identity(tokenizer: "PreTrainedTokenizerFast") -> TokenizerIdentity:
    """Return what tells the tokenizer from others."""
    return TokenizerIdentity(tokenizer_fingerprint(tokenizer), tokenizer_probe(tokenizer))


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Return the sha256, in hex, of every (id, piece) and of the ids of bos, eos and unk."""
    pieces = sorted((index, piece) for piece, index in tokenizer.get_vocab().items())
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    return hashlib.sha256(json.dumps([pieces, special]).encode()).hexdigest()


def tokenizer_probe(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Return the version of the probe texts and the sha256, in hex, of the ids that they get."""
    backend = tokenizer.backend_tokenizer
    before = backend.encode_special_tokens  # which transformers leaves as its last call set it
    ids = [_text_ids(tokenizer, text) for text in PROBE_TEXTS]
    backend.encode_special_tokens = before
    return f"{PROBE_VERSION}:{hashlib.sha256(json.dumps(ids).encode()).hexdigest()}"


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Save a tokenizer for a corpus to carry; AutoTokenizer loads it to the same ids.

    Raises:
        UserError: what is loaded from the folder is not the same.
    """
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    # Of any other class, transformers builds the pre-tokenizer anew and ignores that of tokenizer.json.
    config = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "TokenizersBackend"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    loaded = (load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder))
    if any(tokenizer_identity(other) != tokenizer_identity(tokenizer) for other in loaded):
        name = tokenizer.name_or_path
        raise UserError(f"tokenizer {name} changes when it is saved and loaded: give its tokenizer.json folder")


def auto_tokenizer_agrees(folder: Path) -> bool:
    """Return whether AutoTokenizer, by which others load the folder, gives the ids of its tokenizer.json.

    It does not take `tokenizer_class` into account beside a config.json of some model types, such as qwen2.
    """
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return tokenizer_identity(theirs) == tokenizer_identity(load_tokenizer(str(folder)))


def largest_id(tokenizer: "PreTrainedTokenizerFast") -> int:
    """Return the largest id that the tokenizer gives."""
    return int(max(tokenizer.get_vocab().values()))


def vocabulary_size(tokenizer: "PreTrainedTokenizerFast") -> int:
    """Return the rows that an embedding needs: ids may have holes, so this can exceed the number of pieces."""
    return largest_id(tokenizer) + 1


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, output_model: Path, *, max_lines: int = 1_000_000, seed: int = 1
) -> None:
    """Train a sentencepiece BPE model on ``texts`` and write it to ``output_model``.

    Decoding gives back the text exactly, spaces and newlines included: what has no piece is
    spelled in bytes. The same texts give the same model. At most ``max_lines`` lines, drawn from
    all of them, are held in memory.

    Raises:
        UserError: the text cannot fill ``vocab_size`` pieces, or they are too few for its characters.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_sample(_lines(texts), max_lines, seed)),
            model_writer=model,
            vocab_size=vocab_size,
            # In a small vocabulary every rare character displaces a useful piece.
            character_coverage=0.9995 if vocab_size >= 16_000 else 0.995,
            **_TRAINER_OPTIONS,
        )
    except RuntimeError as error:
        raise UserError(f"--train-tokenizer {vocab_size} does not fit the text: {_remedy(str(error))}") from error
    output_model.write_bytes(model.getvalue())


_TRAINER_OPTIONS: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    "max_sentence_length": 4 * _MAX_LINE,
    "unk_id": 0,
    "eos_id": 1,
    "bos_id": -1,
    "pad_id": -1,
    "num_threads": 4,  # part of the model file, so never the machine's own number
    "minloglevel": 2,
}


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            yield from (line[start : start + _MAX_LINE] for start in range(0, len(line), _MAX_LINE))


def _sample(lines: Iterable[str], count: int, seed: int) -> list[str]:
    """Keep ``count`` lines, each with the same chance (sentencepiece's own draw differs from process to process)."""
    generator = random.Random(seed)
    kept: list[str] = []
    for number, line in enumerate(lines):
        if number < count:
            kept.append(line)
        elif (place := generator.randrange(number + 1)) < count:
            kept[place] = line
    return kept


def _remedy(message: str) -> str:
    if "too high" in message:
        return f"ask for at most {message.rstrip('. ').rsplit(' ', 1)[-1]} pieces, or give more text"
    if "smaller than required_chars" in message:
        needed = message.split(" vs ")[-1].split(".")[0]
        return f"its characters and the 256 bytes alone need {needed} pieces"
    if "sentences_.empty" in message:
        return "there is no text in the input"
    return message


def _from_hugging_face(path: str) -> "PreTrainedTokenizerFast":
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import has_file

    refuse_missing_folder("the tokenizer", path)
    failure: Exception | None = None
    try:
        theirs = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # perhaps of a class that cannot be built from these pieces, or that comes with code
        failure = error
    # This class alone takes tokenizer.json as it is (transformers 5.17 and 5.24).
    if failure is None and type(theirs) is PreTrainedTokenizerFast:
        return theirs
    if not _read(path, lambda: has_file(path, "tokenizer.json")):
        if failure is not None:
            raise _unreadable(path, failure) from failure
        return theirs
    tokenizer = _read(path, lambda: PreTrainedTokenizerFast.from_pretrained(path))
    if failure is not None:
        logger.info(
            "tokenizer %s: AutoTokenizer cannot load it (%s); its tokenizer.json is used", path, _first_line(failure)
        )
        return tokenizer
    _take_special_tokens(tokenizer, theirs)
    if theirs.is_fast and _splits(theirs) != _splits(tokenizer):
        logger.info(
            "tokenizer %s: the %s of transformers gives other ids than its tokenizer.json, which is used",
            path, type(theirs).__name__,
        )  # fmt: skip
    return tokenizer


def _splits(tokenizer: "PreTrainedTokenizerFast") -> tuple[str, int]:
    return tokenizer_probe(tokenizer), largest_id(tokenizer)


def _read(path: str, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as error:  # transformers has no error of its own for files that it cannot use
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> UserError:
    return UserError(
        f"tokenizer {path} cannot be loaded: give a Hugging Face folder, a hub name, "
        f"or a sentencepiece model file ({_first_line(error)})"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _take_special_tokens(tokenizer: "PreTrainedTokenizerFast", theirs: "PreTrainedTokenizerFast") -> None:
    """Take the special tokens that no file names and a class of transformers knows, as far as they are pieces."""
    pieces = tokenizer.get_vocab()
    for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES:
        token = getattr(theirs, name)
        if getattr(tokenizer, name) is None and token in pieces:
            tokenizer.add_special_tokens({name: token})


def _choose_end(tokenizer: "PreTrainedTokenizerFast", end_token: str, path: str) -> None:
    if end_token not in tokenizer.get_vocab():
        raise UserError(
            f"--end-token {end_token} is no piece of the tokenizer {path}: name a single piece of it, such as its "
            "<|endoftext|>"
        )
    tokenizer.add_special_tokens({"eos_token": end_token})
    tokenizer.init_kwargs[_CHOSEN_END] = end_token


def _text_ids(tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int] | None:
    """Return the ids of a text in which special tokens are text; None where it cannot be encoded."""
    try:
        return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"])
    except Exception:  # of the library in Rust, for instance where a piece is unknown and none stands for that
        return None
