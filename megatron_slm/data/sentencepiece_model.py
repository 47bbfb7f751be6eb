"""Sentencepiece model files, read as fast tokenizers that give the ids of sentencepiece itself.

Both must give the same ids to fixed texts and, in prepare, to a sample of the documents. They can break ties between
segmentations of equal score differently, because sentencepiece adds scores in float32 and tokenizers in float64.
"""

import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_slm.data.probe_texts import PROBE_TEXTS
from megatron_slm.errors import UserError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_SPACE = "\u2581"  # how sentencepiece writes a space
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # ModelProto.SentencePiece.Type
_UNIGRAM, _BPE, _WORD, _CHAR = range(1, 5)  # TrainerSpec.ModelType
_PROBE = (
    "  A café: x_1 = 12.50;\n\n\tif (a <= b) {  return 'über';  }\r\n\u00a0日本 🙂 \u0007 "
    "<s></s><unk><0x0A> e\u0301 ﬁ .  "
)
_INSTEAD = "give its Hugging Face folder instead"


class Compared(NamedTuple):
    """How much text got the same ids in both forms."""

    documents: int
    characters: int


def read_sentencepiece(path: Path) -> "PreTrainedTokenizerFast":
    """Build the fast tokenizer that encodes as the sentencepiece model does.

    Raises:
        UserError: the file is no sentencepiece model, or the fast tokenizer would give other ids.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto
    from transformers import PreTrainedTokenizerFast

    processor = _sentencepiece(path)
    proto = ModelProto.FromString(processor.serialized_model_proto())
    trainer = proto.trainer_spec
    if trainer.model_type == _WORD:
        raise UserError(f"tokenizer {path} is of the type word, which has no fast form: {_INSTEAD}")
    ids = {"unk_token": trainer.unk_id, "bos_token": trainer.bos_id, "eos_token": trainer.eos_id}
    named = {name: proto.pieces[index].piece for name, index in ids.items() if index >= 0}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_fast_tokenizer(proto, path), clean_up_tokenization_spaces=False, **named
    )
    symbols = [p.piece.replace(_SPACE, " ") for p in proto.pieces if p.type == _USER_DEFINED]
    for text in (_PROBE + "x".join(symbols[:64]), *PROBE_TEXTS):
        if first_difference(processor, tokenizer, text) is not None:  # symbols that hold spaces, for instance
            raise UserError(f"tokenizer {path} cannot be converted with the same ids: {_INSTEAD}")
    return tokenizer


def compare_with_sentencepiece(
    path: Path, tokenizer: "PreTrainedTokenizerFast", texts: Iterable[tuple[str, str]]
) -> Compared:
    """Compare the ids of a sentencepiece model with those of the fast tokenizer that was made of it.

    Args:
        path: of the model file.
        tokenizer: what ``read_sentencepiece`` returned for it.
        texts: pairs of a place, for messages, and a text.

    Raises:
        UserError: the ids of a text differ.
    """
    processor = _sentencepiece(path)
    documents = characters = 0
    for place, text in texts:
        begin = first_difference(processor, tokenizer, text)
        if begin is not None:
            raise UserError(
                f"tokenizer {path} gives other ids in its fast form than in sentencepiece, in {place} from character "
                f"{begin} on ({text[begin : begin + 40]!r}): {_INSTEAD}"
            )
        documents, characters = documents + 1, characters + len(text)
    return Compared(documents, characters)


def first_difference(
    processor: "SentencePieceProcessor", tokenizer: "PreTrainedTokenizerFast", text: str
) -> int | None:
    """Return the character at which the ids of a text begin to differ, or None where they are the same."""
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
        raise UserError(f"tokenizer {path} is not a sentencepiece model file: give one, or a folder") from error


def _fast_tokenizer(proto: Any, path: Path) -> "Tokenizer":
    from tokenizers import AddedToken, Tokenizer, decoders

    spec = proto.normalizer_spec
    bpe = proto.trainer_spec.model_type == _BPE
    tokenizer = Tokenizer(_bpe(proto) if bpe else _unigram(proto))
    tokenizer.normalizer = _normalizer(spec)
    if not bpe:
        tokenizer.pre_tokenizer = _apart(proto, path)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * spec.add_dummy_prefix)
    special = [p.piece for p in proto.pieces if p.type in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    if bpe:  # among the pieces of Unigram, symbols compete by their score, as in sentencepiece
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


def _unigram(proto: Any) -> Any:
    """The model of the pieces and their scores. One of single characters (type char) has one segmentation at most."""
    from tokenizers.models import Unigram

    best = max((p.score for p in proto.pieces if p.type == _NORMAL), default=0.0)
    scores = [
        # The score that sentencepiece gives to user-defined symbols (unigram_model.cc, 0.2).
        (p.piece, len(p.piece.encode()) * best - 0.1 if p.type == _USER_DEFINED else p.score)
        for p in proto.pieces
    ]
    return Unigram(scores, proto.trainer_spec.unk_id, byte_fallback=proto.trainer_spec.byte_fallback)


def _apart(proto: Any, path: Path) -> Any:
    """Return the pre-tokenizer that keeps Unigram from reading special pieces where a text spells them out.

    Unigram takes every piece that it finds in a text, also ``</s>`` and ``<0x0A>``; sentencepiece takes only those of
    ordinary text. So a text is split inside such a spelling, between two characters that follow each other in no
    ordinary piece: no other segmentation changes.

    Raises:
        UserError: a spelling has no such place.
    """
    from tokenizers import Regex, pre_tokenizers

    ordinary = {p.piece for p in proto.pieces if p.type in (_NORMAL, _USER_DEFINED)}
    together = {piece[place : place + 2] for piece in ordinary for place in range(len(piece) - 1)}
    if not proto.trainer_spec.byte_fallback:  # two unknown characters beside each other are one token
        together |= {a + b for p in proto.pieces for a, b in pairwise(p.piece) if ordinary.isdisjoint((a, b))}
    patterns: set[str] = set()
    for kind, piece in ((p.type, p.piece) for p in proto.pieces if p.piece not in ordinary):
        cut = next((place for place in range(1, len(piece)) if piece[place - 1 : place + 1] not in together), None)
        if cut is None:
            raise UserError(f"tokenizer {path} cannot be converted with the same ids ({piece} is in text): {_INSTEAD}")
        # One pattern serves all bytes, because each is tried at every character of the corpus.
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
