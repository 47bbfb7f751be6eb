import re
from dataclasses import dataclass, field

from megatron_slm.io.paths import PathText


@dataclass
class DataSettings:
    """Prepared corpora (PREFIX of .bin, .idx, .json) and how samples are drawn from them.

    train            one PREFIX, a list (in proportion to their tokens), or [weight, PREFIX, ...] [; Megatron]
    valid            evaluation sets: a PREFIX by name [; Megatron's valid_data_path]
    split            the part of the documents of train to use: "98,2,0" takes the first 98 % [per cent; Megatron]
    seq_length       length of a sample [tokens; Megatron]
    keep             train on the documents alone that this file keeps, which megatron-slm filter wrote [path; ours]
    reset_attention  positions and attention restart at each document [; Megatron's reset_attention_mask]
    order_tokens     one order of the samples; default: what the run reads, frozen in the run folder [tokens; ours]
    cache            folder of the index caches; default: RUN_DIR/cache [path; Megatron's data_cache_path]
    skip_samples     half-open ranges of the order to leave out, such as [[640, 648]] [samples; ours]
    """

    train: PathText | list[PathText | float]
    seq_length: int = 2048
    valid: dict[str, PathText] = field(default_factory=dict)
    split: str | None = None
    keep: PathText | None = None
    reset_attention: bool = False
    order_tokens: int | None = None
    cache: PathText | None = None
    skip_samples: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.seq_length < 1:
            raise ValueError("seq_length must be 1 or more")
        if self.order_tokens is not None and self.order_tokens < 1:
            raise ValueError("order_tokens must be 1 or more")
        if any(not 0 <= first < last for first, last in self.skip_samples):
            raise ValueError("skip_samples must be pairs [first, last] with 0 <= first < last")
        blend(self.train)
        try:
            share = train_share(self.split)
        except (ValueError, ZeroDivisionError):
            share = 0.0
        if not 0 < share <= 1:
            raise ValueError('split must look like "98,2,0": parts of train, validation and test, the first above 0')

    def corpora(self) -> list[tuple[str, str]]:
        """Every PREFIX, with the setting that names it."""
        trained = [("data.train", prefix) for prefix in blend(self.train)[0]]
        return trained + [(f"data.valid.{name}", prefix) for name, prefix in self.valid.items()]


def train_share(split: str | None) -> float:
    """Share of the documents that a split such as "98,2,0" gives to training."""
    # megatron-core finds digits and dots in whatever it is given: it would read 1e-1 as two parts.
    if split and not re.fullmatch(r"[\d.\s]+(?:,[\d.\s]+){0,2}", split):
        raise ValueError(split)
    parts = [float(part) for part in split.split(",")] if split else [1.0]
    return parts[0] / sum(parts)


def blend(train: str | list[str | float]) -> tuple[list[str], list[float] | None]:
    """Prefixes and weights of a blend; no weights where the corpora are to be used in proportion to their size.

    Raises:
        ValueError: an empty list, a weight without its PREFIX, or a weight that is not positive.
    """
    entries = [train] if isinstance(train, str) else list(train)
    if entries and all(isinstance(entry, str) for entry in entries):
        return [str(entry) for entry in entries], None
    weights, prefixes = entries[::2], entries[1::2]
    paired = len(weights) == len(prefixes) > 0 and all(isinstance(prefix, str) for prefix in prefixes)
    if not paired or any(isinstance(weight, str) or not weight > 0 for weight in weights):
        raise ValueError(
            "train must be one PREFIX, a list of them, or [weight, PREFIX, weight, PREFIX, ...] with weights above 0"
        )
    return [str(prefix) for prefix in prefixes], [float(weight) for weight in weights]
