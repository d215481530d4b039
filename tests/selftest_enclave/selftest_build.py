"""Build the kernel's selftest enclave from its sources, and all that its tests need, into one folder.

Done on the host, once; the tests then run with the same folder on the host and in the machine.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
for name in ("", "conformance", "selftest_enclave"):
    if (place := str(HERE.parent / name)) not in sys.path:
        sys.path.append(place)

from conformance_runner import HERE as CONFORMANCE  # noqa: E402
from conformance_runner import build_runner  # noqa: E402
from selftest_image import HEAP, SelftestImage, convert  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Material:
    """What `build` leaves in a folder."""

    folder: Path

    @property
    def elf(self) -> Path:
        """``test_encl.elf``, as the selftests' Makefile makes it."""
        return self.folder / "test_encl.elf"

    @property
    def their_sigstruct(self) -> Path:
        """What the selftests' own code measures and signs, with their key."""
        return self.folder / "theirs.sig"

    @property
    def their_segments(self) -> list[tuple[int, int, int, bool]]:
        """What their loader adds: offset, size, SECINFO flags, measured."""
        rows = [line.split() for line in (self.folder / "theirs.segments").read_text().splitlines()]
        return [(int(row[0], 0), int(row[1], 0), int(row[2], 0), row[3] == "1") for row in rows]

    @property
    def operations(self) -> Path:
        """operations.c, linked with the library's sources."""
        return self.folder / "runner"

    def image(self, folder: Path) -> SelftestImage:
        """Turn the ELF into an image in `folder`."""
        return convert(self.elf, folder)


def build(kernel: Path, folder: Path) -> Material:
    """Build from the kernel's source tree (its tools/ and arch/x86/include)."""
    theirs = kernel / "tools" / "testing" / "selftests" / "sgx"
    include = f"-I{kernel / 'tools' / 'include'}"
    material = Material(folder=folder)

    def gcc(*arguments: str) -> None:
        subprocess.run(["gcc", "-w", include, *arguments], cwd=theirs, check=True)

    # The flags of their Makefile, without its -Werror: compilers have learnt to warn since.
    flags = ("-static", "-nostdlib", "-nostartfiles", "-fPIC", "-fno-stack-protector", "-mrdrnd")
    linking = ("-T", "test_encl.lds", "-Wl,--build-id=none,-z,noexecstack")
    gcc(*flags, *linking, "test_encl.c", "test_encl_bootstrap.S", "-o", str(material.elf))
    measure = folder / "measure"
    wrapped = ("-z", "noexecstack", "-Wl,--wrap=open,--wrap=stat")
    sources = (str(HERE / "measure.c"), "load.c", "sigstruct.c", "sign_key.S")
    gcc("-O1", f"-I{theirs}", *wrapped, *sources, "-o", str(measure), "-lcrypto")
    done = subprocess.run([measure, material.elf, str(HEAP)], check=True, capture_output=True)
    material.their_sigstruct.write_bytes(done.stdout)
    (folder / "theirs.segments").write_bytes(done.stderr)
    build_runner(folder, [f"-I{CONFORMANCE}"], [str(HERE / "operations.c")])
    return material


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]))
