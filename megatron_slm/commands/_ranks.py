"""The ranks of a command that runs under any launcher."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

from megatron_slm.errors import LostRanksError
from megatron_slm.launcher import is_main_process
from megatron_slm.training.settings import TrainingSettings

if TYPE_CHECKING:
    from megatron_slm.dist import World
    from megatron_slm.liveness.activity import Activity


class Ranks(NamedTuple):
    """The ranks of a command.

    world     this rank among all
    activity  receives what this rank does, for its heartbeat
    closing   closed when the command ends, except after the loss of other ranks
    """

    world: "World"
    activity: "Activity"
    closing: ExitStack


@contextmanager
def connected_ranks(training: TrainingSettings) -> Iterator[Ranks]:
    """Connect the ranks that a launcher started, and send heartbeats until the block ends; every rank enters it.

    Raises:
        LostRanksError: other ranks are lost.
    """
    if is_main_process(os.environ):
        logging.getLogger(__name__).info("loading the libraries, the corpora and the models")
    from transformers.utils.logging import disable_progress_bar

    from megatron_slm.dist import connect, disconnect, gather_objects
    from megatron_slm.liveness.activity import Activity
    from megatron_slm.liveness.heartbeat import watched

    world = connect(training.timeout_minutes)
    if not (world.is_main and sys.stderr.isatty()):
        disable_progress_bar()
    activity = Activity()
    with ExitStack() as closing:
        closing.callback(disconnect)
        try:
            with watched(activity, world, training.hang_seconds):
                yield Ranks(world, activity, closing)
                # Rank 0 may host the rendezvous store, so it must not exit while another rank still uses it.
                gather_objects(None)
        except LostRanksError:
            closing.pop_all()  # closing what lost ranks share may wait for them
            raise
