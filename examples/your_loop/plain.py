"""Selective Language Modeling in a plain PyTorch loop with gradient accumulation: `python plain.py`."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from megatron_slm.selection import Rule, SelectionSettings, selected_loss


def token_losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the loss of each token except the first, float32 `[B, T]`. `model` maps tokens to logits."""
    logits = model(tokens[:, :-1]).float()
    return cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


def train_step(
    student: nn.Module, reference: nn.Module, rule: Rule, micro_batches: list[tuple[Tensor, Tensor]]
) -> float:
    """Accumulate the gradient of one optimizer step, and return its loss.

    A micro-batch is `tokens [B, T + 1]` and `valid [B, T]`, which is False for padding.
    """
    # The labels alone determine how many tokens will be selected, so all micro-batches share one divisor.
    planned = rule.plan([valid for _, valid in micro_batches]).sum().clamp(min=1)
    total = 0.0
    for tokens, valid in micro_batches:
        loss = token_losses(student, tokens)
        with torch.no_grad():
            signals = {"student.loss": loss.detach(), "reference.loss": token_losses(reference, tokens)}
        part = selected_loss(loss, rule.choose(signals, valid)) / planned
        part.backward()
        total += float(part.detach())
    return total


def main() -> None:
    """Train a toy model on toy text. Replace both with yours."""
    torch.manual_seed(0)
    student, reference = (nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64)) for _ in range(2))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    rule = Rule(SelectionSettings(score="excess", ratio=0.6))
    for step in range(20):
        starts = torch.randint(64, (2, 8, 1))
        texts = (starts + torch.arange(17)) % 64
        loss = train_step(student, reference, rule, [(tokens, torch.ones(8, 16).bool()) for tokens in texts])
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1} selected loss {loss:.4f}")


if __name__ == "__main__":
    main()
