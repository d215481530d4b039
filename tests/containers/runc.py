"""Real OCI containers for tests, by runc: what a program in one has, and nothing that it has not.

A container here has pid, mount, user, network, IPC and UTS namespaces of its own, no capability, no device, a
root file system that is read-only, and one thing of TeeMate's: the broker's socket.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

__all__ = ["HOST_UID", "SECCOMP", "Container", "Root", "bare_root", "python_root", "start"]

FIRST_UID = 300000
"""The host's number of a container's root; its other users follow."""
USER = 1000
HOST_UID = FIRST_UID + USER
"""Who a container's program is for the host, and so for the broker."""
SOCKET = "/run/teemate/broker.sock"
SECCOMP = Path(__file__).parents[2] / "systemd" / "seccomp-client.json"
_PATIENCE = 60.0
"""Seconds that a program may take to end when its input has ended."""
_numbers = itertools.count()


@dataclass(frozen=True)
class Root:
    """A root file system: a folder, and what of the host is mounted into it read-only."""

    folder: Path
    mounts: tuple[Path, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Container:
    """A running container; `process` is ``runc run``, whose end is that of the container."""

    name: str
    process: subprocess.Popen[str]

    def init(self) -> int:
        """The host's number of its first process."""
        state = subprocess.run(
            ["runc", *_state(), "state", self.name], capture_output=True, text=True, check=True
        )
        pid: int = json.loads(state.stdout)["pid"]
        return pid

    @property
    def output(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout

    def kill(self) -> None:
        """End it as `docker kill` does."""
        subprocess.run(["runc", *_state(), "kill", self.name, "KILL"], check=True, capture_output=True)


def _state() -> list[str]:
    return ["--root", str(Path(tempfile.gettempdir()) / "teemate-test-runc")]


def _skeleton(folder: Path, mounts: Sequence[Path] = ()) -> None:
    """Make the folders that something is mounted on: a container's root may not."""
    for place in (Path("/proc"), Path("/dev"), Path(SOCKET).parent, *mounts):
        (folder / place.relative_to("/")).mkdir(parents=True, exist_ok=True)


def python_root(folder: Path) -> Root:
    """A root file system with this Python, its packages and the host's libraries."""
    folder.mkdir()
    places = [Path("/usr"), Path(sys.prefix), Path(sys.base_prefix)]
    mounts = [place for place in places if not any(other in place.parents for other in places)]
    for link in ("bin", "lib", "lib64"):
        (folder / link).symlink_to(f"usr/{link}")
    mounts = list(dict.fromkeys(mounts))
    _skeleton(folder, mounts)
    return Root(folder, tuple(mounts), {"PATH": f"{sys.prefix}/bin:/usr/bin"})


def bare_root(folder: Path, program: Path, libraries: Path) -> Root:
    """A root file system with one C program at /program and the libraries that it was linked with."""
    (folder / "lib64").mkdir(parents=True)
    _skeleton(folder)
    shutil.copy(program, folder / "program")
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries)}
    listed = subprocess.run(
        ["ldd", str(program)], capture_output=True, text=True, check=True, env=environment
    ).stdout
    for line in listed.splitlines():
        words = [word for word in line.split() if word.startswith("/")]
        if words:
            shutil.copy(words[0], folder / "lib64" / Path(words[0]).name)
    return Root(folder, (), {"LD_LIBRARY_PATH": "/lib64"})


def _config(
    root: Root, arguments: Sequence[str], socket: str, group: str, seccomp: Path | None
) -> dict[str, object]:
    """config.json of the OCI runtime specification."""
    readonly = ["bind", "ro", "nosuid", "nodev"]
    mounts: list[dict[str, object]] = [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "nodev", "noexec"]},
        {
            "destination": "/dev",
            "type": "tmpfs",
            "source": "tmpfs",
            "options": ["nosuid", "noexec", "mode=755", "size=64k"],
        },
        # The folder, and not the socket itself, so that a broker's next socket is there too.
        {
            "destination": str(Path(SOCKET).parent),
            "type": "bind",
            "source": str(Path(socket).parent),
            "options": readonly,
        },
    ]
    mounts += [
        {
            "destination": str(place),
            "type": "bind",
            "source": str(place),
            "options": ["r" + readonly[0], *readonly[1:]],
        }
        for place in root.mounts
    ]
    mapping = [{"containerID": 0, "hostID": FIRST_UID, "size": 65536}]
    environment = {**root.environment, "TEEMATE_SOCKET": f"{Path(SOCKET).parent}/{Path(socket).name}"}
    linux: dict[str, object] = {
        "namespaces": [{"type": kind} for kind in ("pid", "mount", "user", "network", "ipc", "uts")],
        "uidMappings": mapping,
        "gidMappings": mapping,
        "resources": {"devices": [{"allow": False, "access": "rwm"}]},
    }
    if group:
        linux["cgroupsPath"] = group
    if seccomp is not None:
        linux["seccomp"] = json.loads(seccomp.read_text())
    nothing: dict[str, list[str]] = {
        kind: [] for kind in ("bounding", "effective", "permitted", "inheritable", "ambient")
    }
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": USER, "gid": USER},
            "args": list(arguments),
            "env": [f"{name}={value}" for name, value in environment.items()],
            "cwd": "/",
            "capabilities": nothing,
            "noNewPrivileges": True,
        },
        "root": {"path": str(root.folder), "readonly": True},
        "hostname": "container",
        "mounts": mounts,
        "linux": linux,
    }


@contextlib.contextmanager
def start(
    root: Root,
    arguments: Sequence[str],
    socket: str,
    *,
    group: str = "",
    seccomp: Path | None = None,
) -> Iterator[Container]:
    """Run a container until the block ends; `group` is its control group, below the root of the hierarchy."""
    name = f"teemate-{os.getpid()}-{next(_numbers)}"
    with tempfile.TemporaryDirectory(prefix="teemate-bundle-") as bundle:
        config = _config(root, arguments, socket, group or f"/teemate-test/{name}", seccomp)
        (Path(bundle) / "config.json").write_text(json.dumps(config))
        with subprocess.Popen(
            ["runc", *_state(), "run", "--bundle", bundle, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            try:
                yield Container(name, process)
            finally:
                assert process.stdin is not None
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()  # most programs end with their input
                try:
                    process.wait(_PATIENCE)
                except subprocess.TimeoutExpired:
                    subprocess.run(
                        ["runc", *_state(), "delete", "--force", name], capture_output=True, check=False
                    )
                    process.kill()
