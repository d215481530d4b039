"""Call the enclave from Python, in a private enclave of this process."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import teemate
from teemate.image import LayoutOptions, SigParams, build_image, generate_key, sign_with_key

SOURCE = Path(__file__).resolve().parents[1] / "@CNAME@.c"


@pytest.fixture(scope="module")
def enclave(tmp_path_factory: pytest.TempPathFactory) -> Iterator[teemate.Enclave]:
    folder = tmp_path_factory.mktemp("@CNAME@")
    image = folder / "@CNAME@.sgxs"
    built = build_image([SOURCE], image, LayoutOptions(slots=2, heap=1 << 20))
    sigstruct = sign_with_key(SigParams().unsigned(built.mrenclave), generate_key())
    (folder / "@CNAME@.sig").write_bytes(sigstruct.to_bytes())
    with teemate.create_enclave(image, folder / "@CNAME@.sig") as enclave:
        yield enclave


def test_it_greets(enclave: teemate.Enclave) -> None:
    with enclave.slot() as slot:
        assert slot.call("hello", b"world") == b"hello, world"


def test_every_visit_is_counted_once(enclave: teemate.Enclave) -> None:
    with enclave.slot() as slot, enclave.slot() as another:
        first = int.from_bytes(slot.call("visit"), "little")
        second = int.from_bytes(another.call("visit"), "little")
    assert second == first + 1


def test_an_unknown_name_is_refused(enclave: teemate.Enclave) -> None:
    with enclave.slot() as slot, pytest.raises(teemate.NotFound):
        slot.call("no such call")
