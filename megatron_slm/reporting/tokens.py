"""Text of tokens made harmless: it comes from corpora, and may hold markup, control characters, reversed writing."""

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
    """Characters that show nothing, or change how others show, spelled out; newlines and tabs stay."""
    return "".join(_spelled(character) for character in text)


def escape_html(text: str) -> str:
    """Text for the inside of an HTML element or a quoted attribute."""
    return html.escape(visible(text))


def escape_markdown(text: str) -> str:
    """Text for one line of Markdown, a table's cell too: no character of it is markup or HTML.

    A newline becomes a return sign, a tab an arrow. Dialects differ in what a backslash escapes; all
    of them read character references.
    """
    line = visible(text).replace("\n", "⏎").replace("\t", "⇥")
    return _PUNCTUATION.sub(lambda found: f"&#{ord(found[0])};", line).replace("  ", " &#160;")


def _spelled(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in _INVISIBLE:
        return character
    return f"\\u{ord(character):04x}"


SHADES = (0.0, 0.5, 1.0, 2.0)
"""Excess loss, in nats, at which the shade deepens."""

STYLE = """
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; font: 15px/1.9 ui-monospace, "DejaVu Sans Mono", monospace }
.tokens span { padding: 1px 0 }
.tokens .x0 { color: #222 } .tokens .x1 { background: #fff3d6 } .tokens .x2 { background: #ffe0a3 }
.tokens .x3 { background: #ffc46b } .tokens .x4 { background: #ff9f40 }
.tokens .kept { font-weight: 700; text-decoration: underline 2px; text-underline-offset: 4px; color: #000 }
.tokens .none { color: #666; font-style: italic; opacity: 0.8 }
"""
"""CSS of `tokens_html` and `legend_html`."""


@dataclass(frozen=True)
class Token:
    """One token of a text.

    text       what it adds to the decoded text
    student    its loss under the student, in nats; None where it has none (a stream's first token)
    reference  its loss under the reference; None where there is none
    selected   it counts
    """

    text: str
    student: float | None = None
    reference: float | None = None
    selected: bool = False

    @property
    def excess(self) -> float | None:
        return None if self.student is None or self.reference is None else self.student - self.reference


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the decoded text, for any Hugging Face tokenizer.

    Of a character that is spelled in several tokens, the last one carries it and the others are
    empty. Time grows with the square of the length: for passages, not for corpora.
    """
    texts: list[str] = []
    shown = ""
    for end in range(1, len(ids) + 1):
        decoded = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        complete = decoded if end == len(ids) else decoded.rstrip("\ufffd")
        complete = complete if complete.startswith(shown) else shown
        texts.append(complete[len(shown) :])
        shown = complete
    return texts


def tokens_html(tokens: Iterable[Token]) -> str:
    """A passage as HTML, to be shown with `STYLE`; its text is escaped, its losses are in tooltips."""
    return f'<div class="tokens">{"".join(map(_span, tokens))}</div>'


def tokens_markdown(tokens: Iterable[Token]) -> str:
    """A passage as one line of Markdown, selected tokens bold."""
    line = "".join(_bold(token.text) if token.selected else escape_markdown(token.text) for token in tokens)
    return line.lstrip(" ")  # four of them would begin a block of code


def legend_html() -> str:
    """What the marks and shades mean."""
    names = ["excess loss up to 0", *(f"above {shade:g}" for shade in SHADES)]
    shades = " ".join(f'<span class="x{index}">{name}</span>' for index, name in enumerate(names))
    none = '<span class="none">without a loss</span>'
    return f'<div class="tokens"><span class="kept">selected</span> · not selected · {none} · {shades}</div>'


def _span(token: Token) -> str:
    if token.excess is None:
        return f'<span class="none">{escape_html(token.text)}</span>'
    text = escape_html(token.text).replace("\n", "⏎\n")
    kept = " kept" if token.selected else ""
    losses = f"student {token.student:.2f} - reference {token.reference:.2f} = {token.excess:.2f}"
    return f'<span class="x{_shade(token.excess)}{kept}" title="{losses}">{text}</span>'


def _shade(excess: float) -> int:
    """0 for the reference knowing no better than the student, up to `len(SHADES)`."""
    return bisect_right(SHADES, excess)


def _bold(text: str) -> str:
    """Markdown sets no bold around outer spaces."""
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
    """A whole page around `body`, which is HTML already; the title is text."""
    return _PAGE.format(title=escape_html(title), style=STYLE, body=body)


_COLUMNS = ("", "token", "student", "reference", "excess", "selected")
_SPACES = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥"})


def tokens_table(tokens: Sequence[Token]) -> str:
    """The passage as text, selected tokens bold, and below it a row a token: losses in nats.

    Whitespace is visible in the rows. A token that holds a part of a character has no text of its own.
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
