"""What is told about enclaves that are on their way."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from images import Images
from structlog.testing import CapturingLogger

from teemate import errors
from teemate.broker.enclaves.administration import Administration
from teemate.broker.enclaves.enclave import require_file
from teemate.broker.policy.rules import EnclavePolicy, Policy
from teemate.broker.service import Service


@pytest.fixture
def service(images: Images) -> Service:
    """A service that is not running, for a policy with the vault."""
    image = Path(images.vault.sgxs)
    vault = EnclavePolicy(name="vault", image=image, sigstruct=Path(images.vault.sigstruct), owner=0)
    later = EnclavePolicy(name="later", owner=0, start="create")
    return Service(Policy(enclaves=(vault, later)), CapturingLogger())


async def test_an_enclave_that_starts_with_the_broker_is_busy_until_it_is_there(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Exception] = []

    async def build(_self: Administration, policy: EnclavePolicy, *_: object) -> None:
        client: Any = SimpleNamespace(identity=SimpleNamespace(uid=0))
        args: Any = SimpleNamespace(name=policy.name, owner=None)
        rule: Any = SimpleNamespace(who=SimpleNamespace(matches=lambda *_: True))
        monkeypatch.setattr(service, "policy", Policy(enclaves=service.policy.enclaves, create=(rule,)))
        for ask in (
            lambda: service.enclave(policy.name),
            lambda: service.administration._check_create(client, args),
        ):
            with pytest.raises(errors.Busy, match="being built") as busy:
                ask()
            told.append(busy.value)

    monkeypatch.setattr(Administration, "_make", build)
    await service.administration.start_boot_enclaves()
    assert len(told) == 2
    assert not service.administration.building
    with pytest.raises(errors.NotFound):
        service.enclave("later")


def test_an_image_whose_file_system_fails_is_a_bad_image_and_no_bug_of_the_broker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fstat(_fd: int) -> object:
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fstat", fstat)
        with pytest.raises(errors.ImageError, match="not connected"):
            require_file(0)
