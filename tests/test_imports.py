"""What may be imported where, and what must not be needed."""

from __future__ import annotations

import ast
import graphlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import snscc_ray
from tests.conftest import TINY

PACKAGE = Path(snscc_ray.__file__).parent
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# From the ground up: a package imports only from packages before it.
PACKAGES = (
    "config", "core", "models", "data", "training", "runs", "answers", "cluster", "fit",
    "compare", "sweep", "cli",
)  # fmt: skip
MOST_FILES = 15  # in a folder, `__init__.py` apart
RAY_PLACES = ("cluster/", "sweep/", "data/loading/ray_stream.py")
FAISS_FILE = "core/clustering/neighbors.py"
COLLECTIVE_FILES = {"core/distributed.py"}
GROUP_FILES = COLLECTIVE_FILES | {"training/workers.py"}
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
                if ast.unparse(first).startswith("f'{__name__}."):
                    continue  # a file of the same folder
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
    assert "training/engine.py" in FILES and "cli/__init__.py" in FILES


def module_file(name: str) -> str | None:
    """The file of `snscc_ray.a.b`, or of the module that `b` is defined in; None: not ours."""
    parts = name.split(".")
    if parts[0] != "snscc_ray":
        return None
    for end in range(len(parts), 0, -1):
        place = "/".join(parts[1:end])
        for file in (f"{place}.py", f"{place}/__init__.py".lstrip("/")):
            if file in FILES:
                return file
    raise AssertionError(f"{name} is no module")


IMPORTS = {
    file: {found for _, name in imported(parse(file)) if (found := module_file(name))}
    for file in FILES
}


def package_of(file: str) -> str | None:
    return file.split("/")[0] if "/" in file else None


def test_the_rooms_are_these_and_none_is_overfull() -> None:
    assert {package for file in FILES if (package := package_of(file))} == set(PACKAGES)
    for folder in {Path(file).parent for file in FILES}:
        held = [f for f in FILES if Path(f).parent == folder and not f.endswith("__init__.py")]
        assert len(held) <= MOST_FILES, f"{folder} holds {len(held)} files"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_room_imports_what_its_docstring_says(package: str) -> None:
    """Only packages below it, so that there is no circle of packages."""
    used = {
        other
        for file in FILES
        if package_of(file) == package
        for found in IMPORTS[file]
        if (other := package_of(found)) not in (None, package)
    }
    assert used <= set(PACKAGES[: PACKAGES.index(package)])
    if package == "cli":
        return  # it may import all of them
    text = " ".join((ast.get_docstring(parse(f"{package}/__init__.py")) or "").split())
    said = re.search(r"Imports: ([^.]*)\.", text)
    assert said, f"{package}/__init__.py does not say what it imports"
    named = set() if said[1].startswith("no other") else set(said[1].split(", "))
    assert named == used, f"{package} imports {used}"


def test_no_files_import_each_other_in_a_circle() -> None:
    order = graphlib.TopologicalSorter(
        {file: {f for f in found if f != file} for file, found in IMPORTS.items()}
    )
    order.prepare()  # raises CycleError, which names the files


@pytest.mark.parametrize("file", FILES)
def test_ray_stays_in_its_places(file: str) -> None:
    assert not brings(file, "ray") or file.startswith(RAY_PLACES), f"{file} imports ray"


@pytest.mark.parametrize("file", FILES)
def test_faiss_is_imported_only_when_needed(file: str) -> None:
    nodes = brings(file, "faiss")
    assert not nodes or file == FAISS_FILE, f"{file} imports faiss"
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


def test_what_every_node_is_asked_before_a_run_needs_no_torch(tmp_path: Path) -> None:
    """Its import would take each node some seconds, one question after the other."""
    (tmp_path / "marker").write_text("token")
    code = f"""
import sys
from snscc_ray.cluster.scale import probe_node, unseen
marker = {str(tmp_path / "marker")!r}
print(unseen("here", marker, "token", [marker]), probe_node("here", False).versions.keys())
print("torch" in sys.modules)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "None dict_keys(['snscc-ray', 'torch', 'ray'])\nFalse\n"
