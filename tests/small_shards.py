"""The command with small shards of features, to be killed while it computes them.

python -m tests.small_shards ROWS ARGUMENT ...: one command, with so many rows in a shard.
python -m tests.small_shards ROWS --kill SEED TIMES BANK ARGUMENT ...: the command is begun so many
times, and killed each time at a random moment after its first or second new shard in the folder
BANK. It prints whether each of them was killed; one that ends before that moment was not.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

# Imported once, before the command is begun many times.
import snscc_ray.answers.report
import snscc_ray.runs.local  # noqa: F401
from snscc_ray import cli
from snscc_ray.data.loading import bank


def killed(bank_folder: Path, chance: random.Random) -> bool:
    """Begin the command in a process of its own and kill it; whether it was still running."""

    def shards() -> int:
        return len(list(bank_folder.glob("*.npy")))

    # Counted in shards, not in seconds: the whole extraction may take less than half a second.
    enough = shards() + chance.randint(1, 2)
    child = os.fork()
    if child == 0:
        cli.main()
    while shards() < enough:
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return False
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def main() -> None:
    rows, *arguments = sys.argv[1:]
    bank.SHARD_ROWS = int(rows)
    if arguments[0] != "--kill":
        sys.argv[1:] = arguments
        cli.main()
    _, seed, times, folder, *arguments = arguments
    sys.argv[1:] = arguments
    chance = random.Random(int(seed))
    print([killed(Path(folder), chance) for _ in range(int(times))])


if __name__ == "__main__":
    main()
