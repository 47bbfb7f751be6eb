from dataclasses import dataclass, field
from typing import Literal

from megatron_slm.io.paths import PathText


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


@dataclass
class ScoreSettings:
    """The store that `megatron-slm score` writes.

    output        folder to make, for `reference.store` [path; ours]
    kind          packed: each token of this run's samples, as a live reference sees it; document: each token of the
                  corpora after its own document, for any order of samples [; ours]
    encoding      fixed16: two bytes, at most 0.00025 nats off; float32: four, as computed [; ours]
    entropy       also the entropy of each prediction, for the score reference_entropy [; the paper, section 3.4]
    shard_tokens  written and flushed at a time; a restart repeats at most so many [tokens; ours]
    """

    output: PathText
    kind: Literal["document", "packed"] = "packed"
    encoding: Literal["fixed16", "float32"] = "fixed16"
    entropy: bool = False
    shard_tokens: int = 1 << 23

    def __post_init__(self) -> None:
        if not self.output.strip("/. "):
            raise ValueError("output must name a folder")
        if self.shard_tokens < 1:
            raise ValueError("shard_tokens must be 1 or more")


@dataclass
class FilterSettings:
    """What `megatron-slm filter` ranks documents by, and where it writes which of them to keep.

    base       store of kind document: losses of a model like the student at its start [path; ours]
    reference  store of kind document: losses of the reference [path; ours]
    keep       share of all documents to keep, those of highest mean excess loss [share; ours]
    output     file to make, for `data.keep` [path; ours]
    """

    base: PathText
    reference: PathText
    output: PathText
    keep: float = 0.5

    def __post_init__(self) -> None:
        if not self.output.strip("/. "):
            raise ValueError("output must name a file")
        if not 0 < self.keep <= 1:
            raise ValueError("keep is the share of the documents to keep: give a number above 0, at most 1")
