"""Selective Language Modeling under PyTorch's FSDP2, on any number of ranks: `torchrun --nproc-per-node 2 fsdp2.py`."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.functional import cross_entropy

from megatron_slm.selection import Rule, SelectionSettings, selected_loss


def token_losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the loss of each token except the first, float32 `[B, T]`. `model` maps tokens to logits."""
    logits = model(tokens[:, :-1]).float()
    return cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


def train_step(
    student: FSDPModule, reference: nn.Module, rule: Rule, micro_batches: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """Accumulate the gradient of one optimizer step, and return its loss over all ranks.

    The micro-batches `(tokens [B, T + 1], valid [B, T])` are those of this rank. `valid` is False for padding.
    """
    # One all-reduce counts the tokens that will be selected on all ranks and in all micro-batches: the divisor.
    # FSDP averages gradients over the ranks, so the loss is multiplied by their number.
    planned = rule.plan([valid for _, valid in micro_batches]).sum().clamp(min=1)
    scale = dist.get_world_size() / planned
    total = torch.zeros(())
    for index, (tokens, valid) in enumerate(micro_batches):
        student.set_requires_gradient_sync(index == len(micro_batches) - 1)
        loss = token_losses(student, tokens)
        with torch.no_grad():
            signals = {"student.loss": loss.detach(), "reference.loss": token_losses(reference, tokens)}
        # Tokens are ranked over all ranks. Every rank runs the backward, even if none of its tokens is selected.
        part = selected_loss(loss, rule.choose(signals, valid))
        (part * scale).backward()
        total += part.detach() / planned
    dist.all_reduce(total)
    return total


def shard(model: nn.Sequential) -> FSDPModule:
    """Shard each layer, then the remaining parameters."""
    for layer in model:
        fully_shard(layer)
    return fully_shard(model)


def main() -> None:
    """Train a toy model on toy text. Each rank reads its own part."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    student, reference = (shard(nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64))) for _ in range(2))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    rule = Rule(SelectionSettings(score="excess", ratio=0.6))
    torch.manual_seed(dist.get_rank())
    for step in range(20):
        texts = (torch.randint(64, (2, 8, 1)) + torch.arange(17)) % 64
        loss = train_step(student, reference, rule, [(tokens, torch.ones(8, 16).bool()) for tokens in texts])
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {step + 1} selected loss {loss:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
