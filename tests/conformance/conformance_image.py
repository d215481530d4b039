"""The images and SIGSTRUCTs of the conformance table.

A writer of its own, on purpose: it shares nothing with `teemate.image`, so the two read the
formats (SGXS, SIGSTRUCT, MRENCLAVE) independently of each other.
"""

from __future__ import annotations

import hashlib
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

PAGE = 4096
R, W, X = 1, 2, 4
TCS, REG = 1 << 8, 2 << 8
INIT, DEBUG, MODE64, PROVISIONKEY, EINITTOKENKEY, KSS = 1, 2, 4, 0x10, 0x20, 0x80
MISC_EXINFO = 1
SIZE = 0x40000

#: Names of places in ELRANGE, for cases; runner.c gets them on its command line.
PLACES = {
    "code": 0x0000,
    "data": 0x2000,
    "data2": 0x3000,
    "ro": 0x4000,
    "xo": 0x5000,
    "rx": 0x6000,
    "dump": 0x7000,
    "gs0": 0x8000,
    "gs1": 0x9000,
    "gs2": 0xA000,
    "fs": 0xB000,
    "rwx": 0xC000,
    "notcs": 0xD000,
    "newtcs": 0xE000,
    "badtcs": 0xF000,
    "ssa0": 0x10000,
    "ssa1": 0x12000,
    "ssa2": 0x14000,
    "ssa3": 0x16000,
    # Mapped, but nothing was added there; and not even mapped.
    "hole": 0x30000,
    "unmapped": 0x38000,
    "end": SIZE,
}
FIRST_TCS = 0x18000
#: Added to any base, canonical with neither 48 nor 57 bits of address.
NONCANONICAL = 0x4000_0000_0000_0000


def tcs(
    *, ossa: int, nssa: int = 2, oentry: int = 0, fs: int = PLACES["fs"], gs: int = PLACES["gs2"]
) -> bytes:
    """Return a TCS page (SDM volume 3D, "TCS")."""
    head = struct.pack("<QQQIIQQQQII", 0, 0, ossa, 0, nssa, oentry, 0, fs, gs, 0xFFF, 0xFFF)
    return head.ljust(PAGE, b"\0")


#: TCS pages, in this order.  In two-page frames the second page holds GPRSGX.
TCSS: dict[str, bytes] = {
    "t0": tcs(ossa=PLACES["ssa0"], gs=PLACES["gs0"]),
    "t1": tcs(ossa=PLACES["ssa1"], gs=PLACES["gs1"]),
    "t_one": tcs(ossa=PLACES["ssa2"], nssa=1),
    "t_none": tcs(ossa=PLACES["ssa3"], nssa=0),
    "t_fs_canonical": tcs(ossa=PLACES["ssa3"], fs=NONCANONICAL),
    "t_gs_canonical": tcs(ossa=PLACES["ssa3"], gs=NONCANONICAL),
    "t_entry": tcs(ossa=PLACES["ssa3"], oentry=NONCANONICAL),
    "t_ssa_hole": tcs(ossa=PLACES["hole"]),
    "t_ssa_unmapped": tcs(ossa=PLACES["unmapped"]),
    "t_ssa_outside": tcs(ossa=SIZE),
    "t_ssa_tcs": tcs(ossa=FIRST_TCS),
    "t_ssa_data": tcs(ossa=PLACES["data2"]),
    "t_gpr_hole": tcs(ossa=PLACES["hole"] - PAGE),
    "t_gpr_unmapped": tcs(ossa=PLACES["unmapped"] - PAGE),
    "t_gpr_tcs": tcs(ossa=FIRST_TCS - PAGE),
    "t_gpr_data": tcs(ossa=PLACES["data"]),
}
#: In an image of their own ("odd"): EADD has no check for them, but a processor might.
ODD: dict[str, bytes] = {
    "t_ossa": tcs(ossa=PLACES["ssa3"] + 8),
    "t_fs": tcs(ossa=PLACES["ssa3"], fs=PLACES["fs"] + 8),
    "t_gs": tcs(ossa=PLACES["ssa3"], gs=PLACES["gs2"] + 8),
}
for _index, _name in enumerate([*TCSS, *ODD]):
    PLACES[_name] = FIRST_TCS + _index * PAGE


@dataclass(frozen=True, kw_only=True)
class Page:
    offset: int
    flags: int
    data: bytes = bytes(PAGE)


def marked(offset_of_stack: int, mark: int) -> bytes:
    return struct.pack("<QQ", offset_of_stack, mark).ljust(PAGE, b"\0")


def pages(code: bytes, *, odd: bool) -> list[Page]:
    """All pages of the image, ascending."""
    rw, at = REG | R | W, PLACES
    template = tcs(ossa=at["ssa3"], gs=at["gs2"])
    plain = [
        Page(offset=at["code"], flags=REG | R | X, data=code[:PAGE]),
        Page(offset=at["data"], flags=rw),
        Page(offset=at["data2"], flags=rw),
        Page(offset=at["ro"], flags=REG | R),
        Page(offset=at["xo"], flags=REG | X, data=b"\xc3" * PAGE),
        Page(offset=at["rx"], flags=REG | R | X, data=b"\xc3" * PAGE),
        Page(offset=at["dump"], flags=rw),
        Page(offset=at["gs0"], flags=rw, data=marked(at["gs0"] + PAGE - 16, 0x6060)),
        Page(offset=at["gs1"], flags=rw, data=marked(at["gs1"] + PAGE - 16, 0x6161)),
        Page(offset=at["gs2"], flags=rw, data=marked(at["gs2"] + PAGE - 16, 0x6262)),
        Page(offset=at["fs"], flags=rw, data=marked(0, 0xF5F5)),
        Page(offset=at["rwx"], flags=REG | R | W | X, data=b"\xc3" * PAGE),
        Page(offset=at["notcs"], flags=rw),
        Page(offset=at["newtcs"], flags=rw, data=template),
        Page(offset=at["badtcs"], flags=rw, data=template[:100] + b"\1" + template[101:]),
        *(Page(offset=at["ssa0"] + i * PAGE, flags=rw) for i in range(8)),
        *(Page(offset=at[name] - PAGE, flags=rw) for name in ("hole", "unmapped")),
    ]
    threads = [
        Page(offset=PLACES[name], flags=TCS, data=data)
        for name, data in (TCSS | ODD if odd else TCSS).items()
    ]
    return sorted(plain + threads, key=lambda page: page.offset)


def sgxs(contents: list[Page], *, frame_pages: int = 1) -> tuple[bytes, bytes]:
    """Return the SGXS stream and MRENCLAVE."""
    out = bytearray(struct.pack("<8sIQ", b"ECREATE", frame_pages, SIZE).ljust(64, b"\0"))
    for page in contents:
        out += struct.pack("<8sQQ", b"EADD", page.offset, page.flags).ljust(64, b"\0")
        for chunk in range(0, PAGE, 256):
            out += struct.pack("<8sQ", b"EEXTEND", page.offset + chunk).ljust(64, b"\0")
            out += page.data[chunk : chunk + 256]
    return bytes(out), hashlib.sha256(out).digest()


@dataclass(kw_only=True)
class Sigstruct:
    """Fields of a SIGSTRUCT; `spoil` edits the signed bytes, as (offset, new bytes)."""

    enclavehash: bytes
    attributes: int = MODE64
    xfrm: int = 3
    attributemask: int = ~(INIT | DEBUG | KSS) & 0xFFFF_FFFF_FFFF_FFFF
    xfrmmask: int = 0xFFFF_FFFF_FFFF_FFFF
    miscselect: int = 0
    miscmask: int = 0xFFFF_FFFF
    isvfamilyid: bytes = bytes(16)
    isvextprodid: bytes = bytes(16)
    isvprodid: int = 7
    isvsvn: int = 5
    vendor: int = 0
    #: Applied before signing / after signing.
    edits: list[tuple[int, bytes]] = field(default_factory=list)
    spoils: list[tuple[int, bytes]] = field(default_factory=list)

    def sign(self, key: rsa.RSAPrivateKey) -> bytes:
        out = bytearray(1808)
        out[0:16] = bytes.fromhex("06000000E10000000000010000000000")
        struct.pack_into("<II", out, 16, self.vendor, 0x20260101)
        out[24:40] = bytes.fromhex("01010000600000006000000001000000")
        modulus = key.public_key().public_numbers().n
        out[128:512] = modulus.to_bytes(384, "little")
        struct.pack_into("<I", out, 512, 3)
        struct.pack_into("<II", out, 900, self.miscselect, self.miscmask)
        out[912:928] = self.isvfamilyid
        struct.pack_into("<QQQQ", out, 928, self.attributes, self.xfrm, self.attributemask, self.xfrmmask)
        out[960:992] = self.enclavehash
        out[1008:1024] = self.isvextprodid
        struct.pack_into("<HH", out, 1024, self.isvprodid, self.isvsvn)
        for offset, data in self.edits:
            out[offset : offset + len(data)] = data
        signed = bytes(out[0:128] + out[900:1028])
        number = int.from_bytes(key.sign(signed, padding.PKCS1v15(), hashes.SHA256()), "big")
        q1, rest = divmod(number * number, modulus)
        q2 = rest * number // modulus
        for offset, value in ((516, number), (1040, q1), (1424, q2)):
            out[offset : offset + 384] = value.to_bytes(384, "little")
        for offset, data in self.spoils:
            out[offset : offset + len(data)] = data
        return bytes(out)


def edited(offset: int, data: bytes) -> Callable[[bytes], Sigstruct]:
    return lambda mrenclave: Sigstruct(enclavehash=mrenclave, edits=[(offset, data)])


#: SIGSTRUCTs by name.  All sign the plain image unless they say otherwise.
SIGSTRUCTS: dict[str, Callable[[bytes], Sigstruct]] = {
    "good": lambda m: Sigstruct(enclavehash=m),
    "intel": lambda m: Sigstruct(enclavehash=m, vendor=0x8086),
    "debuggable": lambda m: Sigstruct(enclavehash=m, attributes=MODE64 | DEBUG),
    "exinfo": lambda m: Sigstruct(enclavehash=m, miscselect=MISC_EXINFO),
    "kss": lambda m: Sigstruct(
        enclavehash=m,
        attributes=MODE64 | KSS,
        isvfamilyid=b"family".ljust(16, b"\0"),
        isvextprodid=b"ext".ljust(16),
    ),
    "kssother": lambda m: Sigstruct(
        enclavehash=m,
        attributes=MODE64 | KSS,
        isvfamilyid=b"family".ljust(16, b"\0"),
        isvextprodid=b"ext".ljust(16),
        isvprodid=8,
    ),
    "kssfamily": lambda m: Sigstruct(
        enclavehash=m,
        attributes=MODE64 | KSS,
        isvfamilyid=b"other".ljust(16, b"\0"),
        isvextprodid=b"ext".ljust(16),
    ),
    "kssext": lambda m: Sigstruct(
        enclavehash=m,
        attributes=MODE64 | KSS,
        isvfamilyid=b"family".ljust(16, b"\0"),
        isvextprodid=b"two".ljust(16),
    ),
    "family": lambda m: Sigstruct(enclavehash=m, isvfamilyid=b"family".ljust(16, b"\0")),
    "header": edited(0, b"\x07"),
    "vendor": lambda m: Sigstruct(enclavehash=m, vendor=1),
    "header2": edited(24, b"\x02"),
    "exponent": edited(512, b"\x05"),
    "reserved1": edited(44, b"\x01"),
    "reserved2": edited(910, b"\x01"),
    "cet": edited(908, b"\x01"),
    "reserved3": edited(992, b"\x01"),
    "reserved4": lambda m: Sigstruct(enclavehash=m, spoils=[(1028, b"\x01")]),
    "signature": lambda m: Sigstruct(enclavehash=m, spoils=[(516, b"\x00\x11\x22\x33")]),
    "date": lambda m: Sigstruct(enclavehash=m, spoils=[(20, b"\x02")]),
    "svn": lambda m: Sigstruct(enclavehash=m, spoils=[(1026, b"\x09")]),
    "q1": lambda m: Sigstruct(enclavehash=m, spoils=[(1040, b"\x00\x11\x22\x33")]),
    "q2": lambda m: Sigstruct(enclavehash=m, spoils=[(1424, b"\x00\x11\x22\x33")]),
    "hash": lambda m: Sigstruct(enclavehash=bytes([m[0] ^ 1]) + m[1:]),
    "nodebug": lambda m: Sigstruct(enclavehash=m, attributemask=~INIT & 0xFFFF_FFFF_FFFF_FFFF),
    "mode32": lambda m: Sigstruct(enclavehash=m, attributes=0),
    "provision": lambda m: Sigstruct(enclavehash=m, attributes=MODE64 | PROVISIONKEY),
    "einittoken": lambda m: Sigstruct(enclavehash=m, attributes=MODE64 | EINITTOKENKEY),
    "other": lambda m: Sigstruct(enclavehash=m, isvprodid=8),
}


def assemble(source: Path, output: Path) -> bytes:
    """Assemble the enclave to a flat binary at offset 0."""
    obj = output / "enclave.o"
    flat = output / "enclave.bin"
    subprocess.run(["cc", "-c", "-nostdlib", str(source), "-o", str(obj)], check=True)
    subprocess.run(
        ["ld", "-Ttext=0", "-e", "0", "--oformat", "binary", str(obj), "-o", str(flat)], check=True
    )
    return flat.read_bytes()


def write_all(source: Path, output: Path) -> None:
    """Write every image and SIGSTRUCT, signed with keys made now, to `output`."""
    key = rsa.generate_private_key(public_exponent=3, key_size=3072)
    stranger = rsa.generate_private_key(public_exponent=3, key_size=3072)
    code = assemble(source, output)
    for name, frame_pages in (("plain", 1), ("frame2", 2), ("odd", 1)):
        stream, mrenclave = sgxs(pages(code, odd=name == "odd"), frame_pages=frame_pages)
        (output / f"{name}.sgxs").write_bytes(stream)
        (output / f"{name}.mrenclave").write_bytes(mrenclave)
        for sig, make in SIGSTRUCTS.items():
            if name == "plain" or sig == "good":
                (output / f"{name}.{sig}.sig").write_bytes(make(mrenclave).sign(key))
    mrenclave = (output / "plain.mrenclave").read_bytes()
    foreign = Sigstruct(enclavehash=mrenclave).sign(key)
    swapped = bytearray(Sigstruct(enclavehash=mrenclave).sign(stranger))
    (output / "plain.stranger.sig").write_bytes(bytes(swapped))
    swapped[516:900] = foreign[516:900]
    (output / "plain.swapped.sig").write_bytes(bytes(swapped))
    modulus = key.public_key().public_numbers().n.to_bytes(384, "little")
    (output / "plain.mrsigner").write_bytes(hashlib.sha256(modulus).digest())
    lines = [f"{name} {offset:#x}\n" for name, offset in PLACES.items()]
    (output / "places").write_text("".join(lines))
