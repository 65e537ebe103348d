"""One HTML page with the summary of a dataset and its first samples.

The page needs no network and no script. It follows the light or dark scheme of the reader. Every
text of the data is escaped. Few bytes of markup a token keep the page small: a trained-on stretch
is a <mark>, a special token is a <u>, and every second token is an <i>, which has another shade.
"""

import html
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

from minitune.data.inspector.dataset_summary import DatasetSummary
from minitune.data.inspector.page_parts import escape, histogram_table, number_card, page
from minitune.data.inspector.summary_text import (
    BAD_TITLE,
    HISTOGRAM_TITLE,
    Row,
    bad_records,
    bar_label,
    fault_rows,
    total_rows,
)
from minitune.data.inspector.token_display import Piece, ShownSample

MAX_SAMPLE_BYTES = 1_900_000  # of all samples together, markup included

STYLE = """
td.number {
  color: var(--quiet); text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap;
}
td.detail { color: var(--quiet); overflow-wrap: anywhere; width: 100%; }
th { white-space: nowrap; }
tr.fault th, tr.fault td.number { color: var(--fault); font-weight: 600; }
tr.fault { background: var(--fault-page); }
tr.fault td.detail { color: var(--text); }
.bad { font-size: .875rem; overflow-wrap: anywhere; }
.bad p { margin: 0; padding: .6rem 1rem; }
.bad p + p { border-top: 1px solid var(--line); }
.sample { margin: 0 0 1rem; }
.sample header {
  display: flex; flex-wrap: wrap; gap: 0 1rem; align-items: baseline; padding: .6rem 1rem;
  border-bottom: 1px solid var(--line); font-size: .85rem;
}
.sample header b { font-size: 1rem; }
.share { height: 3px; background: var(--accent); }
i { font-style: normal; background: var(--shade); }
mark {
  color: var(--trained-text); background: var(--trained); border-bottom: 2px solid var(--accent);
}
mark i { background: var(--trained-2); }
u { text-decoration: none; color: var(--special); }
mark u { color: inherit; font-weight: 700; }
em { display: block; margin: .5rem 0; color: var(--fault); font-style: normal; }
@media (max-width: 40rem) {
  .bad p { padding: .5rem .75rem; }
  .sample header { padding: .5rem .75rem; }
  .faults tr { display: grid; grid-template-columns: 1fr auto; }
  .faults td.detail { grid-column: 1 / -1; padding-top: 0; }
  .faults td.detail:empty { display: none; }
}
"""

LEGEND = (
    '<p class="legend"><span><mark>trained on</mark></span><span>not trained on</span>'
    "<span><u>special token</u></span><span>⏎ line break</span>"
    "<span>each <i>second</i> token is <i>shaded</i></span></p>"
)


def html_page(
    title: str, subtitle: str, summary: DatasetSummary, samples: Sequence[ShownSample]
) -> str:
    """Return the page as a text in UTF-8.

    title, subtitle: the names of the data and of the model.
    samples: the samples to show. Long ones lose their middle if the page would pass 2 MB.
    """
    limit = _fair_limit([sum(_markup_sizes(sample.pieces)) for sample in samples])
    body = [
        f'<h1>{escape(title)}</h1><div class="quiet">{escape(subtitle)}</div>',
        *_totals(total_rows(summary)),
        f"<h2>{HISTOGRAM_TITLE.capitalize()}</h2>",
        '<div class="card">',
        *histogram_table([(bar_label(bar.first, bar.last), bar.count) for bar in summary.bars]),
        "</div>",
        "<h2>Checks</h2>",
        *_table(fault_rows(summary)),
        *_bad_records(summary),
    ]
    if samples:
        body += [f"<h2>The first {len(samples):,} samples</h2>", LEGEND]
    for sample in samples:
        body += _sample(sample, limit)
    return page(title, STYLE, body)


def _totals(rows: Sequence[Row]) -> Iterator[str]:
    yield '<dl class="totals">'
    for row in rows:
        number = f"{row.number:,}", html.escape(row.detail)
        yield number_card(row.label.capitalize(), number)
    yield "</dl>"


def _table(rows: Sequence[Row]) -> Iterator[str]:
    yield '<div class="card"><table class="faults">'
    for row in rows:
        kind = ' class="fault"' if row.is_fault else ""
        yield f'<tr{kind}><th>{row.label}</th><td class="number">{row.number:,}</td>'
        yield f'<td class="detail">{html.escape(row.detail)}</td></tr>'
    yield "</table></div>"


def _bad_records(summary: DatasetSummary) -> Iterator[str]:
    if summary.report.bad.count:
        yield f'<h2>{BAD_TITLE.capitalize()}</h2><div class="card bad">'
        for line in bad_records(summary.report.bad):
            yield f"<p>{html.escape(line)}</p>"
        yield "</div>"


# ---- samples


def _sample(sample: ShownSample, limit: int) -> Iterator[str]:
    """Yield a sample as a card.

    limit: bytes of its markup; a longer sample loses its middle.
    """
    share = f"{100 * sample.trained / sample.tokens:.1f}%"
    yield f'<div class="card sample"><header><b>Sample {sample.number:,}</b>'
    yield f'<span class="mono">{escape(sample.origin)}</span>'
    yield f'<span class="quiet">{sample.facts}</span></header>'
    yield f'<div class="share" style="width:{share}"></div>'
    pieces = sample.pieces
    sizes = _markup_sizes(pieces)
    if sum(sizes) <= limit:
        yield f"<pre>{_tokens(pieces)}</pre></div>"
        return
    begin = bisect_right(list(accumulate(sizes)), limit // 2)
    end = len(pieces) - bisect_right(list(accumulate(reversed(sizes))), limit // 2)
    hidden = pieces[begin:end]
    trained = sum(len(piece.ids) for piece in hidden if piece.trained)
    tokens = sum(len(piece.ids) for piece in hidden)
    gap = f"<em>{tokens:,} tokens are left out of this page, {trained:,} of them trained on</em>"
    yield f"<pre>{_tokens(pieces[:begin])}{gap}{_tokens(pieces[end:])}</pre></div>"


def _fair_limit(sizes: Sequence[int]) -> int:
    """Return the largest number of bytes that a sample may take. Short ones leave room to others.

    sizes: bytes of each sample's markup.
    """
    room, limit = MAX_SAMPLE_BYTES, 0
    for i, size in enumerate(sorted(sizes)):
        limit = room // (len(sizes) - i)
        if size > limit:
            return limit
        room -= size
    return max(sizes, default=limit)


def _markup_sizes(pieces: Sequence[Piece]) -> list[int]:
    return [len(part.encode()) for part in _markup(pieces)]


def _tokens(pieces: Sequence[Piece]) -> str:
    return "".join(_markup(pieces))


def _markup(pieces: Sequence[Piece]) -> Iterator[str]:
    """Yield each piece as markup: <mark> around trained-on stretches, <i> for every second one."""
    for i, piece in enumerate(pieces):
        text = html.escape(piece.shown, quote=False)
        text = f"<u>{text}</u>" if piece.special else text
        text = f"<i>{text}</i>" if i % 2 else text
        begins = piece.trained and (i == 0 or not pieces[i - 1].trained)
        ends = piece.trained and (i == len(pieces) - 1 or not pieces[i + 1].trained)
        yield "<mark>" * begins + text + "</mark>" * ends
