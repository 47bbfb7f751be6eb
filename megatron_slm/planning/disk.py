"""The disk space of a run, the time of its checkpoints, and the interval between them."""

import math
from dataclasses import dataclass

from megatron_slm.planning.memory import MASTER_AND_MOMENTS
from megatron_slm.training.cost import ModelSize

STORED_LOSS_BYTES = 2
"""Bytes of a stored loss with `score.encoding` fixed16."""
SMALL_VOCABULARY = 65_500
"""Largest vocabulary whose tokens take two bytes in a `.bin`; Megatron's own limit."""

FAILURE_HOURS = 54 * 24 * 16_384 / 419
"""Device-hours per failure: 419 unexpected interruptions of 16,384 H100s in 54 days.

Llama 3 (arXiv 2407.21783), section 3.3.4.
"""


@dataclass(frozen=True)
class Disk:
    """Bytes on disk.

    tokens        prepared tokens of the training corpora
    losses        losses of all tokens that the run reads, in a store
    checkpoint    one checkpoint
    checkpoints   all that are kept, and the one that is being written
    """

    tokens: int
    losses: int
    checkpoint: int
    checkpoints: int


def disk_space(student: ModelSize, each: int, corpus_tokens: int, read_tokens: int, vocabulary: int, kept: int) -> Disk:
    """Return the disk space of a run.

    Args:
        student: its size.
        each: bytes per weight in the forward pass.
        corpus_tokens: tokens of the training corpora.
        read_tokens: tokens that the run reads.
        vocabulary: size of the vocabulary.
        kept: `training.keep_checkpoints`.
    """
    checkpoint = checkpoint_bytes(student, each)
    token = 2 if vocabulary < SMALL_VOCABULARY else 4
    return Disk(token * corpus_tokens, STORED_LOSS_BYTES * read_tokens, checkpoint, (kept + 1) * checkpoint)


def checkpoint_bytes(student: ModelSize, each: int) -> int:
    """Return the bytes of a checkpoint: the weights, their float32 copy, and two moments."""
    return (MASTER_AND_MOMENTS + each) * student.parameters


def optimal_interval(stall: float, failure: float) -> float:
    """Return the seconds of work between checkpoints that lose the least time.

    J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future Generation
    Computer Systems 22 (2006), equation 37. Its first term is J. W. Young's (CACM 17, 1974).

    Args:
        stall: seconds that a checkpoint stops the run.
        failure: mean seconds between failures of the run.
    """
    if stall >= 2 * failure:
        return failure
    ratio = stall / (2 * failure)
    return math.sqrt(2 * stall * failure) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall


def lost_share(interval: float, stall: float, failure: float) -> float:
    """Return the share of the time that is lost to checkpoints, and to work that failures undo, on average.

    Young's first-order model: a failure undoes half an interval. The time to start again is not counted.
    """
    return stall / interval + (interval + stall) / (2 * failure)
