"""What the broker says of the host's enclave memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from structlog.testing import CapturingLogger

from teemate.broker.enclaves import epc


def nodes(folder: Path, *sizes: str) -> Path:
    for number, size in enumerate(sizes):
        place = folder / f"node{number}" / "x86"
        place.mkdir(parents=True)
        (place / "sgx_total_bytes").write_text(size)
    return folder


def test_the_epc_of_all_nodes_counts(tmp_path: Path) -> None:
    assert epc.epc_bytes(nodes(tmp_path, "67108864\n", "33554432\n")) == 96 << 20


@pytest.mark.parametrize("sizes", [(), ("0\n",), ("67108864\n", "what?\n")])
def test_where_the_kernel_does_not_tell_nobody_guesses(tmp_path: Path, sizes: tuple[str, ...]) -> None:
    assert epc.epc_bytes(nodes(tmp_path, *sizes)) is None


@pytest.mark.parametrize(("pages", "others", "warned"), [(8, 8, False), (8, 9, True), (17, 0, True)])
def test_enclaves_that_do_not_fit_are_said_to_be_slow(
    monkeypatch: pytest.MonkeyPatch, pages: int, others: int, warned: bool
) -> None:
    monkeypatch.setattr(epc, "epc_bytes", lambda: 16 * 4096)
    log = CapturingLogger()
    epc.warn_when_full(log, enclave="vault", pages=pages, others=others)
    assert [call.method_name for call in log.calls] == ["warning"] * warned
    if warned:
        assert log.calls[0].kwargs["epc"] == "64 KiB"


def test_where_the_size_is_not_known_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epc, "epc_bytes", lambda: None)
    log = CapturingLogger()
    epc.warn_when_full(log, enclave="vault", pages=1 << 40, others=0)
    assert log.calls == []
