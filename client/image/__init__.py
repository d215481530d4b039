"""Images: from the compiler's ELF to a signed SGXS stream, and what an image says about itself.

    elf -> layout -> sgxs          build puts them together
    sigstruct, key                 signing and verifying
    info                           inspect, measure

Nothing here needs libteemate or trio at import: TeeMate's own build runs it from the source tree.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from .._sizes import format_size, parse_size
from ._problem import problem
from .build import Built, build_elf, build_image, layout_image, sdk_paths
from .elf import Location, Symbols
from .info import ImageInfo, inspect, measure_file, read_sigstruct
from .key import generate_key, load_key, save_key
from .layout import ImageHeader, LayoutOptions
from .sigstruct import SigParams, Sigstruct, sign, sign_with_key, verify

__all__ = [
    "Built",
    "ImageHeader",
    "ImageInfo",
    "ImagePaths",
    "LayoutOptions",
    "Location",
    "SigParams",
    "Sigstruct",
    "Symbols",
    "build_elf",
    "build_image",
    "format_size",
    "generate_key",
    "inspect",
    "layout_image",
    "load_key",
    "measure_file",
    "parse_size",
    "read_sigstruct",
    "save_key",
    "sdk_paths",
    "shipped",
    "sign",
    "sign_with_key",
    "verify",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePaths:
    """The files of one image; `elf` is for debugging, and is there for shipped images."""

    sgxs: Path
    sigstruct: Path
    elf: Path


def shipped(name: str) -> ImagePaths:
    """Return the files of an image that comes with TeeMate: ``vault``, or ``bare``, which only leaves.

    Raises :class:`~teemate.errors.ImageError` when there is none of that name, or when TeeMate was
    installed without it.
    """
    if not name.replace("-", "").isalnum():
        raise problem("read", f"{name!r} is no name of an image")
    folder = resources.files("teemate") / "images"
    found = {}
    for suffix in ("sgxs", "sig", "elf"):
        entry = folder / f"{name}.{suffix}"
        if not isinstance(entry, Path) or not entry.is_file():
            raise problem(
                "read", f"TeeMate comes with no image {name!r} ({name}.{suffix} is missing)", image=name
            )
        found[suffix] = entry
    return ImagePaths(sgxs=found["sgxs"], sigstruct=found["sig"], elf=found["elf"])
