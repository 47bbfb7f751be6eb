"""Tokenizers: loading one from any common form, saving it with a corpus, and comparing two.

The ids of a text are those of the tokenizer.json. For some folders, transformers rebuilds parts of it from
`tokenizer_class`, which can change every id.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_slm.data.sentencepiece_model import read_sentencepiece
from megatron_slm.errors import UserError, first_line, refuse_missing_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


logger = logging.getLogger(__name__)

_CHOSEN_END = "ends_documents"  # in tokenizer_config.json; not ..._token, because transformers reads such keys
_DOCUMENT_ENDS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<|eos|>",
    "<eos>",
    "</s>",
)
PROBE_VERSION = 1
"""Increment it when the texts change: hashes of different versions are not compared."""

PROBE_TEXTS = (
    "The quick brown fox doesn't jump; they'll say it's the dog's, I'M SURE WE'VE SEEN 'em.",
    "0 12 345 6789 1234567890 3.14159 -2,000,000.50 1e-9 0xFF 10:30 2024-02-29 50% $5 №7 ½ ²",
    "  two spaces,   three,\ttab\t\ttabs \n\n\nlines\r\nand \n indented\n    four\n\t\tdeep  \n ",
    'def f(x_1, *args):\n    if x_1 <= 10**-3 and args[0] != {}:\n        return f"{x_1!r}\\n"  # done\n\n\n',
    "日本語の文章、中文句子。한국어 문장 ภาษาไทย हिन्दी العربية עברית русский язык Ελληνικά",
    "🙂 👩\u200d👩\u200d👧 🇺🇳 e\u0301 é ﬁ \uff21\uff11 \u00a0 \u2009 \u3000 \ufeff \u0007 naïve café über",
    "<s></s><unk><pad> <|endoftext|><|im_end|> <0x0A> [CLS] [MASK] https://a.example/b?c=d&e=f#g",
    "camelCaseWords snake_case_words ALLCAPS (a) [b] {c}; ... -- 'd' \"e\" !? <f/> g@h.i #j $k %l ^m &n *o +p =q",
    "Although understanding international relationships requires patience, unbelievable misinterpretations of "
    "electromagnetic phenomena frequently reappear throughout undergraduate laboratories; nevertheless, thoughtful "
    "experimentalists rediscover hydrodynamics, photosynthesis, jurisprudence, thermodynamic equilibrium and "
    "counterrevolutionary antidisestablishmentarianism whenever knowledgeable neighbours quietly exchange views.",
)
"""Fixed texts that tokenizers with the same pieces may split differently.

They repeat no piece many times: rounding of scores would decide how to split such a run.
"""


@dataclass(frozen=True)
class TokenizerIdentity:
    """The properties that two tokenizers share if their ids mean the same text.

    fingerprint  hash of the pieces with their ids, and of the ids of bos, eos and unk
    probe        hash of the ids of PROBE_TEXTS; empty if an earlier version did not record it
    """

    fingerprint: str
    probe: str = ""

    def difference(self, other: "TokenizerIdentity") -> str | None:
        """Return how the two differ, in words; None if they agree in everything that both record."""
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
        path: the folder, name or file.
        end_token: the piece that ends documents; None for the tokenizer's eos_token.

    Raises:
        UserError: the tokenizer cannot be loaded, has no fast form, or has no end token.
    """
    tokenizer = read_sentencepiece(Path(path), PROBE_TEXTS) if Path(path).is_file() else _from_hugging_face(path)
    if not tokenizer.is_fast:
        remedy = "Give one with a tokenizer.json, or a sentencepiece model"
        raise UserError("tokenizer", path, "it has no fast form", remedy)
    if end_token is not None:
        _choose_end(tokenizer, end_token, path)
    if tokenizer.eos_token_id is None:
        remedy = "Set eos_token in its configuration, or name one of its pieces with --end-token"
        raise UserError("tokenizer", path, "it has no end token for documents", remedy)
    return tokenizer


def chosen_end_token(tokenizer: "PreTrainedTokenizerFast") -> str | None:
    """Return the end token that was chosen with --end-token; None if documents end with the tokenizer's own."""
    chosen: str | None = tokenizer.init_kwargs.get(_CHOSEN_END)
    return chosen


def likelier_end_token(tokenizer: "PreTrainedTokenizerFast") -> str | None:
    """Return the piece that probably ended documents in pretraining, if the tokenizer's end token ends chat turns.

    Return None if the tokenizer has no chat template, if the template does not write the end token, if the end token
    was chosen or is known to end documents, or if there is no other such piece.
    """
    own, template = tokenizer.eos_token, str(tokenizer.chat_template or "")
    if chosen_end_token(tokenizer) or own in _DOCUMENT_ENDS or not ("eos_token" in template or own in template):
        return None
    pieces = tokenizer.get_vocab()
    return next((token for token in _DOCUMENT_ENDS if token in pieces), None)


def tokenizer_identity(tokenizer: "PreTrainedTokenizerFast") -> TokenizerIdentity:
    """Return the properties that identify the tokenizer."""
    return TokenizerIdentity(tokenizer_fingerprint(tokenizer), tokenizer_probe(tokenizer))


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Return the SHA-256, in hex, of every (id, piece) and of the ids of bos, eos and unk."""
    pieces = sorted((index, piece) for piece, index in tokenizer.get_vocab().items())
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    return hashlib.sha256(json.dumps([pieces, special]).encode()).hexdigest()


def tokenizer_probe(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Return the version of the probe texts, and the SHA-256, in hex, of their ids."""
    backend = tokenizer.backend_tokenizer
    before = backend.encode_special_tokens  # transformers changes it in every call
    ids = [_text_ids(tokenizer, text) for text in PROBE_TEXTS]
    backend.encode_special_tokens = before
    return f"{PROBE_VERSION}:{hashlib.sha256(json.dumps(ids).encode()).hexdigest()}"


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Save a tokenizer to a folder from which AutoTokenizer loads the same tokenizer.

    Raises:
        UserError: the tokenizer that is loaded from the folder differs.
    """
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    # For any other class, transformers rebuilds the pre-tokenizer and ignores that of tokenizer.json.
    config = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "TokenizersBackend"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    loaded = (load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder))
    if any(tokenizer_identity(other) != tokenizer_identity(tokenizer) for other in loaded):
        reason = "it changes when it is saved and loaded"
        raise UserError("tokenizer", tokenizer.name_or_path, reason, "Give the folder of its tokenizer.json")


def auto_tokenizer_agrees(folder: Path) -> bool:
    """Return True if AutoTokenizer, with which other programs load the folder, gives the ids of its tokenizer.json.

    Next to a config.json of some model types, such as qwen2, AutoTokenizer ignores `tokenizer_class`.
    """
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return tokenizer_identity(theirs) == tokenizer_identity(load_tokenizer(str(folder)))


def largest_id(tokenizer: "PreTrainedTokenizerFast") -> int:
    """Return the largest id of the tokenizer."""
    return int(max(tokenizer.get_vocab().values()))


def vocabulary_size(tokenizer: "PreTrainedTokenizerFast") -> int:
    """Return the number of rows that an embedding needs: more than there are pieces if some ids are unused."""
    return largest_id(tokenizer) + 1


def _from_hugging_face(path: str) -> "PreTrainedTokenizerFast":
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import has_file

    refuse_missing_folder("tokenizer", path)
    theirs: Any = None
    failure: Exception | None = None
    try:
        theirs = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # for example, a class that needs other files, or that comes with code
        failure = error
    # Only this class uses tokenizer.json unchanged (transformers 5.17 and 5.24).
    if type(theirs) is PreTrainedTokenizerFast:
        return theirs
    if not _read(path, lambda: has_file(path, "tokenizer.json")):
        if failure is not None:
            raise _unreadable(path, failure) from failure
        return theirs
    tokenizer = _read(path, lambda: PreTrainedTokenizerFast.from_pretrained(path))
    if failure is not None:
        logger.info(
            "tokenizer %s: AutoTokenizer cannot load it (%s), so its tokenizer.json is used directly",
            path, first_line(failure),
        )  # fmt: skip
        return tokenizer
    _copy_special_tokens(tokenizer, theirs)
    if theirs.is_fast and _splits(theirs) != _splits(tokenizer):
        logger.info(
            "tokenizer %s: the %s of transformers gives other ids than its tokenizer.json, which is used instead",
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
    remedy = "Give a Hugging Face folder, a hub name, or a sentencepiece model file"
    return UserError("tokenizer", path, f"it cannot be loaded ({first_line(error)})", remedy)


def _copy_special_tokens(tokenizer: "PreTrainedTokenizerFast", theirs: "PreTrainedTokenizerFast") -> None:
    """Copy the special tokens that only a class of transformers defines, if the tokenizer has pieces for them."""
    pieces = tokenizer.get_vocab()
    for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES:
        token = getattr(theirs, name)
        if getattr(tokenizer, name) is None and token in pieces:
            tokenizer.add_special_tokens({name: token})


def _choose_end(tokenizer: "PreTrainedTokenizerFast", end_token: str, path: str) -> None:
    if end_token not in tokenizer.get_vocab():
        remedy = "Name a single piece, such as <|endoftext|>"
        raise UserError("--end-token", end_token, f"it is not a piece of the tokenizer {path}", remedy)
    tokenizer.add_special_tokens({"eos_token": end_token})
    tokenizer.init_kwargs[_CHOSEN_END] = end_token


def _text_ids(tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int] | None:
    """Return the ids of a text in which special tokens count as text; None if it cannot be encoded."""
    try:
        return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"])
    except Exception:  # raised in Rust, for example if unknown text has no unknown token
        return None
