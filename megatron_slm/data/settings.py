import math
import re
from dataclasses import field
from typing import Annotated, Any

from pydantic import PlainValidator
from pydantic.dataclasses import dataclass

from megatron_slm.errors import UserError
from megatron_slm.settings import STRICT, Group, PathText, Positive, Switch, Whole, expand_path


def _expand_paths(train: Any) -> Any:
    """Return `data.train` with its paths expanded; weights stay numbers, and a PREFIX such as `80B` stays text."""
    if isinstance(train, list):
        return [_expand_paths(entry) for entry in train]
    return expand_path(train) if isinstance(train, str) else train


@dataclass(config=STRICT)
class DataSettings:
    """Prepared corpora (each a PREFIX of .bin, .idx and .json files), and how samples are drawn from them.

    train            a PREFIX; a list of them, used in proportion to their tokens; or [weight, PREFIX, ...] [; Megatron]
    valid            evaluation sets: a name and a PREFIX each [; Megatron's valid_data_path]
    split            parts of the documents of data.train; "98,2,0" trains on the first 98 % [per cent; Megatron]
    seq_length       length of a sample [tokens; Megatron]
    keep             keep-list of megatron-slm filter: train only on the documents that it keeps [path; ours]
    reset_attention  restart positions and attention at each document [; Megatron's reset_attention_mask]
    order_tokens     length of one shuffled order of samples; default: the tokens that the run reads, as planned when
                     it begins [tokens; ours]
    cache            folder for index files; default: RUN_DIR/cache [path; Megatron's data_cache_path]
    skip_samples     ranges of the order of samples to skip, such as [[640, 648]]; each end is exclusive [samples; ours]
    """

    train: Annotated[str | list[str | float], PlainValidator(_expand_paths)]
    seq_length: Positive[Whole] = 2048
    valid: Group[dict[str, PathText]] = field(default_factory=dict)
    split: str | None = None
    keep: PathText | None = None
    reset_attention: Switch = False
    order_tokens: Positive[Whole] | None = None
    cache: PathText | None = None
    skip_samples: list[tuple[Whole, Whole]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if any(not 0 <= first < last for first, last in self.skip_samples):
            reason = "each range must be [first, last] with 0 <= first < last"
            raise UserError("skip_samples", list(map(list, self.skip_samples)), reason, "Correct the range")
        blend(self.train)
        train_share(self.split)

    def corpora(self) -> list[tuple[str, str]]:
        """Return every PREFIX, with the setting that names it."""
        trained = [("data.train", prefix) for prefix in blend(self.train)[0]]
        return trained + [(f"data.valid.{name}", prefix) for name, prefix in self.valid.items()]


def train_share(split: str | None) -> float:
    """Return the share of the documents that a split such as "98,2,0" gives to training.

    Raises:
        UserError: the split is not one to three numbers, or the first is 0.
    """
    if not split:
        return 1.0
    # Stricter than megatron-core, which extracts digits and dots from any text and reads 1e-1 as two parts.
    number = r"\s*(\d+\.?\d*|\.\d+)\s*"
    parts = [float(part) for part in split.split(",")] if re.fullmatch(f"{number}(,{number}){{0,2}}", split) else [0.0]
    if not parts[0] > 0:
        reason = 'it must be parts for training, validation and test, such as "98,2,0", the first above 0'
        raise UserError("split", split, reason, "Correct it, or remove it to train on all documents")
    return parts[0] / sum(parts)


def blend(train: str | list[str | float]) -> tuple[list[str], list[float] | None]:
    """Return the prefixes and weights of a blend; no weights if corpora are used in proportion to their size.

    Raises:
        UserError: an empty list, a weight without its PREFIX, or a weight that is not a positive number.
    """
    entries = train if isinstance(train, list) else [train]
    if entries and all(isinstance(entry, str) for entry in entries):
        return [str(entry) for entry in entries], None
    weights, prefixes = entries[::2], entries[1::2]
    paired = len(weights) == len(prefixes) > 0 and all(isinstance(prefix, str) for prefix in prefixes)
    if not paired or not all(map(_is_weight, weights)):
        reason = "it must be one PREFIX, a list of them, or [weight, PREFIX, weight, PREFIX, ...] with weights above 0"
        raise UserError("train", train, reason, "Write one of these three forms")
    return [str(prefix) for prefix in prefixes], [float(weight) for weight in weights]


def _is_weight(entry: str | float) -> bool:
    return type(entry) in (int, float) and 0 < float(entry) < math.inf
