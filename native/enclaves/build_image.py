"""Make one of the images that TeeMate ships, while TeeMate itself is being built.

Usage: build_image.py NAME NATIVE TEST_BUILD KEY OUTPUT.sgxs OUTPUT.sig OUTPUT.elf DEPFILE

NATIVE is the folder native/ of the source tree.  KEY is a PEM file, or "" for a key that is
made now and thrown away: nobody can sign another enclave with that image's MRSIGNER.
The C compiler is in the environment, CC.
"""

from __future__ import annotations

import sys
import tomllib
import types
from pathlib import Path


def put_package_on_path(client: Path) -> None:
    """Make client/ importable as `teemate` without running its __init__, which is for installed packages."""
    package = types.ModuleType("teemate")
    package.__path__ = [str(client)]
    sys.modules["teemate"] = package


def dependencies(native: Path, name: str) -> list[Path]:
    """Every file whose change could change the image."""
    folders = (native / "sdk", native / "include", native / "lib", native / "enclaves" / name)
    found = [p for f in folders for p in f.rglob("*") if p.suffix in (".c", ".h", ".S", ".lds", ".toml")]
    tools = native.parent / "client" / "image"
    return sorted([*found, *tools.glob("*.py"), native / "enclaves" / "images.toml", Path(__file__)])


def main() -> None:
    name, native_arg, test_build, key_path, *outputs = sys.argv[1:]
    native = Path(native_arg).resolve()
    sgxs, sig, elf, depfile = map(Path, outputs)
    put_package_on_path(native.parent / "client")

    from teemate.errors import ImageError
    from teemate.image import (
        LayoutOptions,
        SigParams,
        build_elf,
        generate_key,
        layout_image,
        load_key,
        parse_size,
        sign_with_key,
    )

    row = tomllib.loads((native / "enclaves" / "images.toml").read_text(encoding="utf-8"))[name]
    bare = row.pop("bare", False)
    for size in ("heap", "stack"):
        if isinstance(row.get(size), str):
            row[size] = parse_size(row[size])
    sources = sorted(p for p in (native / "enclaves" / name).iterdir() if p.suffix in (".c", ".S"))
    try:
        build_elf(sources, elf, bare=bare, test_build="" if test_build == "none" else test_build)
        built = layout_image(elf, sgxs, LayoutOptions(**row))
        key = load_key(Path(key_path)) if key_path else generate_key()
        sig.write_bytes(sign_with_key(SigParams().unsigned(built.mrenclave), key).to_bytes())
    except (ImageError, OSError) as error:
        raise SystemExit(f"{name}: {error}") from error
    names = " ".join(str(path).replace(" ", "\\ ") for path in dependencies(native, name))
    depfile.write_text(f"{sgxs}: {names}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
