"""Going back to an earlier checkpoint. What came after it is moved aside, never deleted.

RUN_DIR/rolled-back/0001/metrics.jsonl, spikes.jsonl    the records after the checkpoint
RUN_DIR/rolled-back/0001/step_00000500/                 the checkpoints after it
"""

import logging
import shutil
from pathlib import Path

from megatron_slm.dist import World, agree
from megatron_slm.errors import AgreedError, UserError
from megatron_slm.files import sync, write_durably
from megatron_slm.training.checkpoints import (
    CheckpointStore,
    all_checkpoints,
    checkpoint_name,
    saved_steps,
    step_of,
)
from megatron_slm.training.records import split_records


def refuse_missing_checkpoint(checkpoints: Path, step: int) -> None:
    """Say what there is to go back to.

    Raises:
        UserError: there is no checkpoint of this step.
    """
    steps = saved_steps(checkpoints)
    if step not in steps:
        there = ", ".join(map(str, steps)) or "no step"
        raise UserError(f"--rollback is {step}, and {checkpoints} has checkpoints of {there}.")


def roll_back(run_dir: Path, store: CheckpointStore, step: int, world: World) -> None:
    """Make the checkpoint of `step` the newest; every rank calls it.

    A kill at any instant loses nothing, and asking again finishes the work: the records are copied first, the
    checkpoints are moved from the newest on, and what is left is always the beginning of a run.

    Raises:
        AgreedError: the checkpoint is damaged, the records are garbled, or something cannot be moved.
    """
    if store.newest(step) is None:
        raise AgreedError(f"--rollback is {step}, and that checkpoint is gone.")
    agree(lambda: _move_aside(run_dir, step) if world.is_main else None)


def _move_aside(run_dir: Path, step: int) -> None:
    later = [path for path in all_checkpoints(run_dir / "checkpoints") if (step_of(path) or 0) > step]
    records = {name: split_records(run_dir / name, step)[1] for name in ("metrics.jsonl", "spikes.jsonl")}
    if not later and not any(records.values()):
        return
    try:
        aside = _next_folder(run_dir / "rolled-back")
        for name, text in records.items():
            if text:
                write_durably(aside / name, text)
        for checkpoint in reversed(later):
            shutil.move(checkpoint, aside / checkpoint.name)
            sync(aside)
        write_durably(run_dir / "checkpoints" / "latest", checkpoint_name(step))
    except OSError as error:
        raise UserError(
            f"--rollback is {step}, and {run_dir} cannot be changed ({error}): mend that, and ask again."
        ) from error
    logging.getLogger(__name__).info("rolled back to step %d: what came after it is in %s", step, aside)


def _next_folder(parent: Path) -> Path:
    taken = [int(path.name) for path in parent.glob("[0-9]*") if path.name.isdigit()]
    folder = parent / f"{max(taken, default=0) + 1:04d}"
    folder.mkdir(parents=True)
    sync(parent)
    return folder
