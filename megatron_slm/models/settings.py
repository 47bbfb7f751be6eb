from dataclasses import dataclass, field
from typing import Any

from megatron_slm.io.paths import PathText


@dataclass
class ModelSettings:
    """The student.

    path                          folder or hub name to continue from [path; Hugging Face's from_pretrained]
    config                        without path: a configuration (model_type, hidden_size, ...) to start from scratch;
                                  with path: what to change in the model's own [; Hugging Face's AutoConfig]
    trust_remote_code             run Python that comes with the model; off unless asked for [; Hugging Face]
    attn_implementation           sdpa, eager, flash_attention_2, ...; default: Hugging Face's choice [; Hugging Face]
    make_vocab_size_divisible_by  from scratch, pad the tokenizer's vocabulary size up to a multiple [; Megatron]
    """

    path: PathText | None = None
    config: dict[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False
    attn_implementation: str | None = None
    make_vocab_size_divisible_by: int = 1

    def __post_init__(self) -> None:
        if self.path is None and not self.config:
            raise ValueError("give path (a Hugging Face folder or name) or config (from scratch)")
        if self.path is None and "model_type" not in self.config:
            raise ValueError("config has no model_type: name one of Hugging Face's, such as llama")
        if self.make_vocab_size_divisible_by < 1:
            raise ValueError("make_vocab_size_divisible_by must be 1 or more")
