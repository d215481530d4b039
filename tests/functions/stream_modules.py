"""Modules that read and write on and on."""

from __future__ import annotations

import modules as wasm

_READ = wasm.i32(60000) + wasm.i32(0) + wasm.I32_STORE + wasm.i32(60004) + wasm.i32(50000) + wasm.I32_STORE
_READ += wasm.i32(0) + wasm.i32(60000) + wasm.i32(1) + wasm.i32(60008) + wasm.call("fd_read") + wasm.DROP
_BACK = wasm.i32(60004) + wasm.i32(60008) + wasm.I32_LOAD + wasm.I32_STORE
_BACK += wasm.i32(1) + wasm.i32(60000) + wasm.i32(1) + wasm.i32(60012) + wasm.call("fd_write") + wasm.DROP

CAT = wasm.command(wasm.LOOP + _READ + _BACK + wasm.i32(60008) + wasm.I32_LOAD + b"\x0d\x00" + wasm.END)
"""Reads up to 50,000 bytes and writes them, until nothing comes."""
READS_ON = wasm.command(wasm.LOOP + _READ + wasm.BRANCH + wasm.END)
WRITES_ON = wasm.command(wasm.LOOP + wasm.write(1, 0, 60000) + wasm.BRANCH + wasm.END)
