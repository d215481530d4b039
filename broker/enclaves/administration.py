"""Making enclaves and taking them down, and looking at who is connected."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, final

import trio

from teemate import errors
from teemate._backend import choose_backend
from teemate.broker.connections.requests import Answer, Clients, Create, Result
from teemate.broker.enclaves.building import Builds
from teemate.broker.enclaves.enclave import (
    PAGE,
    SIGSTRUCT_SIZE,
    Built,
    Enclave,
    EnclaveState,
    ImageFacts,
    build_enclave,
    measure_image,
)
from teemate.broker.enclaves.epc import warn_when_full
from teemate.broker.enclaves.image_copy import ImageCopies
from teemate.broker.enclaves.source import ImageSource
from teemate.broker.enclaves.storage import Storage
from teemate.broker.policy.limits import Charge, Resource
from teemate.broker.policy.rules import CreateRule, DenialReason, EnclavePolicy, Missing, Rule
from teemate.broker.slots.claims import claim_of
from teemate.broker.wardens.programs import warden_program
from teemate.broker.wardens.protocol import SEGMENTS
from teemate.broker.wardens.warden import EnclaveBrokenError, EnclaveGoneError, Warden, WardenError

if TYPE_CHECKING:
    from teemate.broker.connections.clients import Client
    from teemate.broker.service import Service

__all__ = ["Administration"]

_CLIENTS_BYTES = 48 * 1024
"""About so much of a reply is filled with clients; who wants more asks for those after the last."""


@final
class Administration:
    """The operations that change what enclaves there are."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._copies = ImageCopies()
        self.building = Builds()
        self.not_built: set[str] = set()
        """Enclaves of the policy that failed to start with the broker."""

    # -- making ----------------------------------------------------------------

    def expect_boot_enclaves(self) -> list[EnclavePolicy]:
        """Return what the policy wants from the start and nobody builds yet: attaches wait from here on."""
        service = self._service
        wanted = [
            policy
            for policy in service.policy.enclaves
            if policy.start == "boot"
            and policy.name not in service.enclaves
            and policy.name not in self.building
            and service.lifecycle.stored(policy.name) is None
            and not service.lifecycle.emptied
        ]
        for policy in wanted:
            self.building.begin(policy, self._backend(policy), requested=False)
        return wanted

    async def start_boot_enclaves(self, expected: Sequence[EnclavePolicy] = ()) -> None:
        """Build what was `expected`, and what else the policy wants from the start, one after the other.

        One that cannot be built is logged with the reason; the others and the broker go on.
        """
        service = self._service
        self.not_built.clear()
        for policy in [*expected, *self.expect_boot_enclaves()]:
            assert policy.image is not None  # the policy's reader wants one for "boot"
            assert policy.sigstruct is not None
            try:
                self._require_filled()
                sigstruct = _read_sigstruct(policy.sigstruct)
                fd = os.open(policy.image, os.O_RDONLY | os.O_CLOEXEC)
                source = ImageSource(fd, sigstruct, str(policy.image))
                await self._make(policy, self._backend(policy), source, None)
            except (OSError, errors.Error, WardenError) as error:
                self.not_built.add(policy.name)
                service.log.warning(
                    "enclave not built", enclave=policy.name, image=str(policy.image), reason=str(error)
                )
            finally:
                self.building.end(policy.name)

    def _backend(self, policy: EnclavePolicy, wanted: str = "auto") -> str:
        """Which backend the enclave gets: what a request wants, else its entry, else the broker's."""
        return next((name for name in (wanted, policy.backend) if name != "auto"), self._service.backend)

    def _require_filled(self) -> None:
        """Raise Draining when the host is being emptied, or is empty."""
        if self._service.lifecycle.emptied:
            raise errors.Draining(f"{self._service.lifecycle.emptied}: `teemate undrain --all` ends that")

    def create(self, client: Client, args: Create, image_fd: int) -> Result:
        """Build an enclave from the image that came; `image_fd` is ours."""
        maker = (client.number, client.asking)
        made = self._service.enclaves.get(args.name)
        if made is not None and made.maker == maker:  # and the last broker died before it could say so
            client.dispose((image_fd,))
            return Answer(made.info())
        try:
            policy, rules = self._check_create(client, args)
        except BaseException:
            client.dispose((image_fd,))
            raise
        backend = self._backend(policy, args.backend)
        self.building.begin(replace(policy, debug=args.debug), backend, requested=True)
        return self._create(client, args, image_fd, policy, rules, maker)

    def _check_create(self, client: Client, args: Create) -> tuple[EnclavePolicy, list[CreateRule]]:
        """Who asks, and for what name: what can be refused before the image is looked at."""
        service, identity = self._service, client.identity
        rules = self.create_rules(client, "create")
        owner = identity.uid if args.owner is None else args.owner
        if owner != identity.uid:
            service.require_administrator(client, "create for another owner")
        policy = self._policy_for(args.name, owner)
        if policy.owner != identity.uid and not service.policy.administrators.includes(identity):
            rule = f"[[enclave]] {args.name} belongs to uid {policy.owner}, not to {identity.uid}"
            raise service.denied(client, "create", Missing(DenialReason.NAME, rule))
        self._require_filled()
        if args.name in self.building:
            raise errors.Busy(f"enclave {args.name!r} is being built")
        if args.name in service.enclaves:
            raise errors.Busy(f"there is an enclave {args.name!r} already: destroy it first")
        if service.lifecycle.stored(args.name) is not None:
            raise errors.Busy(
                f"enclave {args.name!r} was taken down to empty the host: undrain brings it back, destroy"
                " gives it up"
            )
        return policy, rules

    async def _create(
        self,
        client: Client,
        args: Create,
        image_fd: int,
        policy: EnclavePolicy,
        rules: list[CreateRule],
        maker: tuple[int, int],
    ) -> Answer:
        service = self._service
        enclave: Enclave | None = None
        source: ImageSource | None = None
        try:
            copy = await self._copies.copy(client, image_fd, max(rule.pages for rule in rules))
            source = ImageSource(copy, args.sigstruct, f"sent by uid {client.identity.uid}")
            wanted = next(
                (name for name in (args.backend, policy.backend) if name != "auto"), service.choice.wanted
            )
            backend = (await trio.to_thread.run_sync(choose_backend, wanted)).backend
            facts = await trio.to_thread.run_sync(measure_image, source.fd, source.sigstruct)
            self.require_rule(client, "create", rules, facts, debug=args.debug)
            charge = client.account.charge(Resource.PAGES, facts.pages)
            policy = replace(policy, debug=args.debug, require_sdk=False)
            try:
                enclave = await self._make(
                    policy, backend, source, charge, maker=maker, payer=client.account.uid
                )
            except WardenError as error:
                raise errors.ImageError(f"the enclave was built but does not start: {error}") from error
        finally:
            if enclave is None and source is not None:
                source.close()
            self.building.end(args.name)
        service.audit.changed(client.identity, client=client.number, operation="create", enclave=enclave.name)
        return Answer(enclave.info())

    def create_rules(self, client: Client, operation: str) -> list[CreateRule]:
        """Return the policy's [[create]] for this process; raises Denied when there is none."""
        service, identity = self._service, client.identity
        rules = [rule for rule in service.policy.create if rule.who.matches(identity, service.cgroup_tree)]
        if not rules:
            missing = Missing(DenialReason.CREATE_RULE, "[[create]] for this process")
            raise service.denied(client, operation, missing)
        return rules

    def require_rule(
        self, client: Client, operation: str, rules: list[CreateRule], facts: ImageFacts, *, debug: bool
    ) -> None:
        """Raise Denied unless the image satisfies all of one of the rules."""
        reasons = [reason for rule in rules if (reason := _refusal(rule, facts, debug))]
        if len(reasons) == len(rules):
            missing = Missing(DenialReason.IMAGE, "; ".join(reasons))
            raise self._service.denied(client, operation, missing)

    def _policy_for(self, name: str, owner: int) -> EnclavePolicy:
        """What the policy has for an enclave that is made by request: its own entry, or its owner alone."""
        for policy in self._service.policy.enclaves:
            if policy.name == name:
                return policy
        return EnclavePolicy(name=name, owner=owner, start="create", attach=(Rule(uids=frozenset({owner})),))

    async def _make(
        self,
        policy: EnclavePolicy,
        backend: str,
        source: ImageSource,
        charge: Charge | None,
        *,
        maker: tuple[int, int] = (0, 0),
        payer: int | None = None,
    ) -> Enclave:
        """Build an enclave and open it to clients; takes `source` and `charge` over, also when it fails."""
        try:
            enclave = await self.build(policy, backend, source, charge)
        except BaseException:
            source.close()
            raise
        enclave.source = source
        enclave.maker, enclave.payer, enclave.requested = maker, payer, payer is not None
        try:
            self._require_filled()  # an administrator may have begun to empty it meanwhile
        except errors.Draining:
            await self.take_down(enclave)
            raise
        self.open(enclave)
        return enclave

    def open(self, enclave: Enclave, instead_of: Enclave | None = None) -> None:
        """Let clients attach, unless it is drained: from now on it is the enclave of its name.

        Nobody else has that name (`building`, and what was stored, keep others away from it), but
        `instead_of`, which the caller retires.
        """
        assert self._service.enclaves.get(enclave.name) is instead_of
        # It may have changed since the building began.
        entry = self._service.policy.entry_for(enclave.policy, requested=enclave.requested)
        enclave.policy = entry or enclave.policy
        enclave.state = EnclaveState.DRAINING if enclave.drained else EnclaveState.READY
        enclave.reason = enclave.drained
        self._service.enclaves[enclave.name] = enclave

    def close_name(self, enclave: Enclave) -> None:
        """Nobody finds it any more; what has its name by now keeps that."""
        if self._service.enclaves.get(enclave.name) is enclave:
            del self._service.enclaves[enclave.name]

    async def build(
        self,
        policy: EnclavePolicy,
        backend: str,
        source: ImageSource,
        charge: Charge | None,
        *,
        generation: int = 1,
        aside: bool = False,
    ) -> Enclave:
        """Build, start the warden, arm all slots; takes `charge` over, also when it fails.

        `aside`: another enclave has the name until :meth:`Generations.succeed`, after a restart too.
        """
        service = self._service
        image_fd, sigstruct = source.fd, source.sigstruct
        base: int | None = None
        enclave: Enclave | None = None
        with contextlib.ExitStack() as undo:
            if charge is not None:
                undo.callback(charge.release)
            head = os.pread(image_fd, 64, 0) if _is_regular(image_fd) else b""
            size = int.from_bytes(head[12:20], "little") if head[:8] == b"ECREATE\0" else 0
            if size and not size & (size - 1) and size >= 2 * PAGE:
                base = service.addresses.reserve(size)
                undo.callback(service.addresses.release, base)
            built = await trio.to_thread.run_sync(
                lambda: build_enclave(
                    image_fd, sigstruct, backend=backend, base=base or 0, debug=policy.debug
                )
            )
            enclave = Enclave(policy, backend, built, charge, generation=generation)
            enclave.retired = aside
            undo.pop_all()
        if backend == "sgx":
            others = sum(other.built.pages for other in service.enclaves.values() if other.backend == "sgx")
            warn_when_full(service.log, enclave=policy.name, pages=built.pages, others=others)
        try:
            _check_sdk(policy, built)
            if built.sdk:
                enclave.warden = self.new_warden(enclave)
                await enclave.warden.start()
            for index in enclave.slots.slots:
                await service.reclaimer.arm(enclave, index)
            await service.restoration.tidied.wait()  # the store may have no room beside what is left over
            await service.state.keep_enclave(enclave, source)
        except BaseException:
            await self.take_down(enclave)
            raise
        service.log.info(
            "enclave built", enclave=enclave.name, generation=generation,
            mrenclave=built.mrenclave.hex(), backend=backend, base=hex(built.base), size=built.size,
            pages=built.pages, slots=len(enclave.slots.slots), sdk=built.sdk, debug=built.debug,
        )  # fmt: skip
        return enclave

    def new_warden(self, enclave: Enclave, *, with_storage: bool = True) -> Warden:
        """Return what starts the enclave's wardens; `with_storage`: if its policy says so."""
        settings, built, policy = self._service.policy.broker, enclave.built, enclave.policy
        storage = None
        if with_storage and policy.storage and settings.state_directory is not None:
            storage = Storage.of(
                settings.state_directory, policy.name, policy.storage_limit, lends=policy.io == "client"
            )
        warden = Warden(
            warden_program(), enclave.geometry, enclave.key, (built.fd, built.arena),
            self._service.log.bind(enclave=enclave.name),
            deadline=settings.warden_deadline, failures=settings.warden_failures, storage=storage,
        )  # fmt: skip
        warden.on_contended = lambda count: self._service.intruders.contended(enclave, count)
        if storage is not None:
            warden.on_started = lambda: self._service.reclaimer.spawn(self._keep_warden, enclave)
        return warden

    async def _keep_warden(self, enclave: Enclave) -> None:
        """Start the next warden when this one ends, since calls in the enclave wait for their files."""
        service = self._service
        assert enclave.warden is not None
        try:
            await enclave.warden.keep()
        except EnclaveGoneError as error:
            service.reclaimer.lose(enclave, str(error))
        except EnclaveBrokenError as error:
            service.reclaimer.give_up(enclave, str(error))
        except WardenError as error:
            service.log.warning("warden not started", enclave=enclave.name, reason=str(error))

    # -- taking down -----------------------------------------------------------

    async def take_down(self, enclave: Enclave) -> None:
        """End the warden and close what the broker has of the enclave."""
        enclave.state = EnclaveState.LOST
        if enclave.warden is not None:
            with trio.CancelScope(shield=True):
                await enclave.warden.close()
        with trio.CancelScope(shield=True):
            confirmed = await self._service.state.drop_enclave(enclave)
        if not confirmed:
            self._service.log.warning(
                "enclave perhaps kept", enclave=enclave.name, generation=enclave.generation,
                reason="the service manager did not confirm in time that it closed the enclave's descriptors",
            )  # fmt: skip
        enclave.close()
        with contextlib.suppress(KeyError):
            self._service.addresses.release(enclave.built.base)

    async def close(self) -> None:
        """The broker ends: end every warden; clients keep what they mapped."""
        service = self._service
        service.state.close()  # what was kept stays so, and what is done now is not written
        for enclave in [*service.enclaves.values(), *service.generations.retired]:
            await self.take_down(enclave)
        service.enclaves.clear()
        service.lifecycle.close()

    # -- looking -----------------------------------------------------------------

    def list_clients(self, args: Clients) -> Answer:
        """List clients by number, as many as fit; `next` is there when more follow."""
        clients: list[dict[str, object]] = []
        room = _CLIENTS_BYTES
        answer: dict[str, object] = {"clients": clients}
        for number in sorted(number for number in self._service.clients if number > args.after):
            client = self._service.clients[number]
            room -= (
                (300 if args.activity else 200)
                + len(client.identity.cgroup_text.encode())
                + sum(60 + 5 * len(g.charges) for g in client.grants.values())
            )
            if room < 0 and clients:
                answer["next"] = clients[-1]["client"]
                break
            clients.append(_client_info(client))
            if args.activity:
                clients[-1]["activity"] = _activity(client)
        return Answer(answer)


def _activity(client: Client) -> dict[str, object]:
    claim = claim_of(client)
    activity: dict[str, object] = {"held": client.held_seconds()}
    return activity if claim is None else activity | claim._asdict()


def _client_info(client: Client) -> dict[str, object]:
    identity = client.identity
    return {
        "client": client.number,
        "name": client.name,
        "pid": identity.pid,
        "uid": identity.uid,
        "gid": identity.gid,
        "cgroup": identity.cgroup_text,
        "connected": trio.current_time() - client.connected_at,
        "requests": client.requests,
        "grants": [
            {"grant": grant.number, "enclave": grant.enclave.name, "slots": grant.slots}
            for grant in client.grants.values()
        ],
    }


def _check_sdk(policy: EnclavePolicy, built: Built) -> None:
    if built.sdk and len(built.segments) > SEGMENTS:
        raise errors.ImageError(
            f"the image has {len(built.segments)} ranges of pages; a warden maps {SEGMENTS} at most:"
            " build it with fewer slots"
        )
    if policy.require_sdk and not built.sdk:
        raise errors.ImageError(
            "the image was not built with the SDK, so nothing would keep its clients apart:"
            " the policy allows that with require_sdk = false"
        )
    if policy.storage and not (built.sdk and built.io_slots):
        raise errors.ImageError(
            "the policy gives it files (storage = true), and its image has no I/O slot for them:"
            " build it with --io-slots 1"
        )


def _read_sigstruct(path: Path) -> bytes:
    sigstruct = path.read_bytes()
    if len(sigstruct) != SIGSTRUCT_SIZE:
        raise errors.ImageError(f"{path}: {len(sigstruct)} bytes, a SIGSTRUCT has {SIGSTRUCT_SIZE}")
    return sigstruct


def _is_regular(fd: int) -> bool:
    return stat.S_ISREG(os.fstat(fd).st_mode)


def _refusal(rule: CreateRule, facts: ImageFacts, debug: bool) -> str | None:
    """Why `rule` does not allow this image, for the log."""
    if rule.mrsigner is not None and facts.mrsigner not in rule.mrsigner:
        return f"[[create]] mrsigner: {facts.mrsigner.hex()} is not listed"
    if rule.mrenclave is not None and facts.mrenclave not in rule.mrenclave:
        return f"[[create]] mrenclave: {facts.mrenclave.hex()} is not listed"
    if facts.isvsvn < rule.min_isvsvn:
        return f"[[create]] min_isvsvn: {facts.isvsvn} is below {rule.min_isvsvn}"
    if debug and not rule.debug:
        return "[[create]] debug = true"
    if rule.require_sdk and not facts.sdk:
        return "[[create]] require_sdk = false"
    if facts.pages > rule.pages:
        return f"[[create]] pages: {facts.pages} are more than {rule.pages}"
    return None
