"""Every way in which a host can lack SGX: named, with what to do, and as the reason of a refusal."""

from __future__ import annotations

import errno
import gzip
import os

import pytest
from fake_host import AMD, MIB, FakeHost, cpuid_table

from teemate.doctor import Check, Group, Status, diagnose, why_not_sgx
from teemate.doctor._host import BrokerAnswer, Choice, DeviceTrial

NO_FLC = (
    "6,700,1,-;sgx: SGX disabled: SGX launch control CPU feature is not available, "
    "/dev/sgx_enclave disabled.\n"
)


def check(fake: FakeHost, identifier: str) -> Check:
    found = diagnose(fake.host).check(identifier)
    assert found.found
    assert found.advice or found.status is not Status.PROBLEM, f"{identifier}: a problem without advice"
    return found


def problem(fake: FakeHost, identifier: str) -> Check:
    """The check found a problem, and it is what a refusal says."""
    found = check(fake, identifier)
    assert found.status is Status.PROBLEM, found
    assert why_not_sgx("libteemate said so", fake.host).startswith(
        f"{found.title}: {found.found}; {found.advice}"
    )
    return found


def test_on_a_host_where_all_is_well_nothing_is_a_problem(fake: FakeHost) -> None:
    diagnosis = diagnose(fake.host)
    bad = [c for c in diagnosis.checks if c.group is not Group.BROKER and c.status is not Status.OK]
    assert not bad
    assert diagnosis.good
    assert diagnosis.backends == {"sgx": True, "sim": True}
    assert (diagnosis.auto, diagnosis.auto_reason) == ("sgx", "")
    assert why_not_sgx("libteemate said so", fake.host).startswith("libteemate said so")


def test_a_processor_of_another_maker_has_no_sgx_whatever_the_firmware(fake: FakeHost) -> None:
    fake.without_sgx(vendor=AMD)
    found = problem(fake, "processor")
    assert "SGX is Intel's" in found.found
    assert check(fake, "firmware").status is Status.NOT_APPLICABLE
    assert check(fake, "launch-control").status is Status.NOT_APPLICABLE
    assert check(fake, "epc").status is Status.NOT_APPLICABLE
    assert check(fake, "device").status is Status.NOT_APPLICABLE


def test_an_intel_processor_without_sgx_is_sent_to_the_list_and_the_firmware(fake: FakeHost) -> None:
    fake.without_sgx()
    found = problem(fake, "processor")
    assert "shows no SGX" in found.found
    assert "firmware" in found.advice


@pytest.mark.parametrize(
    ("signature", "name"), [("KVMKVMKVM", "KVM"), ("Microsoft Hv", "Hyper-V"), ("something", "a hypervisor")]
)
def test_a_hypervisor_that_hides_sgx_is_named(fake: FakeHost, signature: str, name: str) -> None:
    fake.without_sgx(hypervisor=signature)
    found = problem(fake, "processor")
    assert f"under {name}" in found.found
    assert "does not pass SGX on" in found.found
    assert "sgx-epc" in found.advice


def test_sgx_that_the_firmware_left_off_is_told_from_the_kernel_s_log(fake: FakeHost) -> None:
    fake.write("/proc/cpuinfo", "flags\t\t: fpu\n")
    fake.without_driver()
    fake.log("3,300,1,-;x86/cpu: SGX disabled by BIOS.\n")
    found = problem(fake, "firmware")
    assert 'the kernel says: "x86/cpu: SGX disabled by BIOS."' in found.found
    assert "firmware's setup" in found.advice


def test_sgx_that_the_firmware_left_off_is_told_from_feature_control(fake: FakeHost) -> None:
    fake.write("/proc/cpuinfo", "flags\t\t: fpu\n")
    fake.without_driver()
    fake.remove("/dev/kmsg")
    fake.write("/dev/cpu/0/msr", bytes(0x3A) + (0x5).to_bytes(8, "little"))
    assert "IA32_FEATURE_CONTROL (0x5, locked)" in problem(fake, "firmware").found
    fake.write("/dev/cpu/0/msr", bytes(0x3A) + (0x4).to_bytes(8, "little"))
    assert "not locked" in problem(fake, "firmware").found


def test_sgx_that_the_firmware_left_off_is_told_from_cpuid_alone(fake: FakeHost) -> None:
    fake.machine.table = cpuid_table(sgx1=False, sgx2=False, epc=())
    fake.write("/proc/cpuinfo", "flags\t\t: fpu\n")
    fake.without_driver()
    fake.remove("/dev/kmsg")
    assert "without SGX1" in problem(fake, "firmware").found
    fake.machine.table = cpuid_table(sgx1=False, sgx2=False, epc=(), hypervisor="KVMKVMKVM")
    assert "virtual machine" in problem(fake, "firmware").advice


@pytest.mark.parametrize("word", ["nosgx", "clearcpuid=sgx", "clearcpuid=1,290"])
def test_a_command_line_that_switches_sgx_off_is_named(fake: FakeHost, word: str) -> None:
    fake.write("/proc/cmdline", f"quiet {word} ro\n")
    fake.write("/proc/cpuinfo", "flags\t\t: fpu\n")
    fake.without_driver()
    found = problem(fake, "firmware")
    assert word in found.found
    assert found.advice == f"boot without {word}"


def test_a_processor_without_flexible_launch_control_is_named_and_the_kernel_quoted(fake: FakeHost) -> None:
    fake.machine.table = cpuid_table(flc=False)
    fake.write("/proc/cpuinfo", "flags\t\t: fpu sgx\n")
    fake.without_driver()
    fake.log("6,700,1,-;sgx: EPC section 0x100000000-0x103ffffff\n", NO_FLC)
    assert "FLC" in problem(fake, "launch-control").found
    driver = check(fake, "kernel-driver")
    assert driver.status is Status.PROBLEM
    assert "SGX launch control CPU feature is not available" in driver.found
    assert "EPC section" not in driver.found
    fake.machine.table = cpuid_table(flc=False, hypervisor="KVMKVMKVM")
    assert "+sgxlc" in problem(fake, "launch-control").advice


def test_launch_control_that_the_firmware_locked_is_named(fake: FakeHost) -> None:
    fake.without_driver()
    fake.write("/proc/cpuinfo", "flags\t\t: fpu sgx\n")
    fake.log("3,300,1,-;x86/cpu: SGX Launch Control is locked. Disable SGX.\n")
    assert "locked" in problem(fake, "launch-control").found
    fake.remove("/dev/kmsg")
    assert "locked" in problem(fake, "launch-control").found  # from the flags of /proc/cpuinfo
    fake.write("/proc/cpuinfo", "flags\t\t: fpu sgx sgx_lc\n")
    fake.write("/dev/cpu/0/msr", bytes(0x3A) + (1 | 1 << 18).to_bytes(8, "little"))
    assert "locked" in problem(fake, "launch-control").found


def test_sgx1_alone_is_a_warning_and_no_reason_to_refuse(fake: FakeHost) -> None:
    fake.machine.table = cpuid_table(sgx2=False)
    assert check(fake, "sgx2").status is Status.WARNING
    assert why_not_sgx("libteemate said so", fake.host).startswith("libteemate said so")


def test_a_kernel_from_before_the_driver_is_named_with_the_old_driver_beside_it(fake: FakeHost) -> None:
    fake.without_driver()
    fake.write("/proc/cpuinfo", "flags\t\t: fpu\n")
    fake.write("/proc/sys/kernel/osrelease", "5.4.0-100-generic\n")
    found = problem(fake, "kernel-driver")
    assert "5.11" in found.found
    assert "boot Linux 5.11" in found.advice
    fake.write("/dev/isgx", "")
    assert "/dev/isgx" in problem(fake, "kernel-driver").found


@pytest.mark.parametrize("where", ["/boot/config-6.1.0-56-amd64", "/proc/config.gz"])
def test_a_kernel_that_was_built_without_the_driver_is_named(fake: FakeHost, where: str) -> None:
    fake.without_driver()
    fake.remove("/boot/config-6.1.0-56-amd64")
    config = b"# CONFIG_X86_SGX is not set\nCONFIG_X86_SGX_KVM=y\n"
    fake.write(where, gzip.compress(config) if where.endswith("gz") else config)
    assert "CONFIG_X86_SGX" in problem(fake, "kernel-driver").found


def test_a_driver_that_is_off_without_a_word_is_told_from_its_registration(fake: FakeHost) -> None:
    fake.without_driver()
    fake.remove("/dev/kmsg", "/boot/config-6.1.0-56-amd64")
    found = problem(fake, "kernel-driver")
    assert "/proc/misc has no sgx_enclave" in found.found
    assert "as root" in found.advice


def test_a_missing_node_is_told_from_a_missing_driver(fake: FakeHost) -> None:
    fake.remove("/dev/sgx_enclave")
    found = problem(fake, "device")
    assert "the kernel has the driver" in found.found
    assert "mknod /dev/sgx_enclave c 10 125" in found.advice
    fake.write("/.dockerenv", "")
    found = problem(fake, "device")
    assert "container" in found.found
    assert "--device /dev/sgx_enclave" in found.advice
    assert "socket" in found.advice


def test_a_node_that_this_user_may_not_open_names_mode_and_groups(fake: FakeHost) -> None:
    fake.machine.uid, fake.machine.gids = 1000, (100,)
    fake.machine.device = DeviceTrial(open_errno=errno.EACCES)
    (fake.root / "dev/sgx_enclave").chmod(0o600)
    found = problem(fake, "device")
    assert "mode 0600" in found.found
    assert "uid 1000 and groups users" in found.found
    assert "udev" in found.advice
    assert check(fake, "device-exec").status is Status.NOT_APPLICABLE


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to a group that it is not in")
def test_a_node_of_a_group_that_this_user_is_not_in_says_which_group(fake: FakeHost) -> None:
    fake.machine.uid, fake.machine.gids = 1000, (100,)
    fake.machine.device = DeviceTrial(open_errno=errno.EACCES)
    os.chown(fake.root / "dev/sgx_enclave", 0, 106)
    found = problem(fake, "device")
    assert "group sgx" in found.found
    assert "usermod -aG sgx" in found.advice
    assert "--group-add 106" in found.advice


def test_a_device_that_a_control_group_forbids_is_told_from_its_mode(fake: FakeHost) -> None:
    fake.machine.device = DeviceTrial(open_errno=errno.EPERM)
    fake.write("/run/.containerenv", "")
    found = problem(fake, "device")
    assert "control group of this container" in found.found
    assert "DeviceAllow=/dev/sgx_enclave" in found.advice


@pytest.mark.parametrize("number", [errno.ENXIO, errno.ENODEV])
def test_a_node_without_a_driver_behind_it_is_named(fake: FakeHost, number: int) -> None:
    fake.machine.device = DeviceTrial(open_errno=number)
    assert "no driver stands behind it" in problem(fake, "device").found


def test_a_failure_to_open_that_nobody_knows_is_told_as_it_is(fake: FakeHost) -> None:
    fake.machine.device = DeviceTrial(open_errno=errno.EMFILE)
    assert os.strerror(errno.EMFILE) in problem(fake, "device").found


def test_a_noexec_dev_is_told_from_mapping_it_and_names_the_mount(fake: FakeHost) -> None:
    fake.machine.device = DeviceTrial(map_errno=errno.EPERM)
    fake.write(
        "/proc/self/mountinfo",
        "1 0 0:1 / / rw - ext4 x rw\n2 1 0:5 / /dev rw,nosuid,noexec - devtmpfs d rw\n",
    )
    found = problem(fake, "device-exec")
    assert "/dev is mounted noexec" in found.found
    assert "mount -o remount,exec /dev" in found.advice
    # The option alone says it too, where the device cannot be opened.
    fake.machine.device = DeviceTrial(open_errno=errno.EACCES)
    assert check(fake, "device-exec").status is Status.PROBLEM


def test_the_mount_that_counts_is_the_one_that_the_node_lies_on(fake: FakeHost) -> None:
    fake.machine.device = DeviceTrial(map_errno=errno.EPERM)
    fake.write(
        "/proc/self/mountinfo",
        "1 0 0:1 / / rw - ext4 x rw\n2 1 0:5 / /dev rw - devtmpfs d rw\n"
        "3 2 0:6 / /dev/sgx_enclave rw,noexec - devtmpfs d rw\n4 2 0:7 / /dev/sgx rw - tmpfs d rw\n",
    )
    assert "/dev/sgx_enclave is mounted noexec" in problem(fake, "device-exec").found


def test_read_implies_exec_is_told_from_a_security_module(fake: FakeHost) -> None:
    fake.machine.device = DeviceTrial(map_errno=errno.EACCES)
    assert "security module" in problem(fake, "device-exec").found
    fake.write("/proc/self/personality", "00400000\n")
    assert "READ_IMPLIES_EXEC" in problem(fake, "device-exec").found


def test_a_vdso_without_the_function_is_named(fake: FakeHost) -> None:
    fake.machine.vdso = False
    assert "__vdso_sgx_enter_enclave" in problem(fake, "vdso").found
    fake.auxv({26: 2})
    assert "gVisor" in problem(fake, "vdso").found
    fake.write("/proc/cmdline", "vdso=0\n")
    assert problem(fake, "vdso").advice == "boot without vdso=0"


def test_fsgsbase_that_is_off_is_named(fake: FakeHost) -> None:
    fake.auxv({26: 0, 33: 1})
    assert "off" in problem(fake, "fsgsbase").found
    fake.write("/proc/cmdline", "nofsgsbase\n")
    assert problem(fake, "fsgsbase").advice == "boot without nofsgsbase"
    fake.remove("/proc/self/auxv")
    assert check(fake, "fsgsbase").status is Status.UNKNOWN


def test_epc_is_shown_for_each_node_and_its_use_is_said_to_be_unknown(fake: FakeHost) -> None:
    fake.write("/sys/devices/system/node/node10/x86/sgx_total_bytes", f"{128 * MIB}\n")
    fake.write("/sys/devices/system/node/node2/x86/sgx_total_bytes", f"{32 * MIB}\n")
    found = check(fake, "epc").found
    assert found.startswith("node 0: 64 MiB, node 2: 32 MiB, node 10: 128 MiB; 224 MiB in all")
    assert "free: not known" in found


def test_epc_is_shown_from_cpuid_where_the_kernel_does_not_tell(fake: FakeHost) -> None:
    fake.remove("/sys/devices/system/node/node0/x86/sgx_total_bytes")
    fake.machine.table = cpuid_table(epc=((0x1_0000_0000, 3 << 30), (0x10_0000_0000, 5 << 30)))
    assert check(fake, "epc").found.startswith("8 GiB (CPUID;")


def test_no_epc_at_all_is_a_problem(fake: FakeHost) -> None:
    fake.remove("/sys/devices/system/node/node0/x86/sgx_total_bytes")
    fake.machine.table = cpuid_table(epc=())
    assert "PRMRR" in problem(fake, "epc").advice


def test_epc_in_use_is_the_control_group_s_or_what_the_broker_s_enclaves_have(fake: FakeHost) -> None:
    enclave = ("vault", "sgx", 1 << 46, 16 * MIB, 1024)
    fake.write("/run/teemate/broker.sock", "")
    fake.machine.broker = BrokerAnswer(name="teemate-broker", version=1, enclaves=(enclave,))
    assert "enclaves that you may see have 4 MiB" in check(fake, "epc").found
    fake.machine.broker = BrokerAnswer(name="teemate-broker", version=1, enclaves=(enclave,) * 20)
    assert check(fake, "epc").status is Status.WARNING
    fake.write("/sys/fs/cgroup/misc.current", f"sgx_epc {8 * MIB}\n")
    assert "in use: 8 MiB" in check(fake, "epc").found


def test_the_provision_device_is_optional(fake: FakeHost) -> None:
    fake.machine.provision = errno.EACCES
    assert check(fake, "provision").status is Status.WARNING
    fake.remove("/dev/sgx_provision")
    assert check(fake, "provision").status is Status.WARNING
    assert why_not_sgx("libteemate said so", fake.host).startswith("libteemate said so")


def test_what_the_library_would_not_try_is_not_tried_and_its_reason_is_shown(fake: FakeHost) -> None:
    fake.machine.choices["sgx"] = Choice(backend=None, reason="no device")
    fake.machine.choices["auto"] = Choice(backend="sim", reason="no device")
    diagnosis = diagnose(fake.host)
    assert fake.machine.probed == ["sim"]
    assert diagnosis.backends == {"sgx": False, "sim": True}
    assert (diagnosis.auto, diagnosis.auto_reason) == ("sim", "no device")
    assert diagnosis.check("sgx-works").found == "not tried: no device"
    assert diagnosis.good
