from dataclasses import dataclass

from megatron_slm.paths import PathText


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
