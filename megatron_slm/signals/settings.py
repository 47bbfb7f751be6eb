from dataclasses import dataclass


@dataclass
class ReferenceSettings:
    """The frozen model that says what is learnable.

    path               Hugging Face folder or hub name; its tokenizer must be the corpus's
    micro_batch_size   sequences at a time, without gradients; larger than the student's is faster
    shard              split the weights over all ranks (ZeRO-3); false: every rank holds all of them
    trust_remote_code  run Python that comes with the model; off unless asked for
    """

    path: str
    micro_batch_size: int = 16
    shard: bool = True
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1:
            raise ValueError("micro_batch_size must be 1 or more")
