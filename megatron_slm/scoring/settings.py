from dataclasses import dataclass
from typing import Literal

from megatron_slm.paths import PathText


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

    @property
    def columns(self) -> list[str]:
        """What a row of the store holds."""
        return ["loss", *(["entropy"] if self.entropy else [])]
