"""The content of the event files for TensorBoard, read back."""

import re
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.plugins.custom_scalar import layout_pb2

from megatron_slm.errors import UserError
from megatron_slm.training.metrics import StepMetrics
from megatron_slm.training.state import Plan, RunState
from megatron_slm.training.tensorboard import ExcessHistogram, TensorBoard, layout, open_event_files, preformatted
from tests.steps import result_of_step

CLM = ["loss/all", "lr", "grad_norm", "tokens_per_second", "step_seconds", "skipped_updates"]
SLM = [*CLM, "loss/selected", "loss/unselected", "loss/reference", "selection/threshold", "selection/ratio"]
SLM += ["selection/ratio/web", "selection/ratio/a|b (c)", "excess/q10", "excess/q50", "excess/q90", "eval/math/loss"]
CONFIGURATION = "run_dir: runs/a\nmodel: {path: '<script>alert(1)</script> **x** | `y`'}\n"


def train(folder: Path, first: int, last: int) -> None:
    """Write steps `first` to `last` with a histogram every second step, and leave the writer open, as when killed."""
    state = RunState(Plan(100, 1, 8, 1, 100, 100), step=first - 1)
    writer = open_event_files(folder, state.step)
    callbacks = [ExcessHistogram(2, writer), TensorBoard(writer, CONFIGURATION, ["math"])]
    for callback in callbacks:
        callback.on_train_start(state)
    for step in range(first, last + 1):
        state.step = step
        state.record = {"step": step, "mfu": None} | {name: float(first) for name in SLM if "eval" not in name}
        for callback in callbacks:
            callback.on_step_end(state, result_of_step(step))
            callback.on_record(state, state.record)
    writer.flush()


def read(folder: Path) -> Any:
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0, "histograms": 0})
    events.Reload()
    return events


def charts(tags: list[str]) -> dict[str, list[str]]:
    """Return the tags in each chart."""
    found = {title: chart[1] for charts in layout(tags).values() for title, chart in charts.items()}
    return {
        title: [tag for tag in tags if any(re.match(pattern, tag) for pattern in patterns)]
        for title, patterns in found.items()
    }


def test_the_charts_hold_what_belongs_together() -> None:
    assert list(charts(SLM).values()) == [
        ["loss/all", "loss/selected", "loss/unselected", "loss/reference"],
        ["eval/math/loss"],
        ["selection/threshold", "selection/ratio"],
        ["selection/ratio/web", "selection/ratio/a|b (c)"],
        ["excess/q10", "excess/q50", "excess/q90"],
        ["tokens_per_second"],
        ["grad_norm"],
        ["lr"],
    ]


def test_a_run_without_selection_has_no_charts_of_it() -> None:
    assert list(charts([*CLM, "mfu"]).values()) == [
        ["loss/all"],
        ["tokens_per_second"],
        ["mfu"],
        ["grad_norm"],
        ["lr"],
    ]


def test_the_layout_is_in_the_event_files_and_knows_what_will_be_evaluated(tmp_path: Path) -> None:
    train(tmp_path, 1, 1)
    content = read(tmp_path).Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    found = layout_pb2.Layout.FromString(content)
    titles = [chart.title for category in found.category for chart in category.chart]
    assert len(titles) == 9 and "held-out loss of each set" in titles and "MFU" not in titles
    patterns = [pattern for category in found.category for chart in category.chart for pattern in chart.multiline.tag]
    assert all(re.compile(pattern) for pattern in patterns)


def test_quantiles_that_are_not_defined_yet_have_their_chart(tmp_path: Path) -> None:
    """All tokens count at first, without a reference, but the layout is written only once, with the first record."""
    writer = open_event_files(tmp_path, 0)
    record = {"loss/all": 1.0, "excess/q50": None, "mfu": None}
    callback = TensorBoard(writer, CONFIGURATION, [])
    callback.on_record(RunState(Plan(1, 1, 8, 1, 1, 1), step=1), record)
    callback.close()
    content = read(tmp_path).Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    titles = [chart.title for category in layout_pb2.Layout.FromString(content).category for chart in category.chart]
    assert titles == ["training loss: all, selected, unselected, reference", "excess loss: quantiles"]


def test_the_histogram_is_in_the_event_files(tmp_path: Path) -> None:
    train(tmp_path, 1, 4)
    histograms = read(tmp_path).Histograms("excess/distribution")
    assert [event.step for event in histograms] == [2, 4]
    value = histograms[0].histogram_value
    filled = [limit for limit, count in zip(value.bucket_limit, value.bucket, strict=True) if count]
    assert filled == [2.25 + index / 2 for index in range(16)] and sum(value.bucket) == value.num == 16
    assert (value.min, value.max, value.sum) == (2.0, 9.75, sum(2 + index / 2 for index in range(16)))


def test_a_resumed_run_shows_each_step_once(tmp_path: Path, ticking_clock: None) -> None:
    train(tmp_path, 1, 9)
    train(tmp_path, 5, 8)
    events = read(tmp_path)
    scalars = events.Scalars("loss/all")
    assert [event.step for event in scalars] == [*range(1, 9)]
    assert [event.value for event in scalars] == [1.0] * 4 + [5.0] * 4
    assert [event.step for event in events.Histograms("excess/distribution")] == [2, 4, 6, 8]
    assert [event.step for event in events.Tensors("configuration/text_summary")] == [0, 4]


def test_the_configuration_is_shown_as_it_is(tmp_path: Path) -> None:
    train(tmp_path, 1, 1)
    text = read(tmp_path).Tensors("configuration/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == preformatted(CONFIGURATION)
    page = markdown_to_safe_html(text)
    assert page.startswith("<pre><code>run_dir: runs/a\n")
    assert "'&lt;script&gt;alert(1)&lt;/script&gt; **x** | `y`'" in page


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(UserError) as caught:
        open_event_files(tmp_path / "tensorboard", 0)
    assert (caught.value.setting, caught.value.value) == ("run_dir", str(tmp_path))
    assert "folder tensorboard cannot be written" in caught.value.reason


def test_the_share_of_a_source_is_of_its_own_tokens() -> None:
    """The excess loss is 1 to 8.5; tokens above 4 are selected: the last of source 0, and all of source 1."""
    result = result_of_step(1)
    state = RunState(Plan(100, 1, 8, 1, 100, 100), step=1, record={})
    StepMetrics(["web", "books"], True, (0.5,)).on_step_end(state, result)
    shown = {name: value for name, value in state.record.items() if name.startswith(("selection", "excess"))}
    expected = {"": 9 / 16, "/web": 1 / 8, "/books": 1.0}
    assert shown == {f"selection/ratio{name}": share for name, share in expected.items()} | {
        "selection/threshold": 3.0,
        "selection/nan": 0,
        "excess/q50": 5.0,
    }
