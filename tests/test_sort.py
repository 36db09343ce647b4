"""Images of a run in a folder per group, and everything back where it was."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from snscc_ray import cli
from snscc_ray.answers.journal import UNDO_FILE
from snscc_ray.answers.names import Naming, save
from snscc_ray.answers.places import file_names, folder_names
from snscc_ray.cli import options
from tests.test_cli import PHOTOS, Snscc, content, environment, refused, sets, start

IMAGES = 42


@pytest.fixture
def snscc(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Snscc:
    monkeypatch.setattr(options.out, "width", 160)
    return Snscc(capsys)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in `run`, of the files in `photos`: the same names in three folders."""
    place = tmp_path_factory.mktemp("sort")
    for number in range(IMAGES):
        folder = place / "photos" / "abc"[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number // 3:02}.png")
    words = ["snscc", "run", "images", "--data", str(place / "photos"), *sets(*PHOTOS)]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(sys, "argv", [*words, "--out", str(place / "run")])
        cli.main()
    assert exit.value.code == 0
    return place


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil; the run knows the images by their present place."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    recipe = tmp_path / "run" / "recipe.json"
    recipe.write_text(recipe.read_text().replace(str(trained), str(tmp_path)))
    return tmp_path


State = dict[str, tuple[int, int, int, bytes | str] | None]


def state(folder: Path) -> State:
    """Inode, size, time of change and content of each file, and the folders."""
    found: State = {}
    for path in sorted(folder.rglob("*")):
        name, at = str(path.relative_to(folder)), path.lstat()
        if path.is_symlink():
            found[name] = (0, 0, 0, os.readlink(path))
        elif path.is_dir():
            found[name] = None
        else:
            found[name] = (at.st_ino, at.st_size, at.st_mtime_ns, path.read_bytes())
    return found


def images_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*.png") if p.is_file())


@pytest.mark.parametrize("action", ["--link", "--copy", "--move"])
def test_sorted_and_put_back(action: str, place: Path, snscc: Snscc) -> None:
    photos, into = place / "photos", place / "new" / "sorted"
    before = state(photos)
    told = snscc("sort", place / "run", "--into", into, action)
    assert told.status == 0 and f"{IMAGES} images would be" in told.out
    assert not into.parent.exists() and state(photos) == before
    assert f"snscc sort {place / 'run'} --into {into} {action} --yes" in told.out
    done = snscc("sort", place / "run", "--into", into, action, "--yes")
    assert done.status == 0, done
    assigned = pq.read_table(place / "run" / "assignments.parquet").to_pylist()
    sorted_ = images_of(into)
    assert len(sorted_) == IMAGES
    inodes = {before[row["id"]][0]: row for row in assigned}  # type: ignore[index]
    contents = {before[row["id"]][3]: row for row in assigned}  # type: ignore[index]
    for file in sorted_:
        row = contents[file.read_bytes()]
        assert file.parent.name == f"cluster {row['cluster']}"
        assert (file.stat().st_ino in inodes) == (action != "--copy")
        assert file.name in (row["id"].replace("/", "_"), row["id"].partition("/")[2])
    assert len(images_of(photos)) == (0 if action == "--move" else IMAGES)
    back = snscc("sort", "--undo", into)
    says = {"--link": "links removed", "--copy": "copies removed", "--move": "files put back"}
    assert back.status == 0 and f"{IMAGES} {says[action]}" in back.out, back
    assert state(photos) == before
    assert not into.parent.exists()


def test_doubtful_ones_duplicates_and_names(place: Path, snscc: Snscc) -> None:
    assigned = pq.read_table(place / "run" / "assignments.parquet").to_pylist()
    save(Naming(("a/b", "a:b", "a/b")), place / "run")
    names = ("a/b", "a:b", "a/b")
    sure = {  # clusters with one name are one group
        row["id"]: row["confidence"]
        + row["second_confidence"] * (names[row["cluster"]] == names[row["second"]])
        for row in assigned
    }
    middle = sorted(sure.values())[IMAGES // 2]
    aside = assigned[0]["id"]
    (place / "d.csv").write_text(f"group;id;keep\n0;{assigned[1]['id']};yes\n0;{aside};no\n")
    asked = ("sort", place / "run", "--into", place / "s", "--min-confidence", middle, "--yes")
    done = snscc(*asked, "--duplicates", place / "d.csv")
    assert done.status == 0 and "group 'a/b' is the folder 'a_b'" in done.out
    folder = {"a/b": "a_b", "a:b": "a_b (2)"}
    expected = {}
    for row in assigned:
        group = folder[("a/b", "a:b", "a/b")[row["cluster"]]]
        if row["id"] == aside:
            group = f"duplicates/{group}"
        elif sure[row["id"]] < middle:
            group = f"doubtful/{group}"
        expected[(place / "photos" / row["id"]).stat().st_ino] = group
    found = {
        p.stat().st_ino: str(p.parent.relative_to(place / "s")) for p in images_of(place / "s")
    }
    assert found == expected
    assert any(group.startswith("doubtful") for group in expected.values())
    snscc("sort", "--undo", place / "s")
    assert snscc("sort", place / "run", "--into", place / "s", "--by", "cluster").out.count(
        "cluster "
    )
    (place / "d.csv").write_text("group,id,keep\n0,other.png,no\n")
    refused(snscc(*asked, "--duplicates", place / "d.csv"), "line 2", "other.png")
    (place / "d.csv").write_text(f"Group,Id,KEEP\n0,{assigned[1]['id']},No\n0,{aside},no\n")
    refused(snscc(*asked, "--duplicates", place / "d.csv"), "group 0 keeps none of its images")


def test_moved_images_are_told_where_they_are_needed(place: Path, snscc: Snscc) -> None:
    run, into = place / "run", place / "s"
    asked = ("sort", run, "--into", into, "--move", "--yes")
    assert snscc(*asked).status == 0
    undo = f"snscc sort --undo {into}"
    for command in (
        ("report", run),
        ("duplicates", run, "-o", place / "d.csv"),
        ("similar", run, next(into.rglob("*.png")), "-o", place / "page.html"),
        ("sort", run, "--into", place / "t"),
    ):
        refused(snscc(*command), f"were moved to {into}", undo)
    assert snscc("sort", "--undo", into).status == 0
    assert snscc("sort", run, "--into", place / "t").status == 0


@pytest.mark.parametrize("action", ["--link", "--copy", "--move"])
def test_what_came_and_went_is_left_out_and_named(action: str, place: Path, snscc: Snscc) -> None:
    photos = place / "photos"
    (photos / "a" / "03.png").unlink()
    shutil.copyfile(photos / "b" / "01.png", photos / "b" / "02.png")  # changed
    shutil.copy2(photos / "c" / "01.png", place / "same.png")
    os.replace(place / "same.png", photos / "c" / "01.png")
    os.utime(photos / "c" / "01.png")  # another time, but the same picture
    Image.new("RGB", (8, 8)).save(photos / "new.png")
    before = state(photos)
    asked = ("sort", place / "run", "--into", place / "s", action)
    for more in ((), ("--yes",)):
        done = snscc(*asked, *more)
        assert done.status == 1
        assert "left out a/03.png: it is gone" in done.out
        assert "left out b/02.png: it was changed since the run" in done.out
        assert "2 images left out" in done.out and "1 image file in" in done.out
    assert len(images_of(place / "s")) == IMAGES - 2
    assert (photos / "new.png").exists() and (photos / "b" / "02.png").exists()
    assert snscc("sort", "--undo", place / "s").status == 0
    assert state(photos) == before


def test_undo_never_overwrites_nor_removes_the_last_one(place: Path, snscc: Snscc) -> None:
    photos, into = place / "photos", place / "s"
    asked = ("sort", place / "run", "--into", into, "--yes")
    # Moved: a new file is at the old place, one was renamed, one was edited.
    assert snscc(*asked, "--move").status == 0
    lines = [json.loads(line) for line in (into / UNDO_FILE).read_text().splitlines()]
    new, renamed, edited = [line for line in lines if "to" in line][:3]
    Path(new["from"]).write_bytes(b"new")
    (into / renamed["to"]).rename(into / "mine.png")
    (into / edited["to"]).write_bytes(b"edited")
    done = snscc("sort", "--undo", into)
    assert done.status == 1 and f"{IMAGES - 2} files put back" in done.out
    assert f"there is another file at {new['from']}" in done.out
    assert "it is no longer at" in done.out and "was changed since, and went back" in done.out
    assert Path(new["from"]).read_bytes() == b"new" and (into / new["to"]).exists()
    assert Path(edited["from"]).read_bytes() == b"edited"
    # It can be repeated, once the cause is gone.
    Path(new["from"]).unlink()
    (into / "mine.png").rename(into / renamed["to"])
    assert snscc("sort", "--undo", into).status == 0 and not into.exists()
    assert len(images_of(photos)) == IMAGES


@pytest.mark.parametrize("action", ["--link", "--copy"])
def test_undo_keeps_what_has_no_original(action: str, place: Path, snscc: Snscc) -> None:
    into = place / "s"
    assert snscc("sort", place / "run", "--into", into, "--yes", action).status == 0
    lines = [json.loads(line) for line in (into / UNDO_FILE).read_text().splitlines()]
    gone, led, edited = [line for line in lines if "to" in line][:3]
    Path(gone["from"]).unlink()
    Path(led["from"]).unlink()
    Path(led["from"]).symlink_to(into / led["to"])  # leads back to the only one
    (into / edited["to"]).unlink()
    (into / edited["to"]).write_bytes(b"edited")
    kept = (into / gone["to"]).read_bytes()
    (into / "mine.txt").write_text("mine")
    done = snscc("sort", "--undo", into)
    assert done.status == 1 and "so this is the only one left" in done.out
    assert done.out.count("left " + str(into)) == 3
    assert (into / gone["to"]).read_bytes() == kept
    assert Path(led["from"]).read_bytes()
    assert (into / edited["to"]).read_bytes() == b"edited"
    assert (into / "mine.txt").exists() and len(images_of(into)) == 3


@pytest.mark.parametrize("action", ["--link", "--copy", "--move"])
def test_another_disk(action: str, place: Path, snscc: Snscc) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == place.stat().st_dev:
        pytest.skip("there is no second disk here")
    into = other / f"snscc-test-{os.getpid()}"
    before = content(place / "photos")
    try:
        done = snscc("sort", place / "run", "--into", into, "--yes", action)
        assert done.status == 0 and len(images_of(into)) == IMAGES
        assert ("another disk" in done.out) == (action != "--copy")
        assert all(p.is_symlink() == (action == "--link") for p in images_of(into))
        assert snscc("sort", "--undo", into).status == 0
        assert content(place / "photos") == before and not into.exists()
    finally:
        shutil.rmtree(into, ignore_errors=True)


KILLED = """
import os, signal, sys
from snscc_ray.answers import carry, journal
from snscc_ray.cli import main
carry._BATCH, left = 8, [int(os.environ["AFTER"])]
name = os.environ["CALL"]
real = getattr(os, name)
def call(*words, **named):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*words, **named)
real_carry = carry.carry_out
def carried(*words):
    setattr(os, name, call)
    return real_carry(*words)
carry.carry_out = carried
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "call", "after"),
    [
        ("link", "link", 13), ("copy", "link", 13), ("copy", "unlink", 13), ("move", "link", 13),
        ("move", "unlink", 0), ("move", "unlink", 29), ("link", "fsync", 2), ("move", "mkdir", 1),
    ],
)  # fmt: skip
def test_a_kill_at_any_moment_is_undone(
    action: str, call: str, after: int, place: Path, snscc: Snscc
) -> None:
    before, into = state(place / "photos"), place / "s"
    words = ["sort", str(place / "run"), "--into", str(into), f"--{action}", "--yes"]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *words],
        env={**environment(), "CALL": call, "AFTER": str(after)},
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    refused(snscc(*words), f"`snscc sort --undo {into}`")
    done = snscc("sort", "--undo", into)
    assert done.status == 0, done
    assert state(place / "photos") == before and not into.exists()


@pytest.mark.slow
def test_a_disk_that_fills_up(place: Path, snscc: Snscc) -> None:
    """A file of noise is larger than a process may write; the undo file is right."""
    before, into = state(place / "photos"), place / "s"
    big = max(images_of(place / "photos"), key=lambda p: p.stat().st_size).stat().st_size
    done = start(
        "sort", place / "run", "--into", into, "--copy", "--yes", file_limit=max(4096, big)
    )
    refused(done, "File too large after 0 of 42 files", f"snscc sort --undo {into}")
    assert all(p.stat().st_size for p in images_of(into))
    assert snscc("sort", "--undo", into).status == 0
    assert state(place / "photos") == before and not into.exists()


def test_targets_that_are_refused(place: Path, snscc: Snscc) -> None:
    run, photos = place / "run", place / "photos"
    full = place / "full"
    full.mkdir()
    (full / "x").touch()
    for into, says in (
        (photos, "in the folder of the images"), (photos / "a" / "new", "in the folder of"),
        (full, "is not empty"), (place / "full" / "x", "is a file"), (place, "is not empty"),
    ):  # fmt: skip
        before = content(place)
        for more in ((), ("--yes",)):
            refused(snscc("sort", run, "--into", into, *more), says)
        assert content(place) == before
    (place / "way").symlink_to(photos)
    refused(snscc("sort", run, "--into", place / "way" / "new"), "in the folder of the images")
    refused(snscc("sort", "--undo", full), f"holds no {UNDO_FILE}")
    refused(snscc("sort", run), "--into")
    refused(snscc("sort", run, "--into", place / "s", "--copy", "--move"), "exclude each other")
    refused(snscc("sort", run, "--into", place / "s", "--by", "x"), "name or cluster")


def test_a_tampered_undo_file_touches_nothing_outside(place: Path, snscc: Snscc) -> None:
    into = place / "s"
    assert snscc("sort", place / "run", "--into", into, "--yes").status == 0
    file = into / UNDO_FILE
    file.write_text(file.read_text().replace('"to": "', '"to": "../photos/', 1))
    before = content(place)
    refused(snscc("sort", "--undo", into), "outside of its folder")
    assert content(place) == before


def test_folders_have_valid_names_and_none_is_used_twice() -> None:
    labels = ["cats", "Cats", "a/b", "a:b", "a_b", "..", "", " ", ".x", "-rf", "~", "CON",
              "nul.txt", "v1.5", "V1.5", "Duplicates", "doubtful", "x" * 400, "🐟" * 100,
              "e\u0301", "\u00e9", "end. ",
              "a\nb", "\u202eevil", "👩\u200d🚀"]  # fmt: skip
    found = folder_names(labels, ("duplicates", "doubtful"))
    names = list(found.values())
    assert len({name.casefold() for name in names}) == len(labels) == len(names)
    assert (found["cats"], found["Cats"]) == ("cats", "Cats (2)")
    assert (found["a/b"], found["a:b"], found["a_b"]) == ("a_b", "a_b (2)", "a_b (3)")
    assert found["👩\u200d🚀"] == "👩\u200d🚀" and found["Duplicates"] == "Duplicates (2)"
    assert (found["CON"], found["nul.txt"], found[".."]) == ("_CON", "_nul.txt", "unnamed")
    assert found["V1.5"] == "V1.5 (2)"
    for name in names:
        assert 0 < len(name.encode()) <= 255 and name == name.strip().rstrip(".")
        assert not set(name) & set('\\/:*?"<>|\n\u202e') and name[0] not in ".-~"


def test_files_of_one_name_get_different_ones() -> None:
    long = "y" * 250 + ".png"
    paths = ["2020/a.jpg", "2021/a.JPG", "2021/b.jpg", "2021_c.jpg", "2021/c.jpg", "x/c.jpg",
             f"long/{long}", f"other/{long}", "2020/sub/e\u0301.png", "\u00e9.png"]  # fmt: skip
    names = file_names(paths)
    assert names[:3] == ["2020_a.jpg", "2021_a.JPG", "b.jpg"]
    assert names[3:6] == ["2021_c.jpg", "2021_c (2).jpg", "x_c.jpg"]
    assert len({name.casefold() for name in names}) == len(paths)
    assert all(len(os.fsencode(name)) <= 255 and name.endswith(paths[i][-4:])
               for i, name in enumerate(names))  # fmt: skip
    assert file_names(paths) == names
