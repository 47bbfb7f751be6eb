"""One readable line a logged step."""

import datetime
import logging

from megatron_slm.training.callbacks.callback import Callback
from megatron_slm.training.state import RunState
from megatron_slm.training.step import StepResult


class Console(Callback):
    """Logs the record on rank 0, with the time that the remaining steps will take."""

    def on_step_end(self, state: RunState, result: StepResult) -> None:
        if state.record is None:
            return
        logging.getLogger(__name__).info(" | ".join(describe(state, state.record)))

    def on_train_end(self, state: RunState) -> None:
        log = logging.getLogger(__name__).info
        if state.is_last:
            log("finished: %d steps, %s tokens%s", state.step, f"{state.trained_tokens:,}", _beside(state))
        else:
            log(
                "stopped by a signal: step %d of %d is saved; the same command goes on from there",
                state.step,
                state.plan.total_steps,
            )


def describe(state: RunState, record: dict[str, float | int | None]) -> list[str]:
    """The parts of the line. The selected loss never stands alone: it falls when the selection changes."""
    parts = [f"step {state.step}/{state.plan.total_steps}", f"tokens {quantity(state.trained_tokens)}{_beside(state)}"]
    parts.append("loss " + " ".join(_named(record, "loss/", ("all", "selected", "unselected", "reference"))))
    if record.get("selection/threshold") is not None:
        parts.append(f"cut {record['selection/threshold']:.3f}")
    parts.append(f"lr {record['lr']:.2e} grad {record['grad_norm']:.2f}")
    mfu = record.get("mfu")
    parts.append(f"{quantity(record['tokens_per_second'])} tokens/s" + (f" MFU {mfu:.1%}" if mfu else ""))
    remaining = (state.plan.total_steps - state.step) * (record["step_seconds"] or 0.0)
    parts.append(f"ETA {datetime.timedelta(seconds=round(remaining))}")
    if state.skipped_updates:
        parts.append(f"skipped {state.skipped_updates}")
    parts += [f"{key} {value:.4f}" for key, value in record.items() if key.startswith("eval/") and value is not None]
    return parts


def _beside(state: RunState) -> str:
    """Where candidates were read, how many tokens."""
    return f" of {quantity(state.consumed_tokens)} read" if state.plan.candidates > 1 else ""


def quantity(value: float | int | None) -> str:
    """1234567 as 1.23M."""
    if value is None:
        return "n/a"
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def _named(record: dict[str, float | int | None], prefix: str, names: tuple[str, ...]) -> list[str]:
    return [f"{name} {record[prefix + name]:.4f}" for name in names if record.get(prefix + name) is not None]
