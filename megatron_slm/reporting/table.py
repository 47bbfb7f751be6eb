"""Tokens with their losses as a table, in the HTML that TensorBoard's Text tab lets through: no style, no attribute.

Raw HTML and not Markdown, for Markdown differs from one renderer to the next in what a backslash escapes.
"""

from collections.abc import Sequence

from megatron_slm.reporting.escaping import escape_html
from megatron_slm.reporting.tokens import Token

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
