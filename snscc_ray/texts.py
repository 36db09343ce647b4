"""Text for people: numbers of things, and names of files and classes, which may hold anything."""

from __future__ import annotations

import re

from rich.console import Console

# Control characters, lone halves of a pair, and marks that turn the direction of reading.
_UNSEEN = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
# What means something in the middle of a line of Markdown, in a table or out of it.
_MARKDOWN = re.compile(r"[\\`*<\[|&~]")


def shown(text: str) -> str:
    """The text on one line; what would move a cursor or turn the reading becomes an escape."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def in_markdown(text: str) -> str:
    """The text as it stands, for a table or a sentence of Markdown."""
    return _MARKDOWN.sub(r"\\\g<0>", shown(" ".join(text.split())))


def counted(number: int, what: str, many: str | None = None) -> str:
    """A number and what it counts, in the singular or plural: `1 shard`, `1,200 shards`."""
    return f"{number:,} {what if number == 1 else many or f'{what}s'}"


def say(console: Console, text: str) -> None:
    """Print one line. Nothing in it is markup or an emoji's name: a file may be called so."""
    console.print(shown(text), highlight=False, markup=False, emoji=False, soft_wrap=True)
