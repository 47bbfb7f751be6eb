from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_slm.errors import UserError
from megatron_slm.settings import STRICT, NotNegative, Number, PathText, Positive, Whole


@dataclass(config=STRICT)
class ObserveSettings:
    """Recording of the losses of a fixed set of tokens, in RUN_DIR/observed.

    corpus    a PREFIX, or a group of names and a PREFIX each; default: the corpora of data.valid [path; ours]
    tokens    number of tokens, in whole samples that are spread over the corpora [tokens; the paper, section 2.1]
    interval  steps between recordings [steps; ours]
    """

    corpus: PathText | dict[str, PathText] | None = None
    tokens: Positive[Whole] = 320_000
    interval: Positive[Whole] = 500


@dataclass(config=STRICT)
class TrainingSettings:
    """Length of the run, batches, optimizer, schedule and intervals.

    micro_batch_size          samples per rank per micro-step [samples; Megatron]
    global_batch_size         samples per optimizer step, over all ranks and micro-steps [samples; Megatron]
    train_tokens              length of the run; set this or train_epochs [tokens; Megatron's train_samples]
    train_epochs              length of the run in passes over data.train [passes; Hugging Face's num_train_epochs]
    lr                        peak learning rate [; Megatron]
    min_lr                    final learning rate [; Megatron]
    warmup_tokens             tokens over which the learning rate rises linearly from 0 [tokens; Megatron's
                              lr_warmup_samples]
    schedule                  shape of the learning rate after the warm-up [; Megatron's lr_decay_style]
    weight_decay              AdamW's weight decay; norms, biases and embeddings are exempt [; Megatron]
    adam_beta1                AdamW's beta 1 [; Megatron]
    adam_beta2                AdamW's beta 2 [; Megatron]
    adam_eps                  AdamW's epsilon [; Megatron]
    clip_grad                 largest norm of the gradient; 0 turns clipping off [; Megatron]
    precision                 type of weights and activations; default: bf16 on CUDA, fp32 on CPU [; Megatron's bf16]
    loggers                   where records go, beside metrics.jsonl [; Hugging Face's report_to]
    log_interval              steps between records in metrics.jsonl [steps; Megatron]
    eval_interval             steps between evaluations; the last step is always evaluated [steps; Megatron]
    save_interval             steps between checkpoints; the last step is always saved [steps; Megatron]
    histogram_interval        steps between histograms of the excess loss in TensorBoard [steps; ours]
    token_table_interval      steps between tables of tokens in TensorBoard; default: eval_interval [steps; ours]
    keep_checkpoints          number of newest checkpoints to keep [checkpoints; Hugging Face's save_total_limit]
    activation_checkpointing  full: recompute each layer during backward, which saves memory [; Megatron's
                              recompute_granularity]
    backend                   deepspeed; or plain: PyTorch alone, with all weights and states on every rank [; ours]
    max_skipped_updates       stop the run after this number of skipped updates in a row [updates; ours]
    spike_sigma               report a loss spike if the loss is this many standard deviations above its average; 0
                              turns this off [; ours]
    profile_steps             first and last step to profile, such as [10, 12] [steps; ours]
    timeout_minutes           time after which ranks stop waiting for a rank that does not respond [minutes; Megatron]
    hang_seconds              report a hang, and write the stacks of all ranks to their logs, if no rank makes progress
                              for this time; 0 turns this off [seconds; ours]
    observe                   record the losses of a fixed set of tokens over training; {} for all defaults [; ours]
    """

    global_batch_size: Positive[Whole]
    micro_batch_size: Positive[Whole] = 1
    train_tokens: Positive[Whole] | None = None
    train_epochs: Positive[Number] | None = None
    lr: Positive[Number] = 1.0e-4
    min_lr: NotNegative[Number] = 0.0
    warmup_tokens: NotNegative[Whole] = 0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: NotNegative[Number] = 0.1
    adam_beta1: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[Number, Field(ge=0, lt=1)] = 0.95
    adam_eps: Positive[Number] = 1.0e-8
    clip_grad: NotNegative[Number] = 1.0
    precision: Literal["bf16", "fp32"] | None = None
    loggers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = field(default_factory=lambda: ["tensorboard"])
    log_interval: Positive[Whole] = 1
    eval_interval: Positive[Whole] = 500
    save_interval: Positive[Whole] = 500
    histogram_interval: Positive[Whole] = 50
    token_table_interval: Positive[Whole] | None = None
    keep_checkpoints: Positive[Whole] = 3
    activation_checkpointing: Literal["none", "full"] = "none"
    backend: Literal["deepspeed", "plain"] = "deepspeed"
    max_skipped_updates: Positive[Whole] = 10
    spike_sigma: NotNegative[Number] | None = 6.0
    profile_steps: tuple[Whole, Whole] | None = None
    timeout_minutes: Positive[Number] = 30.0
    hang_seconds: NotNegative[Number] = 300.0
    observe: ObserveSettings | None = None

    def __post_init__(self) -> None:
        if self.train_tokens is None and self.train_epochs is None:
            raise UserError("train_tokens", None, "a run needs a length", "Set it, or training.train_epochs")
        if self.train_tokens is not None and self.train_epochs is not None:
            reason = f"training.train_tokens is {self.train_tokens}, and a run has one length"
            raise UserError("train_epochs", self.train_epochs, reason, "Set one of the two")
        if self.profile_steps is not None and not 1 <= self.profile_steps[0] <= self.profile_steps[1]:
            reason = "it must be [first, last] with 1 <= first <= last"
            raise UserError("profile_steps", list(self.profile_steps), reason, "Use a range such as [10, 12]")
        if self.min_lr > self.lr:
            reason = f"the peak, training.lr, is {self.lr}"
            raise UserError("min_lr", self.min_lr, reason, "Use a minimum that is not above the peak")
