"""Fortanix's crates and we read each other's images and signatures alike."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from fortanix import MissingError, build
from images import BuiltImage, Images

from teemate.image import SigParams, sign_with_key
from teemate.image.sigstruct import Sigstruct

pytest.importorskip("teemate._native", reason="the C library is not built")
from teemate._native import ffi, lib


@pytest.fixture(scope="session")
def programs() -> Path:
    try:
        return build()
    except MissingError as reason:
        pytest.skip(str(reason))


def agree(programs: Path, command: str, file: Path) -> dict[str, str]:
    done = subprocess.run(
        [str(programs / "agree"), command, str(file)], capture_output=True, text=True, check=True
    )
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


def sgxs_sign(programs: Path, *arguments: str | Path) -> None:
    subprocess.run([str(programs / "sgxs-sign"), *map(str, arguments)], check=True, capture_output=True)


def measure(image: Path) -> dict[str, str]:
    """Return what the library sees, in the words of agree.rs."""
    info, diag = ffi.new("struct teemate_image_info *"), ffi.new("struct teemate_diag *")
    with image.open("rb") as file:
        assert lib.teemate_image_measure(file.fileno(), info, diag) == 0, ffi.string(diag.text)
    return {
        "mrenclave": bytes(info.mrenclave).hex(),
        "size": str(info.size),
        "ssa_frame_pages": str(info.ssa_frame_pages),
        "pages": str(info.pages),
        "tcs": str(info.tcs_count),
        "measured": str(info.measured_bytes),
    }


def verify(sigstruct: bytes, mrenclave: bytes) -> None:
    diag = ffi.new("struct teemate_diag *")
    result = lib.teemate_sigstruct_verify(sigstruct, mrenclave, ffi.NULL, diag)
    assert result == 0, ffi.string(diag.text)


@pytest.fixture(params=["vault", "bare"])
def built(request: pytest.FixtureRequest, images: Images) -> BuiltImage:
    image: BuiltImage = getattr(images, request.param)
    return image


def test_their_crate_reads_our_images_as_we_do(programs: Path, built: BuiltImage) -> None:
    assert agree(programs, "image", built.sgxs) == measure(built.sgxs)
    assert agree(programs, "image", built.sgxs)["mrenclave"] == built.mrenclave.hex()


def test_their_crate_verifies_our_sigstructs(programs: Path, built: BuiltImage) -> None:
    seen = agree(programs, "sigstruct", built.sigstruct)
    ours = Sigstruct.from_bytes(built.sigstruct.read_bytes())
    assert seen["verified"] == "true"
    assert seen["enclavehash"] == built.mrenclave.hex()
    assert (seen["isvprodid"], seen["isvsvn"]) == (str(ours.isvprodid), str(ours.isvsvn))
    assert (seen["attributes"], seen["xfrm"]) == (str(ours.attributes), str(ours.xfrm))


def test_their_crate_refuses_a_sigstruct_that_was_changed(
    programs: Path, built: BuiltImage, tmp_path: Path
) -> None:
    """The program that verifies can say no as well."""
    changed = bytearray(built.sigstruct.read_bytes())
    changed[1026] ^= 1
    (tmp_path / "changed.sig").write_bytes(changed)
    assert agree(programs, "sigstruct", tmp_path / "changed.sig")["verified"] == "false"


def test_we_take_what_sgxs_sign_signed(
    programs: Path, built: BuiltImage, images: Images, tmp_path: Path
) -> None:
    output = tmp_path / "theirs.sig"
    sgxs_sign(programs, "--key", images.key_path, built.sgxs, output)
    verify(output.read_bytes(), built.mrenclave)
    theirs = Sigstruct.from_bytes(output.read_bytes())
    assert theirs.enclavehash == built.mrenclave


def test_we_and_sgxs_sign_make_the_same_bytes(
    programs: Path, built: BuiltImage, images: Images, tmp_path: Path
) -> None:
    output = tmp_path / "theirs.sig"
    options = ["--isvprodid", "7", "--isvsvn", "3", "--date", "20000101"]
    # Value and inverse mask.
    options += ["--attributes", "4/0", "--xfrm", "3/0", "--miscselect", "0/0"]
    sgxs_sign(programs, "--key", images.key_path, *options, built.sgxs, output)
    params = SigParams(isvprodid=7, isvsvn=3)
    ours = sign_with_key(params.unsigned(built.mrenclave), images.key).to_bytes()
    assert output.read_bytes() == ours


def test_an_enclave_starts_with_what_sgxs_sign_signed(programs: Path, images: Images, tmp_path: Path) -> None:
    output = tmp_path / "theirs.sig"
    sgxs_sign(programs, "--key", images.key_path, images.bare.sgxs, output)
    enclave, diag = ffi.new("struct teemate_enclave **"), ffi.new("struct teemate_diag *")
    with images.bare.sgxs.open("rb") as file:
        result = lib.teemate_create(lib.TEEMATE_SIM, 0, 0, file.fileno(), output.read_bytes(), enclave, diag)
    assert result == 0, ffi.string(diag.text)
    lib.teemate_close(enclave[0])


def test_we_read_what_their_crate_wrote(programs: Path, tmp_path: Path) -> None:
    image = tmp_path / "theirs.sgxs"
    agree(programs, "write", image)
    seen = measure(image)
    assert seen == agree(programs, "image", image)
    assert (seen["pages"], seen["measured"]) == ("6", str(4096 + 256))
