"""The trackers that receive the records of a run: Weights & Biases, MLflow and Trackio.

Each is an optional package, imported on rank 0 only, and reads its server, project and credentials from its own
environment variables. TensorBoard, which writes files of its own, is in `tensorboard.py`.
"""

import dataclasses
import logging
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from megatron_slm.errors import UserError
from megatron_slm.io.files import write_durably
from megatron_slm.training.callbacks import finite
from megatron_slm.training.state import RunState
from megatron_slm.training.trainer import Callback

logger = logging.getLogger(__name__)

PROJECT = "megatron_slm"
"""Name of the project or experiment, unless an environment variable of the tracker names another."""
RECORDS_TO_KEEP = 10_000
"""Number of records that wait for a tracker that does not respond; later ones are not sent to it."""
SECONDS_TO_RETRY = 60.0
"""How long a tracker at which the run could not be begun is left alone before the next attempt."""
SECONDS_TO_FINISH = 20.0
"""How long the end of a run waits for a tracker. torchrun kills a rank 30 s after it was asked to stop."""


@dataclass(frozen=True)
class TrackedRun:
    """A run, as trackers see it.

    name           of the run directory
    directory      the run directory
    configuration  with every setting resolved, as nested dicts
    id             under which the tracker knows the run; None for a new run
    """

    name: str
    directory: Path
    configuration: dict[str, Any]
    id: str | None = None


class Tracker(Protocol):
    """A run at a tracker. Creating it begins the run, or continues the run with the id; any method may raise."""

    id: str

    def __init__(self, run: TrackedRun) -> None: ...

    def log(self, values: dict[str, float], step: int) -> None:
        """Send the values of one step."""

    def finish(self, completed: bool) -> None:
        """End the run, and wait until all values are sent."""


class WeightsAndBiases:
    """A run at Weights & Biases, under WANDB_PROJECT and WANDB_ENTITY."""

    def __init__(self, run: TrackedRun) -> None:
        self._run = import_module("wandb").init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", run.name),
            dir=os.environ.get("WANDB_DIR", str(run.directory)),
            id=run.id,
            resume="allow",
            config=run.configuration,
            allow_val_change=True,  # some settings may change on resume
        )
        self.id = self._run.id
        # W&B's own count of steps only grows. It ignores values for an earlier step, such as those of a resumed run.
        self._run.define_metric("*", step_metric="step")

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values | {"step": step})

    def finish(self, completed: bool) -> None:
        self._run.finish(exit_code=0 if completed else 1)


class MLflow:
    """A run at the MLflow server in MLFLOW_TRACKING_URI, in the experiment MLFLOW_EXPERIMENT_NAME."""

    def __init__(self, run: TrackedRun) -> None:
        self._mlflow = import_module("mlflow")
        if "MLFLOW_EXPERIMENT_ID" not in os.environ:
            os.environ.setdefault("MLFLOW_EXPERIMENT_NAME", PROJECT)
        name = os.environ.get("MLFLOW_RUN_NAME", run.name)
        self.id = self._mlflow.start_run(run_id=run.id, run_name=name).info.run_id
        # MLflow never changes a parameter, so it keeps those with which the run began.
        self._parameters = list(_flatten(run.configuration).items()) if run.id is None else []

    def log(self, values: dict[str, float], step: int) -> None:
        while self._parameters:  # a request holds at most 100, of at most 500 characters each
            self._mlflow.log_params({key: str(value)[:500] for key, value in self._parameters[:100]})
            del self._parameters[:100]
        # Names of sources may hold characters that MLflow refuses.
        self._mlflow.log_metrics({re.sub(r"[^\w. :/-]", "_", key): value for key, value in values.items()}, step=step)

    def finish(self, completed: bool) -> None:
        self._mlflow.end_run("FINISHED" if completed else "FAILED")


class Trackio:
    """A run at Trackio, in TRACKIO_DIR, or at TRACKIO_SPACE_ID or TRACKIO_SERVER_URL."""

    def __init__(self, run: TrackedRun) -> None:
        # Trackio finds a run by its name, which two run directories may share.
        self.id = run.id or f"{run.name}-{uuid.uuid4().hex[:8]}"
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self._run = import_module("trackio").init(
            project=project, name=self.id, resume="allow", config=run.configuration, embed=False
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def finish(self, completed: bool) -> None:
        self._run.finish()


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


TRACKERS: dict[str, type[Tracker]] = {"wandb": WeightsAndBiases, "mlflow": MLflow, "trackio": Trackio}
"""The trackers by their names in `training.loggers`, which are also those of their packages and extras."""


def refuse_missing_loggers(names: Sequence[str]) -> None:
    """Raise a UserError if a logger cannot be imported, or has no credentials. Rank 0 calls it.

    Raises:
        UserError: names the package to install, or how to log in.
    """
    for name in names:
        try:
            package = import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
        except ImportError as error:
            extra = "tensorboard" if name == "tensorboard" else f"'megatron_slm[{name}]'"
            raise UserError(
                "training.loggers",
                list(names),
                f"{name} cannot be imported ({error})",
                f"Run pip install {extra}, or remove {name} from training.loggers",
            ) from error
        if name == "wandb":
            _refuse_missing_key(package)


def _refuse_missing_key(wandb: Any) -> None:
    """Raise a UserError if W&B has no key. It would ask for one at the terminal, after the models are loaded."""
    if wandb.setup().settings.mode in ("offline", "dryrun", "disabled") or wandb.login(verify=False, prompt=False):
        return
    reason = "training.loggers has wandb, which sends the records to a server"
    raise UserError("WANDB_API_KEY", None, reason, "Set it, run wandb login, or set WANDB_MODE=offline")


class RecordSender(Callback):
    """Sends the records to a tracker, on rank 0, in a thread of its own: training neither waits for it nor fails.

    The tracker's id of the run is kept in the run directory, so that a resumed run continues the same run.

    Args:
        name: of the tracker.
        run: the run, without the id.
    """

    def __init__(self, name: str, run: TrackedRun) -> None:
        self._name = name
        self._run = run
        self._id_file = run.directory / f"tracker-{name}.txt"
        self._records: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(RECORDS_TO_KEEP)
        self._thread = threading.Thread(target=self._send, name=f"megatron_slm {name}", daemon=True)
        self._tracker: Tracker | None = None
        self._next_attempt = 0.0
        self._completed = False
        self._warned = False

    def on_train_start(self, state: RunState) -> None:
        self._thread.start()

    def on_record(self, state: RunState, record: dict[str, float | int | None]) -> None:
        values = {key: value for key, value in finite(record).items() if value is not None and key != "step"}
        self._put((state.step, values))

    def on_train_end(self, state: RunState) -> None:
        self._completed = True

    def close(self) -> None:
        if self._thread.is_alive():
            self._put(None)
            self._thread.join(SECONDS_TO_FINISH)
            if self._thread.is_alive():
                self._warn(f"it did not finish within {SECONDS_TO_FINISH:.0f} s")

    def _put(self, item: tuple[int, dict[str, float]] | None) -> None:
        try:
            self._records.put_nowait(item)
        except queue.Full:
            self._warn(f"{RECORDS_TO_KEEP} records wait for it")

    def _send(self) -> None:
        """Send the records that arrive, until None arrives. A record that cannot be sent is left out."""
        self._open()
        while (item := self._records.get()) is not None:
            if self._tracker is None and time.monotonic() > self._next_attempt:
                self._open()
            if self._tracker is not None:
                step, values = item
                with self._reporting():
                    self._tracker.log(values, step)
        if self._tracker is not None:
            with self._reporting():
                self._tracker.finish(self._completed)

    def _open(self) -> None:
        """Begin the run at the tracker, or continue it."""
        with self._reporting():
            known = self._id_file.read_text(encoding="utf-8").strip() if self._id_file.exists() else None
            self._tracker = TRACKERS[self._name](dataclasses.replace(self._run, id=known))
            write_durably(self._id_file, f"{self._tracker.id}\n")
        self._next_attempt = time.monotonic() + SECONDS_TO_RETRY

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        # A tracker's library may raise anything, even SystemExit, which would end this thread silently.
        except (Exception, SystemExit) as error:
            self._warn(f"{type(error).__name__}: {error}")

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "training.loggers: a record cannot be sent to %s (%s). Training continues, and metrics.jsonl holds all "
                "records. Later records are still sent if possible; this warning appears once.",
                self._name,
                " ".join(reason.split()),
            )
