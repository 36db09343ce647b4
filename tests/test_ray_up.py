"""`ray up` for real, with deploy/cluster-local.yaml: up, submit, fetch, down.

The machines are namespaces: a laptop, a head and a worker, each with a network, processes, mounts
and a home folder of its own, the last two with an SSH server, joined by a bridge. So the `ray stop`
in `ray up` and `ray down` meets no process of anyone else, and nothing is reachable from outside.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from tests.conftest import TINY

ROOT = Path(__file__).resolve().parents[1]
PATH = os.pathsep.join([str(Path(sys.prefix, "bin")), os.environ["PATH"], "/usr/sbin", "/sbin"])
TOOLS = ("ip", "nsenter", "rsync", "setpriv", "ssh", "ssh-keygen", "sshd", "unshare")
OWN = ("--net", "--pid", "--mount", "--uts")
GATEWAY, HEAD, WORKER = "10.77.0.1", "10.77.0.2", "10.77.0.3"
# Three CPUs a machine, whatever this one has: room for one training worker of two, not for two.
RESOURCES = '{"CPU":3}'


def why_not() -> str:
    """Why this machine cannot play three, or nothing."""
    missing = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (openssh-server, rsync, iproute2, util-linux)"
    bridge = ["ip", "link", "add", "br0", "type", "bridge"]
    made = subprocess.run(["unshare", *OWN, "--fork", *bridge], capture_output=True, text=True)
    if made.returncode:
        return f"namespaces are not permitted: {made.stderr.strip()}"
    if not all(importlib.util.find_spec(name) for name in ("aiohttp_cors", "opencensus")):
        return "ray[default] is not installed"
    return ""


@dataclass
class Machine:
    """A namespace of each kind; `pid` is its process 1 as seen from outside."""

    name: str
    home: Path
    pid: int
    holder: subprocess.Popen[bytes]

    @classmethod
    def start(cls, name: str, folder: Path, script: str) -> Machine:
        """A new machine that runs `script` as process 1; its root user lives in `folder`/home."""
        home = folder / "home"
        home.mkdir(parents=True, exist_ok=True)
        users = Path("/etc/passwd").read_text().splitlines()
        users = [f"root:x:0:0:root:{home}:/bin/bash", *(u for u in users if u[:5] != "root:")]
        (folder / "passwd").write_text("\n".join(users) + "\n")
        (folder / "shadow").write_text("root:*:19000:0:99999:7:::\n")
        # A machine's own name must lead to its address: training asks for it.
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{HEAD} head\n{WORKER} worker\n")
        setup = f"""set -e
            mount --bind {folder}/passwd /etc/passwd
            mount --bind {folder}/shadow /etc/shadow
            mount --bind {folder}/hosts /etc/hosts
            mount -t tmpfs tmpfs /run
            mount -t tmpfs tmpfs /dev/shm
            mkdir /run/sshd /run/ray
            hostname {name}
            ip link set lo up
            {script}"""
        # However this test ends, the machine ends with it.
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", *OWN, "--fork", "--mount-proc"]
        command += ["--kill-child", "bash", "-c", setup]
        with (folder / "log").open("wb") as log:
            holder = subprocess.Popen(command, env={"PATH": PATH}, stdout=log, stderr=log)
        children: list[psutil.Process] = []
        until(lambda: bool(children.extend(psutil.Process(holder.pid).children()) or children))
        return cls(name, home, children[0].pid, holder)

    def command(self, *arguments: object, **more: object) -> list[str]:
        """`arguments` as root of this machine runs them; `more` adds to the environment."""
        environment = {
            "HOME": self.home,
            "PATH": PATH,
            "TMPDIR": "/run",
            "COLUMNS": 200,
            "RAY_TMPDIR": "/run/ray",
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": 0,
            **more,
        }
        enter = ["nsenter", "--target", str(self.pid), *OWN, f"--wd={ROOT}", "--", "env", "-i"]
        variables = [f"{name}={value}" for name, value in environment.items()]
        return [*enter, *variables, *map(str, arguments)]

    def run(self, *arguments: object, status: int = 0, **more: object) -> str:
        """Run a command and return all it printed. Another exit status fails the test with it."""
        done = subprocess.run(
            self.command(*arguments, **more),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        said = f"{self.name}: {' '.join(map(str, arguments))}\n{done.stdout}"
        assert done.returncode == status, said
        return done.stdout

    def ray_processes(self) -> list[str]:
        """The command line of every Ray process on this machine."""
        script = "import psutil; [print(*p.cmdline()) for p in psutil.process_iter()]"
        names = ("raylet", "gcs_server", "ray::", "ray/dashboard", "ray/autoscaler")
        lines = self.run(sys.executable, "-c", script).splitlines()
        return [line for line in lines if any(name in line for name in names)]

    def stop(self) -> None:
        """End process 1, and with it every process of the machine."""
        os.kill(self.pid, signal.SIGKILL)
        self.holder.wait(timeout=30)


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[tuple[Machine, Machine, Machine]]:
    """Laptop, head and worker, on one network that leads nowhere else."""
    if reason := why_not():
        pytest.skip(reason)
    started: list[Machine] = []

    def start(name: str, script: str) -> Machine:
        started.append(Machine.start(name, tmp_path / name, script))
        return started[-1]

    try:
        laptop = start(
            "laptop",
            f"""ip link add br0 type bridge
            ip addr add {GATEWAY}/24 dev br0
            ip link set br0 up
            touch /run/ready
            exec sleep infinity""",
        )
        until(Path(f"/proc/{laptop.pid}/root/run/ready").exists)
        key = laptop.home / ".ssh" / "id_ed25519"
        key.parent.mkdir(mode=0o700)
        make_key(key)
        for name, address in (("head", HEAD), ("worker", WORKER)):
            prepare_host(tmp_path / name, key, address)
            # The default route leads nowhere, but Ray takes the address it would leave by.
            host = start(
                name,
                f"""until ip link show eth0 2>/dev/null; do sleep 0.1; done
                ip addr add {address}/24 dev eth0
                ip link set eth0 up
                ip route add default via {GATEWAY}
                exec $(command -v sshd) -D -e -f {tmp_path / name}/sshd_config""",
            )
            link = ["nsenter", f"--net=/proc/{laptop.pid}/ns/net", "ip", "link"]
            pair = ["add", name, "type", "veth", "peer", "name", "eth0", "netns", str(host.pid)]
            subprocess.run([*link, *pair], check=True)
            subprocess.run([*link, "set", name, "master", "br0", "up"], check=True)
        yield laptop, started[1], started[2]
    finally:
        for machine in started:
            machine.stop()


def make_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)


def prepare_host(folder: Path, key: Path, address: str) -> None:
    """What a person has done to a machine before `ray up`: their key, and Python."""
    home = folder / "home"
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    (home / ".ssh" / "authorized_keys").write_text(key.with_suffix(".pub").read_text())
    (home / ".ssh" / "authorized_keys").chmod(0o600)
    # There is no network to install from: the environment of this test stands in.
    (home / "snscc-venv").symlink_to(sys.prefix)
    variables = "RAY_TMPDIR=/run/ray RAY_USAGE_STATS_ENABLED=0"
    (home / ".bashrc").write_text(f"export {variables} RAY_OVERRIDE_RESOURCES='{RESOURCES}'\n")
    make_key(folder / "host_key")
    (folder / "sshd_config").write_text(
        f"ListenAddress {address}:22\nHostKey {folder}/host_key\nPidFile none\nUsePAM no\n"
        "PermitRootLogin prohibit-password\nPasswordAuthentication no\n"
    )


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Path]:
    """deploy/cluster-local.yaml filled in, less the one command that needs the network."""
    config = yaml.safe_load((ROOT / "deploy" / "cluster-local.yaml").read_text())
    # Ray keeps SSH connections in a folder named after the cluster, which all tests share.
    name = f"snscc-{uuid.uuid4().hex[:8]}"
    connections = hashlib.sha256(name.encode()).hexdigest()[:10]
    config["cluster_name"] = name
    config["provider"].update(head_ip=HEAD, worker_ips=[WORKER])
    config["auth"]["ssh_user"] = "root"
    commands = config["setup_commands"]
    config["setup_commands"] = [c for c in commands if "pip install" not in c]
    assert len(config["setup_commands"]) == len(commands) - 1
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(config))
    yield path
    for folder in Path("/tmp").glob(f"ray_ssh_*/{connections}"):
        shutil.rmtree(folder)


def can_connect(machine: Machine, host: str, port: int) -> bool:
    script = f"import socket; socket.create_connection(({host!r}, {port}), 3)"
    done = subprocess.run(machine.command(sys.executable, "-c", script), capture_output=True)
    return done.returncode == 0


def fetch(machine: Machine, url: str) -> str:
    """What is at a URL, as seen from a machine; nothing if it does not answer."""
    script = f"import urllib.request as u; print(u.urlopen({url!r}, timeout=5).read())"
    done = subprocess.run(machine.command(sys.executable, "-c", script), capture_output=True)
    return done.stdout.decode()


def documented_commands(cluster: Path, storage: Path, home: Path) -> list[list[str]]:
    """The lines under "On more than one machine", with this test's own files and folders."""
    page = (ROOT / "docs" / "cluster.md").read_text()
    section = page.split("## On more than one machine")[1]
    block = section.split("```")[1]
    for told, here in (
        ("deploy/cluster-local.yaml", cluster),
        ("/shared/runs", storage),
        (" runs/", f" {home}/runs/"),
    ):
        assert told in block
        block = block.replace(told, str(here))
    return [shlex.split(line, comments=True) for line in block.strip().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_up_submit_fetch_down(
    machines: tuple[Machine, Machine, Machine], cluster: Path, tmp_path: Path
) -> None:
    laptop, head, worker = machines
    storage = tmp_path / "storage"
    storage.mkdir()
    token, up, dashboard, export, submit, bring, down = documented_commands(
        cluster, storage, laptop.home
    )
    laptop.run(*token)
    laptop.run(*up)
    log = (tmp_path / "tunnel.log").open("wb")
    subprocess.Popen(laptop.command(*dashboard), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    until(lambda: can_connect(laptop, "127.0.0.1", 8265))

    # The dashboard is reached by SSH and with the token, and in no other way.
    assert can_connect(laptop, HEAD, 22) and not can_connect(laptop, HEAD, 8265)
    set_ = dict(variable.split("=", 1) for variable in export[1:])
    laptop.run("ray", "job", "list", **set_)
    wrong = set_ | {"RAY_AUTH_TOKEN": "another"}
    refusal = laptop.run("ray", "job", "list", status=1, **wrong)
    assert "authentication token is invalid" in refusal

    # One worker fits on a machine, so two workers are one on each.
    few = [word for setting in TINY for word in ("--set", setting)]
    laptop.run(*submit, "--cpus-per-worker", 2, "--wait", 120, *few, **set_)
    listed = laptop.run("ray", "list", "actors", "--format", "json", **set_)
    actors = json.loads(listed[listed.index("[{") :].strip().splitlines()[0])
    places = {a["node_id"] for a in actors if a["class_name"] == "RayTrainWorker"}
    assert len(places) == 2

    board = f"tensorboard --logdir {storage} --host 127.0.0.1 --port 6006"
    command = laptop.command("ray", "exec", cluster, "-p", 6006, board)
    subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    until(lambda: "digits/tensorboard" in fetch(laptop, "http://127.0.0.1:6006/data/runs"))

    laptop.run(*bring)
    fetched = laptop.home / "runs" / "digits"
    figures = json.loads((fetched / "metrics.json").read_text())
    assert list(figures["stages"]) == ["pretrain", "train", "boost"]
    assignments = pq.read_table(fetched / "assignments.parquet")
    assert assignments.num_rows == figures["rows"] == 200
    assert {"id", "cluster", "confidence"} <= set(assignments.column_names)

    # What docs/cluster.md says to do at the end: Ray's own `ray down` leaves the workers to notice.
    laptop.run(*down)
    assert head.ray_processes() == []
    assert worker.ray_processes() != []
    ssh = ("ssh", "-o", "StrictHostKeyChecking=no", f"root@{WORKER}")
    laptop.run(*ssh, "snscc-venv/bin/ray", "stop", "--force")
    assert worker.ray_processes() == []
