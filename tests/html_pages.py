"""The pages that this package writes, as a browser's parser reads them."""

from html.parser import HTMLParser


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
