"""What both backends and the sim need, and how the broker is found."""

from __future__ import annotations

import errno
import os

import pytest
from fake_host import MIB, FakeHost

from teemate.doctor import Check, Status, diagnose
from teemate.doctor._host import BrokerAnswer, Choice, ProbeResult, Unit

SOCKET = "/run/teemate/broker.sock"
WINDOW = "400000000000-400000001000 rw-p 00000000 00:00 0 "


def check(fake: FakeHost, identifier: str, socket: str | None = None) -> Check:
    found = diagnose(fake.host, socket=socket).check(identifier)
    assert found.found
    assert found.advice or found.status is not Status.PROBLEM, f"{identifier}: a problem without advice"
    return found


def answer(fake: FakeHost, **fields: object) -> None:
    fake.write(SOCKET, "")
    fake.machine.broker = BrokerAnswer(**fields)  # type: ignore[arg-type]


def test_without_a_backend_that_works_the_diagnosis_is_bad(fake: FakeHost) -> None:
    fake.machine.choices = {name: Choice(backend=None, reason="not here") for name in ("sgx", "sim", "auto")}
    diagnosis = diagnose(fake.host)
    assert not diagnosis.good
    assert diagnosis.auto == ""
    assert fake.machine.probed == []


def test_a_trial_that_fails_gives_its_text_and_says_what_auto_would_do(fake: FakeHost) -> None:
    fake.machine.trials["sgx"] = ProbeResult(works=False, text="ended by signal 4")
    diagnosis = diagnose(fake.host)
    assert diagnosis.backends == {"sgx": False, "sim": True}
    found = diagnosis.check("sgx-works")
    assert (found.status, found.found) == (Status.PROBLEM, "ended by signal 4")
    assert 'backend = "sim"' in found.advice


def test_a_processor_without_xsave_cannot_run_the_sim(fake: FakeHost) -> None:
    fake.machine.xsave = 0
    assert check(fake, "xsave").status is Status.PROBLEM
    fake.machine.xsave = 1
    assert check(fake, "xsave").status is Status.PROBLEM


def test_the_sim_s_memory_is_the_least_that_any_control_group_above_leaves(fake: FakeHost) -> None:
    assert check(fake, "memory").status is Status.OK
    fake.write("/proc/self/cgroup", "0::/box/inner\n")
    for folder, limit, used in (("box", "max", 0), ("box/inner", 200 * MIB, 170 * MIB)):
        fake.write(f"/sys/fs/cgroup/{folder}/memory.max", f"{limit}\n")
        fake.write(f"/sys/fs/cgroup/{folder}/memory.current", f"{used}\n")
    found = check(fake, "memory")
    assert found.status is Status.WARNING
    assert "30.0 MiB available to this control group" in found.found
    fake.write("/sys/fs/cgroup/box/memory.max", f"{100 * MIB}\n")
    fake.write("/sys/fs/cgroup/box/memory.current", f"{99 * MIB}\n")
    assert check(fake, "memory").status is Status.PROBLEM


def test_control_groups_of_version_1_count_as_well_and_their_no_limit_is_none(fake: FakeHost) -> None:
    fake.write("/proc/self/cgroup", "4:memory:/box\n0::/\n")
    fake.write("/sys/fs/cgroup/memory/box/memory.limit_in_bytes", "9223372036854771712\n")
    fake.write("/sys/fs/cgroup/memory/box/memory.usage_in_bytes", "5\n")
    assert "to the machine" in check(fake, "memory").found
    fake.write("/sys/fs/cgroup/memory/box/memory.limit_in_bytes", f"{40 * MIB}\n")
    assert check(fake, "memory").status is Status.WARNING


def test_a_machine_with_next_to_no_memory_is_a_problem(fake: FakeHost) -> None:
    fake.write("/proc/meminfo", "MemAvailable: 2000 kB\n")
    assert check(fake, "memory").status is Status.PROBLEM
    fake.remove("/proc/meminfo")
    assert check(fake, "memory").status is Status.UNKNOWN


def test_what_lies_in_the_address_window_is_named(fake: FakeHost) -> None:
    fake.write("/proc/self/maps", f"{WINDOW}      /usr/lib/libodd.so\n")
    found = check(fake, "address-window")
    assert found.status is Status.WARNING
    assert "/usr/lib/libodd.so lies at 0x400000000000" in found.found
    below_and_above = "3ffffffff000-400000000000 rw-p 0 0:0 0\n410000000000-410000001000 rw-p 0 0:0 0\n"
    fake.write("/proc/self/maps", below_and_above)
    assert check(fake, "address-window").status is Status.OK


def test_a_limit_on_the_address_space_is_named(fake: FakeHost) -> None:
    line = "Max address space         {:<21}unlimited            bytes\n"
    fake.write("/proc/self/limits", line.format(500 * MIB))
    assert check(fake, "address-window").status is Status.PROBLEM
    fake.write("/proc/self/limits", line.format(8192 * MIB))
    found = check(fake, "address-window")
    assert found.status is Status.WARNING
    assert "RLIMIT_AS is 8.0 GiB" in found.found


def test_strict_overcommit_is_named_when_little_is_left(fake: FakeHost) -> None:
    fake.write("/proc/sys/vm/overcommit_memory", "2\n")
    memory = "MemAvailable: 4000000 kB\nCommitLimit: {} kB\nCommitted_AS: 3900000 kB\n"
    fake.write("/proc/meminfo", memory.format(9000000))
    assert check(fake, "address-window").status is Status.OK
    fake.write("/proc/meminfo", memory.format(4000000))
    assert "overcommit_memory is 2" in check(fake, "address-window").found


@pytest.mark.parametrize(
    ("path", "text", "sign"),
    [
        ("/.dockerenv", "", "Docker"),
        ("/run/.containerenv", "", "Podman"),
        ("/run/systemd/container", "systemd-nspawn\n", "systemd-nspawn"),
        ("/proc/1/environ", "PATH=/bin\0container=lxc\0", "lxc"),
        ("/proc/self/cgroup", "0::/kubepods.slice/pod1\n", "control group"),
    ],
)
def test_a_container_is_recognised_and_told_what_it_does_not_need(
    fake: FakeHost, path: str, text: str, sign: str
) -> None:
    assert check(fake, "container").found == "no sign of one"
    fake.write(path, text)
    fake.write("/proc/self/status", "Seccomp:\t2\n")
    found = check(fake, "container")
    assert sign in found.found
    assert "seccomp filter" in found.found
    assert "socket" in found.advice


def test_no_socket_means_that_no_broker_runs_and_nobody_is_asked(fake: FakeHost) -> None:
    found = check(fake, "socket")
    assert found.status is Status.WARNING
    assert found.found.startswith(f"{SOCKET}: no such file")
    assert "teemate-broker" in found.advice
    assert str(fake.root / SOCKET[1:]) not in fake.machine.asked
    fake.write("/.dockerenv", "")
    assert "-v /run/teemate:/run/teemate" in check(fake, "socket").advice


def test_the_socket_is_the_given_one_else_the_environment_s(fake: FakeHost) -> None:
    fake.environment["TEEMATE_SOCKET"] = "/srv/a.sock"
    assert check(fake, "socket").found.startswith("/srv/a.sock: ")
    assert check(fake, "socket", socket="/srv/b.sock").found.startswith("/srv/b.sock: ")


def test_a_broker_that_answers_is_shown_with_its_backend_and_what_auto_took(fake: FakeHost) -> None:
    enclave = ("vault", "sgx", 1 << 46, 16 * MIB, 1024)
    answer(fake, name="teemate-broker 0.1", version=1, backend="sgx", wanted="auto", enclaves=(enclave,))
    found = check(fake, "socket")
    assert found.status is Status.OK
    assert (
        "teemate-broker 0.1 answers, protocol 1, backend sgx (taken by auto), 1 enclave for you"
        in found.found
    )


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ECONNREFUSED, "this is no socket"),
        (errno.EACCES, "not permitted"),
        (errno.EAGAIN, "accepts nobody"),
        (errno.EPROTOTYPE, os.strerror(errno.EPROTOTYPE)),
    ],
)
def test_every_way_in_which_a_socket_fails_has_its_own_words(fake: FakeHost, number: int, says: str) -> None:
    answer(fake, errno=number)
    found = check(fake, "socket")
    assert found.status is Status.PROBLEM
    assert says in found.found


def test_a_listener_that_is_no_broker_is_a_problem(fake: FakeHost) -> None:
    answer(fake, complaint="somebody listens there, and says nothing within 1 s")
    assert "says nothing" in check(fake, "socket").found


def test_without_systemd_there_is_no_unit_to_ask_for(fake: FakeHost) -> None:
    found = check(fake, "unit")
    assert (found.status, found.found) == (Status.NOT_APPLICABLE, "systemd does not run here")


@pytest.mark.parametrize(
    ("unit", "status", "says"),
    [
        (("not-found", "inactive", "dead", "success", ""), Status.OK, "not installed"),
        (("masked", "inactive", "dead", "success", "masked"), Status.WARNING, "masked"),
        (("loaded", "failed", "failed", "exit-code", "enabled"), Status.PROBLEM, "result exit-code"),
        (("loaded", "inactive", "dead", "success", "disabled"), Status.WARNING, "inactive (dead), disabled"),
        (("loaded", "active", "running", "success", "enabled"), Status.OK, "active (running), enabled"),
        (("bad-setting", "inactive", "dead", "success", ""), Status.PROBLEM, "bad-setting"),
    ],
)
def test_the_unit_s_state_is_told_as_systemd_has_it(
    fake: FakeHost, unit: tuple[str, str, str, str, str], status: Status, says: str
) -> None:
    fake.write("/run/systemd/system/.keep", "")
    load, active, sub, result, state = unit
    fake.machine.systemd_unit = Unit(load=load, active=active, sub=sub, result=result, file_state=state)
    found = check(fake, "unit")
    assert found.status is status
    assert says in found.found


def test_a_systemd_that_does_not_answer_leaves_what_the_folders_say(fake: FakeHost) -> None:
    fake.write("/run/systemd/system/.keep", "")
    assert "not installed" in check(fake, "unit").found
    fake.write("/usr/lib/systemd/system/teemate-broker.service", "[Unit]\n")
    assert check(fake, "unit").status is Status.UNKNOWN


def process(fake: FakeHost, pid: int, name: str, *lines: str) -> None:
    fake.write(f"/proc/{pid}/comm", f"{name}\n")
    fake.write(f"/proc/{pid}/maps", "".join(f"{line}\n" for line in lines))


SGX = "400000000000-400000400000 rw-s 00000000 00:05 125                        /dev/sgx_enclave"
SIM = "400001000000-400001400000 ---s 00000000 00:01 77 /memfd:teemate-sim-enclave (deleted)"
SIM_VIEW = "7f0001000000-7f0001400000 rw-s 00000000 00:01 77 /memfd:teemate-sim-enclave (deleted)"


def test_enclaves_that_nobody_governs_are_shown_with_who_holds_them(fake: FakeHost) -> None:
    assert check(fake, "holders").found == "none"
    process(fake, 900001, "client", SGX, SIM, SIM_VIEW)
    process(fake, 900002, "other", SGX)
    found = check(fake, "holders")
    assert found.status is Status.WARNING
    assert "8 MiB mapped by 900001 (client), 900002 (other)" in found.found


def test_enclaves_of_a_broker_are_not_shown_as_left_over(fake: FakeHost) -> None:
    process(fake, 900001, "client", SGX)
    process(fake, 900002, "teemate-warden", SGX)
    assert check(fake, "holders").status is Status.OK
    process(fake, 900003, "client", SIM)
    assert "4 MiB mapped by 900003 (client)" in check(fake, "holders").found
    answer(fake, name="b", version=1, enclaves=(("x", "sim", 0x400001000000, 4 * MIB, 1024),))
    assert check(fake, "holders").status is Status.OK


def test_processes_that_may_not_be_looked_at_are_counted(fake: FakeHost) -> None:
    (fake.root / "proc/900001/maps").mkdir(parents=True)  # cannot be read, not by root either
    fake.machine.uid = 1000
    found = check(fake, "holders")
    assert found.status is Status.UNKNOWN
    assert "1 process could not be looked at (root sees all)" in found.found
