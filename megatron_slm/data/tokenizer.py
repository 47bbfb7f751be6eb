"""Tokenizers: load one from any common form, train one, and tell whether two are the same."""

import hashlib
import io
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_slm.errors import UserError, refuse_missing_folder

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_SPACE = "\u2581"  # how sentencepiece writes a space
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # ModelProto.SentencePiece.Type
_BPE = 2  # TrainerSpec.ModelType; fast Unigram tokenizers break ties otherwise than sentencepiece does
_MAX_LINE = 4000  # characters; sentencepiece skips sentences above 4,192 bytes unless told otherwise
_PROBE = (
    "  A café: x_1 = 12.50;\n\n\tif (a <= b) {  return 'über';  }\r\n\u00a0日本 🙂 \u0007 "
    "<s></s><unk><0x0A> e\u0301 ﬁ .  "
)


def load_tokenizer(path: str) -> "PreTrainedTokenizerFast":
    """Load a tokenizer from a Hugging Face folder, a hub name, or a sentencepiece model file.

    A sentencepiece model (BPE) gives the ids that sentencepiece itself gives.

    Raises:
        UserError: nothing loadable is there, it has no fast form, or it has no end token.
    """
    tokenizer = _from_sentencepiece(Path(path)) if Path(path).is_file() else _from_hugging_face(path)
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer {path} has no fast form: give one with a tokenizer.json, or a sentencepiece model")
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {path} has no end token, which ends documents: set eos_token in its configuration")
    return tokenizer


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Return the sha256, in hex, of every (id, piece) and of the ids of bos, eos and unk."""
    pieces = sorted((index, piece) for piece, index in tokenizer.get_vocab().items())
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    return hashlib.sha256(json.dumps([pieces, special]).encode()).hexdigest()


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Save a tokenizer for a corpus to carry.

    Raises:
        UserError: what is loaded from the folder is not the same.
    """
    tokenizer.save_pretrained(folder)
    if tokenizer_fingerprint(load_tokenizer(str(folder))) != tokenizer_fingerprint(tokenizer):
        name = tokenizer.name_or_path
        raise UserError(f"tokenizer {name} changes when it is saved and loaded: give its tokenizer.json folder")


def largest_id(tokenizer: "PreTrainedTokenizerFast") -> int:
    """Return the largest id that the tokenizer gives."""
    return max(tokenizer.get_vocab().values())


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
    from transformers import AutoTokenizer

    refuse_missing_folder("the tokenizer", path)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers has no error of its own for files that it cannot use
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"tokenizer {path} cannot be loaded: give a Hugging Face folder, a hub name, "
            f"or a sentencepiece model file ({reason})"
        ) from error


def _from_sentencepiece(path: Path) -> "PreTrainedTokenizerFast":
    """Build the fast tokenizer that encodes as the sentencepiece model does."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto
    from transformers import PreTrainedTokenizerFast

    processor = _sentencepiece(path)
    proto = ModelProto.FromString(processor.serialized_model_proto())
    trainer = proto.trainer_spec
    if trainer.model_type != _BPE:
        raise UserError(f"tokenizer {path} is no BPE model, so its ids could change: give its Hugging Face folder")
    ids = {"unk_token": trainer.unk_id, "bos_token": trainer.bos_id, "eos_token": trainer.eos_id}
    named = {name: proto.pieces[index].piece for name, index in ids.items() if index >= 0}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_fast_tokenizer(proto), clean_up_tokenization_spaces=False, **named
    )
    symbols = [p.piece.replace(_SPACE, " ") for p in proto.pieces if p.type == _USER_DEFINED]
    probe = _PROBE + "x".join(symbols[:64])
    ours = tokenizer(probe, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if ours != processor.encode_as_ids(probe):  # symbols that hold spaces, for instance
        raise UserError(f"tokenizer {path} cannot be converted with the same ids: give its Hugging Face folder instead")
    return tokenizer


def _sentencepiece(path: Path) -> "SentencePieceProcessor":
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise UserError(f"tokenizer {path} is not a sentencepiece model file: give one, or a folder") from error


def _fast_tokenizer(proto: Any) -> "Tokenizer":
    from tokenizers import AddedToken, Tokenizer, decoders

    spec = proto.normalizer_spec
    tokenizer = Tokenizer(_bpe(proto))
    tokenizer.normalizer = _normalizer(spec)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * spec.add_dummy_prefix)
    special = [p.piece for p in proto.pieces if p.type in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    symbols = [p.piece for p in proto.pieces if p.type == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in symbols])
    return tokenizer


def _bpe(proto: Any) -> Any:
    """The model whose merges are every way to make a piece from two, best pieces first."""
    from tokenizers.models import BPE

    ids = {p.piece: index for index, p in enumerate(proto.pieces)}
    ranked = sorted((p for p in proto.pieces if p.type == _NORMAL), key=lambda p: -p.score)
    known = {p.piece: ids[p.piece] for p in ranked}
    merges: list[tuple[str, str]] = []
    for piece in (p.piece for p in ranked):
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        possible = [(left, right) for left, right in halves if left in known and right in known]
        merges += sorted(possible, key=lambda pair: (known[pair[0]], known[pair[1]]))
    unknown = proto.pieces[proto.trainer_spec.unk_id].piece
    return BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=proto.trainer_spec.byte_fallback)


def _normalizer(spec: Any) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
