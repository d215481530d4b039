"""Build C sources of native/lib as they are and call them through cffi."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from cffi import FFI

ROOT = Path(__file__).parents[2]
LIB = ROOT / "native" / "lib"
CRYPTO = ["sha256.c", "hmac.c", "aes.c", "cmac.c", "gcm.c", "rsa3072.c"]
#: As the library builds them, without the SHA extensions, with plain C only, and as they go into enclaves.
VARIANTS: dict[str, list[str]] = {
    "host": [],
    "avx2": ["-DTEEMATE_CRYPTO_NO_SHA"],
    "portable": ["-DTEEMATE_CRYPTO_PORTABLE"],
    "enclave": ["-DTEEMATE_ENCLAVE", "-ffreestanding"],
}


def build_library(sources: list[str], output: Path, flags: list[str]) -> Path:
    """Compile `sources` of native/lib to a shared library; fails with the compiler's words."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler is not None, "the tests need a C compiler"
    command = [compiler, "-std=gnu17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    command += ["-D_GNU_SOURCE", f"-I{ROOT / 'native' / 'include'}", *flags]
    command += [str(LIB / source) for source in sources]
    subprocess.run([*command, "-o", str(output)], check=True)
    return output


def crypto_declarations() -> str:
    """Return crypto.h without what cffi does not read."""
    text = (LIB / "crypto.h").read_text()
    text = re.sub(r"^#.*$", "", text, flags=re.MULTILINE)
    return text.replace("__attribute__((aligned(16)))", "")


class Crypto:
    """crypto.h for Python: bytes in, bytes out."""

    def __init__(self, path: Path) -> None:
        self.ffi = FFI()
        self.ffi.cdef(crypto_declarations())
        self.lib: Any = self.ffi.dlopen(str(path))

    def sha256(self, *pieces: bytes) -> bytes:
        state = self.ffi.new("struct sha256 *")
        digest = self.ffi.new("uint8_t[32]")
        self.lib.sha256_init(state)
        for piece in pieces:
            self.lib.sha256_update(state, piece, len(piece))
        self.lib.sha256_final(state, digest)
        return bytes(digest)

    def hmac(self, key: bytes, data: bytes) -> bytes:
        mac = self.ffi.new("uint8_t[32]")
        self.lib.hmac_sha256(key, len(key), data, len(data), mac)
        return bytes(mac)

    def hmac_2(self, key: bytes, a: bytes, b: bytes) -> bytes:
        mac = self.ffi.new("uint8_t[32]")
        self.lib.hmac_sha256_2(key, len(key), a, len(a), b, len(b), mac)
        return bytes(mac)

    def aes(self, key: bytes, block: bytes) -> bytes:
        # struct aes128 is aligned to 16 bytes, which cffi does not promise.
        room = self.ffi.new("uint8_t[]", 176 + 16)
        start = -int(self.ffi.cast("uintptr_t", room)) % 16
        aes = self.ffi.cast("struct aes128 *", room + start)
        out = self.ffi.new("uint8_t[16]")
        self.lib.aes128_init(aes, key)
        self.lib.aes128_encrypt(aes, block, out)
        return bytes(out)

    def cmac(self, key: bytes, data: bytes) -> bytes:
        mac = self.ffi.new("uint8_t[16]")
        self.lib.aes128_cmac(key, data, len(data), mac)
        return bytes(mac)

    def gcm_seal(self, key: bytes, iv: bytes, aad: bytes, data: bytes) -> tuple[bytes, bytes]:
        out = self.ffi.new("uint8_t[]", len(data) or 1)
        tag = self.ffi.new("uint8_t[16]")
        self.lib.aes128_gcm_seal(key, iv, aad, len(aad), data, len(data), out, tag)
        return bytes(out)[: len(data)], bytes(tag)

    def gcm_open(self, key: bytes, iv: bytes, aad: bytes, data: bytes, tag: bytes) -> tuple[int, bytes]:
        out = self.ffi.new("uint8_t[]", b"\xee" * (len(data) or 1))
        result = self.lib.aes128_gcm_open(key, iv, aad, len(aad), data, len(data), out, tag)
        return result, bytes(out)[: len(data)]

    def rsa3072_e3_verify(self, modulus: int, signature: int, q1: int, q2: int, digest: bytes) -> int:
        numbers = [number.to_bytes(384, "little") for number in (modulus, signature, q1, q2)]
        return int(self.lib.rsa3072_e3_verify(*numbers, digest))
