"""What may be imported where, and what must not be needed."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import snscc_ray
from tests.conftest import TINY

PACKAGE = Path(snscc_ray.__file__).parent
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

RAY_FILES = {"data/stream.py", "sweep.py"} | {
    f"launch/{name}.py" for name in ("__init__", "group", "nodes")
}
FAISS_FILES = {"neighbors.py", "doctor.py"}
COLLECTIVE_FILES = {"distributed.py"}
GROUP_FILES = COLLECTIVE_FILES | {"workers.py"}
# Setting a group up and asking for it; every other function of torch.distributed communicates.
GROUP = {"init_process_group", "destroy_process_group", "is_available", "is_initialized"}


def parse(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text())


def imported(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Every import statement below `tree` with the whole dotted name of each thing it brings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                yield node, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("__import__", "importlib.import_module", "import_module") and node.args:
                first = node.args[0]
                assert isinstance(first, ast.Constant), f"line {node.lineno}: import of a variable"
                yield node, str(first.value)


def brings(file: str, package: str) -> list[ast.AST]:
    return [
        node
        for node, name in imported(parse(file))
        if name == package or name.startswith(f"{package}.")
    ]


def collectives(tree: ast.AST) -> set[str]:
    """Names used out of torch.distributed, by whatever name it was imported."""
    aliases, used = {"torch.distributed"}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {a.asname for a in node.names if a.name == "torch.distributed" and a.asname}
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            aliases |= {a.asname or a.name for a in node.names if a.name == "distributed"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "torch.distributed"
        ):
            used |= {a.name for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in aliases:
            used.add(node.attr)
    return used


def test_the_walk_sees_every_way_to_import() -> None:
    code = """
import ray.data
def f():
    from ray import train
    import torch.distributed as d
    from torch import distributed
    __import__("ray")
    d.all_gather(1, 2)
    distributed.barrier()
    torch.distributed.broadcast(3)
"""
    tree = ast.parse(code)
    assert [n for _, n in imported(tree) if n.split(".")[0] == "ray"] == [
        "ray.data", "ray.train", "ray",
    ]  # fmt: skip
    assert collectives(tree) == {"all_gather", "barrier", "broadcast"}
    assert "engine.py" in FILES and "stages/train.py" in FILES


@pytest.mark.parametrize("file", FILES)
def test_ray_stays_in_its_places(file: str) -> None:
    assert not brings(file, "ray") or file in RAY_FILES, f"{file} imports ray"


@pytest.mark.parametrize("file", FILES)
def test_faiss_is_imported_only_when_needed(file: str) -> None:
    nodes = brings(file, "faiss")
    assert not nodes or file in FAISS_FILES, f"{file} imports faiss"
    tree = parse(file)
    inside = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child, name in imported(node)
        if name == "faiss" or name.startswith("faiss.")
    }
    assert len(inside) == len(nodes), f"{file} imports faiss outside a function"


@pytest.mark.parametrize("file", FILES)
def test_only_distributed_calls_collectives(file: str) -> None:
    used = collectives(parse(file))
    if file in COLLECTIVE_FILES:
        assert used
    elif file in GROUP_FILES:
        assert used <= GROUP
    else:
        assert not used, f"{file} uses torch.distributed: {used}"


WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "faiss"):
            raise ImportError(f"{name} is not there")
sys.meta_path.insert(0, Absent())
for name in ("ray", "faiss"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} can be imported: this test tests nothing")
from snscc_ray.cli import main
main()
"""


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_run_needs_neither_ray_nor_faiss(tmp_path: Path) -> None:
    settings = [word for setting in TINY for word in ("--set", setting)]
    done = python(WITHOUT, "run", "digits", *settings, "--out", str(tmp_path / "r"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r" / "assignments.parquet").exists()


def test_the_command_line_starts_without_torch() -> None:
    slow = ("torch", "torchvision", "ray", "faiss", "sklearn", "scipy", "pyarrow", "numpy")
    code = f"import sys, snscc_ray.cli; print([m for m in {slow} if m in sys.modules])"
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
