"""Tokens as HTML and Markdown, with escaped text: text of corpora may hold markup and control characters."""

import html
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

_INVISIBLE = ("Cc", "Cf", "Co", "Cs", "Zl", "Zp")
_PUNCTUATION = re.compile(r"[!-/:-@\[-`{-~]")


def visible(text: str) -> str:
    """Return text with invisible and direction-changing characters escaped; newlines and tabs stay."""
    return "".join(_spelled(character) for character in text)


def escape_html(text: str) -> str:
    """Return text escaped for an HTML element or a quoted attribute."""
    return html.escape(visible(text))


def escape_markdown(text: str) -> str:
    """Return text for one line of Markdown, such as a table's cell, in which no character is markup or HTML.

    A newline becomes a return sign, and a tab an arrow. Character references are used because all dialects read them;
    dialects differ in what a backslash escapes.
    """
    line = visible(text).replace("\n", "⏎").replace("\t", "⇥")
    return _PUNCTUATION.sub(lambda found: f"&#{ord(found[0])};", line).replace("  ", " &#160;")


def _spelled(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in _INVISIBLE:
        return character
    return f"\\u{ord(character):04x}"


SHADES = (0.0, 0.5, 1.0, 2.0)
"""The excess losses, in nats, at which the shade deepens."""

STYLE = """
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; font: 15px/1.9 ui-monospace, "DejaVu Sans Mono", monospace }
.tokens span { padding: 1px 0 }
.tokens .x0 { color: #222 } .tokens .x1 { background: #fff3d6 } .tokens .x2 { background: #ffe0a3 }
.tokens .x3 { background: #ffc46b } .tokens .x4 { background: #ff9f40 }
.tokens .kept { font-weight: 700; text-decoration: underline 2px; text-underline-offset: 4px; color: #000 }
.tokens .none { color: #666; font-style: italic; opacity: 0.8 }
"""
"""The CSS of `tokens_html` and `legend_html`."""


@dataclass(frozen=True)
class Token:
    """A token of a text.

    text       what the token adds to the decoded text
    student    its loss under the student, in nats; None if it has none, such as the first token of a stream
    reference  its loss under the reference, in nats; None if it has none
    selected   whether the token counts toward the loss
    """

    text: str
    student: float | None = None
    reference: float | None = None
    selected: bool = False

    @property
    def excess(self) -> float | None:
        return None if self.student is None or self.reference is None else self.student - self.reference


def token_texts(tokenizer: Any, ids: Sequence[int], known: dict[tuple[int, ...], str] | None = None) -> list[str]:
    """Return what each token adds to the decoded text, for any Hugging Face tokenizer.

    The last token of a character that spans several tokens carries the character; the others are empty.

    Args:
        tokenizer: a fast tokenizer.
        ids: tokens of one text.
        known: texts of pieces that were decoded before. Pass the same dict for many texts, which repeat each other.
    """
    known = {} if known is None else known

    def decode(first: int, last: int) -> str:
        piece = tuple(ids[first:last])
        if piece not in known:
            known[piece] = tokenizer.decode(piece, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return known[piece]

    texts: list[str] = []
    # A token is decoded behind the piece before it, because some tokenizers drop the space before a first token.
    before = done = 0
    for end in range(1, len(ids) + 1):
        shown, now = decode(before, done), decode(before, end)
        is_complete = end == len(ids) or not now.endswith("\ufffd")
        texts.append(now[len(shown) :] if is_complete and now.startswith(shown) else "")
        if is_complete:
            before, done = done, end
    return texts


def tokens_html(tokens: Iterable[Token]) -> str:
    """Return a passage as HTML for a page with `STYLE`; the text is escaped, and the losses are in tooltips."""
    return f'<div class="tokens">{"".join(map(_span, tokens))}</div>'


def tokens_markdown(tokens: Iterable[Token]) -> str:
    """Return a passage as one line of Markdown with the selected tokens in bold."""
    line = "".join(_bold(token.text) if token.selected else escape_markdown(token.text) for token in tokens)
    return line.lstrip(" ")  # four spaces would begin a block of code


def legend_html() -> str:
    """Return a legend of the marks and shades as HTML."""
    names = ["excess loss up to 0", *(f"above {shade:g}" for shade in SHADES)]
    shades = " ".join(f'<span class="x{index}">{name}</span>' for index, name in enumerate(names))
    none = '<span class="none">without a loss</span>'
    return f'<div class="tokens"><span class="kept">selected</span> · not selected · {none} · {shades}</div>'


def _span(token: Token) -> str:
    if token.excess is None:
        return f'<span class="none">{escape_html(token.text)}</span>'
    text = escape_html(token.text).replace("\n", "⏎\n")
    shade = bisect_right(SHADES, token.excess)
    kept = " kept" if token.selected else ""
    losses = f"student {token.student:.2f} - reference {token.reference:.2f} = {token.excess:.2f}"
    return f'<span class="x{shade}{kept}" title="{losses}">{text}</span>'


def _bold(text: str) -> str:
    """Return bold Markdown; outer spaces stay outside, because Markdown allows none inside the marks."""
    inner = text.strip(" ")
    if not inner:
        return text
    before, after = text.split(inner, 1)
    return f"{before}**{escape_markdown(inner)}**{after}"


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light }}
body {{ max-width: 62rem; margin: 2rem auto; padding: 0 1rem; background: #fff; color: #111;
       font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif }}
section {{ margin: 1.2rem 0; padding: .8rem 1rem; border: 1px solid #ccc; border-radius: 6px; break-inside: avoid }}
h3 {{ margin: 0 0 .5rem; font-size: 1rem }}
{style}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def page_html(title: str, body: str) -> str:
    """Return a complete page. `body` is HTML; `title` is text."""
    return _PAGE.format(title=escape_html(title), style=STYLE, body=body)


_COLUMNS = ("", "token", "student", "reference", "excess", "selected")
_SPACES = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥"})


def tokens_table(tokens: Sequence[Token]) -> str:
    """Return a passage as HTML text with the selected tokens in bold, and a table of the losses in nats.

    The rows make whitespace visible. A token that holds only a part of a character has no text of its own.
    """
    rows = "".join(_row(number, token) for number, token in enumerate(tokens))
    head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
    text = "".join(map(_marked, tokens))
    return f"<p>{text}</p>\n\n<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _marked(token: Token) -> str:
    text = escape_html(token.text).replace("\n", "⏎<br>").replace("\t", "⇥")
    return f"<strong>{text}</strong>" if token.selected and text else text


def _row(number: int, token: Token) -> str:
    text = escape_html(token.text.translate(_SPACES)) or "<em>part of the next</em>"
    losses = (token.student, token.reference, token.excess)
    figures = ["" if loss is None else f"{loss:.2f}" for loss in losses]
    cells = (str(number), f"<code>{text}</code>", *figures, "✓" if token.selected else "")
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
