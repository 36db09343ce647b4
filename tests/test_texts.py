"""Names that may hold anything, in what a person reads."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from snscc_ray.answers.report import page
from snscc_ray.texts import counted, in_markdown, say, shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb", r"a\nb"),
        ("\x1b[31m", r"\x1b[31m"),
        ("\u202egnp", r"\u202egnp"),
        ("\udce9", r"\udce9"),
        ("\x9b", r"\x9b"),
        ("café 😀 日本\u3000", "café 😀 日本\u3000"),
    ],
)
def test_what_is_not_seen_is_escaped(text: str, expected: str) -> None:
    assert shown(text) == expected


def test_a_cell_of_markdown_stays_one_cell() -> None:
    assert in_markdown("a|b\n`c` <d> *e* \\") == r"a\|b \`c\` \<d> \*e\* \\"


@pytest.mark.parametrize(
    ("number", "words", "expected"),
    [
        (0, ("shard",), "0 shards"),
        (1, ("shard",), "1 shard"),
        (1, ("pass", "passes"), "1 pass"),
        (2, ("pass", "passes"), "2 passes"),
        (1200, ("image",), "1,200 images"),
    ],
)
def test_one_thing_is_in_the_singular(number: int, words: tuple[str, ...], expected: str) -> None:
    assert counted(number, *words) == expected


@pytest.mark.parametrize("terminal", [True, False])
def test_a_line_is_said_as_it_stands(terminal: bool) -> None:
    told = io.StringIO()
    console = Console(file=told, force_terminal=terminal, color_system="truecolor", width=20)
    say(console, "[red]x[/red] :cat: 12 'y' a long line that is not folded \x1b]0;t\x07")
    assert told.getvalue() == (
        "[red]x[/red] :cat: 12 'y' a long line that is not folded \\x1b]0;t\\x07\n"
    )


def test_a_page_shows_escapes_and_leaves_what_it_is_given() -> None:
    given = {"images": [{"id": "a\u202eb"}], "clusters": 2}
    assert page._shown(given) == {"images": [{"id": r"a\u202eb"}], "clusters": 2}
    assert given["images"] == [{"id": "a\u202eb"}]
