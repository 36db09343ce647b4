"""Reading the checkpoints of others: whatever is in them, none of it is executed."""

from __future__ import annotations

import argparse
import http.server
import os
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from snscc_ray.config.errors import UserError
from snscc_ray.models.foreign import read_checkpoint
from tests.conftest import equal_states


class Executed:
    """Unpickled by pickle, it would make a file."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.place)!r}, 'w').close()",)


class Blocked(Executed):
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.place}",)


class Hyper(dict):  # type: ignore[type-arg]
    """As Lightning's AttributeDict: a dict of a class of its own, with a state."""


def test_objects_in_a_checkpoint_are_passed_over_and_not_executed(tmp_path: Path) -> None:
    mark, file = tmp_path / "executed", tmp_path / "x.ckpt"
    parameters = Hyper(lr=0.1)
    parameters.more = argparse.Namespace(path=tmp_path)  # type: ignore[attr-defined]
    held = {"hyper_parameters": parameters, "args": argparse.Namespace(a=1), "cb": Executed(mark)}
    torch.save(held | {"state_dict": {"conv1.weight": torch.ones(2)}}, file)
    read = read_checkpoint(str(file))
    assert read["state_dict"]["conv1.weight"].tolist() == [1, 1]
    assert not mark.exists()
    torch.load(file, weights_only=False)
    assert mark.exists()  # it would have been executed


@pytest.mark.parametrize("zipped", [True, False])
def test_what_cannot_be_passed_over_is_refused(zipped: bool, tmp_path: Path) -> None:
    mark, file = tmp_path / "executed", tmp_path / "x.ckpt"
    held = {"a": Blocked(mark) if zipped else Executed(mark), "w": torch.ones(2)}
    torch.save(held, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="extract the weights"):
        read_checkpoint(str(file))
    assert not mark.exists()


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_a_broken_file_is_named(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    with pytest.raises(UserError, match="there is no such file"):
        read_checkpoint(str(file))
    file.write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match=f"{name} is damaged or not"):
        read_checkpoint(str(file))
    state = {"w": torch.rand(100, 100)}
    (safetensors.torch.save_file if "safe" in name else torch.save)(state, file)
    assert equal_states(read_checkpoint(str(file)), state)
    os.truncate(file, 20_000)
    with pytest.raises(UserError, match=f"{name} is damaged or not"):
        read_checkpoint(str(file))


def test_a_file_on_the_web_is_fetched_once(hub: Path, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pth")
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

        def log_message(self, format: str, *arguments: object) -> None: ...

    handler = partial(Handler, directory=str(tmp_path))
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        for _ in range(2):
            assert read_checkpoint(f"{url}/w.pth")["w"].tolist() == [1, 1]
        with pytest.raises(UserError, match=r"nothing\.pth cannot be read .*404"):
            read_checkpoint(f"{url}/nothing.pth")
        server.shutdown()
        thread.join()
    assert asked == ["/w.pth", "/nothing.pth"]
