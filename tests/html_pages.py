"""The pages that this package writes, as a browser's parser reads them."""

import re
from html.parser import HTMLParser

from minitune.report.html_report import html_report


class Page(HTMLParser):
    """The tags, attributes and texts of a page; the tags must be balanced.

    texts: those of elements except style and script.
    """

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(source)
        self.close()
        assert not self.open, f"open at the end: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in ("meta", "br", "wbr", "!doctype"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if not {"style", "script"} & set(self.open):
            self.texts.append(text)


# ---- reports


def words_of(*runs):
    """Return the texts of a report as one line."""
    return words_in(html_report(runs))


def words_in(source):
    """Return the texts of a markup as one line."""
    return re.sub(r"\s+", " ", " ".join(Page(source.replace("<wbr>", "")).texts))


def chart_of(source, title):
    """Return the markup of a chart."""
    charts = re.findall(r'<figure class="card chart.*?</figure>', source, re.DOTALL)
    return next(chart for chart in charts if f"<b>{title}</b>" in chart)


def curves_of(chart):
    """Return (steps, values, points) of each curve of a chart."""
    found = re.findall(r'd="M(.*?)" data-steps="(.*?)" data-values="(.*?)"', chart)
    return [
        (
            [float(step) for step in steps.split()],
            values.split(";"),
            [tuple(map(float, point.split())) for point in points.split("L")],
        )
        for points, steps, values in found
    ]
