"""Enclave images for tests: built from native/enclaves once per run, signed with a key made on the spot."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

from elves import compile_elf, signing_key

from teemate.image import (
    LayoutOptions,
    SigParams,
    layout_image,
    parse_size,
    save_key,
    sign_with_key,
)

ENCLAVES = Path(__file__).resolve().parents[1] / "native" / "enclaves"


@dataclass(frozen=True, kw_only=True)
class BuiltImage:
    """The files of one image, its MRENCLAVE, and the number of its client slots."""

    name: str
    sgxs: Path
    sigstruct: Path
    elf: Path
    mrenclave: bytes
    slots: int


def sources(name: str) -> list[Path]:
    """C and assembly of native/enclaves/NAME, as they are linked, and what it takes from others."""
    own = sorted(path for path in (ENCLAVES / name).iterdir() if path.suffix in (".c", ".S"))
    also = image_table(name).get("also", [])
    assert isinstance(also, list)
    return [*own, *((ENCLAVES / name / path).resolve() for path in also)]


def image_table(name: str) -> dict[str, object]:
    """The row of native/enclaves/images.toml that says how NAME is laid out."""
    table: dict[str, dict[str, object]] = tomllib.loads((ENCLAVES / "images.toml").read_text())
    return table[name]


def layout_options(name: str, **changes: object) -> LayoutOptions:
    """Options of images.toml with `changes`; sizes may be text such as "64M"."""
    compiling = ("also", "bare", "foreign", "includes", "library")
    row = {key: value for key, value in image_table(name).items() if key not in compiling} | changes
    for key in ("heap", "stack"):
        if isinstance(row.get(key), str):
            row[key] = parse_size(str(row[key]))
    return replace(LayoutOptions(), **row)  # type: ignore[arg-type]


class Images:
    """Builds images when they are first asked for; compiling is done once per name.

    `images.vault`, `images.faults`, `images.bare` are enough for most tests; `build` changes the
    layout: ``images.build("vault", slots=4, heap="4M")``.
    """

    def __init__(self, folder: Path, *, test_build: str = "") -> None:
        self._folder = folder
        self.test_build = test_build
        self._built: dict[tuple[str, LayoutOptions, SigParams | None], BuiltImage] = {}
        self.key = signing_key()
        self.key_path = folder / "test-key.pem"
        save_key(self.key, self.key_path)

    @property
    def vault(self) -> BuiltImage:
        """The vault with a small heap and 12 client slots."""
        return self.build("vault", heap="4M", slots=12)

    @property
    def faults(self) -> BuiltImage:
        """A debug image whose ECALLs fault on request."""
        return self.build("faults")

    @property
    def bare(self) -> BuiltImage:
        """A bare-assembly enclave that only leaves."""
        return self.build("bare")

    def build(self, name: str, *, sign: SigParams | None = None, **changes: object) -> BuiltImage:
        """Build native/enclaves/NAME with the options of images.toml and `changes`."""
        options = layout_options(name, **changes)
        key = (name, options, sign)
        if key not in self._built:
            self._built[key] = self._build(name, options, sign)
        return self._built[key]

    def _build(self, name: str, options: LayoutOptions, sign: SigParams | None) -> BuiltImage:
        output = self._folder / f"{name}-{len(self._built)}.sgxs"
        elf = output.with_suffix(".elf")
        earlier = next((image for image in self._built.values() if image.name == name), None)
        if earlier is None:
            bare = bool(image_table(name).get("bare"))
            compile_elf(sources(name), elf, bare=bare, test_build=self.test_build)
        else:
            os.link(earlier.elf, elf)  # faults are shown by the ELF that lies beside the image
        built = layout_image(elf, output, options)
        params = sign or SigParams(debug_allowed=options.debug)
        signature = sign_with_key(params.unsigned(built.mrenclave), self.key)
        sigstruct = output.with_suffix(".sig")
        sigstruct.write_bytes(signature.to_bytes())
        return BuiltImage(
            name=name,
            sgxs=output,
            sigstruct=sigstruct,
            elf=elf,
            mrenclave=built.mrenclave,
            slots=options.slots,
        )
