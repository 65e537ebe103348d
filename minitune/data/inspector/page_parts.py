"""Parts of every HTML page that this package writes: its frame, its look, cards and bars.

A page needs no network, and it follows the light or dark scheme of the reader. Texts of unknown
origin go through `escape`.
"""

import html
from collections.abc import Iterable, Iterator, Sequence

from minitune.config.visible_text import on_one_line

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f7f7f5; --card: #ffffff; --line: #e3e3de; --text: #1d1f21; --quiet: #666a70;
  --accent: #1f7a3f; --trained: #cdeed6; --trained-2: #b2e2bf; --trained-text: #0c2e17;
  --shade: #efefeb; --special: #7c3aad; --fault: #9a5b00; --fault-page: #fdf1dc;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #121416; --card: #1a1d20; --line: #2d3136; --text: #e7e9eb; --quiet: #989ea6;
    --accent: #59c07b; --trained: #1d4a2d; --trained-2: #27603b; --trained-text: #e3f6e8;
    --shade: #25292d; --special: #c79bec; --fault: #efb45a; --fault-page: #33280f;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 68rem;
  background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
h1 { margin: 0; font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .75rem; font-size: 1.1rem; }
.quiet { color: var(--quiet); }
.mono, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
.totals {
  display: grid; grid-template-columns: repeat(3, 1fr); gap: .75rem; margin: 1.5rem 0 0;
}
.totals .card { padding: .8rem 1rem; }
dt { color: var(--quiet); font-size: .85rem; }
dd { margin: 0; font-variant-numeric: tabular-nums; }
dd b { display: block; font-size: 1.5rem; font-weight: 600; line-height: 1.3; }
dd span { color: var(--quiet); font-size: .85rem; overflow-wrap: anywhere; }
table { width: 100%; border-collapse: collapse; }
th, td { padding: .45rem 1rem; text-align: left; vertical-align: top; font-weight: 400; }
tr + tr { border-top: 1px solid var(--line); }
.bars { margin: .6rem 0; font-size: .9rem; }
.bars th {
  text-align: right; color: var(--quiet); font-variant-numeric: tabular-nums; white-space: nowrap;
}
.bars tr { border: 0; }
.bars tr > * { padding-top: .1rem; padding-bottom: .1rem; }
.bars td { width: 100%; padding-left: 0; white-space: nowrap; font-variant-numeric: tabular-nums; }
.bar {
  display: inline-block; height: .8rem; margin-right: .5rem; border-radius: 0 .2rem .2rem 0;
  background: var(--accent); vertical-align: -.1rem;
}
.legend {
  display: flex; flex-wrap: wrap; gap: .3rem 1.25rem; margin: 0 0 .75rem; font-size: .85rem;
}
pre {
  margin: 0; padding: .8rem 1rem 1rem; color: var(--quiet); font-size: .875rem; line-height: 1.65;
  white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4;
}
@media (max-width: 40rem) {
  body { padding: 1.5rem .75rem 3rem; }
  .totals { grid-template-columns: 1fr 1fr; gap: .5rem; }
  .totals .card { padding: .6rem .75rem; }
  pre { padding: .6rem .75rem .8rem; }
  th, td { padding: .45rem .6rem; }
}
"""


def escape(text: str) -> str:
    """Return a text of unknown origin as markup on one line, with signs for hidden characters."""
    return html.escape(on_one_line(text))


def page(title: str, style: str, body: Iterable[str], head: str = "") -> str:
    """Return a whole page.

    title: a text, not markup.
    style: the rules that the page adds to STYLE.
    body, head: markup.
    """
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">' + head,
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head><body>",
        *body,
        "</body></html>",
        "",
    ]
    return "\n".join(parts)


def number_card(label: str, *numbers: tuple[str, str]) -> str:
    """Return a card of a <dl class="totals">.

    label: markup.
    numbers: (number, detail), both markup; the detail may be empty.
    """
    shown = (
        f"<b>{number}</b>{f'<span>{detail}</span>' * bool(detail)}" for number, detail in numbers
    )
    return f'<div class="card"><dt>{label}</dt>\n<dd>{"".join(shown)}</dd></div>'


def histogram_table(bars: Sequence[tuple[str, int]]) -> Iterator[str]:
    """Yield a table with a horizontal bar for each (label, count)."""
    most = max((count for _, count in bars), default=0)
    yield '<table class="bars">'
    for label, count in bars:
        width = f"{80 * count / max(1, most):.2f}%"
        yield f"<tr><th>{label}</th>"
        yield f'<td><span class="bar" style="width:{width}"></span>{count:,}</td></tr>'
    yield "</table>"
