"""What every benchmark needs: images, brokers, and the programs that are measured, in one folder."""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, final

from teemate._backend import choose_backend
from teemate.bench._broker import UNKEPT, BenchBroker
from teemate.bench._measured import Listener, Measured
from teemate.demo._prepare import ENCLAVE, DemoImage, prepare_image
from teemate.errors import Unsupported
from teemate.image import generate_key, shipped

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

__all__ = ["C_SUBJECT", "FLOOR", "HEAP", "MIB", "Setting"]

MIB = 1 << 20
SLOTS = 32
HEAP = 64 * MIB
"""Of the enclave, where nothing else is said: those of the vault as it is shipped."""
_LIBEXEC = Path(__file__).resolve().parents[1] / "libexec"
FLOOR = _LIBEXEC / "teemate-floor"
C_SUBJECT = _LIBEXEC / "teemate-subject"
"""There when the C library was built."""


@final
class Setting:
    """Where and how benchmarks run.

    For tests, `command` starts another broker than ours, and `scale` (less than 1) shrinks every number of
    repetitions.  `settle_seconds` is how long a broker may take until what clients held is ready for the
    next ones.
    """

    def __init__(
        self,
        folder: Path,
        listener: Listener,
        *,
        backend: str = "auto",
        quick: bool = False,
        command: tuple[str, ...] = UNKEPT,
        scale: float = 1.0,
        settle_seconds: float = 10.0,
    ) -> None:
        self.settle_seconds = settle_seconds
        self.listener = listener
        self.backend = choose_backend(backend).backend
        self.quick = quick
        self.scale = scale
        self._folder = folder
        self._command = command
        self._images: dict[tuple[int, int], DemoImage] = {}
        self._signer: RSAPrivateKey | None = None

    def times(self, full: int, quick: int) -> int:
        """Return how often something is to be repeated."""
        return max(2, round((quick if self.quick else full) * self.scale))

    def new_folder(self, name: str) -> Path:
        """Make a folder that goes when all is over."""
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self._folder))

    def image(self, *, heap: int = HEAP, slots: int = SLOTS) -> DemoImage:
        """Lay the vault out, once for each size."""
        key = (heap, slots)
        if key not in self._images:
            self._images[key] = prepare_image(self.new_folder("image"), heap=heap, clients=slots)
        return self._images[key]

    def database_image(self, *, heap: int, slots: int) -> DemoImage:
        """Lay the database enclave out; all have one signer, and so can open each other's databases."""
        if self._signer is None:
            self._signer = generate_key()
        folder = self.new_folder("database")
        return prepare_image(folder, heap=heap, clients=slots, name="db", key=self._signer)

    def functions_image(self, *, heap: int, slots: int) -> DemoImage:
        """Lay the functions enclave out."""
        return prepare_image(self.new_folder("functions"), heap=heap, clients=slots, name="functions")

    def broker(
        self,
        image: DemoImage,
        *,
        clients: int = 64,
        slots_per_client: int = 4,
        copies: int = 1,
        storage: bool = False,
    ) -> BenchBroker:
        """Return a broker that shares `copies` enclaves from `image`, to be entered.

        With `storage` they may have files.
        """
        return BenchBroker(
            self.new_folder("broker"), image, backend=self.backend, programs=clients, command=self._command,
            slots_per_client=slots_per_client, copies=copies, storage=storage,
        )  # fmt: skip

    def sharer(self, broker: BenchBroker, *options: str) -> Measured:
        """Return a program that attaches, to be entered."""
        return Measured("a program that attaches", self.attaching(broker, *options))

    def c_sharer(self, broker: BenchBroker) -> Measured | None:
        """Return a C program that attaches, to be entered; None where there is no C client."""
        command = self.c_attaching(broker)
        return None if command is None else Measured("a C program that attaches", command)

    def builder(self, image: DemoImage, *options: str) -> Measured:
        """Return a program that builds its own enclave, to be entered."""
        return Measured("a program that builds", self.building(image, *options))

    @staticmethod
    def attaching(broker: BenchBroker, *options: str) -> list[str]:
        """Return the command of :meth:`sharer`."""
        return [*_SUBJECT, "--socket", broker.socket, "--enclave", ENCLAVE, *options]

    def c_attaching(self, broker: BenchBroker) -> list[str] | None:
        """Return the command of :meth:`c_sharer`."""
        if not C_SUBJECT.is_file():
            self.listener.phase("the C client's figures are left out: it was not built (libcbor is missing)")
            return None
        return [str(C_SUBJECT), broker.socket, ENCLAVE]

    def building(self, image: DemoImage, *options: str) -> list[str]:
        """Return the command of :meth:`builder`."""
        paths = ["--image", str(image.sgxs), "--sigstruct", str(image.sigstruct)]
        return [*_SUBJECT, *paths, "--backend", self.backend, *options]

    def floor(self, *words: str) -> Measured:
        """Return ``teemate-floor`` with these words, to be entered."""
        if not FLOOR.is_file():
            raise Unsupported(f"{FLOOR} is missing: install TeeMate anew")
        return Measured(f"teemate-floor {words[0]}", [str(FLOOR), *words])

    def attach_floor(self, stack: ExitStack, image: DemoImage) -> Measured:
        """Start the floor of attaching to an enclave of that size."""
        socket = self.new_folder("floor") / "socket"
        return stack.enter_context(self.floor("attach", str(socket), str(image.size)))

    def creation_floor(self, stack: ExitStack, image: DemoImage) -> Measured:
        """Start the floor of building an enclave of as many pages."""
        return stack.enter_context(self.floor("create", str(image.pages), str(image.measured)))

    def call_floor(self, stack: ExitStack, image: DemoImage) -> Measured:
        """Start the program that calls from C, and enters an enclave that only leaves."""
        bare = shipped("bare")
        paths = (bare.sgxs, bare.sigstruct, image.sgxs, image.sigstruct)
        return stack.enter_context(self.floor("call", *map(str, paths), self.backend))


_SUBJECT = (sys.executable, "-m", "teemate.bench.subject")
