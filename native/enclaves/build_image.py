"""Make one of the images that TeeMate ships, while TeeMate itself is being built.

Usage: build_image.py NAME NATIVE TEST_BUILD KEY OUTPUT.sgxs OUTPUT.sig OUTPUT.elf DEPFILE

NATIVE is the folder native/ of the source tree.  KEY is a PEM file, or "" for a key that is
made now and thrown away: nobody can sign another enclave with that image's MRSIGNER.
The C compiler is in the environment, CC.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
import types
from pathlib import Path
from typing import Any


def tools(client: Path, module: str) -> Any:
    """Import a module of client/ from the source tree.

    Not under the name `teemate`: where that is installed in editable mode, importing it starts a
    second build in the directory of this one.
    """
    package = types.ModuleType("teemate_sources")
    package.__path__ = [str(client)]
    sys.modules.setdefault("teemate_sources", package)
    return importlib.import_module(f"teemate_sources.{module}")


def dependencies(native: Path, name: str) -> list[Path]:
    """Every file whose change could change the image."""
    row = tomllib.loads((native / "enclaves" / "images.toml").read_text(encoding="utf-8"))[name]
    also = {(native / "enclaves" / name / path).resolve().parent for path in row.get("also", [])}
    folders = (native / "sdk", native / "include", native / "lib", native / "enclaves" / name, *sorted(also))
    kinds = (".c", ".h", ".S", ".lds", ".toml", ".py", ".rs", ".lock")
    found = [p for f in folders for p in f.rglob("*") if p.suffix in kinds]
    tools = native.parent / "client" / "image"
    return sorted([*found, *tools.glob("*.py"), native / "enclaves" / "images.toml", Path(__file__)])


def main() -> None:
    name, native_arg, test_build, key_path, *outputs = sys.argv[1:]
    native = Path(native_arg).resolve()
    sgxs, sig, elf, depfile = map(Path, outputs)
    image = tools(native.parent / "client", "image")
    errors = tools(native.parent / "client", "errors")

    row = tomllib.loads((native / "enclaves" / "images.toml").read_text(encoding="utf-8"))[name]
    bare = row.pop("bare", False)
    for size in ("heap", "stack"):
        if isinstance(row.get(size), str):
            row[size] = image.parse_size(row[size])
    folder = native / "enclaves" / name
    includes = [folder / include for include in row.pop("includes", [])]
    kept = None
    if foreign := row.pop("foreign", None):
        includes.append(Path(subprocess.check_output([sys.executable, folder / foreign], text=True).strip()))  # noqa: S603 (a list, no shell)
        kept = includes[-1].parent / "objects"  # large sources take minutes where the processor is slow
    archives = []
    if library := row.pop("library", None):
        archives.append(Path(subprocess.check_output([sys.executable, folder / library], text=True).strip()))  # noqa: S603 (a list, no shell)
    sources = sorted(p for p in folder.iterdir() if p.suffix in (".c", ".S"))
    sources += [(folder / path).resolve() for path in row.pop("also", [])]
    try:
        image.build_elf(
            sources,
            elf,
            bare=bare,
            test_build="" if test_build == "none" else test_build,
            includes=includes,
            archives=archives,
            objects_kept=kept,
        )
        built = image.layout_image(elf, sgxs, image.LayoutOptions(**row))
        key = image.load_key(Path(key_path)) if key_path else image.generate_key()
        signed = image.sign_with_key(image.SigParams().unsigned(built.mrenclave), key)
        sig.write_bytes(signed.to_bytes())
    except (errors.ImageError, OSError) as error:
        raise SystemExit(f"{name}: {error}") from error
    names = " ".join(str(path).replace(" ", "\\ ") for path in dependencies(native, name))
    depfile.write_text(f"{sgxs}: {names}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
