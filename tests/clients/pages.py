"""The pages of the documentation, and what stands in them to be run.

A block of a language in `COMMANDS` is run as it stands, a `console` block with `$ ` is a transcript. A comment above a
block says otherwise: `<!-- by hand: why -->`, or `<!-- file: name -->` for what others need.
"""

import re
import sys
from collections import namedtuple

from support import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = {
    "bash": ["bash", "-euo", "pipefail", "-c"],
    "python": [sys.executable, "-c"],
    "js": ["node", "--input-type=module", "-e"],
}
BLOCK = re.compile(r"(?:^<!-- (by hand|file): ([^\n]*) -->\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

Block = namedtuple("Block", "note about language text")


def blocks(page):
    """All fenced blocks of a page, in order."""
    return [Block(*found) for found in BLOCK.findall(page.read_text(encoding="utf-8"))]


def file(page, name):
    """What a page says is in the file of this name."""
    [found] = [block.text for block in blocks(page) if (block.note, block.about) == ("file", name)]
    return found


def transcript(text):
    """The commands of a transcript, each with what it printed."""
    parts = re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]
    return [re.fullmatch(r"((?:.*\\\n)*.*)\n((?s:.*))", part).groups() for part in parts]


def looks_like(expected):
    """A pattern for a text in which each `…` stands for something."""
    return re.compile(rf"\A{'.*?'.join(map(re.escape, expected.split('…')))}\Z", re.DOTALL)


def anchors(page):
    """What a link into a page may name."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
