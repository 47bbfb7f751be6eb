"""The stacks of this process: the place where a thread stands, and all of them as text."""

import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from megatron_slm.dist import COLLECTIVES

PACKAGE = Path(__file__).parents[1]


def place(thread: int) -> tuple[str, bool]:
    """Return where a thread stands, and whether it waits in a collective operation.

    The place is `FILE:LINE in FUNCTION` of its innermost Python frame, followed by the innermost frame of this package
    if that is another one. The frames in between are those of libraries.

    Args:
        thread: identifier of the thread.
    """
    frames = list(_frames(thread))
    if not frames:
        return "", False
    ours = next((index for index, frame in enumerate(frames) if _is_ours(frame)), len(frames))
    waits = any(folder in frame.f_code.co_filename for frame in frames[:ours] for folder in COLLECTIVES)
    innermost = _described(frames[0])
    if 0 < ours < len(frames):
        return f"{innermost}, called by {_described(frames[ours])}", waits
    return innermost, waits


def all_stacks() -> str:
    """Return the stacks of all threads of this process as text, the innermost frame of each last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for number, frame in sys._current_frames().items():
        lines = "".join(traceback.format_stack(frame)).rstrip()
        parts.append(f"thread {names.get(number, number)}:\n{lines}")
    return "\n".join(parts)


def _frames(thread: int) -> Iterator[FrameType]:
    frame = sys._current_frames().get(thread)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_ours(frame: FrameType) -> bool:
    return Path(frame.f_code.co_filename).is_relative_to(PACKAGE)


def _described(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    name = path.relative_to(PACKAGE.parent) if path.is_relative_to(PACKAGE) else path.name
    return f"{name}:{frame.f_lineno} in {frame.f_code.co_name}"
