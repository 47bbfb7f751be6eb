"""The callbacks that write to TensorBoard: records as curves, a histogram of the excess loss, a table of tokens."""

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_slm.errors import UserError
from megatron_slm.reporting.tokens import Token, escape_html, token_texts, tokens_table
from megatron_slm.training.state import RunState
from megatron_slm.training.statistics import ScoredPool
from megatron_slm.training.step import StepResult
from megatron_slm.training.trainer import Callback

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

AXES = (
    "step",
    "consumed_samples",
    "consumed_tokens",
    "consumed_selected_tokens",
    "scored_tokens",
    "trained_tokens",
    "flops",
)
"""Entries of a record that only grow. They are horizontal axes, not curves."""

CHARTS = {
    "1 loss": {
        "training loss: all, selected, unselected, reference": r"loss/(all|selected|unselected|reference)$",
        "training loss of each source": r"loss/all/.+",
        "router loss, before its coefficient": r"loss/router$",
        "held-out loss of each set": r"eval/.+/loss$",
        "held-out bits per byte": r"eval/.+/bits_per_byte$",
    },
    "2 selection": {
        "threshold, and share that is selected": r"selection/(threshold|ratio)$",
        "share that is selected of each source": r"selection/ratio/.+",
        "excess loss: quantiles": r"excess/q\d+$",
    },
    "3 speed": {"tokens per second": r"tokens_per_second$", "MFU": r"(mfu|hardware_utilization)$"},
    "4 optimizer": {"gradient norm": r"grad_norm$", "learning rate": r"lr$"},
}
"""The charts of the tab Custom Scalars by category: the title, and a pattern of the tags.

They are the same in all runs, because TensorBoard merges the layouts of all runs."""


class TensorBoard(Callback):
    """Writes the records as scalars, on rank 0. The horizontal axis is the step.

    Args:
        writer: writer of the run's event files; this callback closes it.
        configuration: the run's configuration as text.
        evaluation_sets: names of the sets that will be evaluated.
    """

    def __init__(self, writer: "SummaryWriter", configuration: str, evaluation_sets: list[str]) -> None:
        self._writer = writer
        self._configuration = configuration
        self._later = [f"eval/{name}/{unit}" for name in evaluation_sets for unit in ("loss", "bits_per_byte")]
        self._has_layout = False

    def on_train_start(self, state: RunState) -> None:
        self._writer.add_text("configuration", preformatted(self._configuration), state.step)
        run_dir = Path(self._writer.log_dir).parent
        logging.getLogger(__name__).info(
            "curves: tensorboard --logdir %s --host 127.0.0.1, then http://127.0.0.1:6006/#custom_scalars", run_dir
        )

    def on_record(self, state: RunState, record: dict[str, float | int | None]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        shown = {name: v for name, v in record.items() if name not in AXES and v is not None}
        # One event for the whole record: each event passes through the writer's queue, which holds only ten.
        values = [Summary.Value(tag=name, simple_value=value) for name, value in shown.items()]
        self._writer.file_writer.add_summary(Summary(value=values), state.step)
        if not self._has_layout:
            # The layout is written only once, and these quantiles are null while the run trains on all tokens.
            quantiles = [name for name in record if name.startswith("excess/")]
            self._writer.add_custom_scalars(layout([*shown, *quantiles, *self._later]))
            self._has_layout = True

    def close(self) -> None:
        self._writer.close()


def open_event_files(folder: Path, step: int) -> "SummaryWriter":
    """Return the writer of a run that resumes from `step`, and hide the curves that a killed run wrote after it.

    Raises:
        UserError: the folder cannot be written.
    """
    from torch.utils.tensorboard import SummaryWriter

    try:
        return SummaryWriter(str(folder), purge_step=step + 1)
    except OSError as error:
        raise UserError(
            "run_dir",
            str(folder.parent),
            f"TensorBoard's folder {folder.name} cannot be written there ({error.strerror})",
            "Make it writable, or use another run_dir",
        ) from error


def layout(tags: list[str]) -> dict[str, dict[str, list[Any]]]:
    """Return the charts that contain any of these tags, for `SummaryWriter.add_custom_scalars`."""
    charts: dict[str, dict[str, list[Any]]] = {}
    for category, titles in CHARTS.items():
        for title, pattern in titles.items():
            if any(re.match(pattern, tag) for tag in tags):
                charts.setdefault(category, {})[title] = ["Multiline", [pattern]]
    return charts


def preformatted(text: str) -> str:
    """Return Markdown that shows a text unchanged: an indented block contains no markup."""
    return "\n".join(f"    {line}" for line in text.split("\n"))


class ExcessHistogram(Callback):
    """Counts the excess loss of the step's tokens over all ranks, and shows it in TensorBoard.

    Args:
        interval: steps between histograms.
        writer: writer of the run's event files; None on ranks that do not write.
    """

    def __init__(self, interval: int, writer: "SummaryWriter | None") -> None:
        self._interval = interval
        self._writer = writer

    def on_step_end(self, state: RunState, result: StepResult) -> None:
        if not state.is_due(self._interval) or not result.statistics.has_reference:
            return
        histogram = result.statistics.excess_histogram()
        if self._writer is not None and histogram.counts:
            self._writer.add_histogram_raw(
                "excess/distribution",
                min=histogram.edges[0],
                max=histogram.edges[-1],
                num=sum(histogram.counts),
                sum=histogram.total,
                sum_squares=histogram.squares,
                bucket_limits=histogram.edges[1:],
                bucket_counts=histogram.counts,
                global_step=state.step,
            )


MAX_TOKENS = 128
"""Number of tokens in a table."""


class TokenTable(Callback):
    """Shows the beginning of the step's first sequence in TensorBoard, on rank 0.

    Args:
        interval: steps between tables.
        writer: writer of the run's event files.
        tokenizer: tokenizer of the corpora.
        sources: names of the blend's entries.
    """

    def __init__(self, interval: int, writer: "SummaryWriter", tokenizer: Any, sources: list[str]) -> None:
        self._interval = interval
        self._writer = writer
        self._tokenizer = tokenizer
        self._sources = sources

    def on_step_end(self, state: RunState, result: StepResult) -> None:
        pool = result.statistics.first_pool
        if pool is None or not state.is_due(self._interval):
            return
        sample, source = int(pool.batch.sample_index_B[0]), self._sources[int(pool.batch.source_B[0])]
        title = escape_html(f"Sample {sample} of the run, from {source}: selected tokens are bold.")
        table = tokens_table(first_tokens(pool, self._tokenizer, MAX_TOKENS))
        self._writer.add_text("tokens", f"<p>{title}</p>\n\n{table}", state.step)


def first_tokens(pool: ScoredPool, tokenizer: Any, limit: int) -> list[Token]:
    """Return the beginning of the pool's first sequence. Its first token has no loss, because nothing precedes it."""
    labels = pool.batch.labels_BT[0, : limit - 1].tolist()
    valid = pool.batch.valid_BT[0, : limit - 1].tolist()
    selected = pool.choice.mask_BT[0, : limit - 1].tolist()
    student = pool.signals["student.loss"][0, : limit - 1].tolist()
    reference: list[float | None] = [None] * len(labels)
    if "reference.loss" in pool.signals:
        reference = pool.signals["reference.loss"][0, : limit - 1].tolist()
    first, *texts = token_texts(tokenizer, [int(pool.batch.tokens_BT[0, 0]), *labels])
    rows = zip(texts, valid, student, reference, selected, strict=True)
    return [Token(first)] + [Token(text, *losses) if is_valid else Token(text) for text, is_valid, *losses in rows]
