"""The database image with holes: what tests guard is switched off in it, and they have to notice."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from connections import database_image
from images import Images, layout_options

from teemate.image import SigParams, build_elf, layout_image, sign_with_key
from teemate.image.build import SdkPaths

FOLDER = Path(__file__).parents[2] / "native" / "enclaves" / "db"


def altered_database(images: Images, folder: Path, *holes: str) -> Path:
    """Build the image with the macros `holes` defined; SQLite itself is compiled once for all builds."""
    database_image()
    sys.path.insert(0, str(FOLDER))
    try:
        from sqlite_source import SourceMissingError, sqlite_source
    finally:
        sys.path.remove(str(FOLDER))
    try:
        source = sqlite_source()
    except SourceMissingError as missing:
        pytest.skip(f"SQLite's source was not to be had: {missing}")
    output = folder / "db.sgxs"
    elf = output.with_suffix(".elf")
    sources = sorted(FOLDER.glob("*.c"))
    includes = [FOLDER / "libc", source]
    sdk = SdkPaths(native=FOLDER.parents[1])  # the same text as the build's
    build_elf(sources, elf, defines=holes, includes=includes, sdk=sdk, objects_kept=source.parent / "objects")
    built = layout_image(elf, output, layout_options("db", heap="16M", slots=3))
    signature = sign_with_key(SigParams().unsigned(built.mrenclave), images.key)
    output.with_suffix(".sig").write_bytes(signature.to_bytes())
    return output
