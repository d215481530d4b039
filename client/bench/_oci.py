"""Containers by runc: what a program in one has, and nothing that it has not.

They have pid, mount, network, IPC and UTS namespaces of their own, no capability, a root file system that is
read-only, and of TeeMate the folder with the broker's socket.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from teemate.errors import Unsupported

__all__ = ["SOCKET_FOLDER", "Rights", "Root", "config", "program_root", "python_root", "runc_program"]

SOCKET_FOLDER = Path("/run/teemate")
"""Where a container has the folder of the broker's socket."""
_NAMESPACES = ("pid", "mount", "network", "ipc", "uts")
_CAPABILITY_SETS = ("bounding", "effective", "permitted", "inheritable", "ambient")
_MAPPED = 65536


class Root(NamedTuple):
    """A root file system: a folder, and what of the host is mounted into it read-only."""

    folder: Path
    mounts: tuple[Path, ...] = ()
    environment: Mapping[str, str] = {}


class Rights(NamedTuple):
    """Who the program is, and what it may beyond the least."""

    uid: int = 0
    first_host_uid: int | None = None
    """With it the container has a user namespace, whose root is this user of the host."""
    group: str = ""
    """Its control group, below the root of the hierarchy."""
    seccomp: Mapping[str, object] | None = None
    device: Path | None = None
    """A device of the host that it may open: what the conventional way needs."""


def runc_program() -> str:
    """Return where runc is.

    Raises
    ------
    Unsupported
        It is not installed, or this is not root.

    """
    found = shutil.which("runc", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if found is None:
        raise Unsupported("containers are made by runc, which is not here: install it (Debian: runc)")
    if os.geteuid() != 0:
        raise Unsupported("runc makes namespaces and control groups, which root may: run this as root")
    return found


def _skeleton(folder: Path, mounts: Sequence[Path] = ()) -> None:
    """Make the folders that something is mounted on: nobody may write to the container's root."""
    for place in (Path("/proc"), Path("/dev"), SOCKET_FOLDER, *mounts):
        (folder / place.relative_to("/")).mkdir(parents=True, exist_ok=True)


def python_root(folder: Path, *more: Path) -> Root:
    """Make a root file system with this Python, its packages, the host's libraries, and `more`."""
    folder.mkdir()
    places = list(dict.fromkeys([Path("/usr"), Path(sys.prefix), Path(sys.base_prefix), *more]))
    mounts = [place for place in places if not any(other in place.parents for other in places)]
    for link in ("bin", "lib", "lib64"):
        (folder / link).symlink_to(f"usr/{link}")
    _skeleton(folder, mounts)
    return Root(folder, tuple(mounts), {"PATH": f"{sys.prefix}/bin:/usr/bin"})


def program_root(folder: Path, program: Path, libraries: Path | None = None) -> Root:
    """Make a root file system with one program at /program and the libraries that it was linked with."""
    (folder / "lib64").mkdir(parents=True)
    _skeleton(folder)
    shutil.copy(program, folder / "program")
    environment = {**os.environ, **({"LD_LIBRARY_PATH": str(libraries)} if libraries else {})}
    listed = subprocess.run(  # noqa: S603 - on our own program
        ["/usr/bin/ldd", str(program)], capture_output=True, text=True, check=True, env=environment
    ).stdout
    for line in listed.splitlines():
        found = [word for word in line.split() if word.startswith("/")]
        if found:
            shutil.copy(found[0], folder / "lib64" / Path(found[0]).name)
    return Root(folder, (), {"LD_LIBRARY_PATH": "/lib64"})


def config(
    root: Root, arguments: Sequence[str], *, socket: str | None = None, rights: Rights | None = None
) -> dict[str, object]:
    """Return the content of a bundle's config.json (OCI runtime specification 1.0)."""
    rights = rights or Rights()
    environment = dict(root.environment)
    mounts = [
        _mount(Path("/proc"), "proc", "nosuid", "nodev", "noexec"),
        # exec: Linux maps no enclave's code from a device below a noexec one.
        _mount(
            Path("/dev"), "tmpfs", "nosuid", "exec" if rights.device else "noexec", "mode=755", "size=64k"
        ),
        *(_bind(place, place, "rbind", "ro") for place in root.mounts),
    ]
    if socket is not None:
        # The folder and not the socket itself, so that a later broker's is there too.
        mounts.append(_bind(SOCKET_FOLDER, Path(socket).parent, "bind", "ro"))
        environment["TEEMATE_SOCKET"] = str(SOCKET_FOLDER / Path(socket).name)
    devices: list[dict[str, object]] = [{"allow": False, "access": "rwm"}]
    linux: dict[str, object] = {
        "namespaces": [{"type": kind} for kind in _NAMESPACES],
        "resources": {"devices": devices},
    }
    if rights.device is not None:
        number = rights.device.stat().st_rdev
        about: dict[str, object] = {"type": "c", "major": os.major(number), "minor": os.minor(number)}
        devices.append({"allow": True, "access": "rw", **about})
        mode = stat.S_IMODE(rights.device.stat().st_mode)
        linux["devices"] = [{"path": str(rights.device), "fileMode": mode, "uid": 0, "gid": 0, **about}]
    if rights.first_host_uid is not None:
        mapping = [{"containerID": 0, "hostID": rights.first_host_uid, "size": _MAPPED}]
        linux["namespaces"] = [{"type": kind} for kind in (*_NAMESPACES, "user")]
        linux |= {"uidMappings": mapping, "gidMappings": mapping}
    if rights.group:
        linux["cgroupsPath"] = rights.group
    if rights.seccomp is not None:
        linux["seccomp"] = rights.seccomp
    nothing: dict[str, list[str]] = {name: [] for name in _CAPABILITY_SETS}
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": rights.uid, "gid": rights.uid},
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


def _mount(place: Path, kind: str, *options: str) -> dict[str, object]:
    return {"destination": str(place), "type": kind, "source": kind, "options": list(options)}


def _bind(place: Path, source: Path, *options: str) -> dict[str, object]:
    return {
        "destination": str(place),
        "type": "bind",
        "source": str(source),
        "options": [*options, "nosuid", "nodev"],
    }
