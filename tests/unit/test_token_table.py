"""The table of tokens, as TensorBoard's Markdown and sanitizer render it."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

from megatron_slm.backend import Update
from megatron_slm.dist import World
from megatron_slm.reporting.tokens import Token, tokens_table
from megatron_slm.training.cost import StepTokens
from megatron_slm.training.objective import Choice
from megatron_slm.training.state import Plan, Requested, RunState
from megatron_slm.training.statistics import ScoredPool, StepStatistics
from megatron_slm.training.step import StepResult
from megatron_slm.training.tensorboard import TokenTable, first_tokens, open_event_files
from megatron_slm.types import Batch

HOSTILE = [
    *("|", " a | b |", "`", "```", "\\", "\\|", "**x**", "__x__", "$y$", "~~z~~", "[a](http://e)", "<b>", "</td>"),
    *("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "![](http://e/x.png)", "</code></table>", "<!--"),
    *(
        "&lt;",
        "&#60;",
        "&",
        '"',
        "'",
        "\n",
        "\n\n# head",
        "\t",
        "    ",
        "- item",
        "1. item",
        "<?php",
        "<![CDATA[",
        "]]>",
    ),
    *(
        "| a | b |\n|---|---|\n",
        "{x}",
        "http://e",
        "<http://e>",
        "&copy;",
        "{{x}}",
        "==m==",
        "^1",
        "[^1]: x",
        "*[e]: x",
    ),
]
SPELLED = {"\x02klzzwxh:0001\x03": r"\u0002klzzwxh:0001\u0003", "\u202eabc": r"\u202eabc", "\r": r"\u000d"}


class Page(HTMLParser):
    """The parsed page: texts of table cells, the text before the table, the marked texts, and all tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.before, self.marked, self.tags, self.attributes = "", "", set(), []
        self._open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[Any]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag != "br":
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self._open or "th" in self._open:
            self.rows[-1][-1] += data
        elif "p" in self._open:
            self.before += data
            self.marked += data if "strong" in self._open else ""
        else:
            assert not data.strip(), data


@pytest.mark.parametrize("selected", [True, False])
def test_no_text_of_a_token_is_markup(selected: bool) -> None:
    texts = [*HOSTILE, *SPELLED]
    page = Page(markdown_to_safe_html(tokens_table([Token(text, 2.0, 0.5, selected) for text in texts])))
    assert (
        page.tags <= {"p", "strong", "code", "br", "table", "thead", "tbody", "tr", "th", "td"} and not page.attributes
    )
    shown = [SPELLED.get(text, text) for text in texts]
    spaces = {" ": "␣", "\n": "⏎", "\t": "⇥"}
    cells = ["".join(spaces.get(character, character) for character in text) for text in shown]
    assert page.rows[1:] == [
        [str(number), cell, "2.00", "0.50", "1.50", "✓" if selected else ""] for number, cell in enumerate(cells)
    ]
    assert page.before == "".join(shown).replace("\n", "⏎").replace("\t", "⇥")
    assert page.marked == (page.before if selected else "")


def test_selected_tokens_are_marked_and_losses_may_be_missing() -> None:
    tokens = [Token("First"), Token(" a", 1.0, 2.0), Token(" proof", 3.0, 0.5, True), Token(""), Token(".", 1.0)]
    page = Page(markdown_to_safe_html(tokens_table(tokens)))
    assert page.before == "First a proof." and page.marked == " proof"
    assert page.rows == [
        ["", "token", "student", "reference", "excess", "selected"],
        ["0", "First", "", "", "", ""],
        ["1", "␣a", "1.00", "2.00", "-1.00", ""],
        ["2", "␣proof", "3.00", "0.50", "2.50", "✓"],
        ["3", "part of the next", "", "", "", ""],
        ["4", ".", "1.00", "", "", ""],
    ]


def byte_level() -> Any:
    """Return a tokenizer of single bytes, in the alphabet of GPT-2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def pool_of(ids: list[int], valid: int, reference: bool = True) -> ScoredPool:
    """Return a pool of two sequences; label t has loss t, the reference has loss 1, and every third is selected."""
    length = len(ids) - 1
    text = torch.tensor([ids, [0] * len(ids)])
    valid_BT = (torch.arange(length) < valid).repeat(2, 1)
    row = torch.tensor([7, 8])
    batch = Batch(text[:, :-1], text[:, 1:], valid_BT, text[:, :-1], row, torch.tensor([1, 0]), text[:, 1:], row * 0)
    signals = {"student.loss": torch.arange(float(length)).repeat(2, 1)}
    if reference:
        signals["reference.loss"] = torch.ones(2, length)
    mask_BT = valid_BT & (torch.arange(length) % 3 == 0)
    return ScoredPool(batch, signals, Choice(mask_BT, {"loss": mask_BT.float()}, torch.tensor(0.5), mask_BT))


@pytest.mark.parametrize("family", ["sentencepiece", "byte level"])
def test_a_character_of_several_tokens_is_shown_once(corpora: Path, family: str) -> None:
    from megatron_slm.data.tokenizer import load_tokenizer

    tokenizer = byte_level() if family == "byte level" else load_tokenizer(str(corpora / "web.tokenizer"))
    text = "the sum: 日本 é"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = first_tokens(pool_of([*ids, 0, 0], len(ids) - 1), tokenizer, len(ids))
    assert "".join(token.text for token in tokens) == text
    assert [token.text for token in tokens if "日" in token.text] == ["日"]
    assert sum(token.text == "" for token in tokens) >= 5
    assert [token.student for token in tokens] == [None, *range(len(ids) - 1)]


def test_padding_and_what_is_beyond_the_limit_are_not_shown_as_losses() -> None:
    tokens = first_tokens(pool_of(list(range(40, 60)), 5, reference=False), byte_level(), 10)
    assert len(tokens) == 10
    assert [token.student for token in tokens] == [None, 0, 1, 2, 3, 4, None, None, None, None]
    assert all(token.reference is None for token in tokens)
    assert [token.selected for token in tokens] == [False, True, False, False, True, False, False, False, False, False]


def test_the_table_comes_at_its_interval_and_once_a_step(tmp_path: Path, ticking_clock: None) -> None:
    for first in (1, 3):  # the second is a resumed run
        state = RunState(Plan(5, 1, 8, 1, 100, 100), step=first - 1)
        writer = open_event_files(tmp_path, state.step)
        table = TokenTable(2, writer, byte_level(), ["web", "<b>books</b>"])
        for step in range(first, 6):
            state.step = step
            statistics = StepStatistics(2, World(0, 1, 0, torch.device("cpu")))
            for other in (0, 1):
                statistics.add(*pool_of([65 + first + other] * 9, 8))
            tokens = StepTokens(candidates=0, trained=8, selected=8, reference=8)
            table.on_step_end(state, StepResult(8, 1e-3, 1.0, Requested(), Update(True, 1.0), statistics, tokens))
        writer.close()
    # The one behind TensorBoard's pages; the other, for scripts, keeps texts that a resumed run has written again.
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    events.Reload()
    texts = events.Tensors("tokens/text_summary")
    assert [event.step for event in texts] == [2, 4, 5]
    pages = [Page(markdown_to_safe_html(event.tensor_proto.string_val[0])) for event in texts]
    letters = [byte_level().decode([65 + first]) for first in (1, 3, 3)]
    for page, letter in zip(pages, letters, strict=True):
        assert page.before == f"Sample 7 of the run, from <b>books</b>: selected tokens are bold.{letter * 9}"
        assert [row[1] for row in page.rows[1:]] == [letter] * 9
