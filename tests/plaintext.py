"""Looking for what nobody but an enclave may have: in processes' memory, in the broker's messages."""

from __future__ import annotations

import subprocess
from pathlib import Path


def build_listener(folder: Path) -> Path:
    """Compile what, preloaded into the broker, writes all of its messages to the file that HEARD names."""
    library = folder / "listener.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", str(library)]
    subprocess.run([*command, str(Path(__file__).with_name("db") / "listener.c"), "-ldl"], check=True)
    return library


def memory(pid: int, elrange: range) -> bytes:
    """All that a process can read, without the enclave's pages: the sim maps their file at two places."""
    mappings = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        place, rights, offset, device, inode, *name = line.split(maxsplit=5)
        start, end = (int(number, 16) for number in place.split("-"))
        mappings.append((start, end, rights, int(offset, 16), (device, inode), "".join(name)))
    pages = {file for start, *_, file, _ in mappings if start in elrange}
    found = []
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for start, end, rights, offset, file, name in mappings:
            if "r" not in rights or name.startswith("[v"):  # the kernel's own pages
                continue
            if file in pages:  # what lies behind the enclave's pages is the sim's
                start = min(end, start + max(0, len(elrange) - offset))
            while start < end:
                memory.seek(start)
                found.append(memory.read(min(end - start, 1 << 24)))
                start += len(found[-1])
    return b"".join(found)
