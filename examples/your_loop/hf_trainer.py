"""The same in Hugging Face's Trainer, with its gradient accumulation and on several ranks."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Trainer

from megatron_slm.selection import Rule, selected_loss


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """float32 `[B, T - 1]`: what each token but the first costs; 0 where the label is ignored."""
    return cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none")


class SelectiveTrainer(Trainer):
    """A Trainer that learns from the selected tokens; it evaluates on all of them. One process a device.

    Args:
        reference: a frozen model with the student's tokenizer.
        rule: which tokens count.
    """

    # compute_loss divides by the count of the whole accumulated batch: nothing is left to be divided.
    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, reference: nn.Module, rule: Rule, **options: Any) -> None:
        super().__init__(*args, **options)
        self.reference = reference.to(self.args.device).eval().requires_grad_(False)
        self.rule = rule

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple:
        """The batches of an optimizer step, and the tokens of them that will be kept on all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:  # an iterable dataset has come to its end
            return batches, None
        return batches, self.rule.plan([batch["labels"][:, 1:].to(device) != -100 for batch in batches]).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Summed loss of the selected tokens over the planned count; DDP averages over the ranks, which is undone."""
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
