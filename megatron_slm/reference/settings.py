from dataclasses import field
from typing import Literal

from pydantic.dataclasses import dataclass

from megatron_slm.errors import UserError
from megatron_slm.settings import STRICT, NotNegative, Number, PathText, Positive, Share, Switch, Whole


@dataclass(config=STRICT)
class PartSettings:
    """One of several references: a model that runs during training, or a store of losses.

    path               folder or hub name of a model [path; Hugging Face's from_pretrained]
    store              folder that megatron-slm score wrote [path; ours]
    weight             weight in the mix, relative to the other references [; ours]
    micro_batch_size   samples per forward, without gradients [samples; ours]
    shard              shard the weights over all ranks (ZeRO-3); false: every rank holds all of them [; ours]
    trust_remote_code  run Python code that comes with the model [; Hugging Face]
    """

    path: PathText | None = None
    store: PathText | None = None
    weight: Positive[Number] = 1.0
    micro_batch_size: Positive[Whole] = 16
    shard: Switch = True
    trust_remote_code: Switch = False

    def __post_init__(self) -> None:
        if self.path is None and self.store is None:
            reason = "each reference is a model or a store"
            raise UserError("path", None, reason, "Set path or store of this entry of reference.of")
        if self.path is not None and self.store is not None:
            reason = "each entry of reference.of is either a model (path) or a store"
            raise UserError("store", self.store, reason, "Remove one of the two, or write two entries")


@dataclass(config=STRICT)
class ReferenceSettings:
    """The frozen reference model, or a store of its losses.

    path               folder or hub name; its tokenizer must be that of data.train [path; Hugging Face's
                       from_pretrained]
    store              folder that megatron-slm score wrote; its losses are read, and no reference model runs [path;
                       ours]
    mix                how several references are mixed: mean of the losses, minimum of the losses, or log_mixture: the
                       loss of the mean of their probabilities [; ours]
    of                 the references to mix [; ours]
    micro_batch_size   samples per forward, without gradients; a larger size than the student's is faster [samples;
                       ours]
    check_windows      windows of each evaluation set on which to compare reference and student before training; 0 for
                       none [windows; ours]
    shard              shard the weights over all ranks (ZeRO-3); false: every rank holds all of them [; ours]
    trust_remote_code  run Python code that comes with the model [; Hugging Face]
    """

    path: PathText | None = None
    store: PathText | None = None
    mix: Literal["mean", "minimum", "log_mixture"] = "mean"
    of: list[PartSettings] = field(default_factory=list)
    micro_batch_size: Positive[Whole] = 16
    check_windows: NotNegative[Whole] = 64
    shard: Switch = True
    trust_remote_code: Switch = False

    def __post_init__(self) -> None:
        single = "path" if self.path else "store" if self.store else None
        if self.of and single:
            reason = "reference.of also lists references"
            raise UserError(single, getattr(self, single), reason, "Remove it, or move it into reference.of")
        if not self.of and not single:
            remedy = "Set reference.path, reference.store (a store of losses), or reference.of (several references)"
            raise UserError("path", None, "there is no other reference", remedy)

    def in_words(self) -> str:
        """Return the name of the reference for reports and model cards."""
        names = [part.path or f"the store {part.store}" for part in self.parts]
        return names[0] if not self.of else f"{self.mix} of {', '.join(names)}"

    @property
    def parts(self) -> list[PartSettings]:
        """Return all references as entries of `of`. If both a path and a store are set, only the store is used."""
        if self.of:
            return self.of
        path = None if self.store else self.path
        return [PartSettings(path, self.store, 1.0, self.micro_batch_size, self.shard, self.trust_remote_code)]


@dataclass(config=STRICT)
class ScoreSettings:
    """The store that `megatron-slm score` writes.

    output        folder to create, for `reference.store` [path; ours]
    kind          packed: losses of the samples of this run, exactly as a live reference gives them; document: losses of
                  the corpora, each token in the context of its own document, for any order of samples [; ours]
    encoding      fixed16: two bytes per loss, exact to 0.00025 nats; float32: four bytes, as computed [; ours]
    entropy       also store the entropy of each prediction, for the score reference_entropy [; the paper, section 3.4]
    shard_tokens  tokens to write and flush at once; a restart repeats at most this many [tokens; ours]
    """

    output: PathText
    kind: Literal["document", "packed"] = "packed"
    encoding: Literal["fixed16", "float32"] = "fixed16"
    entropy: Switch = False
    shard_tokens: Positive[Whole] = 1 << 23

    def __post_init__(self) -> None:
        _refuse_no_name(self.output, "the folder of the store")


@dataclass(config=STRICT)
class FilterSettings:
    """The losses by which `megatron-slm filter` ranks documents, and the keep-list that it writes.

    base       store of kind document with losses of a model like the student before training [path; ours]
    reference  store of kind document with losses of the reference [path; ours]
    keep       share of the documents to keep: those of the highest mean excess loss [share; ours]
    output     file to create, for `data.keep` [path; ours]
    """

    base: PathText
    reference: PathText
    output: PathText
    keep: Share = 0.5

    def __post_init__(self) -> None:
        _refuse_no_name(self.output, "the keep-list")


def _refuse_no_name(output: str, made: str) -> None:
    if not output.strip("/. "):
        raise UserError("output", output, f"{made} needs a name of its own", "Name a path that does not exist yet")
