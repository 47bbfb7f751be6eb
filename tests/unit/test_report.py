"""Reports: every number by brute force, what may not be compared is not drawn together, and text is never markup."""

import base64
import csv
import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from megatron_slm.analysis.dynamics import CLASSES, PAPER
from megatron_slm.analysis.report import Output, build_page, write_figures, write_report
from megatron_slm.analysis.report_tokens import PASSAGE_TOKENS, PASSAGES, passage_rows
from megatron_slm.analysis.report_training import effective_time
from megatron_slm.analysis.runs import read_runs
from megatron_slm.errors import UserError
from megatron_slm.reporting.blocks import Listing, Page
from megatron_slm.reporting.blocks import Passages as Text
from megatron_slm.reporting.charts import Chart, Curve, draw_chart, look
from megatron_slm.reporting.page import ALL_POINTS, CURVE_POINTS, embedded_json, page_html, thinned
from megatron_slm.reporting.text_figure import COLUMNS, ShadedToken, draw_text
from tests.reader import Reader
from tests.run_directories import CORPORA, HOSTILE, observe, write_run, write_tokenizer


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A CLM run and two selective runs of other ratios, which observe the same tokens; CLM knows no reference."""
    root = tmp_path_factory.mktemp("runs")
    runs = [
        write_run(root / "clm", objective="clm"),
        write_run(root / "slm", ratio=0.6, seed=1),
        write_run(root / "slm-04", ratio=0.4, seed=2),
    ]
    for run in runs:
        observe(run, with_selection=run.name != "clm", with_reference=run.name != "clm", ids=_ids(run))
    return runs


def _ids(run: Path) -> list[int]:
    """Return the ids of the hostile tokens, and of a few words."""
    from megatron_slm.data.tokenizer import load_tokenizer

    known = load_tokenizer(str(run / "tokenizer")).get_vocab()
    return [known[text] for text in (*HOSTILE, " the", " sum", " 12", " =")]


def built(paths: list[Path]) -> Page:
    return build_page(read_runs([str(path) for path in paths]))


def chart(page: Page, name: str) -> Chart:
    return next(chart for chart in page.charts() if chart.name == name)


def table(page: Page, name: str) -> list[list[object]]:
    return next([list(row) for row in table.rows] for table in page.tables() if table.name == name)


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path, column: str = "loss") -> np.ndarray:
    from safetensors.numpy import load_file

    return np.stack([load_file(path)[column] for path in sorted((run / "observed").glob("step_*"))])


def data_of(html: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html)[1])


def test_curves_are_the_records(three: list[Path]) -> None:
    page = built(three)
    for curve, run in zip(chart(page, "loss-all").curves, three, strict=True):
        assert list(zip(curve.x, curve.y, strict=True)) == [(r["step"], r["loss/all"]) for r in records(run)]
    held_out = chart(page, f"held-out-0-{CORPORA[0]}").curves
    for curve, run in zip(held_out, three, strict=True):
        key = f"eval/{CORPORA[0]}/loss"
        assert list(curve.y) == [r[key] for r in records(run) if key in r]
    assert [curve.label for curve in chart(page, "threshold-0").curves] == [
        "slm",
        "slm-04",
    ]
    shares = chart(page, "selected-share-by-source-1")
    assert [curve.label for curve in shares.curves] == ["all sources", "web", "books"]
    assert shares.curves[1].y[0] == pytest.approx(0.3)


def test_the_table_of_ends_holds_the_last_and_the_lowest_result(three: list[Path]) -> None:
    rows = table(built(three), "held_out")
    for row, run in zip(rows, three, strict=True):
        key = f"eval/{CORPORA[1]}/loss"
        found = [(r[key], r["step"]) for r in records(run) if key in r]
        assert row[4:7] == [found[-1][0], *min(found)]


def test_axes_are_those_of_the_records(three: list[Path]) -> None:
    clock = built(three).runs[1].clock
    last = records(three[1])[-1]
    assert clock["step"][0] == clock["tokens"][0] == 0
    assert clock["selected"][-1] == last["consumed_selected_tokens"]
    assert clock["seconds"][-1] == pytest.approx(last["step"] * 0.0128)


def brute_classes(loss_SN: np.ndarray, steps: list[int]) -> list[str]:
    """Fit each token by numpy's polynomial fit, and apply the rules of appendix D.1."""
    names = []
    for token in range(loss_SN.shape[1]):
        slope, _ = np.polyfit(steps, loss_SN[:, token], 1)
        change = slope * (steps[-1] - steps[0])
        low = loss_SN[-1, token] <= loss_SN[-1].mean()
        names.append(("L->H" if change > 0 else "H->L") if abs(change) > 0.2 else "L->L" if low else "H->H")
    return names


def test_dynamics_are_those_of_every_token(three: list[Path]) -> None:
    page, steps = built(three), [0, 15, 30, 45, 60]
    shares = chart(page, "classes-0")
    assert [curve.label for curve in shares.curves] == [run.name for run in three] + [f"paper, {n}" for n in PAPER]
    for number, run in enumerate(three):
        loss_SN = losses(run).astype(np.float64)
        names = brute_classes(loss_SN, steps)
        assert list(shares.curves[number].y) == pytest.approx([names.count(name) / len(names) for name in CLASSES])
        for curve in chart(page, f"class-curves-{number}").curves:
            of_class = [name == curve.label for name in names]
            if any(of_class):
                assert list(curve.y) == pytest.approx(loss_SN[:, of_class].mean(1), rel=1e-6)
        assert sum(chart(page, f"learned-{number}").curves[0].y) == pytest.approx(1)


def test_perplexities_overlaps_and_shares_are_those_of_the_selections(three: list[Path]) -> None:
    page = built(three)
    loss_SN, selected_SN = losses(three[1]), losses(three[1], "selected")
    for number, curve in enumerate(chart(page, "perplexity-1").curves):
        expected = [math.exp(row[selected_SN[number]].mean(dtype=np.float64)) for row in loss_SN]
        assert list(curve.y) == pytest.approx(expected, rel=1e-6)
    one, other = selected_SN[-1], losses(three[2], "selected")[-1]
    overlap = table(page, "overlap_of_runs_1")
    assert overlap[0][2] == pytest.approx((one & other).sum() / (one | other).sum())
    half = len(one) // 2
    assert table(page, "by_source_1")[0][1:3] == [half, pytest.approx(selected_SN[0, :half].mean())]


def test_a_fixed_selection_is_measured_under_every_run(three: list[Path]) -> None:
    page = built(three)
    mask = losses(three[1], "selected")[-1]
    for curve, run in zip(chart(page, "fixed-selected-0").curves, three, strict=True):
        assert list(curve.y) == pytest.approx(losses(run)[:, mask].mean(1, dtype=np.float64))
    for curve, run in zip(chart(page, "fixed-unselected-0").curves, three, strict=True):
        assert list(curve.y) == pytest.approx(losses(run)[:, ~mask].mean(1, dtype=np.float64))


def test_fits_use_the_steps_at_which_both_were_measured(three: list[Path]) -> None:
    page = built(three)
    points = chart(page, "fit-0-0").curves[0]
    assert points.style == "points" and len(points.x) == 4  # 15, 30, 45 and 60 are evaluated and recorded
    evaluated = {r["step"]: r for r in records(three[0])}
    assert points.y[0] == -evaluated[15][f"eval/{CORPORA[0]}/loss"]


def test_a_sweep_of_ratios_is_drawn_by_ratio(three: list[Path]) -> None:
    curve = chart(built(three), "ratio-0-0").curves[0]
    assert list(curve.x) == [0.4, 0.6]
    assert curve.y[1] == records(three[1])[-1][f"eval/{CORPORA[0]}/loss"]


def test_figures_that_the_runs_do_not_hold_leave_a_sentence(tmp_path: Path) -> None:
    page = built([write_run(tmp_path / "run", objective="clm")])
    text = Reader(page_html(page)).text
    for figure in ("Figure 6 needs", "Figure 7 needs", "Figure 9 needs", "a trend needs", "no threshold"):
        assert figure in text


def test_runs_of_other_tokenizers_are_compared_in_bits_and_their_losses_are_drawn_apart(tmp_path: Path) -> None:
    one, other = (write_run(tmp_path / name) for name in ("one", "other"))
    write_tokenizer(other / "tokenizer", ["another token"])
    page = built([one, other])
    held_out = chart(page, f"held-out-0-{CORPORA[0]}")
    assert held_out.ylabel == "bits per byte" and len(held_out.curves) == 2
    key = f"eval/{CORPORA[0]}/bits_per_byte"
    assert held_out.curves[1].y[-1] == records(other)[-1][key]
    in_nats = [chart for chart in page.charts() if "nats" in chart.ylabel or chart.name.startswith("threshold")]
    assert in_nats and all(len({curve.run for curve in chart.curves}) == 1 for chart in in_nats)


def test_a_set_that_differs_is_not_drawn_together(tmp_path: Path) -> None:
    changed = {CORPORA[0]: "another checksum", CORPORA[1]: "checksum"}
    runs = [write_run(tmp_path / "one"), write_run(tmp_path / "other", evaluation=changed)]
    page = built(runs)
    of_set = [chart for chart in page.charts() if chart.name.startswith("held-out-0")]
    assert [[curve.run for curve in chart.curves] for chart in of_set] == [[0], [1]]
    assert [chart.run for chart in of_set] == [0, 1]
    columns = next(table.columns for table in page.tables() if table.name == "held_out")
    assert not any(CORPORA[0] in column for column in columns) and any(CORPORA[1] in column for column in columns)
    assert "different corpora under the name" in Reader(page_html(page)).text


def test_runs_that_observe_other_tokens_are_not_drawn_together(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("one", "other")]
    for seed, run in enumerate(runs):
        observe(run, seed=seed)
    page = built(runs)
    fixed = [chart for chart in page.charts() if chart.name.startswith(("fixed", "classes"))]
    assert fixed
    for chart in fixed:
        assert len({curve.run for curve in chart.curves if curve.run is not None}) == 1


def test_thresholds_of_other_scores_are_drawn_apart(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "one"),
        write_run(tmp_path / "other", changes={"selection": {"score": "student_loss"}}),
    ]
    titles = {c.title: [curve.run for curve in c.curves] for c in built(runs).charts() if "Threshold" in c.title}
    assert titles == {"Threshold of the score excess": [0], "Threshold of the score student_loss": [1]}


def test_text_of_corpora_and_names_is_never_markup(three: list[Path], tmp_path: Path) -> None:
    hostile = write_run(tmp_path / "<img src=x onerror=alert(2)>", changes={"data": {"train": "</script><b>"}})
    observe(hostile, ids=_ids(hostile))
    html = page_html(built([*three, hostile]))
    page = Reader(html)
    assert {tag for tag, _ in page.elements}.isdisjoint({"img", "b", "a-b", "iframe", "object", "link"})
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    payload = re.search(r'id="data">(.*?)</script>', html)[1]
    assert "<" not in payload and "\u202e" not in html and "\x1b" not in html
    shown = {token for group in data_of(html)["passages"] for _, tokens in group["texts"] for token in tokens}
    assert {HOSTILE[0], HOSTILE[1], HOSTILE[2], "\\u202e", "\\u001b[31m", "a\nb"} <= shown


def test_json_in_the_page_cannot_end_its_element() -> None:
    text = embedded_json({"a": "</script><!--\u2028"})
    assert "<" not in text and text.isascii() and json.loads(text) == {"a": "</script><!--\u2028"}


def test_the_page_forbids_everything_but_its_own_style_and_script(three: list[Path]) -> None:
    html = page_html(built(three))
    policy = next(a["content"] for tag, a in Reader(html).elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    for element, directive in (("style", "style-src"), ("script", "script-src")):
        content = re.search(rf"<{element}>(.*?)</{element}>", html, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    assert set(re.findall(r"https?://[^\s\"']+", html)) == {"http://www.w3.org/2000/svg"}


def test_charts_have_captions_tables_have_headings_and_anchors_are_unique(three: list[Path]) -> None:
    page = built(three)
    assert all(chart.title and chart.caption and chart.ylabel for chart in page.charts())
    elements = Reader(page_html(page)).elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [attributes["href"] for tag, attributes in elements if tag == "a"]
    assert targets and all(target[1:] in ids for target in targets)
    figures = [attributes for tag, attributes in elements if tag == "figure"]
    assert all(attributes["aria-labelledby"] in ids for attributes in figures)
    names = [chart.name for chart in page.charts()] + [table.name for table in page.tables()]
    assert len(names) == len(set(names))


def test_a_thinned_curve_keeps_its_ends_and_its_peaks() -> None:
    random = np.random.default_rng(0)
    y = random.normal(size=10_000)
    y[777], y[5000], y[42] = 50, -50, np.nan
    curve = thinned(Curve("a", range(10_000), y.tolist()), CURVE_POINTS)
    assert len(curve.x) <= CURVE_POINTS and list(curve.x) == sorted(curve.x)
    assert (curve.x[0], curve.x[-1]) == (0, 9999)
    assert {777, 5000} <= set(curve.x)
    assert all(y[int(x)] == value for x, value in zip(curve.x, curve.y, strict=True) if not math.isnan(value))
    short = Curve("a", [1, 2], [3.0, 4.0])
    assert thinned(short, CURVE_POINTS) == short


def test_many_long_curves_share_the_points_of_the_page() -> None:
    curves = [Curve(str(number), range(2000), [0.0, 1.0] * 1000, run=0) for number in range(1000)]
    from megatron_slm.reporting.blocks import Figures, RunHead, Section

    head = RunHead("run", "", {"step": np.arange(2000.0)})
    chart = Chart("many", "Many", "Many curves.", "y", curves)
    page = Page("t", "s", [head], {"step": "step"}, [Section("a", "A", [Figures("f", [chart])])])
    drawn = data_of(page_html(page))
    assert sum(len(curve["x"]) for curve in drawn["charts"]["many"]["curves"]) <= ALL_POINTS
    assert len(drawn["runs"][0]["clock"]["step"]) <= CURVE_POINTS


def test_passages_are_few_spread_over_the_corpora_and_within_one_document(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    observe(run, tokens=20_000, steps=range(61))
    observed = read_runs([str(run)])[0].observed
    rows = passage_rows(observed, PASSAGES)
    assert len(rows) == PASSAGES and all(0 < part.stop - part.start <= PASSAGE_TOKENS for part in rows)
    assert [sum(observed.columns["corpus"][part.start] == c for part in rows) for c in (0, 1)] == [12, 12]
    for part in rows:
        assert len({*zip(observed.columns["corpus"][part], observed.columns["document"][part], strict=True)}) == 1
    text = next(b for s in built([run]).sections for b in s.blocks if isinstance(b, Text))
    assert text.losses[0].steps[0] == 0 and text.losses[0].steps[-1] == 60 and len(text.losses[0].steps) <= 20
    step = text.losses[0].steps[3]
    row = observed.steps.index(step)
    assert np.array_equal(text.losses[0].loss[2][3], observed.loss_SN[row, rows[2]])
    assert np.array_equal(text.losses[0].selected[2][3], observed.selected_SN[row, rows[2]])


def test_a_run_without_a_reference_is_shaded_by_that_of_its_group(three: list[Path]) -> None:
    text = next(b for s in built(three).sections for b in s.blocks if isinstance(b, Text))
    clm, slm = text.losses[:2]
    assert all(np.array_equal(one, other) for one, other in zip(clm.reference, slm.reference, strict=True))
    assert not any(clm.has_mask_S) and all(slm.has_mask_S)


def test_rows_and_figures_of_a_run_carry_its_number(three: list[Path]) -> None:
    page = built(three)
    costs = next(b for s in page.sections for b in s.blocks if isinstance(b, Listing) and b.table.name == "cost")
    assert list(costs.row_runs) == [0, 1, 2]
    assert [row[2] for row in costs.table.rows] == [records(run)[-1]["trained_tokens"] for run in three]
    assert table(page, "differences")[1][0] == "slm"


def test_the_effective_time_is_left_out_where_it_cannot_be_right(three: list[Path]) -> None:
    run = read_runs([str(three[0])])[0]
    assert 0 < effective_time(run) < 1
    run.environment["starts"] = []
    assert effective_time(run) is None


def test_every_figure_and_table_is_written_in_full(three: list[Path], tmp_path: Path) -> None:
    page = built(three[:2])
    kept = {"loss-all", "classes-0", "fit-0-0"}
    sections = [
        type(s)(s.name, s.title, [_only(b, kept) for b in s.blocks if hasattr(b, "charts") or isinstance(b, Listing)])
        for s in page.sections
    ]
    write_figures(Page(page.title, page.subtitle, page.runs, page.axes, sections), tmp_path)
    for name in kept:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()
    assert not list(tmp_path.glob("text-*"))  # the sections above hold no text
    rows = list(csv.reader((tmp_path / "loss-all.csv").open()))
    assert rows[0] == ["curve", "step", *list(page.axes.values())[1:], "nats per token"]
    assert len(rows) == 1 + 2 * 60
    assert rows[60][0] == "clm" and float(rows[60][2]) == 60 * 128
    assert {table.name for table in page.tables()} <= {path.stem for path in tmp_path.glob("*.csv")}


def test_text_is_drawn_in_lines_with_its_selected_tokens_marked(tmp_path: Path) -> None:
    tokens = [ShadedToken("a$<b>\n", 3.0, True), ShadedToken("\u202e" + "x" * 2 * COLUMNS, None, False)]
    draw_text([("Step 1", tokens), ("Step 2", [])], tmp_path / "a.svg", tmp_path / "a.png")
    svg = (tmp_path / "a.svg").read_text()
    assert "a$&lt;b&gt;" in svg and "\\u202e" in svg and "\u202e" not in svg
    assert svg.count("x" * COLUMNS + "<") == 1 and "#ff9d3c" in svg


def test_a_name_with_dollar_signs_is_no_formula(tmp_path: Path) -> None:
    curves = [Curve("$\\undefined$", [0, 1], [1.0, math.nan], run=0), Curve("$", [0, 1], [1.0, 2.0], style="points")]
    draw_chart(Chart("a", "$^$", "A.", "y", curves, "x"), "", tmp_path / "a.svg")
    assert "undefined" in (tmp_path / "a.svg").read_text()


def _only(block, names):
    from megatron_slm.reporting.blocks import Figures

    if not isinstance(block, Figures):
        return block
    return Figures(block.title, [chart for chart in block.charts if chart.name in names])


def test_216_runs_look_different() -> None:
    assert len({look(index) for index in range(216)}) == 216
    assert all(len({look(i)[1:] for i in range(first, first + 6)}) == 6 for first in range(0, 36, 6))


def test_a_report_replaces_a_report_and_nothing_else(three: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    for _ in range(2):
        write_report([str(three[0])], Output(path))
    path.write_text("notes")
    with pytest.raises(UserError) as caught:
        write_report([str(three[0])], Output(path))
    assert caught.value.setting == "--output" and path.read_text() == "notes"
    for output in (Output(tmp_path), Output(tmp_path / "none" / "x.html"), Output(tmp_path / "y.html", path)):
        with pytest.raises(UserError):
            output.check()


def test_what_is_no_run_is_refused(tmp_path: Path, three: list[Path]) -> None:
    (tmp_path / "folder").mkdir()
    started, old, damaged, foreign = (write_run(tmp_path / name) for name in ("started", "old", "damaged", "foreign"))
    (started / "metrics.jsonl").write_text("")
    (old / "metrics.jsonl").write_text('{"step": 1, "loss/all": 2.0}\n')
    (damaged / "metrics.jsonl").write_text('{"step": 1,\n{"step": 2}\n')
    observe(foreign, fingerprint="another")
    for path, reason in (
        (tmp_path / "absent", "does not exist"),
        (tmp_path / "folder", "no config.yaml"),
        (started, "not logged a step"),
        (old, "an earlier version"),
        (damaged, "cannot be read"),
        (foreign, "different tokenizer"),
    ):
        with pytest.raises(UserError) as caught:
            write_report([str(three[0]), str(path)], Output(tmp_path / "report.html"))
        assert caught.value.setting == "RUN_DIR" and str(path) in str(caught.value.value)
        assert reason in caught.value.reason
    assert not (tmp_path / "report.html").exists()
