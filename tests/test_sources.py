"""Every source, every error a person can meet, and pixels that do not depend on the path taken."""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from snscc_ray.config.errors import UserError
from snscc_ray.config.settings import DataSettings
from snscc_ray.data import decode
from snscc_ray.data.sources import ImageSet, load_images, resolve_source

REAL = Path(__file__).parents[1] / ".." / "shared" / "data"


def settings(source: str = "auto", path: Path | str | None = None, **more: Any) -> DataSettings:
    fields = {"num_clusters": 2, "image_size": 16, "path": None if path is None else str(path)}
    return DataSettings.model_validate({"source": source, **fields, **more})


def load(source: str = "auto", path: Path | str | None = None, **more: Any) -> ImageSet:
    return load_images(settings(source, path, **more), workers=2)


def refusal(source: str = "auto", path: Path | str | None = None, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(source, path, **more)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def picture(seed: int = 0, size: tuple[int, int] = (16, 16), mode: str = "RGB") -> Image.Image:
    """Smooth, so that a lossy format or a resampling changes it only a little."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(
    content: bytes,
    size: int = 16,
    channels: int = 3,
    reading: decode.Reading = decode.OWN_RANGE,
) -> np.ndarray:
    """(S, S, C) of one encoded image."""
    out = np.empty((channels, size, size), np.uint8)
    decode.decode_into(content, out, reading)
    return out.transpose(1, 2, 0)


def write_images(root: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(file)
    return root


def write_shard(file: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), file, row_group_size=3)
    return file


PICTURES = [encoded(picture(seed)) for seed in range(7)]
NAMES = [f"row-{row}" for row in range(7)]


# ------------------------------------------------------------------------------------ digits


def test_digits() -> None:
    found = load("digits", image_size=8, channels=1)
    assert found.images.shape == (1797, 1, 8, 8) and found.images.dtype == torch.uint8
    assert found.images.is_contiguous() and found.images.device.type == "cpu"
    assert found.images.min() == 0 and found.images.max() == 255
    assert found.catalog.ids[0] == "digits/0000" and found.catalog.ids[-1] == "digits/1796"
    assert len(found) == len(set(found.catalog.ids)) == 1797
    assert found.catalog.labels is not None and found.catalog.labels.dtype == torch.int64
    assert found.catalog.labels.bincount(minlength=10).min() > 100
    assert found.catalog.class_names == tuple("0123456789") and found.catalog.skipped == ()


def test_digits_resized_and_in_colour() -> None:
    found = load("digits", image_size=16, channels=3, limit=5)
    assert found.images.shape == (5, 3, 16, 16) and len(found.catalog.labels) == 5  # type: ignore[arg-type]
    plain = load("digits", image_size=8, channels=1, limit=5).images[0, 0].numpy()
    expected = Image.fromarray(plain).resize((16, 16), Image.Resampling.BILINEAR)
    for channel in found.images[0]:
        np.testing.assert_array_equal(channel, np.asarray(expected))


# ----------------------------------------------------------------------------------- folders


def test_folder_is_read_in_order_of_relative_paths(tmp_path: Path) -> None:
    names = ["b/2.PNG", "b/1.jpg", "a/deep/er/x.webp", "z.bmp", "c.tif", "d.gif", "e.ppm"]
    write_images(tmp_path, *names)
    (tmp_path / "notes.txt").write_text("not an image")
    write_images(tmp_path, ".hidden/1.png", "._b.png")
    found = load("folder", tmp_path)
    assert found.catalog.ids == sorted(names)
    assert found.catalog.labels is None and found.catalog.class_names is None
    for row, name in enumerate(found.catalog.ids):
        wanted = np.asarray(picture(names.index(name)), np.int16)
        # A GIF has 256 colours, JPEG and WebP are lossy.
        assert np.abs(found.images[row].numpy().transpose(1, 2, 0) - wanted).mean() < 12, name


def test_folders_are_labels(tmp_path: Path) -> None:
    write_images(tmp_path, "dog/1.png", "cat/x/1.png", "cat/2.png")
    found = load("folder", tmp_path, folders_are_labels=True)
    assert found.catalog.ids == ["cat/2.png", "cat/x/1.png", "dog/1.png"]
    assert found.catalog.labels is not None and found.catalog.labels.tolist() == [0, 0, 1]
    assert found.catalog.class_names == ("cat", "dog")
    limited = load("folder", tmp_path, folders_are_labels=True, limit=1)
    assert limited.catalog.class_names == ("cat", "dog") and len(limited) == 1
    write_images(tmp_path, "loose.png")
    assert "loose.png" in refusal("folder", tmp_path, folders_are_labels=True)


@pytest.mark.parametrize("tops", [("train", "val"), ("Training", "test", "validation"), ("test",)])
def test_parts_of_a_dataset_are_no_labels(tmp_path: Path, tops: tuple[str, ...]) -> None:
    write_images(tmp_path, *(f"{top}/{kind}/x/1.png" for top in tops for kind in ("dog", "cat")))
    found = load("folder", tmp_path, folders_are_labels=True).catalog
    assert found.class_names == ("cat", "dog")
    assert found.labels is not None and found.labels.tolist() == [0, 1] * len(tops)
    named = ", ".join(sorted(tops))
    assert found.notes == (f"labels: the names of the folders in {named}, which are no labels",)
    write_images(tmp_path, "cat/2.png")  # now the others are kinds, too
    found = load("folder", tmp_path, folders_are_labels=True).catalog
    assert found.class_names == tuple(sorted((*tops, "cat")))
    assert found.notes[0].startswith(f"labels: the names of the folders directly in {tmp_path}; ")
    assert "--labels-deepest" in found.notes[0]


def test_a_file_directly_in_a_part_has_no_label(tmp_path: Path) -> None:
    write_images(tmp_path, "train/cat/1.png", "test/2.png")
    told = refusal("folder", tmp_path, folders_are_labels=True)
    assert "test/2.png has no label" in told and "leave --labels out" in told
    found = load("folder", tmp_path, folders_are_labels=False).catalog
    assert found.labels is None and found.notes == ()


def test_the_deepest_folders_are_labels(tmp_path: Path) -> None:
    write_images(tmp_path, "a/birds/owls/1.png", "a/birds/2.png", "b/owls/3.png", "train/4.png")
    found = load("folder", tmp_path, folders_are_labels="deepest").catalog
    assert found.ids == ["a/birds/2.png", "a/birds/owls/1.png", "b/owls/3.png", "train/4.png"]
    assert found.class_names == ("birds", "owls", "train")
    assert found.labels is not None and found.labels.tolist() == [0, 1, 1, 2]
    assert found.notes == ("labels: the names of the folders that hold the files",)
    write_images(tmp_path, "loose.png")
    assert "loose.png" in refusal("folder", tmp_path, folders_are_labels="deepest")


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write_images(tmp_path / "elsewhere", "1.png")
    root = write_images(tmp_path / "root", "own/2.png")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "own" / "back").symlink_to(root)
    assert load("folder", root).catalog.ids == ["linked/1.png", "own/2.png"]


def test_a_name_that_is_not_utf8_gets_an_id_that_is(tmp_path: Path) -> None:
    try:
        (tmp_path / "caf\udce9.png").write_bytes(PICTURES[0])
    except OSError:
        pytest.skip("this file system only takes UTF-8 names")
    assert load("folder", tmp_path).catalog.ids == ["caf\\xe9.png"]


def test_an_unreadable_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, "1.png")

    def denied(path: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", denied)
    assert "Permission denied" in refusal("folder", tmp_path)


def test_imagenet_keeps_the_named_classes_in_their_order(tmp_path: Path) -> None:
    write_images(tmp_path / "train", "n3/b.png", "n3/a.png", "n1/a.png", "n2/a.png")
    found = load("imagenet", tmp_path, classes=("n3", "n1"))
    assert found.catalog.ids == ["n3/a.png", "n3/b.png", "n1/a.png"]
    assert found.catalog.labels is not None and found.catalog.labels.tolist() == [0, 0, 1]
    assert found.catalog.class_names == ("n3", "n1")
    assert load("imagenet", tmp_path / "train", classes=("n2", "n1")).catalog.ids == [
        "n2/a.png",
        "n1/a.png",
    ]
    assert (
        load("imagenet", tmp_path, classes=("n3", "n1"), limit=2).catalog.ids
        == found.catalog.ids[:2]
    )


def test_imagenet_errors(tmp_path: Path) -> None:
    write_images(tmp_path, "n1/a.png")
    (tmp_path / "empty").mkdir()
    assert "n2" in refusal("imagenet", tmp_path, classes=("n1", "n2"))
    assert "empty" in refusal("imagenet", tmp_path, classes=("n1", "empty"))
    assert "data.classes" in refusal("imagenet", tmp_path)
    assert "n1/a.png" in refusal("imagenet", tmp_path, classes=("n1", "n1"))


# ------------------------------------------------------------------------------------ shards


def test_shards_with_every_column(tmp_path: Path) -> None:
    labels, names = [2, 0, 2, 0, 0, 2, 0], ["owl", "ant", "owl", "ant", "ant", "owl", "ant"]
    file = write_shard(
        tmp_path / "x.parquet", id=NAMES, image=PICTURES, label=labels, class_name=names
    )
    for path in (file, tmp_path):
        found = load("shards", path)
        assert found.catalog.ids == NAMES
        assert found.catalog.labels is not None and found.catalog.labels.tolist() == labels
        assert found.catalog.class_names == ("ant", "1", "owl")
        for row in range(7):
            wanted = np.asarray(picture(row))
            np.testing.assert_array_equal(found.images[row].permute(1, 2, 0), wanted)


def test_shards_without_ids_are_numbered_by_file(tmp_path: Path) -> None:
    write_shard(tmp_path / "b.parquet", image=PICTURES[:2])
    write_shard(tmp_path / "a.parquet", image=PICTURES[2:4])
    write_shard(tmp_path / "c.parquet", image=PICTURES[4:5], id=pa.array([None], pa.string()))
    found = load("shards", tmp_path)
    assert found.catalog.ids == [
        "a.parquet:0",
        "a.parquet:1",
        "b.parquet:0",
        "b.parquet:1",
        "c.parquet:0",
    ]
    assert found.catalog.labels is None and found.catalog.class_names is None


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_huggingface_structs(tmp_path: Path, kind: Any) -> None:
    rows = [{"bytes": content, "path": None} for content in PICTURES]
    column = pa.array(rows, pa.struct([("bytes", kind), ("path", pa.string())]))
    write_shard(tmp_path / "x.parquet", image=column, id=list(range(7)))
    plain = write_shard(tmp_path / "plain", image=PICTURES, id=list(range(7)))
    plain.rename(tmp_path / "plain.parquet")
    structs, binary = (load("shards", tmp_path / f"{name}.parquet") for name in ("x", "plain"))
    assert structs.catalog.ids == [str(row) for row in range(7)]
    assert structs.catalog.fingerprint == binary.catalog.fingerprint


def test_a_missing_image_counts_as_corrupt(tmp_path: Path) -> None:
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    empty = pa.array([None, {"bytes": None, "path": "x"}, {"bytes": PICTURES[0]}], struct)
    write_shard(tmp_path / "x.parquet", image=empty)
    found = load("shards", tmp_path, skip_corrupt=True)
    assert found.catalog.ids == ["x.parquet:2"] and len(found.catalog.skipped) == 2


def test_limit_takes_the_first_rows_and_reads_no_further(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", image=PICTURES[:4], id=NAMES[:4], label=[0, 1, 2, 3])
    write_shard(tmp_path / "b.parquet", image=[b"broken"] * 3, id=NAMES[4:], label=[4, 5, 6])
    for limit in (1, 3, 4):
        found = load("shards", tmp_path, limit=limit)
        assert found.catalog.ids == NAMES[:limit] and len(found.images) == limit
        assert found.catalog.labels is not None and found.catalog.labels.tolist() == list(
            range(limit)
        )
    assert load("shards", tmp_path, limit=6, skip_corrupt=True).catalog.ids == NAMES[:4]


def test_shard_errors(tmp_path: Path) -> None:
    def refused(**columns: Any) -> str:
        return refusal("shards", write_shard(tmp_path / "x.parquet", **columns))

    two = PICTURES[:2]
    message = refused(picture=two, label=[0, 1])
    assert "x.parquet" in message and "picture, label" in message
    assert "string" in refused(image=["a.png", "b.png"])
    assert "'a'" in refused(image=two, id=["a", "a"])
    assert "no images" in refused(image=pa.array([], pa.binary()))


def test_ids_that_repeat_across_shards(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shard(tmp_path / f"{name}.parquet", image=PICTURES[:1], id=["same"])
    assert "'same' occurs 2 times" in refusal("shards", tmp_path)


def test_broken_parquet(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    file.write_bytes(b"")
    assert "x.parquet" in refusal("shards", tmp_path)
    write_shard(file, image=PICTURES)
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    assert "x.parquet" in refusal("shards", tmp_path)
    file.write_bytes(whole[:4] + b"\xff" * 600 + whole[604:])  # the footer is whole, the data not
    assert "x.parquet" in refusal("shards", tmp_path)
    assert "no *.parquet" in refusal("shards", write_images(tmp_path / "none", "1.png"))


# ------------------------------------------------------------------------- CIFAR and STL-10


def publish(monkeypatch: pytest.MonkeyPatch, dataset: Any, files: dict[str, bytes]) -> None:
    """Make torchvision know these files' checksums in place of the published ones."""
    digests = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    for part in ("train_list", "test_list"):
        named = [[name, digests.get(name, md5)] for name, md5 in getattr(dataset, part)]
        monkeypatch.setattr(dataset, part, named)
    if "meta" in vars(dataset):
        meta = dict(dataset.meta, md5=digests[dataset.meta["filename"]])
        monkeypatch.setattr(dataset, "meta", meta)


def write_archive(
    monkeypatch: pytest.MonkeyPatch, root: Path, source: str, each: int = 2
) -> tuple[np.ndarray, list[int]]:
    """A small archive in torchvision's layout; returns its images (N, 3, S, S) and labels.

    each: images in a file of CIFAR, or in the test part of STL-10, whose other part has one more.
    """
    from torchvision import datasets

    rng = np.random.default_rng(0)
    files: dict[str, bytes] = {}
    if source == "stl10":
        dataset: Any = datasets.STL10
        images = rng.integers(0, 256, (2 * each + 1, 3, 96, 96), dtype=np.uint8)
        labels = [(4, 0, 9, 1, 1)[row % 5] for row in range(len(images))]
        for split, rows in (("train", slice(each + 1)), ("test", slice(each + 1, None))):
            files[f"{split}_X.bin"] = images[rows].transpose(0, 1, 3, 2).tobytes()
            files[f"{split}_y.bin"] = bytes(label + 1 for label in labels[rows])
        files["class_names.txt"] = b"airplane\n" + b"bird\n" * 8 + b"truck\n"
    else:
        dataset = datasets.CIFAR10 if source == "cifar10" else datasets.CIFAR100
        names = [name for name, _ in dataset.train_list + dataset.test_list]
        images = rng.integers(0, 256, (each * len(names), 3, 32, 32), dtype=np.uint8)
        labels = [row % 7 for row in range(len(images))]
        for part, name in enumerate(names):
            rows = slice(each * part, each * part + each)
            entry: dict[str, Any] = {"data": images[rows].reshape(each, -1)}
            if source == "cifar10":
                entry["labels"] = labels[rows]
            else:
                entry |= {"fine_labels": [99] * each, "coarse_labels": labels[rows]}
            files[name] = pickle.dumps(entry, protocol=2)
        key = "label_names" if source == "cifar10" else "coarse_label_names"
        files[dataset.meta["filename"]] = pickle.dumps({key: list("abcdefg")}, protocol=2)
    publish(monkeypatch, dataset, files)
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return images, labels


@pytest.mark.parametrize("source", ["cifar10", "cifar20", "stl10"])
def test_torchvision_archives(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = write_archive(monkeypatch, tmp_path, source)
    size = images.shape[-1]
    found = load(source, tmp_path, image_size=size)
    np.testing.assert_array_equal(found.images, images)
    assert found.catalog.labels is not None and found.catalog.labels.tolist() == labels
    assert found.catalog.ids[0] == "train/00000" and found.catalog.ids[-1].startswith("test/")
    assert len(set(found.catalog.ids)) == len(images)
    named = ("airplane", "truck") if source == "stl10" else ("a", "g")
    assert found.catalog.class_names is not None
    assert (found.catalog.class_names[0], found.catalog.class_names[-1]) == named
    inner = next(tmp_path.iterdir())
    for path in (tmp_path, inner):
        assert resolve_source(settings("auto", path)) == source
        assert load("auto", path, image_size=size).catalog.fingerprint == found.catalog.fingerprint
    for limit in (1, 3, 4):
        first = load(source, tmp_path, image_size=size, limit=limit)
        assert first.catalog.ids == found.catalog.ids[:limit] and torch.equal(
            first.images, found.images[:limit]
        )
    grey = load(source, tmp_path, image_size=size // 2, channels=1)
    assert grey.images.shape == (len(images), 1, size // 2, size // 2)


@pytest.mark.parametrize("source", ["cifar10", "cifar20", "stl10"])
def test_a_damaged_archive_is_refused_before_it_is_unpickled(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_archive(monkeypatch, tmp_path, source)
    monkeypatch.setattr("pickle.loads", lambda *_, **__: pytest.fail("unpickled unchecked bytes"))
    folder = next(tmp_path.iterdir())
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    message = refusal(source, tmp_path)
    assert "checksum" in message and str(folder) in message
    for file in folder.iterdir():
        file.unlink()
    assert "data.download=true" in refusal(source, tmp_path)


def test_a_missing_archive_names_the_path_and_the_ways_out(tmp_path: Path) -> None:
    for message in (refusal("cifar10", tmp_path), refusal("stl10", tmp_path / "absent")):
        assert str(tmp_path) in message
        assert "--set data.download=true" in message
    assert "--data PATH" in refusal("cifar20")
    assert "--data PATH" in refusal("cifar20", download=True)


@pytest.mark.parametrize("source", ["cifar10", "stl10"])
def test_download(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    dataset = datasets.CIFAR10 if source == "cifar10" else datasets.STL10

    def fail(self: Any) -> None:
        raise OSError("no\nnetwork")

    monkeypatch.setattr(dataset, "download", fail)
    assert "no network" in refusal(source, tmp_path / "new", download=True)

    def fetch(self: Any) -> None:
        write_archive(monkeypatch, tmp_path / "new", source)
        monkeypatch.setattr(dataset, "_check_integrity", lambda self: True)

    monkeypatch.setattr(dataset, "download", fetch)
    assert load(source, tmp_path / "new", download=True, image_size=32).images.any()


# -------------------------------------------------------------------------------------- auto


def test_auto_and_stand_ins(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", "deep/1.png")
    assert resolve_source(settings("auto", images)) == "folder"
    (tmp_path / "shards").mkdir()
    file = write_shard(tmp_path / "shards" / "x.parquet", image=PICTURES)
    for path in (file, file.parent):
        for source in ("auto", "shards", "cifar10", "cifar20", "stl10"):
            assert resolve_source(settings(source, path)) == "shards"
            assert len(load(source, path)) == 7
    for source in ("digits", "cifar10", "imagenet", "folder"):
        assert resolve_source(settings(source)) == source
    (tmp_path / "nothing").mkdir()
    message = refusal("auto", tmp_path / "nothing")
    for word in ("nothing", "*.parquet", "cifar-10-batches-py", "stl10_binary"):
        assert word in message
    (tmp_path / "a.txt").write_text("x")
    assert "give the folder of the images" in refusal("auto", tmp_path / "a.txt")
    assert "--data" in refusal("auto")


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    for source in ("auto", "folder", "shards", "imagenet"):
        assert "absent" in refusal(source, tmp_path / "absent", classes=("n1",))
        assert "--data" in refusal(source)
    assert "no images" in refusal("folder", tmp_path)
    assert "is a file" in refusal("folder", write_images(tmp_path, "1.png") / "1.png")


# -------------------------------------------------------------------- corrupt images, memory


def test_corrupt_images_are_named_or_left_out(tmp_path: Path) -> None:
    write_images(tmp_path, *[f"{number}.png" for number in range(6)])
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "4.png").write_bytes(b"")
    (tmp_path / "9.jpg").symlink_to(tmp_path / "gone.jpg")
    message = refusal("folder", tmp_path)
    assert "'1.png'" in message and "truncated" in message
    assert "--set data.skip_corrupt=true" in message
    found = load("folder", tmp_path, skip_corrupt=True)
    assert found.catalog.ids == ["0.png", "2.png", "3.png", "5.png"]
    assert [name for name, _ in found.catalog.skipped] == ["1.png", "4.png", "9.jpg"]
    assert all(reason and "\n" not in reason for _, reason in found.catalog.skipped)
    assert found.images.is_contiguous() and len(found.images) == 4
    for row, name in enumerate(found.catalog.ids):
        wanted = np.asarray(picture(int(name[0])))
        np.testing.assert_array_equal(found.images[row].permute(1, 2, 0), wanted)


def test_labels_stay_with_their_images(tmp_path: Path) -> None:
    contents = [PICTURES[0], b"junk", PICTURES[2]]
    write_shard(tmp_path / "x.parquet", image=contents, label=[0, 1, 2])
    found = load("shards", tmp_path, skip_corrupt=True)
    assert found.catalog.labels is not None and found.catalog.labels.tolist() == [0, 2]


def test_nothing_left(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.parquet", image=[b"junk", b"more junk"], id=["a", "b"])
    message = refusal("shards", tmp_path, skip_corrupt=True)
    assert "no image in" in message and "the first of 2, 'a'" in message


def test_a_set_larger_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, "1.png")

    def full(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("numpy.empty", full)
    assert "data.image_size" in refusal("folder", tmp_path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_every_truncation_is_found(kind: str) -> None:
    content = encoded(picture(), kind)
    for share in (0.1, 0.5, 0.9):
        with pytest.raises(decode.UnreadableImage):
            pixels(content[: int(len(content) * share)])


def test_a_jpeg_is_truncated_wherever_it_is_cut() -> None:
    content = encoded(picture(), "JPEG")
    for end in range(len(content)):
        with pytest.raises(decode.UnreadableImage):
            pixels(content[:end])


def test_far_too_large_images_are_unreadable() -> None:
    with pytest.raises(decode.UnreadableImage, match=r"64 × 64 pixels .* data.max_pixels=4095"):
        pixels(encoded(picture(size=(64, 64))), reading=decode.Reading(max_pixels=4095))
    assert pixels(encoded(picture(size=(64, 64))), reading=decode.Reading(max_pixels=4096)).any()


def test_programs_are_not_started_for_images() -> None:
    with pytest.raises(decode.UnreadableImage, match="known format"):
        pixels(encoded(picture(), "EPS"))


# ------------------------------------------------------------------------- how pixels are made


def test_modes() -> None:
    colour = picture()
    wanted = np.asarray(colour, np.int16)
    grey = np.asarray(colour.convert("L"), np.int16)
    np.testing.assert_array_equal(pixels(encoded(colour)), wanted)
    np.testing.assert_array_equal(pixels(encoded(colour), channels=1)[..., 0], grey)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    whole = decode.Reading(value_range=(0, 65535))
    for kind in ("PNG", "TIFF", "PPM"):
        content = encoded(deep, kind)
        np.testing.assert_array_equal(pixels(content, channels=1, reading=whole)[..., 0], grey)
        np.testing.assert_array_equal(pixels(content, reading=whole)[..., 2], grey)
    for image, kind in ((colour.convert("P"), "PNG"), (colour.convert("CMYK"), "TIFF")):
        want = np.asarray(image.convert("RGB"))
        np.testing.assert_array_equal(pixels(encoded(image, kind)), want)
    assert np.abs(pixels(encoded(colour.convert("CMYK"), "JPEG", quality=95)) - wanted).mean() < 12
    stripes = Image.fromarray(np.eye(16) > 0)
    np.testing.assert_array_equal(pixels(encoded(stripes), channels=1)[..., 0], 255 * np.eye(16))


def test_transparency_is_laid_over_white() -> None:
    layered = picture().convert("RGBA")
    layered.putalpha(
        Image.fromarray(np.repeat([[0, 128, 255, 255]], 4, 0).astype(np.uint8)).resize(
            (16, 16), Image.Resampling.NEAREST
        )
    )
    found, colour = pixels(encoded(layered)), np.asarray(picture(), np.int16)
    assert (found[:, :4] == 255).all()
    np.testing.assert_array_equal(found[:, 8:], colour[:, 8:])
    assert np.abs(found[:, 4:8] - (colour[:, 4:8] + 255) / 2).max() <= 2
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([10, 20, 30])
    assert (pixels(encoded(palette, transparency=0)) == 255).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation(kind: str, turn: int) -> None:
    image = picture(size=(16, 16))
    exif = Image.Exif()
    exif[0x0112] = turn
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    if kind == "WEBP":
        options = {"lossless": True}
    upright = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: lambda a: np.rot90(a),
    }[turn](np.asarray(image, np.int16))  # fmt: skip
    found = pixels(encoded(image, kind, exif=exif, **options))
    assert np.abs(found - upright).max() <= (6 if kind == "JPEG" else 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_does_not_lose_the_image() -> None:
    content = encoded(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(pixels(content), pixels(encoded(picture(), "JPEG")))


def test_the_shorter_side_is_resized_and_the_centre_cropped() -> None:
    from torchvision.transforms.v2 import CenterCrop, Compose, Resize

    fine = {"quality": 95, "subsampling": 0}
    usual = Compose([Resize(16), CenterCrop(16)])
    for size in ((60, 47), (48, 61), (20, 100), (10, 12), (16, 40), (801, 600)):
        image = picture(size=size)
        wanted = np.asarray(usual(image), np.int16)
        # Only a large image is first reduced a little more coarsely.
        assert np.abs(pixels(encoded(image)) - wanted).max() <= (1 if min(size) < 64 else 4), size
        # A large JPEG is decoded at a fraction of its size.
        assert np.abs(pixels(encoded(image, "JPEG", **fine)) - wanted).mean() < 3, size


def test_both_decoders_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    grey, noise = (
        picture(mode="L"),
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)),
    )
    contents = [
        encoded(image, "JPEG", **options)
        for image in (picture(), noise, grey)
        for options in ({}, {"progressive": True}, {"quality": 95, "subsampling": 0})
    ]
    assert decode._decode_directly(contents[0], np.empty((3, 16, 16), np.uint8))
    both: dict[int, np.ndarray] = {}
    for decoder in (decode._jpeg_decoder, lambda: None):
        monkeypatch.setattr(decode, "_jpeg_decoder", decoder)
        for channels in (1, 3):
            found = np.stack([pixels(content, 16, channels) for content in contents])
            np.testing.assert_array_equal(found, both.setdefault(channels, found))


# -------------------------------------------------------------------- fingerprint, progress


def test_the_fingerprint_follows_pixels_ids_and_order(tmp_path: Path) -> None:
    def fingerprint(name: str, *parts: tuple[list[bytes], list[str]], **more: Any) -> str:
        (tmp_path / name).mkdir()
        for number, (images, ids) in enumerate(parts):
            write_shard(tmp_path / name / f"{number}.parquet", image=images, id=ids, **more)
        data = settings("shards", tmp_path / name)
        first, second = load_images(data, workers=1), load_images(data, workers=3)
        assert first.catalog.fingerprint == second.catalog.fingerprint
        assert torch.equal(first.images, second.images)
        return first.catalog.fingerprint

    changed = np.asarray(picture()).copy()
    changed[3, 5, 1] ^= 1
    one = fingerprint("one", (PICTURES, NAMES))
    assert one == fingerprint("two", (PICTURES[:3], NAMES[:3]), (PICTURES[3:], NAMES[3:]))
    assert one == fingerprint("labelled", (PICTURES, NAMES), label=[0] * 7)
    others = {
        fingerprint("pixel", ([encoded(Image.fromarray(changed)), *PICTURES[1:]], NAMES)),
        fingerprint("order", (PICTURES[::-1], NAMES[::-1])),
        fingerprint("ids", (PICTURES, NAMES[::-1])),
        fingerprint("fewer", (PICTURES[:6], NAMES[:6])),
    }
    assert len(others | {one}) == 5
    int(one, 16)


def test_progress_counts_up_to_the_total(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.parquet", image=PICTURES * 60)
    told: list[tuple[int, int]] = []
    data = settings("shards", tmp_path)
    load_images(data, workers=2, progress=lambda done, total: told.append((done, total)))
    assert told == sorted(set(told)) and len(told) > 2 and told[-1] == (420, 420)


def test_a_source_that_changes_meanwhile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path / "x.parquet", image=PICTURES)
    monkeypatch.setattr("snscc_ray.data.shards._images", lambda shards: iter([PICTURES[:3]]))
    assert "changed" in refusal("shards", tmp_path)


# ------------------------------------------------------------------------------- real images


def real(name: str) -> Path:
    if not (REAL / name).is_dir():
        pytest.skip(f"the {name} shards are not here")
    return REAL / name


def test_real_cifar10() -> None:
    found = load("cifar10", real("cifar10-jpeg"), image_size=32, limit=10_000)
    assert found.images.shape == (10_000, 3, 32, 32) and len(set(found.catalog.ids)) == 10_000
    assert found.catalog.labels is not None and found.catalog.labels.unique().tolist() == list(
        range(10)
    )
    assert found.catalog.class_names is not None
    assert found.catalog.class_names[0] == "airplane" and found.catalog.class_names[9] == "truck"
    for name, label in zip(found.catalog.ids[:100], found.catalog.labels.tolist(), strict=False):
        assert name.split("/")[1] == found.catalog.class_names[label]


def test_real_cifar20() -> None:
    found = load("cifar20", real("cifar100-jpeg"), image_size=32, limit=2_000)
    assert found.images.shape == (2_000, 3, 32, 32) and found.catalog.class_names is None
    assert found.catalog.labels is not None and found.catalog.labels.unique().tolist() == list(
        range(20)
    )


@pytest.mark.parametrize(("name", "size"), [("cifar10-jpeg", 32), ("imagenette-96", 96)])
def test_both_decoders_agree_on_real_images(
    name: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = load("shards", real(name), image_size=size, limit=500)
    monkeypatch.setattr(decode, "_jpeg_decoder", lambda: None)
    assert (
        load("shards", real(name), image_size=size, limit=500).catalog.fingerprint
        == direct.catalog.fingerprint
    )
