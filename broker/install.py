"""``teemate-broker install``: units, users, device rule, catalog and man pages, where the host looks.

The files lie in the package as they would be in a distribution's; what they say of places is made true for
this installation.  Nothing is started and no command of the host is run: what is left to do is printed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import click

__all__ = ["install"]

_PROGRAM = "/usr/bin/teemate-broker"
_GATEWAY = "/usr/bin/teemate-gateway"
_IMAGES = "/usr/lib/teemate/images"
"""What the shipped files have in place of where things are here."""
_PROTECTED = ("/home/", "/root/", "/run/user/", "/tmp/", "/var/tmp/")  # noqa: S108 - named, not used
"""What the unit hides from the broker (ProtectHome=, PrivateTmp=)."""
CONFIG = "etc/teemate/broker.toml"


class _File(NamedTuple):
    source: str
    """Below the package."""
    target: str
    """Below the root."""


def _wanted(prefix: str, systemd: int) -> Iterator[_File]:
    """What goes where.  All of it is looked for below /usr/local too."""
    lib, share = f"{prefix}/lib", f"{prefix}/share"
    yield _File("systemd/teemate-broker.service", f"{lib}/systemd/system/teemate-broker.service")
    yield _File("systemd/teemate-broker.socket", f"{lib}/systemd/system/teemate-broker.socket")
    yield _File("systemd/teemate-gateway.service", f"{lib}/systemd/system/teemate-gateway.service")
    yield _File("systemd/teemate-gateway.socket", f"{lib}/systemd/system/teemate-gateway.socket")
    if systemd >= 254:
        yield _File("systemd/254.conf", f"{lib}/systemd/system/teemate-broker.service.d/254.conf")
    yield _File("systemd/sysusers.conf", f"{lib}/sysusers.d/teemate.conf")
    yield _File("systemd/tmpfiles.conf", f"{lib}/tmpfiles.d/teemate.conf")  # noqa: S108
    yield _File("systemd/61-teemate-sgx.rules", f"{lib}/udev/rules.d/61-teemate-sgx.rules")
    yield _File("systemd/teemate.catalog", f"{lib}/systemd/catalog/teemate.catalog")
    yield _File("systemd/seccomp-client.json", f"{share}/teemate/seccomp-client.json")
    yield _File("systemd/broker.toml.example", f"{share}/teemate/broker.toml.example")
    yield _File("man/teemate.1", f"{share}/man/man1/teemate.1")
    yield _File("man/teemate-broker.8", f"{share}/man/man8/teemate-broker.8")
    yield _File("man/teemate-gateway.8", f"{share}/man/man8/teemate-gateway.8")
    yield _File("man/teemate.toml.5", f"{share}/man/man5/teemate.toml.5")


def _content(source: str, program: str) -> bytes:
    package = files("teemate")
    text = (package / source).read_text("utf-8")
    gateway = str(Path(program).with_name("teemate-gateway"))
    return (
        text.replace(_PROGRAM, program)
        .replace(_GATEWAY, gateway)
        .replace(_IMAGES, str(package / "images"))
        .encode()
    )


def _program() -> str:
    """Return where ``teemate-broker`` of this installation lies, and see that its unit can reach it."""
    program = Path(sys.prefix) / "bin" / "teemate-broker"
    if not program.is_file():
        raise click.ClickException(f"{program} is missing: name the program with --program")
    for path in (program, Path(sys.executable).resolve()):  # a virtual environment's Python lies elsewhere
        hidden = next((place for place in _PROTECTED if str(path).startswith(place)), None)
        if hidden is not None:
            raise click.ClickException(
                f"{path}: the service does not see {hidden.rstrip('/')} (ProtectHome=, PrivateTmp=): install"
                " the package elsewhere, for example into a virtual environment in /opt/teemate with the"
                " system's Python, and call its `teemate-broker install`"
            )
    return str(program)


def _systemd_version() -> int:
    """Return the host's version, 0 when there is none."""
    systemctl = shutil.which("systemctl")
    if systemctl is None:
        return 0
    done = subprocess.run([systemctl, "--version"], capture_output=True, text=True, check=False)  # noqa: S603
    found = re.match(r"systemd (\d+)", done.stdout)
    return int(found[1]) if found else 0


def _put(path: Path, content: bytes) -> bool:
    """Write the file as a whole, unless it is like that already; says whether it was changed."""
    with contextlib.suppress(FileNotFoundError):
        if path.read_bytes() == content:
            return False
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(content)
    new.chmod(0o644)
    new.replace(path)
    return True


def _remove(path: Path, root: Path) -> None:
    path.unlink(missing_ok=True)
    for folder in path.parents:
        # Only what is ours alone and empty by now.
        if folder == root or folder.name not in ("teemate", "teemate-broker.service.d"):
            break
        with contextlib.suppress(OSError):
            folder.rmdir()


@click.command()
@click.option(
    "--root", type=click.Path(path_type=Path), default=Path("/"), show_default=True, help="Install below it."
)
@click.option("--prefix", default="/usr/local", show_default=True, help="Below the root; packages have /usr.")
@click.option(
    "--program", help="The teemate-broker that the unit starts [default: the one of this installation]."
)
@click.option(
    "--systemd-version", type=click.IntRange(1), help="What to install for [default: this host's version]."
)
@click.option("--uninstall", is_flag=True, help="Remove what was installed; a changed policy stays.")
def install(
    root: Path, prefix: str, program: str | None, systemd_version: int | None, uninstall: bool
) -> None:
    """Put units, system user, device rule, message catalog and man pages in place.

    Installing again brings everything up to date. The policy, /etc/teemate/broker.toml, is only written
    when there is none.
    """
    root = root.absolute()
    prefix = prefix.strip("/")
    if uninstall:
        _uninstall(root, prefix)
        return
    program = program or _program()
    try:
        wanted = list(_wanted(prefix, systemd_version or _systemd_version()))
        stale = {file.target for file in _wanted(prefix, 1 << 16)} - {file.target for file in wanted}
        for target in stale:  # the drop-in of a newer systemd than there is now
            _remove(root / target, root)
        for source, target in wanted:
            changed = _put(root / target, _content(source, program))
            click.echo(f"{'installed' if changed else 'unchanged'}  {root / target}")
        config = root / CONFIG
        if config.exists():
            click.echo(f"kept       {config}")
        else:
            _put(config, _content("systemd/broker.toml.example", program))
            click.echo(f"installed  {config}, the example: say in it who may attach")
    except OSError as error:
        raise click.ClickException(f"{error.filename}: {error.strerror}") from error
    if root == Path("/"):
        click.echo("\nWhat is left to do, as root:\n")
        for command in (
            "systemd-sysusers && systemd-tmpfiles --create teemate.conf && journalctl --update-catalog",
            "udevadm control --reload && udevadm trigger --subsystem-match=misc",
            "systemctl daemon-reload && systemctl enable --now teemate-broker.socket teemate-broker.service",
        ):
            click.echo(f"    {command}")


def _uninstall(root: Path, prefix: str) -> None:
    example = None
    config = root / CONFIG
    installed = root / prefix / "share/teemate/broker.toml.example"
    with contextlib.suppress(OSError):
        example = installed.read_bytes()
    try:
        if config.exists() and example is not None and config.read_bytes() == example:
            _remove(config, root)
            click.echo(f"removed  {config}")
        elif config.exists():
            click.echo(f"kept     {config}, which is not the example any more")
        for _, target in _wanted(prefix, 1 << 16):
            if os.path.lexists(root / target):
                _remove(root / target, root)
                click.echo(f"removed  {root / target}")
    except OSError as error:
        raise click.ClickException(f"{error.filename}: {error.strerror}") from error
    if root == Path("/"):
        click.echo("\nThe system user teemate-broker stays; `systemctl daemon-reload` is left to do.")
