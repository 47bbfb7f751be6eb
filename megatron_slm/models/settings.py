from dataclasses import field

from pydantic.dataclasses import dataclass

from megatron_slm.errors import UserError
from megatron_slm.settings import STRICT, Foreign, PathText, Positive, Switch, Whole


@dataclass(config=STRICT)
class ModelSettings:
    """The student: the model that is trained.

    path                          folder or hub name of the model to start from [path; Hugging Face's from_pretrained]
    config                        without path: the configuration (model_type, hidden_size, ...) of a new model; with
                                  path: changes to the configuration of that model [; Hugging Face's AutoConfig]
    trust_remote_code             run Python code that comes with the model [; Hugging Face]
    attn_implementation           sdpa, eager, flash_attention_2, ...; default: Hugging Face's choice [; Hugging Face]
    make_vocab_size_divisible_by  for a new model: round the vocabulary size up to a multiple of this [tokens; Megatron]
    """

    path: PathText | None = None
    config: Foreign = field(default_factory=dict)
    trust_remote_code: Switch = False
    attn_implementation: str | None = None
    make_vocab_size_divisible_by: Positive[Whole] = 1

    def __post_init__(self) -> None:
        if self.path is None and not self.config:
            remedy = "Set it to a Hugging Face folder or name, or set model.config to train from scratch"
            raise UserError("path", None, "the student needs a model to start from", remedy)
        if self.path is None and "model_type" not in self.config:
            reason = "a new model needs an architecture"
            raise UserError("config.model_type", None, reason, "Name one of Hugging Face's, such as llama")
