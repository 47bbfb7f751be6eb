"""Compare the selection over all ranks with one sort of all scores; every rank runs it under a launcher.

Ranks differ in their number of tokens, one of them has no valid token, and many scores are equal.
"""

import sys

import torch

from megatron_slm.dist import connect, disconnect, gather_objects
from megatron_slm.selection import select_tokens

ROUNDS = 20
RATIO = 0.6


def main() -> int:
    world = connect(timeout_minutes=2.0)
    generator = torch.Generator().manual_seed(world.rank)
    wrong = 0
    for round_ in range(ROUNDS):
        tokens = 1000 * (world.rank + 1)
        scores = torch.randn(tokens, generator=generator)
        if round_ % 2:
            scores = scores.mul(4).round()  # many ties
        valid = torch.rand(tokens, generator=generator) < (0.9 if world.rank else 0.0)
        mask = select_tokens(scores.to(world.device), valid.to(world.device), RATIO).mask.cpu()
        everything = gather_objects((scores, valid, mask))
        all_scores, all_valid, all_masks = (torch.cat(parts) for parts in zip(*everything, strict=True))
        # A stable sort gives ties to the lowest position, as the selection does.
        order = all_scores.masked_fill(~all_valid, -torch.inf).sort(descending=True, stable=True).indices
        expected = torch.zeros_like(all_valid)
        expected[order[: int(RATIO * int(all_valid.sum()) + 0.5)]] = True
        wrong += int(not torch.equal(all_masks, expected))
    disconnect()
    if world.is_main:
        sys.stdout.write(f"{ROUNDS - wrong} of {ROUNDS} selections over {world.size} ranks equal one sort\n")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
