from dataclasses import dataclass, field
from typing import Literal

from megatron_slm.paths import PathText


@dataclass
class PartSettings:
    """One of several references: a model that runs along, or a store.

    path               folder or hub name [path; Hugging Face's from_pretrained]
    store              folder that megatron-slm score wrote [path; ours]
    weight             of this one; only proportions count [; ours]
    micro_batch_size   at a time, without gradients [samples; ours]
    shard              split the weights over all ranks (ZeRO-3); false: every rank holds all of them [; ours]
    trust_remote_code  run Python that comes with the model; off unless asked for [; Hugging Face]
    """

    path: PathText | None = None
    store: PathText | None = None
    weight: float = 1.0
    micro_batch_size: int = 16
    shard: bool = True
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if (self.path is None) == (self.store is None):
            raise ValueError("every reference in of takes either path or store")
        if self.micro_batch_size < 1:
            raise ValueError("micro_batch_size must be 1 or more")
        if not self.weight > 0:
            raise ValueError("weight must be above 0")


@dataclass
class ReferenceSettings:
    """The frozen model that says what is learnable, or the store of what it said.

    path               folder or hub name; its tokenizer must be the corpus's [path; Hugging Face's from_pretrained]
    store              read its scores from this folder, which megatron-slm score wrote; then no model runs [path; ours]
    mix                of several: mean of losses, minimum of losses, or log_mixture of probabilities [; ours]
    of                 the references of a mix [; ours]
    micro_batch_size   at a time, without gradients; larger than the student's is faster [samples; ours]
    check_windows      of each evaluation set to compare with the student at the start; 0 for none [windows; ours]
    shard              split the weights over all ranks (ZeRO-3); false: every rank holds all of them [; ours]
    trust_remote_code  run Python that comes with the model; off unless asked for [; Hugging Face]
    """

    path: PathText | None = None
    store: PathText | None = None
    mix: Literal["mean", "minimum", "log_mixture"] = "mean"
    of: list[PartSettings] = field(default_factory=list)
    micro_batch_size: int = 16
    check_windows: int = 64
    shard: bool = True
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1:
            raise ValueError("micro_batch_size must be 1 or more")
        if self.check_windows < 0:
            raise ValueError("check_windows must be 0 or more")
        if self.of and (self.path or self.store):
            raise ValueError("reference takes path or store, or several of them under of: leave one of the two out")
        if not (self.of or self.path or self.store):
            raise ValueError("reference needs a path (of a model), a store (of scores), or several of them under of")

    def in_words(self) -> str:
        """The reference as a report calls it."""
        names = [part.path or f"the store {part.store}" for part in self.parts]
        return names[0] if not self.of else f"{self.mix} of {', '.join(map(str, names))}"

    @property
    def parts(self) -> list[PartSettings]:
        """Every reference, as one of several. Where there are a path and a store, the store is read."""
        if self.of:
            return self.of
        path = None if self.store else self.path
        return [PartSettings(path, self.store, 1.0, self.micro_batch_size, self.shard, self.trust_remote_code)]
