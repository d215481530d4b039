"""What is told about enclaves that are on their way."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from images import Images
from structlog.testing import CapturingLogger

from teemate import errors
from teemate.broker.administration import Administration
from teemate.broker.policy import EnclavePolicy, Policy
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
