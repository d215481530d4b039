"""``teemate-broker install``: what it puts where, and that systemd and man accept it as it is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from teemate.broker.telemetry.journal import MESSAGE_IDS

EXPOSURE = 1.5
"""At most, on systemd's scale from 0 to 10."""
PROJECT = Path(__file__).parents[2]


def run_broker_command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "teemate.broker.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def install(root: Path, *arguments: str, program: str = "/bin/true") -> str:
    done = run_broker_command("install", "--root", root, "--program", program, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def need(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"needs {program} (.ci/apt-packages)")
    return found


def lint(command: list[str], root: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"MANPATH": f"{root}/usr/local/share/man:/usr/share/man", "LC_ALL": "C.UTF-8"}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, env=environment, cwd=root
    )


def units(root: Path) -> Path:
    return root / "usr/local/lib/systemd/system"


def test_units_of_an_installation_are_verified_by_systemd(tmp_path: Path) -> None:
    analyze = need("systemd-analyze")
    (tmp_path / "bin").mkdir()
    for name in ("teemate-broker", "teemate-gateway"):
        (tmp_path / "bin" / name).symlink_to("/bin/true")
    install(tmp_path, "--systemd-version", "252", program=str(tmp_path / "bin/teemate-broker"))
    names = [f"teemate-{what}.{kind}" for what in ("broker", "gateway") for kind in ("service", "socket")]
    files = [str(units(tmp_path) / name) for name in names]
    done = lint([analyze, "verify", "--man=no", *files], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_mistake_in_a_unit_is_found_by_that_check(tmp_path: Path) -> None:
    analyze = need("systemd-analyze")
    install(tmp_path, "--systemd-version", "252")
    unit = units(tmp_path) / "teemate-broker.service"
    unit.write_text(unit.read_text().replace("WatchdogSec=30", "WatchdogSeconds=30"))
    done = lint([analyze, "verify", "--man=no", str(unit)], tmp_path)
    assert "WatchdogSeconds" in done.stderr


def test_what_only_newer_systemds_know_is_verified_by_one(tmp_path: Path) -> None:
    analyze = need("systemd-analyze")
    version = int(lint([analyze, "--version"], tmp_path).stdout.split()[1])
    if version < 254:
        pytest.skip(f"this is systemd {version}, which does not know what is for 254 and later")
    install(tmp_path, "--systemd-version", str(version))
    unit = units(tmp_path) / "teemate-broker.service"
    drop_in = units(tmp_path) / "teemate-broker.service.d" / "254.conf"
    assert lint([analyze, "verify", "--man=no", str(unit)], tmp_path).stderr == ""
    drop_in.write_text(drop_in.read_text().replace("Type=notify-reload", "Type=notify-again"))
    assert "notify-again" in lint([analyze, "verify", "--man=no", str(unit)], tmp_path).stderr


def exposure(root: Path, service: str = "teemate-broker") -> float:
    unit = str(units(root) / f"{service}.service")
    done = lint([need("systemd-analyze"), "security", "--offline=yes", "--no-pager", unit], root)
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found, done.stdout + done.stderr
    return float(found[1])


def test_the_service_is_exposed_as_little_as_it_was_promised(tmp_path: Path) -> None:
    install(tmp_path)
    assert exposure(tmp_path) <= EXPOSURE
    assert exposure(tmp_path, "teemate-gateway") <= EXPOSURE
    unit = units(tmp_path) / "teemate-broker.service"
    kept = [line for line in unit.read_text().splitlines() if not line.startswith("SystemCallFilter")]
    unit.write_text("\n".join(kept))
    assert exposure(tmp_path) > EXPOSURE


def test_nothing_that_hides_clients_or_the_device_is_in_the_unit(tmp_path: Path) -> None:
    install(tmp_path)
    unit = (units(tmp_path) / "teemate-broker.service").read_text().splitlines()
    keys = dict(line.split("=", 1) for line in unit if re.match(r"[A-Z]\w+=", line))
    assert not {"PrivateUsers", "PrivateDevices"} & set(keys)
    assert keys["ProtectProc"] == "default"
    assert keys["AmbientCapabilities"] == keys["CapabilityBoundingSet"] == "CAP_KILL"


def test_the_store_has_one_size_in_the_unit(tmp_path: Path) -> None:
    """Before version 254 systemd does not say how many descriptors it keeps: the unit has to."""
    install(tmp_path)
    unit = (units(tmp_path) / "teemate-broker.service").read_text()
    found = re.search(r"^FileDescriptorStoreMax=(\d+)$", unit, re.MULTILINE)
    told = re.search(r"^Environment=FDSTORE=(\d+)$", unit, re.MULTILINE)
    assert found
    assert told
    assert found[1] == told[1]


def test_keys_of_newer_versions_come_with_those_only(tmp_path: Path) -> None:
    drop_in = units(tmp_path) / "teemate-broker.service.d/254.conf"
    install(tmp_path, "--systemd-version", "254")
    text = drop_in.read_text()
    assert "Type=notify-reload" in text
    assert "FileDescriptorStorePreserve=yes" in text
    install(tmp_path, "--systemd-version", "253")
    assert not drop_in.parent.exists()


def test_units_name_the_programs_and_images_of_this_installation(tmp_path: Path) -> None:
    install(tmp_path, "--systemd-version", "254", program="/opt/teemate/bin/teemate-broker")
    for path, content in tree(units(tmp_path)).items():
        assert b"/usr/bin/teemate" not in content, path
    unit = (units(tmp_path) / "teemate-broker.service").read_text()
    assert "ExecStart=/opt/teemate/bin/teemate-broker --config" in unit
    config = (tmp_path / "etc/teemate/broker.toml").read_text()
    found = re.search(r'^image = "(.*)"$', config, re.MULTILINE)
    assert found
    assert Path(found[1]).is_file()


def test_what_was_installed_is_removed_again_and_nothing_else(tmp_path: Path) -> None:
    other = tmp_path / "usr/local/lib/systemd/system/other.service"
    other.parent.mkdir(parents=True)
    other.write_text("")
    install(tmp_path, "--systemd-version", "254")
    assert run_broker_command("install", "--root", tmp_path, "--uninstall").returncode == 0
    assert tree(tmp_path) == {str(other.relative_to(tmp_path)): b""}
    assert not (tmp_path / "etc/teemate").exists()
    assert not (tmp_path / "usr/local/share/teemate").exists()


def test_installing_again_changes_nothing_and_keeps_the_policy(tmp_path: Path) -> None:
    install(tmp_path)
    config = tmp_path / "etc/teemate/broker.toml"
    config.write_text("# mine\n")
    before = tree(tmp_path)
    assert "installed" not in install(tmp_path)
    assert tree(tmp_path) == before
    assert run_broker_command("install", "--root", tmp_path, "--uninstall").returncode == 0
    assert tree(tmp_path) == {"etc/teemate/broker.toml": b"# mine\n"}


def test_an_installation_that_the_service_could_not_see_is_refused(tmp_path: Path) -> None:
    """ProtectHome= and PrivateTmp= hide it."""
    if not sys.prefix.startswith(("/tmp/", "/home/", "/root/")):
        pytest.skip(f"{sys.prefix} is where a service sees it")
    done = run_broker_command("install", "--root", tmp_path)
    assert done.returncode == 1
    assert "the service does not see" in done.stderr
    assert not tree(tmp_path)


@pytest.mark.parametrize(
    "page", ["man1/teemate.1", "man8/teemate-broker.8", "man8/teemate-gateway.8", "man5/teemate.toml.5"]
)
def test_man_pages_are_without_complaint(tmp_path: Path, page: str) -> None:
    mandoc = need("mandoc")
    install(tmp_path)
    path = tmp_path / "usr/local/share/man" / page
    done = lint([mandoc, "-T", "lint", "-W", "warning", str(path)], tmp_path)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_page_of_the_policy_has_every_key_that_the_example_has(tmp_path: Path) -> None:
    install(tmp_path)
    page = (tmp_path / "usr/local/share/man/man5/teemate.toml.5").read_text()
    example = (PROJECT / "systemd/broker.toml.example").read_text()
    keys = set(re.findall(r"^(?:# )?([a-z_]+) = ", example, re.MULTILINE))
    assert len(keys) > 40
    assert {key for key in keys if not re.search(rf"^\.(It )?Ic {key}\b", page, re.MULTILINE)} == set()


def test_pages_name_every_command_and_option(tmp_path: Path) -> None:
    from teemate.broker.main import main
    from teemate.cli.main import COMMANDS
    from teemate.gateway.main import main as gateway_command

    install(tmp_path)
    pages = tmp_path / "usr/local/share/man"
    commands = (pages / "man1/teemate.1").read_text()
    assert {name for name in COMMANDS if not re.search(rf"Cm {name}\b", commands)} == set()
    broker = (pages / "man8/teemate-broker.8").read_text().replace("Fl -", "--")
    options = {
        option
        for command in (main, *main.commands.values())
        for parameter in command.params
        if not getattr(parameter, "hidden", False)
        for option in parameter.opts
    }
    assert {option for option in options - {"--version"} if option not in broker} == set()
    gateway = (pages / "man8/teemate-gateway.8").read_text().replace("Fl -", "--")
    options = {option for parameter in gateway_command.params for option in parameter.opts}
    assert {option for option in options - {"--version"} if option not in gateway} == set()


def test_the_catalog_explains_every_message_id_and_no_other(tmp_path: Path) -> None:
    install(tmp_path)
    catalog = tmp_path / "usr/local/lib/systemd/catalog/teemate.catalog"
    assert set(re.findall(r"^-- ([0-9a-f]{32})$", catalog.read_text(), re.MULTILINE)) == set(
        MESSAGE_IDS.values()
    )
    journalctl = need("journalctl")
    done = lint([journalctl, "--root", str(tmp_path), "--update-catalog"], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    listed = lint([journalctl, "--root", str(tmp_path), "--dump-catalog", MESSAGE_IDS["denied"]], tmp_path)
    assert "missing" in listed.stdout


def test_every_event_with_a_message_id_is_logged_somewhere() -> None:
    modules = (PROJECT / "broker").rglob("*.py")
    source = "".join(path.read_text() for path in modules if path.stem != "journal")
    source += '"records dropped"'  # by the journal's own module
    assert {event for event in MESSAGE_IDS if f'"{event}"' not in source} == set()
