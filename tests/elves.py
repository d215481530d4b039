"""ELFs of test enclaves, compiled once and kept where TEEMATE_TEST_BUILDS says.

In the emulated machine a processor is fifty times slower, so nothing is compiled there: the host's tests,
run with TEEMATE_TEST_BUILDS=FOLDER, leave what they compile in FOLDER, and those in the machine find it.
Without the variable everything is compiled anew, as if this module were not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teemate.image import build_elf, generate_key, load_key, save_key, sdk_paths

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey


def kept_builds() -> Path | None:
    """The folder, made if need be; None when nothing is to be kept."""
    name = os.environ.get("TEEMATE_TEST_BUILDS")
    if not name:
        return None
    folder = Path(name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def compile_elf(sources: Sequence[Path], output: Path, **options: Any) -> None:
    """Do what teemate.image.build_elf does, or copy what it did with the same sources and options."""
    folder = kept_builds()
    if folder is None:
        build_elf(sources, output, **options)
        return
    kept = folder / f"{_digest(sources, options)}.elf"
    if not kept.exists():
        build_elf(sources, kept, **options)
    shutil.copyfile(kept, output)


def signing_key() -> RSAPrivateKey:
    """A key to sign test images with: making one takes the machine a quarter of a minute."""
    folder = kept_builds()
    if folder is None:
        return generate_key()
    kept = folder / "test-key.pem"
    if not kept.exists():
        own = folder / f"test-key-{os.getpid()}.pem"
        save_key(generate_key(), own)
        with contextlib.suppress(FileExistsError):  # another run was quicker: its key is the one
            os.link(own, kept)
        own.unlink()
    return load_key(kept)


def _digest(sources: Sequence[Path], options: dict[str, Any]) -> str:
    """Of everything that goes into the ELF: sources, what they include, the SDK, the options."""
    sdk = sdk_paths()
    flags = sdk.sdk / "flags.toml"
    used = [*sources, *(sdk.sdk / name for name in tomllib.loads(flags.read_text())["sources"])]
    folders = {path.parent.resolve() for path in used} | {sdk.native / "include"}
    headers = sorted(path for folder in folders for path in folder.glob("*.h"))
    names = [path.name for path in used]
    digest = hashlib.sha256(repr((names, sorted(options.items()))).encode())
    for path in [*used, *headers, flags, sdk.sdk / "enclave.lds"]:
        data = path.read_bytes()
        digest.update(f"{path.name} {len(data)}\n".encode() + data)
    return digest.hexdigest()[:32]
