"""Text of tokens made harmless: it comes from corpora, and may hold markup, control characters, reversed writing."""

import html
import re
import unicodedata

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
