"""Lines of progress where no bar can be drawn."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from snscc_ray.core import display
from snscc_ray.core.display import Display


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> tuple[Display, io.StringIO]:
    """A display that prints each time it may."""
    monkeypatch.setattr(display, "_LINE_SECONDS", -1.0)
    text = io.StringIO()
    return Display(Console(file=text, width=100)), text


def places(text: io.StringIO) -> list[str]:
    return re.findall(r"\d+/\d+ \w+", text.getvalue())


def test_a_task_with_another_total_begins_anew(shown: tuple[Display, io.StringIO]) -> None:
    """Two tasks may have one name, such as features of images and then of a clean pass."""
    screen, text = shown
    screen.start("features", 1, 2, 0)
    screen.advance()
    screen.advance()
    screen.count("features", 1024, 5000)
    screen.count("features", 5000, 5000)
    assert places(text) == ["1/2 steps", "2/2 steps", "1024/5000 rows", "5000/5000 rows"]


def test_a_clean_pass_within_a_stage_is_shown_and_the_stage_goes_on(
    shown: tuple[Display, io.StringIO],
) -> None:
    screen, text = shown
    screen.start("boost", 2, 2, 0)
    screen.advance()
    screen.count("predictions", 10, 20)
    screen.count("predictions", 20, 20)
    screen.advance()
    screen.epoch("boost", 0, {})
    screen.count("predictions", 10, 20)  # its end is not told
    screen.advance()
    at = ["1/4 steps", "10/20 rows", "20/20 rows", "2/4 steps", "10/20 rows", "3/4 steps"]
    assert places(text) == at


@pytest.mark.parametrize("drawn", [False, True])
def test_a_task_within_a_stage_has_its_bar_beside_it(
    drawn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display, "_BAR_SECONDS", -1.0 if drawn else 1e9)
    text = io.StringIO()
    screen = Display(Console(file=text, width=120, force_terminal=True, color_system=None))
    screen.start("boost", 2, 2, 0)
    screen.count("predictions", 10, 20)
    screen.count("predictions", 15, 20)
    screen.advance()
    screen.finish()
    assert ("predictions" in text.getvalue()) == drawn
    assert "1/4 steps" in " ".join(text.getvalue().rpartition("boost")[2].split())


def test_the_end_of_all_is_shown_beside_the_end_of_a_stage(
    shown: tuple[Display, io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen, text = shown
    clock = [1000.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: clock[0])
    screen.expect(1100.0)
    screen.start("train", 1, 100, 0)
    for clock[0] in (1000.0, 1001.0, 1099.0):
        screen.advance(10)
    lines = [line.partition("ETA ")[2].strip() for line in text.getvalue().splitlines()]
    # Never less than the stage itself still takes.
    assert lines == ["-, of all 1:40", "0:08, of all 1:39", "5:46, of all 5:46"]


def test_what_has_no_total_is_counted(shown: tuple[Display, io.StringIO]) -> None:
    screen, text = shown
    tell = screen.finding("listing", "images")
    tell(10_000)
    tell(20_000)
    lines = text.getvalue().splitlines()
    assert lines == ["listing: 10,000 images so far", "listing: 20,000 images so far"]


def test_several_displays_share_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    console = Console(file=text, width=120, force_terminal=True, color_system=None)
    main = Display(console)
    one, two = (Display(console, name, main) for name in ("ae", "cc"))
    one.start("train", 2, 10, 0)
    two.start("train", 1, 30, 0)
    one.advance(5)
    two.advance(7)
    monkeypatch.setattr(display, "_IDLE_SECONDS", -1.0)
    main.idle("running: ae, cc")
    one.finish()
    before = text.getvalue()
    assert "ae train" in before and "cc train" in before and "running" not in before
    main.line("ae: done")
    two.advance()
    two.finish()
    after = text.getvalue()[len(before) :]
    assert "ae: done" in after and "8/30 steps" in " ".join(after.split())
    assert "ae train" not in after
    main.idle("running: cc")  # no bar is drawn now
    assert text.getvalue().endswith("running: cc\n")


def test_lines_say_whose_they_are(shown: tuple[Display, io.StringIO]) -> None:
    screen, text = shown
    other = Display(screen.console, "temi", screen)
    other.count("temi", 1, 5, "steps")
    other.line("warning")
    other.start("train", 1, 2, 0)
    other.advance()
    lines = [" ".join(line.split()[:3]) for line in text.getvalue().splitlines()]
    assert lines == ["temi 1/5 steps", "temi: warning", "temi train 1/2"]
