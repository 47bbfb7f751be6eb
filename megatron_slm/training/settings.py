from dataclasses import dataclass
from typing import Literal


@dataclass
class TrainingSettings:
    """The run: batches, optimizer, schedule, intervals.

    micro_batch_size          samples a rank runs at once [samples; Megatron]
    global_batch_size         samples an optimizer step, over all ranks and micro-steps [samples; Megatron]
    train_tokens              length of the run; give it or train_epochs [tokens; Megatron's train_samples]
    train_epochs              length of the run: passes over data.train [passes; Hugging Face's num_train_epochs]
    lr                        peak learning rate [; Megatron]
    min_lr                    final learning rate [; Megatron]
    warmup_tokens             linear warm-up from 0 [tokens; Megatron's lr_warmup_samples]
    schedule                  of the learning rate after the warm-up [; Megatron's lr_decay_style]
    weight_decay              of AdamW; not on norms, biases and embeddings [; Megatron]
    adam_beta1                of AdamW [; Megatron]
    adam_beta2                of AdamW [; Megatron]
    adam_eps                  of AdamW [; Megatron]
    clip_grad                 largest gradient norm; 0 for none [; Megatron]
    precision                 of weights and activations; default: bf16 on CUDA, fp32 on CPU [; Megatron's bf16]
    log_interval              between records in metrics.jsonl [steps; Megatron]
    eval_interval             between evaluations; the last step is always evaluated [steps; Megatron]
    save_interval             between checkpoints; the last step is always saved [steps; Megatron]
    histogram_interval        between histograms of the excess loss in TensorBoard [steps; ours]
    token_table_interval      between tables of tokens in TensorBoard; default: eval_interval [steps; ours]
    keep_checkpoints          newest checkpoints to keep [checkpoints; Hugging Face's save_total_limit]
    activation_checkpointing  full: recompute each layer in the backward [; Megatron's recompute_granularity]
    backend                   deepspeed, or plain: PyTorch alone, every rank holds everything [; ours]
    max_skipped_updates       stop after so many in a row that were not applied [updates; ours]
    spike_sigma               a loss so many standard deviations above its average is a spike; 0 for none [; ours]
    profile_steps             first and last step to profile, such as [10, 12] [steps; ours]
    timeout_minutes           how long a rank may be silent before the others give up [minutes; Megatron]
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
    spike_sigma: float | None = 6.0
    profile_steps: tuple[int, int] | None = None
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
        for name in ("min_lr", "warmup_tokens", "weight_decay", "clip_grad", "spike_sigma"):
            if not (getattr(self, name) or 0.0) >= 0:
                raise ValueError(f"{name} must be 0 or more")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be 0 or more, and below 1")
        if self.profile_steps is not None and not 1 <= self.profile_steps[0] <= self.profile_steps[1]:
            raise ValueError("profile_steps must be [first, last] with 1 <= first <= last")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr must not be above lr ({self.lr})")
