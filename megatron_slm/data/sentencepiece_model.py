"""Sentencepiece model files, read as fast tokenizers that give the ids of sentencepiece itself."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_slm.errors import UserError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_SPACE = "\u2581"  # how sentencepiece writes a space
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # ModelProto.SentencePiece.Type
_BPE = 2  # TrainerSpec.ModelType; fast Unigram tokenizers break ties otherwise than sentencepiece does
_PROBE = (
    "  A café: x_1 = 12.50;\n\n\tif (a <= b) {  return 'über';  }\r\n\u00a0日本 🙂 \u0007 "
    "<s></s><unk><0x0A> e\u0301 ﬁ .  "
)


def read_sentencepiece(path: Path) -> "PreTrainedTokenizerFast":
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
