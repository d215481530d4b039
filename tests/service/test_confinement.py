"""Clients and brokers below what systemd and container runtimes put over them."""

from __future__ import annotations

import os
import subprocess
import sys

from backends import BACKEND
from images import Images

# A seccomp filter that refuses one system call with EPERM, as LockPersonality=yes does it for this one.
REFUSED = """
import ctypes, errno, os, struct, sys
PERSONALITY, LOAD, EQUAL, RETURN = 135, 0x20, 0x15, 0x06
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
program = [(LOAD, 0, 0, 0), (EQUAL, 0, 1, PERSONALITY)]
program += [(RETURN, 0, 0, ERRNO | errno.EPERM), (RETURN, 0, 0, ALLOW)]
code = b"".join(struct.pack("<HBBI", *line) for line in program)
buffer = ctypes.create_string_buffer(code)
fprog = struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(buffer))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.create_string_buffer(fprog), 0, 0) == 0
assert libc.personality(0xFFFFFFFF) == -1
import teemate
image, sigstruct, backend = sys.argv[1:]
with teemate.create_enclave(image, sigstruct, backend=backend) as enclave, enclave.slot() as slot:
    print(slot.call("echo", b"inside").decode())
"""


def test_an_enclave_is_mapped_where_nobody_may_ask_for_the_personality(images: Images) -> None:
    vault = images.vault
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, str(vault.sgxs), str(vault.sigstruct), BACKEND],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONFAULTHANDLER": "1"},
    )
    assert (done.returncode, done.stdout) == (0, "inside\n"), done.stderr
