from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from image_sources import run_teemate

import teemate
from teemate.cli.main import COMMANDS, cli
from teemate.image import inspect, save_key, sgxs
from teemate.image.sigstruct import SIZE


def invoke(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args], catch_exceptions=True)


def as_json(*args: object) -> dict[str, object]:
    result = invoke(*args, "--json")
    assert result.exit_code == 0, result.output
    value: dict[str, object] = json.loads(result.output)
    return value


@pytest.fixture(scope="session")
def signed_image(sample: Path, tmp_path_factory: pytest.TempPathFactory, key_file: Path) -> Path:
    output = tmp_path_factory.mktemp("cli") / "sample.sgxs"
    result = invoke(
        "image", "build", sample, "-o", output, "--slots", 3, "--io-slots", 1, "--stack", "16K",
        "--heap", "2MiB", "--nssa", 4, "--key", key_file, "--isvsvn", 5, "--date", "2024-02-29",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return output


@pytest.fixture(scope="session")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("key") / "key.pem"
    assert invoke("image", "key", path).exit_code == 0
    return path


def test_build_writes_image_signature_and_elf_and_info_tells_about_them(signed_image: Path) -> None:
    for suffix in (".sgxs", ".sig", ".elf"):
        assert signed_image.with_suffix(suffix).is_file()
    assert signed_image.with_suffix(".sig").stat().st_size == SIZE
    facts = as_json("image", "info", signed_image)
    sdk = facts["sdk"]
    assert isinstance(sdk, dict)
    assert (sdk["client_slots"], sdk["io_slots"], sdk["nssa"]) == (3, 1, 4)
    assert (sdk["stack_size"], sdk["heap_size"]) == (16384, 2 << 20)
    signature = facts["signature"]
    assert isinstance(signature, dict)
    assert signature["fits"] is True
    assert (signature["isvsvn"], signature["date"]) == (5, "2024-02-29")
    tcs = facts["tcs"]
    assert isinstance(tcs, list)
    assert [one["for"] for one in tcs] == ["warden", "warden", "I/O", "client", "client", "client"]


def test_info_for_people_shows_the_same(signed_image: Path) -> None:
    facts = as_json("image", "info", signed_image)
    text = invoke("image", "info", signed_image).output
    assert str(facts["mrenclave"]) in text
    assert "valid, for this image" in text
    assert "heap" in text
    assert "SSA frames" in text
    assert "\x1b" not in text


def test_measure_agrees_with_the_record_by_record_way(signed_image: Path) -> None:
    with signed_image.open("rb") as stream:
        expected = sgxs.measure(stream).hex()
    assert invoke("image", "measure", signed_image).output == expected + "\n"
    assert as_json("image", "measure", signed_image)["mrenclave"] == expected
    assert inspect(signed_image).mrenclave.hex() == expected


def test_signing_anew_and_verifying(signed_image: Path, key_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "own.sig"
    signed = as_json(
        "image",
        "sign",
        signed_image,
        "--key",
        key_file,
        "-o",
        target,
        "--isvprodid",
        "0x10",
        "--debug-allowed",
    )
    verified = as_json("image", "verify", signed_image, target, "--mrsigner", signed["mrsigner"], "--debug")
    assert verified["valid"] is True
    assert verified["mrenclave"] == signed["mrenclave"]


def test_verify_refuses_with_status_3_and_names_the_field(
    signed_image: Path, key_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.sgxs"
    elf = signed_image.with_suffix(".elf")
    assert invoke("image", "build", "--elf", elf, "-o", other, "--slots", 1).exit_code == 0
    cases = {
        "enclavehash": ("image", "verify", other, signed_image.with_suffix(".sig")),
        "attributes": ("image", "verify", signed_image, "--debug"),
        "modulus": ("image", "verify", signed_image, "--mrsigner", "00" * 32),
    }
    for field, args in cases.items():
        done = run_teemate(*args)
        assert done.returncode == 3, done.stderr
        assert f"{field}: " in done.stderr
        done = run_teemate(*args, "--json")
        assert done.returncode == 3
        error = json.loads(done.stdout)["error"]
        assert error["code"] == "image-error"
        assert error["detail"]["field"] == field


def test_a_damaged_image_is_refused_with_the_place(signed_image: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.sgxs"
    bad.write_bytes(signed_image.read_bytes()[:1000])
    for command in ("measure", "info"):
        done = run_teemate("image", command, bad)
        assert done.returncode == 3, done.stderr
        assert "teemate: image-error: " in done.stderr
        assert "offset" in done.stderr
        assert "Traceback" not in done.stderr


def test_info_says_that_a_signature_does_not_fit(signed_image: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.sig"
    data = bytearray(signed_image.with_suffix(".sig").read_bytes())
    data[600] ^= 1
    bad.write_bytes(data)
    result = invoke("image", "info", signed_image, "--sig", bad)
    assert result.exit_code == 0
    assert "DOES NOT FIT" in result.output
    facts = as_json("image", "info", signed_image, "--sig", bad)
    signature = facts["signature"]
    assert isinstance(signature, dict)
    assert signature["fits"] is False
    assert signature["reason"]


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("--heap", "64Q", "is not a size"),
        ("--heap", "100", "--heap"),
        ("--stack", "1K", "--stack"),
        ("--slots", "4096", "--slots"),
        ("--slots", "many", "is not a number"),
        ("--nssa", "1", "--nssa"),
    ],
)
def test_a_bad_option_is_named(
    signed_image: Path, tmp_path: Path, option: str, value: str, reason: str
) -> None:
    elf = signed_image.with_suffix(".elf")
    done = run_teemate("image", "build", "--elf", elf, "-o", tmp_path / "x.sgxs", option, value)
    assert done.returncode in (2, 3)
    assert reason in done.stderr
    assert not list(tmp_path.iterdir())


def test_sources_and_a_ready_elf_exclude_each_other(sample: Path, sample_elf: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.sgxs"
    assert run_teemate("image", "build", "-o", output).returncode == 2
    assert run_teemate("image", "build", sample, "--elf", sample_elf, "-o", output).returncode == 2
    assert run_teemate("image", "build", sample, "-o", tmp_path / "x.bin").returncode == 2


def test_a_key_that_others_can_read_is_refused(signed_image: Path, key_file: Path, tmp_path: Path) -> None:
    shared = tmp_path / "key.pem"
    shared.write_bytes(key_file.read_bytes())
    shared.chmod(0o644)
    done = run_teemate("image", "sign", signed_image, "--key", shared, "-o", tmp_path / "x.sig")
    assert done.returncode == 3
    assert "mode 0644" in done.stderr
    assert "chmod 600" in done.stderr
    assert "PRIVATE" not in done.stderr + done.stdout


def test_a_new_key_is_private_and_replaces_none(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    assert run_teemate("image", "key", path).returncode == 0
    assert path.stat().st_mode & 0o777 == 0o600
    before = path.read_bytes()
    done = run_teemate("image", "key", path)
    assert done.returncode == 2
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"", b"no key", b"-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n"]
)
def test_a_file_that_is_no_key_is_refused_without_quoting_it(
    signed_image: Path, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(content)
    path.chmod(0o600)
    done = run_teemate("image", "sign", signed_image, "--key", path)
    assert done.returncode == 3
    assert "no private key" in done.stderr
    assert "c2VjcmV0" not in done.stderr


def test_keys_of_another_kind_are_refused(signed_image: Path, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import rsa

    path = tmp_path / "key.pem"
    save_key(rsa.generate_private_key(65537, 2048), path)
    done = run_teemate("image", "sign", signed_image, "--key", path)
    assert done.returncode == 3
    assert "exponent 3" in done.stderr


def test_help_and_version_import_nothing_heavy() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from teemate.cli.main import run; run(['--help']); "
        "heavy = {'rich', 'elftools', 'cryptography', 'trio', 'cffi', 'teemate._native'} & set(sys.modules); "
        "sys.exit(' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "image" in done.stdout
    done = run_teemate("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("teemate ")


def test_a_place_that_is_not_there_is_named(sample_elf: Path, tmp_path: Path) -> None:
    done = run_teemate("image", "build", "--elf", sample_elf, "-o", tmp_path / "lost" / "x.sgxs")
    assert done.returncode == 1
    assert f"{tmp_path / 'lost'}: there is no such folder" in done.stderr


def test_a_reader_that_has_seen_enough_is_no_error(signed_image: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        done = run_teemate("image", "info", signed_image, "--json", stdout=closed)
    assert done.returncode == 1
    assert done.stderr == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there_and_explains_itself(name: str) -> None:
    result = invoke(name, "--help")
    assert result.exit_code == 0
    assert "Usage: " in result.output


def test_an_unknown_command_is_wrong_usage() -> None:
    done = run_teemate("imgae")
    assert done.returncode == 2
    assert "No such command 'imgae'" in done.stderr


def test_the_most_slots_that_build_allows_load_and_answer(
    sample_elf: Path, key_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "many.sgxs"
    refused = run_teemate("image", "build", "--elf", sample_elf, "-o", output, "--slots", "1000")
    assert refused.returncode == 3
    found = re.search(r"at most (\d+) slots", refused.stderr.replace("\n", " "))
    assert found is not None
    most = int(found[1])
    built = run_teemate(
        "image",
        "build",
        "--elf",
        sample_elf,
        "-o",
        output,
        "--slots",
        most,
        "--stack",
        "8K",
        "--key",
        key_file,
    )
    assert built.returncode == 0, built.stderr
    with teemate.create_enclave(output, output.with_suffix(".sig"), backend="sim") as enclave:
        with contextlib.ExitStack() as stack:
            slots = [stack.enter_context(enclave.slot()) for _ in range(most)]
            assert [slot.call("hello", b"x") for slot in slots] == [b"two"] * most
