"""Fixtures of the warden's tests: an enclave that misbehaves on request, and wardens for it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from backends import NUMBER
from crash_world import World, populate
from elves import compile_elf
from images import Images, layout_options, sources
from stepping import build_stepping
from warden_harness import HANGS_WORD, Client, Enclave, Slot, Warden, check

from teemate._native import ffi, lib
from teemate.image import LayoutOptions, SigParams, layout_image, sign_with_key

HERE = Path(__file__).resolve().parent

ImageMaker = Callable[..., tuple[Path, Path]]
VaultMaker = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="session")
def make_image(images: Images, tmp_path_factory: pytest.TempPathFactory) -> ImageMaker:
    """Build tests/warden/enclave.c; keyword arguments are layout options and `defines`."""
    folder = tmp_path_factory.mktemp("warden-images")
    made: dict[str, tuple[Path, Path]] = {}

    def make(*, defines: tuple[str, ...] = (), **changes: object) -> tuple[Path, Path]:
        key = repr((defines, sorted(changes.items())))
        if key not in made:
            stem = folder / f"warden-{len(made)}"
            options = replace(LayoutOptions(slots=3, heap=1 << 20, debug=True), **changes)  # type: ignore[arg-type]
            compile_elf(
                [HERE / "enclave.c"], stem.with_suffix(".elf"), defines=defines, test_build=images.test_build
            )
            built = layout_image(stem.with_suffix(".elf"), stem.with_suffix(".sgxs"), options)
            unsigned = SigParams(debug_allowed=True).unsigned(built.mrenclave)
            stem.with_suffix(".sig").write_bytes(sign_with_key(unsigned, images.key).to_bytes())
            made[key] = (stem.with_suffix(".sgxs"), stem.with_suffix(".sig"))
        return made[key]

    return make


@pytest.fixture
def make_enclave(make_image: ImageMaker) -> Iterator[Callable[..., Enclave]]:
    """Create enclaves that end with the test."""
    enclaves: list[Enclave] = []

    def make(**options: object) -> Enclave:
        enclaves.append(Enclave(*make_image(**options)))
        return enclaves[-1]

    yield make
    for enclave in enclaves:
        enclave.close()


@pytest.fixture
def enclave(make_enclave: Callable[..., Enclave]) -> Enclave:
    """One fresh enclave, created and not yet started."""
    return make_enclave()


@pytest.fixture
def make_warden() -> Iterator[Callable[[], Warden]]:
    """Start warden processes that end with the test."""
    wardens: list[Warden] = []

    def make() -> Warden:
        wardens.append(Warden())
        return wardens[-1]

    yield make
    for warden in wardens:
        warden.kill()


@pytest.fixture
def started(make_warden: Callable[[], Warden], enclave: Enclave) -> Warden:
    """A warden that has started `enclave`."""
    warden = make_warden()
    reply = warden.start(enclave)
    assert (reply.status, reply.text) == (0, b"")
    return warden


@pytest.fixture
def client(enclave: Enclave) -> Iterator[Client]:
    """This process as a client of `enclave`."""
    opened = Client(enclave)
    yield opened
    opened.close()


class Private:
    """A private enclave of this process."""

    def __init__(self, sgxs: Path, sigstruct: Path) -> None:
        diag = ffi.new("struct teemate_diag *")
        pointer = ffi.new("struct teemate_enclave **")
        with sgxs.open("rb") as file:
            signature = ffi.new("uint8_t[]", sigstruct.read_bytes())
            check(lib.teemate_create(NUMBER, 0, 0, file.fileno(), signature, pointer, diag), diag)
        self.handle = pointer[0]
        check(lib.teemate_map(self.handle, diag), diag)
        check(lib.teemate_private_start(self.handle, diag), diag)

    def slot(self, n: int = 0) -> Slot:
        """Open client slot `n`."""
        args = ffi.new("struct teemate_slot_args *")
        check(lib.teemate_private_slot(self.handle, n, args))
        return Slot(self.handle, args)

    def hangs(self) -> bool:
        """Whether somebody has come to where it hangs since this was last asked."""
        info = ffi.new("struct teemate_enclave_info *")
        check(lib.teemate_enclave_describe(self.handle, info))
        word = ffi.cast("uint32_t *", info.base + info.size + 4096 + HANGS_WORD)
        said, word[0] = word[0], 0
        return bool(said)

    def close(self) -> None:
        """Give the enclave up."""
        lib.teemate_close(self.handle)


@pytest.fixture
def make_private(make_image: ImageMaker) -> Iterator[Callable[..., Private]]:
    """Create private enclaves that end with the test."""
    enclaves: list[Private] = []

    def make(image: tuple[Path, Path] | None = None, **options: object) -> Private:
        enclaves.append(Private(*(image or make_image(**options))))
        return enclaves[-1]

    yield make
    for enclave in enclaves:
        enclave.close()


@pytest.fixture
def private(make_private: Callable[..., Private]) -> Private:
    """One started private enclave of tests/warden/enclave.c."""
    return make_private()


@pytest.fixture(scope="module")
def make_vault(images: Images, tmp_path_factory: pytest.TempPathFactory) -> VaultMaker:
    """Build the vault with crash.c: a protection switched off or none, layout options."""
    folder = tmp_path_factory.mktemp("crash")

    def make(test_build: str = "", **changes: object) -> tuple[Path, Path]:
        stem = folder / f"{test_build or 'whole'}-{'-'.join(map(str, changes.values()))}"
        elf, sgxs, sigstruct = (stem.with_suffix(end) for end in (".elf", ".sgxs", ".sig"))
        compile_elf([*sources("vault"), HERE / "crash.c"], elf, test_build=test_build)
        # No time: the warden would enter to tell it whenever it likes.
        small = {"slots": 3, "stack": "16K", "heap": "64K", "time": False}
        built = layout_image(elf, sgxs, layout_options("vault", **small | changes))
        sigstruct.write_bytes(sign_with_key(SigParams().unsigned(built.mrenclave), images.key).to_bytes())
        return sgxs, sigstruct

    return make


@pytest.fixture(scope="module")
def stepping(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build_stepping(tmp_path_factory.mktemp("stepping"))


@pytest.fixture(scope="module")
def world(make_vault: VaultMaker, stepping: ctypes.CDLL) -> Iterator[World]:
    with World(*make_vault(), stepping) as world:
        populate(world)
        yield world
