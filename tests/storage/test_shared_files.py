"""Files of a shared enclave: done by the warden, whoever of clients, warden and broker dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from files_image import (
    CREATE,
    EACCES,
    EINVAL,
    ELOOP,
    ENOSPC,
    ENOSYS,
    ESTALE,
    READ_ONLY,
    Files,
    build_files_image,
)
from images import BuiltImage, Images
from policies import enclave_policy
from processes import wait_until
from running_broker import RunningBroker, run_broker

import teemate
from teemate.broker.policy.rules import PolicyError, load_policy

StartDisk = Callable[..., Any]
StartClient = Callable[..., Any]


def records(path: Path) -> list[int]:
    """The numbers of the records in a file; every record has to be whole."""
    data = path.read_bytes()
    found = []
    for at in range(0, len(data) - len(data) % 64, 64):
        record = data[at : at + 64]
        assert record == record[:8] * 8, f"{path.name}: record {at // 64} is torn"
        found.append(int.from_bytes(record[:8], "little"))
    return found


# ---- what it does -------------------------------------------------------------------------


def test_files_lie_in_the_state_directory_for_the_brokers_user_alone(disk: StartDisk) -> None:
    running = disk()
    with teemate.connect(running.broker.socket) as connection, connection.attach("files") as enclave:
        with enclave.slot() as slot:
            files = Files(slot)
            handle = files.open("a.db")
            assert files.write(handle, 10, b"sealed") == 6
            assert files.sync(handle) == 0
            assert files.read(handle, 8, 100) == b"\0\0sealed"
            assert files.truncate(handle, 12) == 0
            assert files.size(handle) == 12
            assert files.locked() == -errno.EDEADLK
            assert files.at_reset() == 0  # nobody has left yet
        with enclave.slot() as other:  # the same slot or not: a file is everybody's
            assert Files(other).read(Files(other).open("a.db", READ_ONLY), 10, 5) == b"se"
    path = running.folder / "a.db"
    assert path.read_bytes() == bytes(10) + b"se"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for folder in (running.folder, running.folder.parent, running.folder.parent.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_names_that_lead_elsewhere_are_refused(disk: StartDisk, tmp_path: Path) -> None:
    running = disk()
    (tmp_path / "secret").write_text("the host's")
    (running.folder / "link").symlink_to(tmp_path / "secret")
    (running.folder / "inner").symlink_to("real")
    os.mkfifo(running.folder / "pipe")
    (running.folder / "folder").mkdir()
    with teemate.connect(running.broker.socket) as connection, connection.attach("files") as enclave:
        with enclave.slot() as slot:
            files = Files(slot)
            names = (
                "",
                ".",
                "..",
                "../secret",
                "/etc/passwd",
                ".hidden",
                "-x",
                "a/b",
                "a b",
                "n" * 64,
                "\x7f",
            )
            for name in names:
                assert files.open(name) == -EINVAL, name
                assert files.delete(name) == -EINVAL, name
            for name in ("link", "inner"):
                assert files.open(name) == -ELOOP
                assert files.delete(name) == -EACCES
            assert files.open("pipe") == -EACCES
            assert files.open("folder") == -errno.EISDIR
            assert files.open("n" * 63) == 0
    assert (tmp_path / "secret").read_text() == "the host's"


def test_a_full_folder_is_an_error_and_deleting_makes_room(disk: StartDisk) -> None:
    running = disk("storage_limit = 40960")
    with teemate.connect(running.broker.socket) as connection, connection.attach("files") as enclave:
        with enclave.slot() as slot:
            files = Files(slot)
            first, second = files.open("first"), files.open("second")
            assert files.write(first, 0, bytes(32768)) == 32768
            assert files.write(second, 0, bytes(8193)) == -ENOSPC
            assert files.size(second) == 0
            assert files.write(second, 0, bytes(8192)) == 8192
            assert files.write(second, 0, bytes(8192)) == 8192  # over what is there: nothing more
            assert files.open("third") == -ENOSPC
            assert files.truncate(first, 1 << 40) == -ENOSPC
            assert files.write(first, 1 << 40, b"x") == -ENOSPC
            running.kill_warden()  # its successor counts what is there
            assert files.write(second, 8192, b"x") == -ENOSPC
            assert files.delete("first") == 0
            assert files.write(second, 8192, b"x") == 1
            assert files.open("third") >= 0


# ---- deaths ---------------------------------------------------------------------------------


def test_a_client_killed_while_it_waits_for_its_file_holds_nobody_up(
    disk: StartDisk, client: StartClient
) -> None:
    running = disk()
    with teemate.connect(running.broker.socket) as connection, connection.attach("files") as enclave:
        with enclave.slot() as slot:
            files = Files(slot)
            handle = files.open("mine")
            victims = [client(running, "append", f"journal{n}") for n in range(3)]
            for victim in victims:
                wait_until(victim.said, "it writes nothing")
            warden = running.warden()
            os.kill(warden, signal.SIGSTOP)
            for victim in victims:
                wait_until(victim.waits, "it does not wait for its file")
                victim.kill()
            os.kill(warden, signal.SIGCONT)
            assert files.write(handle, 0, b"goes on") == 7
    with teemate.connect(running.broker.socket) as connection:
        with connection.attach("files", slots=6) as enclave, contextlib.ExitStack() as held:
            for _ in range(6):  # all of them, the dead ones' too
                files = Files(held.enter_context(enclave.slot()))
                assert files.open("anew") == 0
                assert files.read(0, 0, 10) == b""
                assert files.at_reset() == -errno.EPERM
        (status,) = connection.enclaves()
    assert status.slots.quarantined == 0
    for n, victim in enumerate(victims):
        found = records(running.folder / f"journal{n}")
        assert found == list(range(len(found)))
        assert len(found) > victim.said()[-1]


def test_whatever_the_warden_was_doing_when_it_was_killed_is_done_once(
    disk: StartDisk, client: StartClient, request: pytest.FixtureRequest
) -> None:
    """Appended records are there in order; files that are made, cut and deleted are as they should be."""
    kills = 300 if request.config.getoption("--full") else 12
    running = disk()
    writers = [client(running, "append", f"journal{n}") for n in range(2)]
    models = [client(running, "model", f"model{n}") for n in range(2)]
    for _ in range(kills):
        for writer in writers:  # everybody gets on between two kills
            enough = len(writer.said()) + random.randrange(1, 6)
            wait_until(lambda writer=writer, enough=enough: len(writer.said()) >= enough, "it is held up")
        running.kill_warden()
    for n, writer in enumerate(writers):
        said = writer.stop()
        found = records(running.folder / f"journal{n}")
        assert said == found == list(range(len(found)))
    for model in models:
        assert model.stop()[-1] > 0
    killed = [record for record in running.broker.log() if record["event"] == "warden killed"]
    assert len(killed) == kills
    assert {record["reason"] for record in killed} == {"somebody else killed it"}


def test_nobody_works_in_a_folder_that_another_warden_is_still_at_work_in(
    disk: StartDisk, client: StartClient, tmp_path: Path
) -> None:
    """A dead warden has its lock until its last system call has ended; here this test has it."""
    path = tmp_path / "state" / "enclaves" / "files"
    path.mkdir(parents=True)
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        running = disk()
        writer = client(running, "append", "journal")
        wait_until(writer.waits, "it does not wait for its file")
        assert not (running.folder / "journal").exists()
        fcntl.flock(folder, fcntl.LOCK_UN)
        wait_until(writer.said, "it is held up")
        with pytest.raises(BlockingIOError):
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert writer.stop() == records(running.folder / "journal")
    finally:
        os.close(folder)


def test_files_go_on_when_the_broker_is_killed(disk: StartDisk, client: StartClient) -> None:
    running = disk(keeper=True)
    writer = client(running, "append", "journal")
    for _ in range(3):
        enough = len(writer.said()) + 5
        wait_until(lambda enough=enough: len(writer.said()) >= enough, "it is held up")
        running.broker.kill_worker()
        with teemate.connect(running.broker.socket) as connection:  # the next one answers
            connection.ping()
    said = writer.stop()
    assert said == records(running.folder / "journal") == list(range(len(said)))


def test_the_next_broker_finds_the_files(disk_policy: Callable[..., str]) -> None:
    for content in (b"", b"kept"):
        with run_broker(disk_policy()) as running, teemate.connect(running.socket) as connection:
            with connection.attach("files") as enclave, enclave.slot() as slot:
                files = Files(slot)
                handle = files.open("a")
                assert files.read(handle, 0, 10) == content
                assert files.write(handle, 0, b"kept") == 4


def test_the_next_generation_has_the_files_and_the_old_one_has_them_no_more(disk: StartDisk) -> None:
    running = disk("rebuild_pause = 0.05\nrebuild_limit = 1000")
    with teemate.connect(running.broker.socket) as connection:
        with connection.attach("files") as old, old.slot() as slot:
            files = Files(slot)
            handle = files.open("kept")
            assert files.write(handle, 0, b"state") == 5
            warden, aside = running.warden(), running.folder.with_name("aside")
            running.folder.rename(aside)
            running.folder.write_text("no folder: no warden can be started")
            os.kill(warden, signal.SIGKILL)
            wait_until(lambda: connection.enclaves()[0].state != "ready", "its wardens are no trouble")
            running.folder.unlink()
            aside.rename(running.folder)
            wait_until(lambda: connection.enclaves()[0].generation == 2, "it is not built again")
            assert files.write(handle, 0, b"never") == -ESTALE
            assert files.open("other") == -ESTALE
            with connection.attach("files") as new, new.slot() as anew:
                assert Files(anew).read(Files(anew).open("kept"), 0, 10) == b"state"


# ---- who has storage -----------------------------------------------------------------------


def test_an_enclave_whose_policy_gives_it_no_storage_hears_so(
    broker: Callable[..., RunningBroker], disk_policy: Callable[..., str], tmp_path: Path
) -> None:
    running = broker(disk_policy(storage=""))
    with teemate.connect(running.socket) as connection, connection.attach("files") as enclave:
        with enclave.slot() as slot:
            assert Files(slot).open("a", CREATE) == -ENOSYS
            assert Files(slot).delete("a") == -ENOSYS
    assert not (tmp_path / "state").exists()


def test_storage_for_an_image_without_an_io_slot_is_refused_with_what_to_do(
    broker: Callable[..., RunningBroker], images: Images, files_image: BuiltImage, tmp_path: Path
) -> None:
    policy = f'[broker]\nstate_directory = "{tmp_path}"\n'
    image = build_files_image(images, tmp_path, io_slots=0, elf=files_image.elf)
    running = broker(policy + enclave_policy("files", image, "storage = true"))
    (record,) = [r for r in running.log() if r["event"] == "enclave not built"]
    assert "--io-slots 1" in str(record["reason"])


def test_storage_without_a_state_directory_is_a_mistake_in_the_policy(
    files_image: BuiltImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    file = tmp_path / "broker.toml"
    file.write_text(enclave_policy("files", files_image, "storage = true"))
    with pytest.raises(
        PolicyError, match=r"broker.toml:\d+: enclave.storage: .*state_directory.*StateDirectory="
    ):
        load_policy(file, default_owner=0)
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/teemate")
    policy = load_policy(file, default_owner=0)
    assert policy.broker.state_directory == Path("/var/lib/teemate")
    assert policy.enclaves[0].storage_limit == 1 << 30


def test_a_folder_that_cannot_be_had_is_told_with_its_setting(
    broker: Callable[..., RunningBroker], disk_policy: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "state").write_text("no folder")
    running = broker(disk_policy())
    (record,) = [r for r in running.log() if r["event"] == "enclave not built"]
    assert "[broker] state_directory" in str(record["reason"])
    assert str(tmp_path / "state") in str(record["reason"])
