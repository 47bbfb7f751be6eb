"""Selective Language Modeling in Hugging Face's Trainer, with gradient accumulation and on several ranks."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Trainer

from megatron_slm.selection import Rule, selected_loss


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of each token except the first, float32 `[B, T - 1]`; 0 where the label is ignored."""
    return cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none")


class SelectiveTrainer(Trainer):
    """A Trainer that trains on the selected tokens and evaluates on all tokens. Start one process per device.

    Args:
        reference: a frozen model with the student's tokenizer.
        rule: selects the tokens that count toward the loss.
    """

    # compute_loss divides by the count of the whole accumulated batch, so the Trainer must not divide again.
    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, reference: nn.Module, rule: Rule, **options: Any) -> None:
        super().__init__(*args, **options)
        self.reference = reference.to(self.args.device).eval().requires_grad_(False)
        self.rule = rule

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple:
        """Return the batches of an optimizer step, and how many of their tokens will be selected on all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:  # the end of an iterable dataset
            return batches, None
        return batches, self.rule.plan([batch["labels"][:, 1:].to(device) != -100 for batch in batches]).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Return the summed loss of the selected tokens, divided by the planned count.

        DDP averages gradients over the ranks, so the loss is multiplied by their number.
        """
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels, read = inputs["labels"], {name: column for name, column in inputs.items() if name != "labels"}
        outputs = model(**read)
        loss = token_losses(outputs.logits, labels)
        with torch.no_grad():
            signals = {
                "student.loss": loss.detach(),
                "reference.loss": token_losses(self.reference(**read).logits, labels),
            }
        selection = self.rule.choose(signals, labels[:, 1:] != -100)
        loss = selected_loss(loss, selection) * self.accelerator.num_processes / num_items_in_batch.clamp(min=1)
        return (loss, outputs) if return_outputs else loss
