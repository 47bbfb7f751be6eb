"""Token pages and curves: text of a corpus is always escaped, and no mark relies on colour alone."""

import re
from pathlib import Path

import pytest

from megatron_slm.reporting.charts import Curve, draw_curves
from megatron_slm.reporting.records import last_record, read_records
from megatron_slm.reporting.tokens import (
    SHADES,
    Token,
    escape_html,
    escape_markdown,
    legend_html,
    page_html,
    token_texts,
    tokens_html,
    tokens_markdown,
    visible,
)
from tests.reader import Reader

NASTY = "<script>alert(1)</script> \"'&amp; </span>"


def test_markup_in_text_makes_no_element() -> None:
    page = Reader(tokens_html([Token(NASTY, 2.0, 1.0, True)]))
    assert page.text == NASTY
    assert [tag for tag, _ in page.elements] == ["div", "span"]
    assert Reader(page_html(NASTY, "")).text.count(NASTY) == 2  # the title, twice


def test_quotes_in_text_end_no_attribute() -> None:
    (_, attributes), *others = Reader(f'<p title="{escape_html(NASTY)}">').elements
    assert attributes == {"title": NASTY} and not others


def test_invisible_and_direction_changing_characters_are_spelled_out() -> None:
    assert visible("a\u202eb\x1bc\ud800\n\t") == "a\\u202eb\\u001bc\\ud800\n\t"
    assert visible("é 数 ∑") == "é 数 ∑"


@pytest.mark.parametrize(
    "text", ["<b>", "**x**", "[a](b)", "`x`", "a|b", "# x", "1. x", "&lt;", "$x$", "~~x~~", "<!--"]
)
@pytest.mark.parametrize("dialect", ["markdown", "markdown_it"])
def test_markdown_shows_markup_as_text(text: str, dialect: str) -> None:
    module = pytest.importorskip(dialect)
    render = module.markdown if dialect == "markdown" else module.MarkdownIt().render
    shown = Reader(render(escape_markdown(text)))
    assert shown.text.strip() == text
    assert [tag for tag, _ in shown.elements] == ["p"]


def test_a_line_of_markdown_stays_one_line() -> None:
    assert escape_markdown("a\n\tb") == "a⏎⇥b"


def test_selected_tokens_are_marked_by_more_than_colour() -> None:
    page = Reader(tokens_html([Token("a", 3.0, 1.0, True), Token("b", 1.0, 3.0)]))
    kept, left = (attributes["class"] for tag, attributes in page.elements if tag == "span")
    assert "kept" in kept.split() and "kept" not in left.split()
    style = page_html("", "")
    assert re.search(r"\.kept \{[^}]*underline", style)
    assert "kept" in legend_html()


def test_the_shade_deepens_with_excess_loss() -> None:
    tokens = [Token("a", excess, 0.0) for excess in (-1.0, *(shade + 0.1 for shade in SHADES))]
    spans = [attributes["class"] for tag, attributes in Reader(tokens_html(tokens)).elements if tag == "span"]
    assert spans == ["x0", "x1", "x2", "x3", "x4"]


def test_a_token_without_a_loss_is_shown_without_a_shade() -> None:
    assert 'class="none"' in tokens_html([Token("a")])


def test_selected_tokens_are_bold_in_markdown() -> None:
    assert tokens_markdown([Token(" a*", 1.0, 0.0, True), Token(" b"), Token(" ", 1.0, 0.0, True)]) == "**a&#42;** b "


def test_token_texts_join_to_the_decoded_text(corpora: Path) -> None:
    from megatron_slm.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(corpora / "web.tokenizer"))
    text = " the number é🙂 of\n\tprime"
    texts = token_texts(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])
    assert "".join(texts) == text
    assert "🙂" in texts and "\ufffd" not in "".join(texts)


def test_token_texts_may_end_within_a_character(corpora: Path) -> None:
    from megatron_slm.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(corpora / "web.tokenizer"))
    ids = tokenizer("a🙂", add_special_tokens=False)["input_ids"]
    assert "".join(token_texts(tokenizer, ids[:-1])).startswith("a")


def test_curves_differ_without_colour(tmp_path: Path) -> None:
    from megatron_slm.reporting import charts

    looks = [(line, marker) for _, line, marker in charts._LOOKS]
    assert len({line for line, _ in looks}) == len({marker for _, marker in looks}) == len(looks)
    curves = [Curve(name, [0, 1, 2], [5.0, 4.5, end]) for name, end in (("CLM", 4.3), ("SLM", 4.3))]
    curves.append(Curve("of seeds", [0, 1, 2], [5.0, 4.4, 4.2], [5.0, 4.3, 4.1], [5.0, 4.5, 4.4]))
    draw_curves({"mathematics": curves, "general": curves}, "tokens", "loss", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_last_record_is_the_last_complete_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_record(path) is None
    path.write_text('{"step": 1')
    assert last_record(path) is None
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert last_record(path) == {"step": 2}
    path.write_text('{"step": 1}\n{"step": 2}\n')
    assert read_records(path) == [{"step": 1}, {"step": 2}]
