"""Training of sentencepiece models, and their conversion to fast tokenizers that give the same ids.

Both forms must give the same ids for fixed texts and, in prepare, for a sample of the documents. They can break ties
between segmentations of equal score differently, because sentencepiece adds scores in float32 and tokenizers in
float64.
"""

import io
import random
import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_slm.errors import UserError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_MAX_LINE = 4000  # characters; by default, sentencepiece skips sentences above 4,192 bytes
_SPACE = "\u2581"  # how sentencepiece writes a space
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # ModelProto.SentencePiece.Type
_UNIGRAM, _BPE, _WORD, _CHAR = range(1, 5)  # TrainerSpec.ModelType
_PROBE = (
    "  A café: x_1 = 12.50;\n\n\tif (a <= b) {  return 'über';  }\r\n\u00a0日本 🙂 \u0007 "
    "<s></s><unk><0x0A> e\u0301 ﬁ .  "
)
_INSTEAD = "Give its Hugging Face folder instead"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, output_model: Path, *, max_lines: int = 1_000_000, seed: int = 1
) -> None:
    """Train a sentencepiece BPE model on ``texts`` and write it to ``output_model``.

    Decoding restores the text exactly, spaces and newlines included; characters without a piece become byte pieces.
    The same texts give the same model.

    Args:
        texts: texts to train on.
        vocab_size: number of pieces.
        output_model: file to write.
        max_lines: number of lines to train on, drawn from all lines and held in memory.
        seed: seed of the draw.

    Raises:
        UserError: the text has too few pieces for ``vocab_size``, or too many characters.
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
        raise UserError("--train-tokenizer", vocab_size, *_reason_and_remedy(str(error))) from error
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
    "num_threads": 4,  # fixed, because it is part of the model file
    "minloglevel": 2,
}


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            yield from (line[start : start + _MAX_LINE] for start in range(0, len(line), _MAX_LINE))


def _sample(lines: Iterable[str], count: int, seed: int) -> list[str]:
    """Draw ``count`` lines uniformly. Sentencepiece's own draw differs between processes."""
    generator = random.Random(seed)
    kept: list[str] = []
    for number, line in enumerate(lines):
        if number < count:
            kept.append(line)
        elif (place := generator.randrange(number + 1)) < count:
            kept[place] = line
    return kept


def _reason_and_remedy(message: str) -> tuple[str, str]:
    """Translate an error message of sentencepiece into a reason and a remedy."""
    if "too high" in message:
        most = message.rstrip(". ").rsplit(" ", 1)[-1]
        return f"the text gives at most {most} pieces", f"Use {most} or less, or give more text"
    if "smaller than required_chars" in message:
        needed = message.split(" vs ")[-1].split(".")[0]
        return f"the characters of the text and the 256 bytes need {needed} pieces", f"Use {needed} or more"
    if "sentences_.empty" in message:
        return "there is no text in the input", "Give files that hold text"
    return f"sentencepiece fails ({message})", "Try another size, or other text"


class Compared(NamedTuple):
    """The amount of text that has the same ids in both forms."""

    documents: int
    characters: int


def read_sentencepiece(path: Path, texts: Iterable[str]) -> "PreTrainedTokenizerFast":
    """Build the fast tokenizer that gives the ids of a sentencepiece model.

    Args:
        path: path of the model file.
        texts: texts for which both must give the same ids, besides a fixed one.

    Raises:
        UserError: the file is not a sentencepiece model, or its fast form would give other ids.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto
    from transformers import PreTrainedTokenizerFast

    processor = _sentencepiece(path)
    proto = ModelProto.FromString(processor.serialized_model_proto())
    trainer = proto.trainer_spec
    if trainer.model_type == _WORD:
        raise UserError("tokenizer", path, "its model type is word, which has no fast form", _INSTEAD)
    ids = {"unk_token": trainer.unk_id, "bos_token": trainer.bos_id, "eos_token": trainer.eos_id}
    named = {name: proto.pieces[index].piece for name, index in ids.items() if index >= 0}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_fast_tokenizer(proto, path), clean_up_tokenization_spaces=False, **named
    )
    symbols = [p.piece.replace(_SPACE, " ") for p in proto.pieces if p.type == _USER_DEFINED]
    for text in (_PROBE + "x".join(symbols[:64]), *texts):
        if first_difference(processor, tokenizer, text) is not None:  # symbols that hold spaces, for instance
            raise UserError("tokenizer", path, "it cannot be converted with the same ids", _INSTEAD)
    return tokenizer


def compare_with_sentencepiece(
    path: Path, tokenizer: "PreTrainedTokenizerFast", texts: Iterable[tuple[str, str]]
) -> Compared:
    """Compare the ids of a sentencepiece model with those of its fast form.

    Args:
        path: path of the model file.
        tokenizer: its fast form, from ``read_sentencepiece``.
        texts: pairs of a place, for messages, and a text.

    Raises:
        UserError: the ids of a text differ.
    """
    processor = _sentencepiece(path)
    documents = characters = 0
    for place, text in texts:
        begin = first_difference(processor, tokenizer, text)
        if begin is not None:
            where = f"{place}, from character {begin} ({text[begin : begin + 40]!r})"
            reason = f"its fast form gives other ids than sentencepiece in {where}"
            raise UserError("tokenizer", path, reason, _INSTEAD)
        documents += 1
        characters += len(text)
    return Compared(documents, characters)


def first_difference(
    processor: "SentencePieceProcessor", tokenizer: "PreTrainedTokenizerFast", text: str
) -> int | None:
    """Return the character at which the ids of a text begin to differ; None if they are the same."""
    theirs = processor.encode_as_ids(text)
    found = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    ours = found["input_ids"]
    if ours == theirs:
        return None
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return found["offset_mapping"][same][0] if same < len(ours) else len(text)


def _sentencepiece(path: Path) -> "SentencePieceProcessor":
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise UserError("tokenizer", path, "it is not a sentencepiece model", "Give one, or a folder") from error


def _fast_tokenizer(proto: Any, path: Path) -> "Tokenizer":
    from tokenizers import AddedToken, Tokenizer, decoders

    spec = proto.normalizer_spec
    bpe = proto.trainer_spec.model_type == _BPE
    tokenizer = Tokenizer(_bpe(proto) if bpe else _unigram(proto))
    tokenizer.normalizer = _normalizer(spec)
    if not bpe:
        tokenizer.pre_tokenizer = _apart(proto, path)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    special = [p.piece for p in proto.pieces if p.type in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    if bpe:  # in Unigram, symbols are pieces that compete by score, as in sentencepiece
        symbols = [p.piece for p in proto.pieces if p.type == _USER_DEFINED]
        tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in symbols])
    return tokenizer


def _bpe(proto: Any) -> Any:
    """Return the BPE model whose merges are all pairs of pieces that form a piece, best pieces first."""
    from tokenizers.models import BPE

    ids = {p.piece: index for index, p in enumerate(proto.pieces)}
    best_first = sorted((p for p in proto.pieces if p.type == _NORMAL), key=lambda p: -p.score)
    known = {p.piece: ids[p.piece] for p in best_first}
    merges: list[tuple[str, str]] = []
    for piece in known:
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        possible = [(left, right) for left, right in halves if left in known and right in known]
        merges += sorted(possible, key=lambda pair: (known[pair[0]], known[pair[1]]))
    unknown = proto.pieces[proto.trainer_spec.unk_id].piece
    return BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=proto.trainer_spec.byte_fallback)


def _unigram(proto: Any) -> Any:
    """Return the Unigram model of the pieces and their scores; it also serves the type char."""
    from tokenizers.models import Unigram

    best = max((p.score for p in proto.pieces if p.type == _NORMAL), default=0.0)
    scores = [
        # Sentencepiece scores user-defined symbols in this way (unigram_model.cc, version 0.2).
        (p.piece, len(p.piece.encode()) * best - 0.1 if p.type == _USER_DEFINED else p.score)
        for p in proto.pieces
    ]
    return Unigram(scores, proto.trainer_spec.unk_id, byte_fallback=proto.trainer_spec.byte_fallback)


def _apart(proto: Any, path: Path) -> Any:
    """Return the pre-tokenizer that keeps Unigram from matching special pieces that a text spells out.

    Unigram matches every piece, including ``</s>`` and ``<0x0A>``; sentencepiece matches only ordinary pieces. So the
    pre-tokenizer splits such a spelling between two characters that are adjacent in no ordinary piece. No other
    segmentation changes.

    Raises:
        UserError: a special piece has no such place.
    """
    from tokenizers import Regex, pre_tokenizers

    ordinary = {p.piece for p in proto.pieces if p.type in (_NORMAL, _USER_DEFINED)}
    together = {piece[place : place + 2] for piece in ordinary for place in range(len(piece) - 1)}
    if not proto.trainer_spec.byte_fallback:  # two adjacent unknown characters are one token
        together |= {a + b for p in proto.pieces for a, b in pairwise(p.piece) if ordinary.isdisjoint((a, b))}
    patterns: set[str] = set()
    for kind, piece in ((p.type, p.piece) for p in proto.pieces if p.piece not in ordinary):
        cut = next((place for place in range(1, len(piece)) if piece[place - 1 : place + 1] not in together), None)
        if cut is None:
            reason = f"it cannot be converted with the same ids (because of {piece})"
            raise UserError("tokenizer", path, reason, _INSTEAD)
        # One pattern for all byte pieces, because every pattern is tried at every character of the corpus.
        rest = "0x[0-9A-F]{2}>" if kind == _BYTE and cut == 1 else re.escape(piece[cut:])
        patterns.add(f"{re.escape(piece[cut - 1])}(?<={re.escape(piece[:cut])})(?={rest})")
    return pre_tokenizers.Split(Regex("|".join(sorted(patterns))), "merged_with_previous")


def _normalizer(spec: Any) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        ends = Regex(rf"\A +|[ {_SPACE}]+\z")
        steps += [normalizers.Replace(ends, ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
