"""Images in an object store: a real S3 server on a loopback port holds them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from snscc_ray.config.errors import UserError
from snscc_ray.data.loading.resident import ResidentData
from snscc_ray.data.loading.survey import survey
from snscc_ray.data.sources import list_rows, load_images, resolve_source
from tests.test_streamed import (
    CPU,
    KINDS,
    assert_equal_batches,
    assert_equal_sets,
    data_settings,
    png,
    stream,
    write,
)

pytest.importorskip("moto.server", reason="moto[server], a local S3 server, is not installed")
pytest.importorskip("s3fs", reason="s3fs, which reads S3, is not installed")
pytest.importorskip("upath", reason="universal-pathlib is not installed")

NAMES = ("a#1.png", "ä ö.png", "50%.png", ".hidden.png", "notes.txt")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Local copies of what lies in s3://pictures/KIND."""
    root = tmp_path_factory.mktemp("urls")
    found = {kind: write(root / kind, kind, [png(seed) for seed in range(40)]) for kind in KINDS}
    for name in NAMES:
        (found["folder"] / "a" / name).write_bytes(png(len(name)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            _upload(root, port)
            yield found
        finally:
            server.kill()
            server.wait()


def _upload(root: Path, port: int) -> None:
    import s3fs

    for _ in range(120):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.25)
    store = s3fs.S3FileSystem()
    store.mkdir("pictures")
    for kind in KINDS:
        for folder, _, names in os.walk(root / kind):
            for name in names:
                file = Path(folder, name)
                store.pipe(f"pictures/{file.relative_to(root).as_posix()}", file.read_bytes())


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_in_an_object_store_is_the_one_on_disk(kind: str, places: dict[str, Path]) -> None:
    local = data_settings(places[kind], folders_are_labels=True)
    remote = data_settings(f"s3://pictures/{kind}", folders_are_labels=True)
    assert resolve_source(remote) == kind
    expected, found = load_images(local), load_images(remote)
    assert torch.equal(found.images, expected.images)
    # Of the further names all but the hidden one: what is in `notes.txt` is an image.
    assert len(found) == (44 if kind == "folder" else 40)
    streamed = survey(list_rows(remote), remote)
    assert_equal_sets(streamed, expected)
    batches = stream(streamed)
    same = ResidentData(expected.images, CPU, order=batches.order)
    assert assert_equal_batches(batches.epoch(16, 3), same.epoch(16, 3)) == 3


def test_one_shard_and_named_class_folders(places: dict[str, Path]) -> None:
    one = data_settings("s3://pictures/shards/1.parquet")
    assert load_images(one).catalog.ids == load_images(
        data_settings(places["shards"] / "1.parquet")
    ).catalog.ids  # fmt: skip
    fields = {"source": "imagenet", "classes": ("b", "a")}
    remote = load_images(data_settings("s3://pictures/folder", **fields))
    assert remote.catalog.fingerprint == load_images(
        data_settings(places["folder"], **fields)
    ).catalog.fingerprint  # fmt: skip


@pytest.mark.parametrize(
    ("path", "source", "words"),
    [
        ("s3://pictures/nothing", "auto", "does not exist"),
        ("s3://no-such-bucket/x", "auto", "does not exist"),
        ("s3://pictures/folder/a/a#1.png", "folder", "is a file"),
        ("s3://pictures/folder", "shards", "no *.parquet files"),
        ("s3://pictures/folder", "cifar10", "must be a folder on this machine"),
        ("nonsense://pictures", "auto", "nonsense://pictures"),
    ],
)
def test_mistakes_are_one_line(path: str, source: str, words: str, places: dict[str, Path]) -> None:
    with pytest.raises(UserError) as caught:
        load_images(data_settings(path, source=source))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_images_that_vanish_from_the_store_are_named(kind: str, places: dict[str, Path]) -> None:
    import s3fs

    remote = data_settings(f"s3://pictures/{kind}")
    streamed = survey(list_rows(remote), remote)
    file = str(streamed.slices[-1].files[-1])
    store = s3fs.S3FileSystem()
    content = store.cat(file)
    store.rm(file)
    try:
        with pytest.raises(UserError) as caught:
            list(stream(streamed).epoch(16, 3))
    finally:
        store.pipe(file, content)
    assert file in str(caught.value) and "\n" not in str(caught.value)
