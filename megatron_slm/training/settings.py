from dataclasses import dataclass
from typing import Literal


@dataclass
class TrainingSettings:
    """The run: batches, optimizer, schedule, intervals.

    micro_batch_size          samples a rank runs at once
    global_batch_size         samples an optimizer step, over all ranks and micro-steps
    train_tokens              length of the run; or train_epochs passes over the training corpora
    lr, min_lr                peak and final learning rate
    warmup_tokens             linear warm-up from 0
    schedule                  cosine, linear or constant after the warm-up
    weight_decay              not on norms, biases and embeddings
    adam_beta1, adam_beta2, adam_eps
                              of AdamW
    clip_grad                 largest gradient norm; 0 for none
    precision                 bf16 or fp32; default: bf16 on CUDA, fp32 on CPU
    log_interval              steps between records in metrics.jsonl
    eval_interval             steps between evaluations; the last step is always evaluated
    save_interval             steps between checkpoints; the last step is always saved
    histogram_interval        steps between histograms of the excess loss in TensorBoard
    token_table_interval      steps between tables of tokens in TensorBoard; default: eval_interval
    keep_checkpoints          newest checkpoints to keep
    activation_checkpointing  none, or full: recompute each layer in the backward
    backend                   deepspeed, or plain: PyTorch alone, every rank holds everything
    max_skipped_updates       stop after so many updates in a row that were not applied
    timeout_minutes           how long a rank may be silent before the others give up
    """

    global_batch_size: int
    micro_batch_size: int = 1
    train_tokens: int | None = None
    train_epochs: float | None = None
    lr: float = 1.0e-4
    min_lr: float = 0.0
    warmup_tokens: int = 0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1.0e-8
    clip_grad: float = 1.0
    precision: Literal["bf16", "fp32"] | None = None
    log_interval: int = 1
    eval_interval: int = 500
    save_interval: int = 500
    histogram_interval: int = 50
    token_table_interval: int | None = None
    keep_checkpoints: int = 3
    activation_checkpointing: Literal["none", "full"] = "none"
    backend: Literal["deepspeed", "plain"] = "deepspeed"
    max_skipped_updates: int = 10
    timeout_minutes: float = 30.0

    def __post_init__(self) -> None:
        if (self.train_tokens is None) == (self.train_epochs is None):
            raise ValueError("give either train_tokens or train_epochs")
        for name in (
            "global_batch_size",
            "micro_batch_size",
            "train_tokens",
            "train_epochs",
            "lr",
            "log_interval",
            "eval_interval",
            "save_interval",
            "histogram_interval",
            "token_table_interval",
            "keep_checkpoints",
            "max_skipped_updates",
            "timeout_minutes",
            "adam_eps",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0")
        for name in ("min_lr", "warmup_tokens", "weight_decay", "clip_grad"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be 0 or more, and below 1")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr must not be above lr ({self.lr})")
