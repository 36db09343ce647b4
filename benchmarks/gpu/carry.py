"""Collect what a GPU machine without a network needs in one ignored folder: `make gpu-pack`.

    python -m benchmarks.gpu.carry --data DIR [--from BUNDLE]

`.gpu/` gets the images, the wheels that such a machine lacks (pydantic, universal-pathlib and their
dependencies, for its Python), and the bundle to resume from. Together with the tracked files it
must stay below 60 MiB. Prints the command to run there, in a copy of this folder.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_FOLDER = ".gpu"
_MOST_BYTES = 60 * 2**20
# Packages that torch 2.11 machines with the usual packages lack.
_WHEELS = ("pydantic", "universal-pathlib")
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
_SECONDS = 560  # of ten minutes; the rest is for unpacking


def fetch_wheels(folder: Path, python: str) -> None:
    """Download the wheels for a Python version on Linux, in the versions of constraints.txt."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp"]
    for platform in _PLATFORMS:
        command += ["--platform", platform]
    command += ["--constraint", str(_ROOT / "constraints.txt"), "--dest", str(folder), *_WHEELS]
    subprocess.run(command, check=True)


def tracked_bytes() -> int:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=_ROOT, capture_output=True, check=True, text=True
    ).stdout
    return sum((_ROOT / name).stat().st_size for name in listed.split("\0") if name)


def bytes_below(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def command_there(*, bundle: bool) -> str:
    """Return the command to run on the other machine; the folder `$OUT` is copied back."""
    site = f"{_FOLDER}/site"
    install = (
        "python3 -m pip install -q --no-index --no-deps --no-compile --upgrade "
        f"--target {site} {_FOLDER}/wheels/*.whl"
    )
    run = f"python3 -u -m benchmarks.gpu --data {_FOLDER}/data --seconds {_SECONDS} --out $OUT/gpu"
    go_on = f" --from {_FOLDER}/bundle" if bundle else ""
    return f"{install} && PYTHONPATH={site} {run}{go_on}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 shards")
    parser.add_argument("--from", dest="bundle", type=Path, help="a bundle to go on with")
    parser.add_argument("--python", default="3.12", help="of the GPU machine  [default: 3.12]")
    arguments = parser.parse_args()
    for path in (arguments.data, arguments.bundle):
        if path is not None and not path.is_dir():
            sys.exit(f"gpu-pack: {path} is no folder")
    folder = _ROOT / _FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "data").mkdir(parents=True)
    for shard in sorted(arguments.data.glob("*.parquet")):
        shutil.copy(shard, folder / "data")
    if not any((folder / "data").iterdir()):
        sys.exit(f"gpu-pack: {arguments.data} holds no Parquet shards")
    fetch_wheels(folder / "wheels", arguments.python)
    if arguments.bundle:
        shutil.copytree(arguments.bundle, folder / "bundle")
    size = bytes_below(folder) + tracked_bytes()
    if size > _MOST_BYTES:
        sys.exit(
            f"gpu-pack: {size / 2**20:.1f} MiB are more than {_MOST_BYTES / 2**20:.0f}; use fewer "
            "shards, or a smaller bundle"
        )
    print(f"{_FOLDER}/ and the tracked files: {size / 2**20:.1f} MiB. Carry both, and run there:\n")
    print(command_there(bundle=arguments.bundle is not None))
    print("\nIts time limit should be at least 590 seconds; $OUT is a folder that comes back.")


if __name__ == "__main__":
    main()
