"""In the machine, where systemd is process 1: installs the service, and is its client through all of it.

One process from the first attach to the end, since what is looked at is that its grant lives on.  Prints one
line of JSON per finding; what does not hold is an AssertionError.
"""

from __future__ import annotations

import grp
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import sysconfig
import time
from importlib.metadata import distribution
from pathlib import Path

import teemate

DROP_IN = Path("/etc/systemd/system/teemate-broker.service.d/test.conf")
IMAGES = Path("/opt/images")
CONFIG = Path("/etc/teemate/broker.toml")
UNIT = "teemate-broker.service"
DEVICE = Path("/dev/sgx_enclave")
UDEVD = Path("/lib/systemd/systemd-udevd")
POLICY = """
[broker]
backend = "sgx"
warden_deadline = 60.0
resume_grace = 600.0
trust_pid = true
[administrators]
uids = [0]
[[enclave]]
name = "vault"
image = "{image}"
owner = 0
wait = 600.0
[[enclave.attach]]
uid = {uid}
"""


def run(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise AssertionError(f"{command}: {done.stdout}{done.stderr}\n{journal()}")
    return done.stdout.strip()


def journal(*matches: str) -> str:
    return run("journalctl", "-u", UNIT, "--no-pager", "-n", "40", *matches)


class Record(dict[str, str]):
    """An entry of the journal, by fields; those that it lacks are empty."""

    def __missing__(self, field: str) -> str:
        return ""


def records() -> list[Record]:
    """All that the journal has of the unit, from one program: each that is started here costs a second."""
    lines = run("journalctl", f"--unit={UNIT}", "--output=json", "--all").splitlines()
    return [Record(json.loads(line)) for line in lines]


def show(name: str) -> str:
    return run("systemctl", "show", UNIT, f"--property={name}", "--value")


def tell(finding: str, **about: object) -> None:
    print(json.dumps({"finding": finding, **about}), flush=True)


def write_policy(uid: int) -> None:
    CONFIG.write_text(POLICY.format(image=IMAGES / "vault.sgxs", uid=uid))


def install() -> None:
    shutil.copytree(Path(sys.argv[1]).parent, IMAGES)  # the service has a /tmp of its own
    IMAGES.chmod(0o755)  # and is another user than the tests
    for file in IMAGES.glob(f"{Path(sys.argv[1]).stem}.*"):
        file.rename(IMAGES / f"vault{file.suffix}")
    # The one that pip has installed, and no other.
    ours = distribution("teemate")
    assert str(ours.read_text("INSTALLER")).strip() == "pip"
    places = {Path(teemate.__file__).parent, Path(str(ours.locate_file("teemate")))}
    assert places == {Path(sysconfig.get_path("platlib")) / "teemate"}, places
    tell("installed", said=run("teemate-broker", "install").count("installed"))
    run("systemd-sysusers")
    run("systemd-tmpfiles", "--create", "teemate.conf")
    run("journalctl", "--update-catalog")
    give_device()
    write_policy(0)
    DROP_IN.parent.mkdir(parents=True)
    # In this machine a broker takes as long to start as elsewhere a hundred do.
    settings = ["WatchdogSec=20", "TimeoutStartSec=600", os.environ.get("DROP_IN", "")]
    settings.append("Environment=LD_LIBRARY_PATH=/opt/python/lib")  # where Python is no package of Debian's
    DROP_IN.write_text("[Service]\n" + "\n".join(settings) + "\n")
    run("systemctl", "enable", "teemate-broker.socket", "teemate-broker.service")  # reads all units again


def give_device() -> None:
    """Have the rule give the device to the broker's group; where there is no udev, as it would do it."""
    if not UDEVD.exists():
        run("chgrp", "sgx", str(DEVICE))
        run("chmod", "0660", str(DEVICE))
        tell("no udev to run the rule for the device (Debian: udev)")
        return
    DEVICE.chmod(0o600)
    # Its own rules say the same by now; this is about ours.
    others = Path("/etc/udev/rules.d/50-udev-default.rules")
    others.parent.mkdir(parents=True, exist_ok=True)
    others.symlink_to("/dev/null")
    run(str(UDEVD), "--daemon")
    run("udevadm", "trigger", "--settle", "--subsystem-match=misc")
    status = DEVICE.stat()
    assert (grp.getgrgid(status.st_gid).gr_name, stat.S_IMODE(status.st_mode)) == ("sgx", 0o660), status
    tell("udev", version=run("udevadm", "--version"), group="sgx", mode="0660")


def newer() -> bool:
    """Whether what is for systemd 254 and later is in force too."""
    return int(run("systemctl", "--version").split()[1]) >= 254


def main_pid() -> int:
    return int(show("MainPID"))


def confined() -> None:
    """What the kernel has of the broker's rights."""
    status = dict(
        line.split(":\t", 1)
        for line in Path(f"/proc/{main_pid()}/status").read_text().splitlines()
        if ":\t" in line
    )
    assert status["CapEff"] == status["CapBnd"] == f"{1 << 5:016x}", status  # CAP_KILL
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert status["Uid"].split()[1] != "0"
    tell("confined", uid=status["Uid"].split()[1], capabilities=status["CapEff"])


def activate() -> None:
    """Have a connection start the service, and wait for as long as that takes in here."""
    assert show("ActiveState") == "inactive"
    started = time.monotonic()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect("/run/teemate/broker.sock")
        while show("ActiveState") == "inactive":
            pass
        run("systemctl", "start", UNIT)  # waits for the start that is under way
    tell("socket activation", seconds=round(time.monotonic() - started, 1), restarts=int(show("NRestarts")))


class Holder:
    """Holds a grant from before everything to after it."""

    def __init__(self) -> None:
        activate()
        self.broker = teemate.connect()
        self.enclave = self.broker.attach("vault", wait=600)
        self.slot = self.enclave.slot().__enter__()
        assert self.call(b"first") == b"first"
        self.before = self.held()

    def call(self, text: bytes) -> bytes:
        return self.slot.call("echo", text)

    def held(self) -> object:
        """This process's grants and slots, and which enclave they are on, as the broker has it."""
        (me,) = [client for client in self.broker.clients() if client.pid == os.getpid()]
        (vault,) = self.broker.enclaves()
        assert vault.backend == "sgx"
        return [grant._asdict() for grant in me.grants], vault.generation, vault.base, vault.mrenclave

    def expect_nothing_lost(self, after: str, old: int) -> None:
        assert self.call(b"still here") == b"still here"
        assert self.held() == self.before, (self.held(), self.before)
        assert main_pid() != old
        tell("nothing lost", after=after, restarts=int(show("NRestarts")), held=str(self.before[0]))  # type: ignore[index]


def reload(holder: Holder) -> None:
    write_policy(12345)
    run("systemctl", "reload", UNIT)
    while not any(record["TEEMATE_EVENT"] == "policy taken" for record in records()):
        assert not newer(), "systemctl came back before the new policy was in force"
        holder.broker.ping()
    try:
        holder.broker.attach("vault")
    except teemate.Denied:
        pass
    else:
        raise AssertionError("the changed policy is not in force")
    CONFIG.write_text("[broker]\nbackand = 1\n")
    done = subprocess.run(["systemctl", "reload", UNIT], capture_output=True, check=False)
    assert done.returncode != 0
    assert show("ActiveState") == "active"
    write_policy(0)
    tell("reload took a changed policy, and failed on one with a mistake")


def watchdog(holder: Holder) -> None:
    old = main_pid()
    os.kill(old, signal.SIGSTOP)
    started = time.monotonic()
    holder.broker.ping()  # answered by the next broker
    tell("watchdog", seconds=round(time.monotonic() - started, 1))
    holder.expect_nothing_lost("watchdog", old)


def look_into_journal() -> None:
    """What the service left there from its start on."""
    found = records()
    (granted, *_) = [record for record in found if record["TEEMATE_AUDIT"] == "grant"]
    wanted = {
        "TEEMATE_ENCLAVE": "vault",
        "TEEMATE_CLIENT_UID": "0",
        "TEEMATE_CLIENT_PID": str(os.getpid()),
        "TEEMATE_CLIENT_CGROUP": "/system.slice/machine-command.service",
        "SYSLOG_IDENTIFIER": "teemate-broker",
        "_SYSTEMD_UNIT": UNIT,
    }
    assert {name: granted[name] for name in wanted} == wanted, granted
    assert granted["TEEMATE_SLOT"]
    (denied,) = [record for record in found if record["TEEMATE_AUDIT"] == "denial"]
    assert "no [[enclave.attach]] matches" in denied["TEEMATE_REASON"]
    assert denied["TEEMATE_CLIENT_CGROUP"]
    messages = [record["MESSAGE"] for record in found]
    assert any("broker.toml:2" in message for message in messages)  # of the policy with a mistake
    assert any("Watchdog timeout" in message for message in messages)
    # Where it was stuck, and nothing of its memory
    assert any("Fatal Python error: Aborted" in message for message in messages)
    explained = run("journalctl", f"--unit={UNIT}", "--catalog", "TEEMATE_AUDIT=denial")
    assert "names the one that is missing" in explained
    print(explained, file=sys.stderr)
    tell("journal", fields=sorted(name for name in granted if name.startswith("TEEMATE_")))


def main() -> None:
    install()
    run("systemctl", "start", "teemate-broker.socket")
    holder = Holder()
    confined()
    old = main_pid()
    run("systemctl", "restart", UNIT)
    holder.expect_nothing_lost("systemctl restart", old)
    old = main_pid()
    os.kill(old, signal.SIGKILL)
    holder.broker.ping()
    holder.expect_nothing_lost("kill -9", old)
    reload(holder)
    watchdog(holder)
    if newer():
        old = main_pid()
        run("systemctl", "stop", UNIT)
        run("systemctl", "start", UNIT)
        holder.expect_nothing_lost("systemctl stop and start", old)
    look_into_journal()
    print(run("systemctl", "status", UNIT, "--no-pager", "-n", "0"), file=sys.stderr)


try:
    main()
except BaseException:
    print(journal(), file=sys.stderr)
    raise
