from dataclasses import dataclass


@dataclass
class ReferenceSettings:
    """The frozen model that says what is learnable.

    path               folder or hub name; its tokenizer must be the corpus's [path; Hugging Face's from_pretrained]
    micro_batch_size   at a time, without gradients; larger than the student's is faster [samples; ours]
    check_windows      of each evaluation set to compare with the student at the start; 0 for none [windows; ours]
    shard              split the weights over all ranks (ZeRO-3); false: every rank holds all of them [; ours]
    trust_remote_code  run Python that comes with the model; off unless asked for [; Hugging Face]
    """

    path: str
    micro_batch_size: int = 16
    check_windows: int = 64
    shard: bool = True
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1:
            raise ValueError("micro_batch_size must be 1 or more")
        if self.check_windows < 0:
            raise ValueError("check_windows must be 0 or more")
