"""A page in one file: no script, nothing fetched."""

from megatron_slm.reporting.escaping import escape_html
from megatron_slm.reporting.tokens import STYLE

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
