"""A run in the terminal: while it starts, trains, is silent or has finished; and what is no run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.__main__ import main
from megatron_slm.config import dump_config, parse_config
from megatron_slm.reporting.records import RecordFile
from megatron_slm.reporting.watch import TICKS, WatchedRun, sparkline

NOW = 1e9
CONFIG = {
    "run_dir": "runs/slm",
    "model": {"config": {"model_type": "llama"}},
    "reference": {"path": "ref"},
    "data": {"train": "web", "seq_length": 32, "order_tokens": 100 * 256},
    "training": {"global_batch_size": 8, "train_tokens": 100 * 256, "save_interval": 40},
}


def record(step: int, **more: Any) -> dict[str, Any]:
    """Return the record of a selective step that takes 2 s, whose losses fall."""
    losses = {"loss/all": 5 - step / 100, "loss/selected": 4.5 - step / 100, "loss/unselected": 6 - step / 100}
    shares = {"selection/ratio": 0.6, "selection/ratio/web": 0.4, "selection/ratio/books": 0.8, "selection/nan": 0}
    counts = {"loss/spikes": 0, "skipped_updates": 0, "failed_saves": 0}
    speed = {"step_seconds": 2.0, "tokens_per_second": 128.0, "mfu": 0.3}
    return {"step": step, "selection/threshold": -0.5, **losses, **shares, **counts, **speed, **more}


def lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(one) + "\n" for one in records)


def make_run(folder: Path, records: list[dict[str, Any]], *, age: float = 0.0, **training: Any) -> WatchedRun:
    """Write a run directory whose last record has an age in seconds."""
    tree = CONFIG | {"training": CONFIG["training"] | training}  # type: ignore[operator]
    (folder / "config.yaml").write_text(dump_config(parse_config(tree)))
    os.utime(folder / "config.yaml", (NOW - 130, NOW - 130))
    if records:
        (folder / "metrics.jsonl").write_text(lines(records))
        os.utime(folder / "metrics.jsonl", (NOW - age, NOW - age))
    return WatchedRun(folder)


def frame(run: WatchedRun, width: int = 79) -> str:
    return "\n".join(run.frame(width, NOW))


def test_a_run_is_shown_with_its_curves_and_progress_in_80_columns(tmp_path: Path) -> None:
    evaluated = {"eval/mathematics/loss": 4.0, "eval/mathematics/bits_per_byte": 1.5}
    records = [record(step, **(evaluated if step % 10 == 0 else {})) for step in range(1, 51)]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step_00000040")
    run = make_run(tmp_path, records, age=3)
    shown = frame(run)
    assert max(map(len, shown.splitlines())) <= 79
    assert "slm, step 50 of 100 (50.0%), ETA 2 min" in shown  # 50 steps of 2 s
    assert "tokens 12.8k of 25.6k, 128 tokens/s, 2 s per step, MFU 30.0%" in shown
    assert "last checkpoint: step 40, next at step 80" in shown
    for label, first, last in [
        ("mathematics", "4.000", "4.000"),
        ("all", "4.990", "4.500"),
        ("selected", "4.490", "4.000"),
        ("unselected", "5.990", "5.500"),
        ("threshold", "-0.500", "-0.500"),
        ("web", "0.400", "0.400"),
        ("books", "0.800", "0.800"),
    ]:
        (row,) = [line.split() for line in shown.splitlines() if line.split()[0] == label]
        assert (row[1], row[-1]) == (first, last)
    assert "bits_per_byte" not in shown
    assert "health: no loss spikes" in shown and "last record 3 s ago; usually every 2 s" in shown
    assert "!" not in shown and not run.is_finished


def test_a_long_path_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / ("x" * 90)).mkdir()
    first, second = frame(make_run(tmp_path / ("x" * 90), [record(1)]), 70).splitlines()[:2]
    assert len(first) == 70 and first.startswith("...") and first.endswith("x" * 60)
    assert second.startswith("slm, step 1 of 100")


def test_a_run_on_all_tokens_has_no_selection(tmp_path: Path) -> None:
    records = [{"step": 1, "loss/all": 2.0, "step_seconds": 1.0, "tokens_per_second": 1.0, "mfu": None}]
    shown = frame(make_run(tmp_path, records))
    assert "all" in shown and "selection" not in shown and "MFU" not in shown


def test_what_needs_attention_is_marked(tmp_path: Path) -> None:
    records = [record(1, **{"selection/nan": 2}), record(2, **{"selection/nan": 3, "loss/spikes": 1})]
    records[-1] |= {"skipped_updates": 4, "failed_saves": 1}
    (line,) = [line for line in frame(make_run(tmp_path, records)).splitlines() if line.startswith("!")]
    assert line == "! loss spikes: 1, skipped updates: 4, failed saves: 1, NaN scores: 5"


@pytest.mark.parametrize(("age", "is_silent"), [(59, False), (61, False), (201, True)])
def test_a_silent_run_is_marked_by_its_own_usual_time(tmp_path: Path, age: float, is_silent: bool) -> None:
    records = [record(step, step_seconds=4.0) for step in range(10, 60, 10)]  # every 40 s
    shown = frame(make_run(tmp_path, records, age=age))
    assert ("! no record for 3 min; usually every 40 s" in shown) == is_silent


def test_the_last_step_is_the_end_whatever_the_age(tmp_path: Path) -> None:
    run = make_run(tmp_path, [record(99), record(100)], age=1e6)
    shown = frame(run)
    assert "step 100 of 100 (100.0%), finished" in shown and "!" not in shown and "next at" not in shown
    assert run.is_finished


def test_the_length_of_a_run_in_epochs_is_that_of_its_order(tmp_path: Path) -> None:
    run = make_run(tmp_path, [record(50)], train_tokens=None, train_epochs=1.5)
    assert "step 50 of 100" in frame(run)


def test_a_run_that_starts_has_no_record_yet(tmp_path: Path) -> None:
    assert "no record yet; the run was started 2 min ago" in frame(make_run(tmp_path, []))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lo')
    assert "no record yet" in frame(WatchedRun(tmp_path))


def test_each_frame_reads_only_what_is_new(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = RecordFile(path)
    assert records.read() == []
    whole = lines([{"step": step} for step in (1, 2, 3)])
    path.write_text(whole[:-5])
    assert [one["step"] for one in records.read()] == [1, 2]
    before = records._end
    path.write_text("x" * before + whole[before:])  # what was read is not read again
    assert [one["step"] for one in records.read()] == [1, 2, 3]
    assert [one["step"] for one in records.read()] == [1, 2, 3]
    (tmp_path / "new").write_text(lines([{"step": 1}, {"step": 5}, {"step": 6}, {"step": 7}]))
    (tmp_path / "new").replace(path)  # a resumed run cuts the file back
    assert [one["step"] for one in records.read()] == [1, 5, 6, 7]
    path.write_text(lines([{"step": 9}]))
    assert [one["step"] for one in records.read()] == [9]


def test_a_line_that_is_not_a_record_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path, [])
    (tmp_path / "metrics.jsonl").write_text("{}x\n")
    assert "metrics.jsonl holds a line that is not a record" in frame(run)


def test_a_curve_shows_the_later_changes_of_a_loss(tmp_path: Path) -> None:
    falls = [10.0] * 5 + [3 - step / 100 for step in range(95)]
    curve = sparkline(falls, 20)
    assert len(curve) == 20 and curve[0] == TICKS[-1] and curve[-1] == TICKS[0]
    assert set(curve) == set(TICKS)
    assert sparkline([1.0, 2.0], 6) == TICKS[0] * 3 + TICKS[-1] * 3
    assert sparkline([3.0], 4) == TICKS[0] * 4


def watch(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_slm", "watch", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


def test_two_runs_are_shown_in_a_pipe_without_colour_and_without_unicode(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        make_run(tmp_path / name, [record(step) for step in range(1, 30)])
    shown = watch(str(tmp_path / "a"), str(tmp_path / "b"), "--once", PYTHONIOENCODING="ascii")
    assert shown.returncode == 0 and not shown.stderr
    assert shown.stdout.isascii() and "\x1b" not in shown.stdout
    assert shown.stdout.count("training loss") == 2


def test_the_command_ends_with_the_run(tmp_path: Path) -> None:
    make_run(tmp_path, [record(100)])
    assert watch(str(tmp_path), "--interval", "0.01").returncode == 0


def test_a_reader_that_ends_ends_the_command(tmp_path: Path) -> None:
    make_run(tmp_path, [record(1)])
    program = f"{sys.executable} -m megatron_slm watch {tmp_path} --interval 0.05 | head -2"
    ended = subprocess.run(["bash", "-o", "pipefail", "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0 and not ended.stderr and "step 1 of 100" in ended.stdout


def test_the_command_imports_nothing_heavy() -> None:
    program = "import megatron_slm.commands.watch, sys; print({'torch', 'numpy', 'transformers'} & sys.modules.keys())"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_what_is_no_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("a: 1\n")
    with pytest.raises(SystemExit) as end:
        main(["watch", str(tmp_path), str(tmp_path / "gone"), "--interval", "0", "--once"])
    assert end.value.code == 2
    interval, other, gone = capsys.readouterr().err.splitlines()
    assert "--interval is 0.0" in interval
    assert f"RUN_DIR is {tmp_path}, but it holds no config.yaml of a run" in other and "gone" in gone


def test_a_terminal_gets_each_frame_in_place_of_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_slm.commands import watch as command

    make_run(tmp_path, [record(1)])
    written: list[str] = []
    terminal = type("Terminal", (), {"isatty": lambda _: True, "write": lambda _, text: written.append(text)})
    monkeypatch.setattr(sys, "stdout", type("T", (terminal,), {"flush": lambda _: None, "encoding": "utf-8"})())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "10")
    command._show([WatchedRun(tmp_path)])
    assert written[0].startswith("\x1b[H") and written[0].endswith("\x1b[J") and written[0].count("\n") == 9
