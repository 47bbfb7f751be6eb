"""Records at trackers: fakes in place of the packages, and, in tests marked slow, the packages without a network."""

import logging
import sqlite3
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from megatron_slm.training import loggers
from megatron_slm.training.loggers import TRACKERS, RecordSender, TrackedRun, refuse_missing_loggers
from megatron_slm.training.state import Plan, RunState
from tests.refusal import refuses

CONFIGURATION = {"run_dir": "runs/slm", "training": {"lr": 1e-3}, "many": {f"key{i}": i for i in range(250)}}


class FakeServer:
    """The runs at a tracker, by id: values and steps, configurations and ends."""

    def __init__(self) -> None:
        self.values: dict[str, list[tuple[int, dict[str, float]]]] = {}
        self.begun: list[dict[str, Any]] = []
        self.ends: list[Any] = []
        self.failures: list[BaseException] = []

    def begin(self, run_id: str, **arguments: Any) -> None:
        if self.failures:
            raise self.failures.pop(0)
        self.begun.append({"id": run_id, **arguments})
        self.values.setdefault(run_id, [])


def fake_wandb(server: FakeServer) -> ModuleType:
    class Run:
        def __init__(self, run_id: str) -> None:
            self.id = run_id

        def define_metric(self, name: str, step_metric: str) -> None:
            assert (name, step_metric) == ("*", "step")

        def log(self, values: dict[str, float]) -> None:
            others = {key: value for key, value in values.items() if key != "step"}
            server.values[self.id].append((int(values["step"]), others))

        def finish(self, exit_code: int) -> None:
            server.ends.append(exit_code == 0)

    def init(**arguments: Any) -> Run:
        assert arguments.pop("resume") == "allow"
        run_id = arguments.pop("id") or "made-by-wandb"
        server.begin(run_id, **arguments)
        return Run(run_id)

    module = ModuleType("wandb")
    vars(module).update(init=init)
    return module


def fake_mlflow(server: FakeServer) -> ModuleType:
    active: list[str] = []

    def start_run(run_id: str | None, run_name: str) -> Any:
        found = run_id or "made-by-mlflow"
        server.begin(found, name=run_name, config={})
        active[:] = [found]
        return SimpleNamespace(info=SimpleNamespace(run_id=found))

    def log_params(parameters: dict[str, str]) -> None:
        assert len(parameters) <= 100 and all(len(value) <= 500 for value in parameters.values())
        server.begun[-1]["config"] |= parameters

    module = ModuleType("mlflow")
    vars(module).update(
        start_run=start_run,
        log_params=log_params,
        log_metrics=lambda values, step: server.values[active[0]].append((step, values)),
        end_run=lambda status: server.ends.append(status == "FINISHED"),
    )
    return module


def fake_trackio(server: FakeServer) -> ModuleType:
    def init(name: str, resume: str, **arguments: Any) -> Any:
        assert resume == "allow"
        server.begin(name, **arguments)
        return SimpleNamespace(
            log=lambda values, step: server.values[name].append((step, values)),
            finish=lambda: server.ends.append(True),
        )

    module = ModuleType("trackio")
    vars(module).update(init=init)
    return module


FAKES: dict[str, Callable[[FakeServer], ModuleType]] = {
    "wandb": fake_wandb,
    "mlflow": fake_mlflow,
    "trackio": fake_trackio,
}


@pytest.fixture(params=TRACKERS)
def tracker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, FakeServer]:
    """Return the name of a tracker and its fake server; the tracker's environment variables are not set."""
    for variable in ("WANDB_PROJECT", "WANDB_NAME", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    server = FakeServer()
    monkeypatch.setitem(sys.modules, request.param, FAKES[request.param](server))
    return request.param, server


def train(name: str, folder: Path, steps: range, *, ends: bool = True) -> RecordSender:
    """Send a record per step, as a run does, and end it; without `ends`, as after an error."""
    sender = RecordSender(name, TrackedRun("slm", folder, CONFIGURATION))
    state = RunState(Plan(100, 1, 8, 1, 100, 100), step=steps.start - 1)
    sender.on_train_start(state)
    for step in steps:
        state.step = step
        sender.on_record(state, {"step": step, "loss/all": step / 2, "mfu": None, "lr": float("nan")})
    if ends:
        sender.on_train_end(state)
    sender.close()
    return sender


def test_a_resumed_run_continues_the_same_run_at_the_tracker(tracker: tuple[str, FakeServer], tmp_path: Path) -> None:
    name, server = tracker
    train(name, tmp_path, range(1, 6), ends=False)
    train(name, tmp_path, range(4, 9))  # from the checkpoint of step 3
    (run_id,) = server.values
    assert [begun["id"] for begun in server.begun] == [run_id, run_id]
    assert server.values[run_id] == [(step, {"loss/all": step / 2}) for step in (*range(1, 6), *range(4, 9))]
    assert server.ends == [name == "trackio", True]  # Trackio has no failed runs


def test_the_configuration_and_the_name_are_at_the_tracker(tracker: tuple[str, FakeServer], tmp_path: Path) -> None:
    name, server = tracker
    train(name, tmp_path, range(1, 2))
    if name == "mlflow":
        assert server.begun[0]["config"] == {"run_dir": "runs/slm", "training.lr": "0.001"} | {
            f"many.key{i}": str(i) for i in range(250)
        }
    else:
        assert server.begun[0]["config"] == CONFIGURATION
    assert "slm" in str(server.begun[0])


def test_a_tracker_that_fails_is_reported_once_and_tried_again(
    tracker: tuple[str, FakeServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name, server = tracker
    monkeypatch.setattr(loggers, "SECONDS_TO_RETRY", -1.0)
    server.failures = [ConnectionError("no route to host"), SystemExit(1), OSError("still none")]
    with caplog.at_level(logging.WARNING):
        train(name, tmp_path, range(1, 6))
    (run_id,) = server.values
    assert [step for step, _ in server.values[run_id]] == [3, 4, 5]
    (warning,) = caplog.messages
    assert name in warning and "no route to host" in warning


def test_a_tracker_that_failed_is_left_alone_for_a_while(tracker: tuple[str, FakeServer], tmp_path: Path) -> None:
    name, server = tracker
    server.failures = [ConnectionError("no route to host")]
    train(name, tmp_path, range(1, 6))
    assert not server.begun and not server.ends


def test_a_tracker_that_hangs_holds_up_neither_the_steps_nor_the_end(
    tracker: tuple[str, FakeServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name, server = tracker
    responds = threading.Event()
    monkeypatch.setattr(server, "begin", lambda *_, **__: responds.wait(60))
    monkeypatch.setattr(loggers, "SECONDS_TO_FINISH", 0.05)
    monkeypatch.setattr(loggers, "RECORDS_TO_KEEP", 3)
    with caplog.at_level(logging.WARNING):
        sender = train(name, tmp_path, range(1, 10))
    assert sender._thread.is_alive() and sender._thread.daemon
    (warning,) = caplog.messages
    assert "3 records wait for it" in warning
    responds.set()


def test_names_that_mlflow_refuses_are_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = FakeServer()
    monkeypatch.setitem(sys.modules, "mlflow", fake_mlflow(server))
    tracker = TRACKERS["mlflow"](TrackedRun("slm", tmp_path, {}))
    tracker.log({"selection/ratio/a|b (c)": 0.5, "eval/web-2.0: x/loss": 1.0}, 1)
    assert server.values[tracker.id] == [(1, {"selection/ratio/a_b _c_": 0.5, "eval/web-2.0: x/loss": 1.0})]


def test_two_run_directories_of_one_name_are_two_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = FakeServer()
    monkeypatch.setitem(sys.modules, "trackio", fake_trackio(server))
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        train("trackio", tmp_path / folder, range(1, 3))
    assert len(server.values) == 2


@pytest.mark.parametrize("name", [*TRACKERS, "tensorboard"])
def test_a_logger_that_is_not_installed_is_named_with_its_remedy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with refuses("training.loggers", ["tensorboard", name][name == "tensorboard" :], f"{name} cannot be imported"):
        refuse_missing_loggers(["tensorboard", name][name == "tensorboard" :])


@pytest.mark.parametrize(("mode", "has_key"), [("online", False), ("online", True), ("offline", False)])
def test_wandb_needs_a_key_unless_it_is_offline(mode: str, has_key: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake_wandb(FakeServer())
    setup = SimpleNamespace(settings=SimpleNamespace(mode=mode))
    vars(module).update(setup=lambda: setup, login=lambda verify, prompt: has_key)
    monkeypatch.setitem(sys.modules, "wandb", module)
    if mode == "offline" or has_key:
        refuse_missing_loggers(["wandb"])
    else:
        with refuses("WANDB_API_KEY", reason="sends the records to a server"):
            refuse_missing_loggers(["wandb"])


@pytest.fixture
def real(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Train 5 steps, and again from step 4, with a real package that keeps everything in a folder; return it."""
    name = request.param
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for module in [module for module in sys.modules if module.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, module)  # Trackio reads TRACKIO_DIR when it is imported
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for variable in ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    monkeypatch.setattr(loggers, "SECONDS_TO_FINISH", 120.0)
    refuse_missing_loggers([name])
    for steps in (range(1, 6), range(4, 9)):
        assert not train(name, tmp_path, steps)._warned
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("real", ["wandb"], indirect=True)
def test_wandb_itself_keeps_one_run_for_both_starts(real: Path) -> None:
    run_id = (real / "tracker-wandb.txt").read_text().strip()
    files = list((real / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [path.name for path in files] == [f"run-{run_id}.wandb"] * len(files) and files


@pytest.mark.slow
@pytest.mark.parametrize("real", ["mlflow"], indirect=True)
def test_mlflow_itself_keeps_every_step_of_both_starts(real: Path) -> None:
    import mlflow

    client = mlflow.MlflowClient()
    run = client.get_run((real / "tracker-mlflow.txt").read_text().strip())
    history = client.get_metric_history(run.info.run_id, "loss/all")
    assert [(point.step, point.value) for point in history] == [(s, s / 2) for s in (*range(1, 6), *range(4, 9))]
    assert run.info.status == "FINISHED" and run.info.run_name == "slm"
    assert run.data.params["training.lr"] == "0.001" and len(run.data.params) == 252


@pytest.mark.slow
@pytest.mark.parametrize("real", ["trackio"], indirect=True)
def test_trackio_itself_keeps_every_step_of_both_starts(real: Path) -> None:
    name = (real / "tracker-trackio.txt").read_text().strip()
    with sqlite3.connect(real / "trackio" / "megatron_slm.db") as database:
        rows = database.execute("select run_name, step from metrics order by id").fetchall()
    assert sorted(rows) == sorted((name, step) for step in (*range(1, 6), *range(4, 9)))
