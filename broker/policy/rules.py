"""What the administrator allows: the TOML file as frozen types, and the decisions over them.

Everything that no rule allows is denied.  A decision returns the name of the rule that is
missing, for the log; the client hears only that it may not.
"""

from __future__ import annotations

import enum
import ipaddress
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import final

from teemate.broker.connections.cgroups import CgroupTree, glob_to_regex
from teemate.broker.connections.identity import Identity
from teemate.broker.enclaves.storage import default_state_directory
from teemate.broker.policy.limits import Limits
from teemate.broker.policy.toml_reader import PolicyError, Table, read_toml

__all__ = [
    "Administrators",
    "BrokerSettings",
    "CreateRule",
    "DenialReason",
    "EnclavePolicy",
    "MetricsSettings",
    "Missing",
    "Policy",
    "PolicyError",
    "Rule",
    "load_policy",
]

DEFAULT_SOCKET = "/run/teemate/broker.sock"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Processes that all of the given conditions hold for; None is a condition that is not made."""

    uids: frozenset[int] | None = None
    any_uid: bool = False
    gids: frozenset[int] | None = None
    cgroups: tuple[str, ...] | None = None

    def matches(self, identity: Identity, tree: CgroupTree) -> bool:
        """Whether every condition holds; a group counts as primary or supplementary."""
        if not self.any_uid and self.uids is not None and identity.uid not in self.uids:
            return False
        if self.gids is not None and identity.gid not in self.gids and not self.gids & identity.groups:
            return False
        return self.cgroups is None or tree.matches(self.cgroups, identity.cgroup)


class DenialReason(enum.Enum):
    """What kind of rule was missing: few values, so that denials can be counted by them."""

    ATTACH_RULE = "attach_rule"
    """No ``[[enclave.attach]]`` is about this process."""
    OWNER = "owner"
    """Another uid than the owner's, and the enclave is not shared."""
    DEBUG = "debug"
    """The same, of a debug enclave, which is never shared."""
    ADMINISTRATORS = "administrators"
    """Only administrators may."""
    CREATE_RULE = "create_rule"
    """No ``[[create]]`` is about this process."""
    NAME = "name"
    """The enclave's name is another owner's in the policy."""
    IMAGE = "image"
    """The image satisfies none of the ``[[create]]`` that are about this process."""


@final
@dataclass(frozen=True, slots=True)
class Missing:
    """The rule that something would have needed; `rule` names it to the log."""

    reason: DenialReason
    rule: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class EnclavePolicy:
    """One ``[[enclave]]``, or what an enclave made by `create` gets."""

    name: str
    image: Path | None = None
    sigstruct: Path | None = None
    owner: int
    start: str = "boot"
    debug: bool = False
    require_sdk: bool = True
    backend: str = "auto"
    """``auto``: what ``[broker]`` says."""
    attach: tuple[Rule, ...] = ()
    slots_per_client: int = 16
    clients_per_uid: int = 1024
    wait: float = 30.0
    with_cgroup: bool = False
    share_sim: bool = False
    """Processes of other uids than the owner's may attach on the sim (``insecure_sim_sharing``)."""
    share_sgx: bool = False
    """The same on real hardware (``share_between_owners = "unfenced"``)."""
    revoke_grace: float = 5.0
    revoke_kill: bool = False
    rebuild_limit: int = 5
    """How many next generations may be built within `rebuild_window` seconds; 0: none."""
    rebuild_window: float = 3600.0
    rebuild_pause: float = 1.0
    """Seconds before the second one; before each further one twice as many as before the last."""
    storage: bool = False
    """Whether its code has files, in the broker's state directory."""
    storage_limit: int = 1 << 30
    """Bytes that they may take together."""
    io: str = "warden"
    """Who reads and writes them; ``client``: each client, with descriptors of those that it is lent."""

    def missing_for_attach(
        self, identity: Identity, tree: CgroupTree, *, backend: str, debug: bool
    ) -> Missing | None:
        """Return the rule that is missing for `identity` to attach, None when it may."""
        if identity.uid != self.owner:
            if debug:
                rule = f"enclave {self.name}: debug enclaves are never shared between owners"
                return Missing(DenialReason.DEBUG, rule)
            shared, setting = (
                (self.share_sim, "insecure_sim_sharing = true")
                if backend == "sim"
                else (self.share_sgx, 'share_between_owners = "unfenced"')
            )
            if not shared:
                rule = f"enclave {self.name}: uid {identity.uid} is not owner {self.owner}, and no {setting}"
                return Missing(DenialReason.OWNER, rule)
        if any(rule.matches(identity, tree) for rule in self.attach):
            return None
        return Missing(DenialReason.ATTACH_RULE, f"enclave {self.name}: no [[enclave.attach]] matches")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CreateRule:
    """One ``[[create]]``: who may make which enclaves."""

    who: Rule
    mrsigner: frozenset[bytes] | None = None
    mrenclave: frozenset[bytes] | None = None
    min_isvsvn: int = 0
    debug: bool = False
    require_sdk: bool = True
    pages: int = 1 << 20


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Administrators:
    """Who may use the operations that are not for every client."""

    uids: frozenset[int] = frozenset()
    gids: frozenset[int] = frozenset()

    def includes(self, identity: Identity) -> bool:
        """Whether `identity` is one."""
        return identity.uid in self.uids or identity.gid in self.gids or bool(self.gids & identity.groups)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerSettings:
    """``[broker]``."""

    socket: str = DEFAULT_SOCKET
    socket_mode: int = 0o666
    socket_gid: int | None = None
    backend: str = "auto"
    warden_deadline: float = 2.0
    warden_failures: int = 5
    cgroup_hierarchy: str = "auto"
    trust_pid: bool = False
    resume_grace: float = 30.0
    ahead: int = 8
    """Grants of each enclave that are ready before anybody asks for them; 0: none."""
    state_directory: Path | None = None
    """Where enclaves with `storage` have their files."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsSettings:
    """``[metrics]``: where they can be read; nowhere unless it says so."""

    socket: str | None = None
    socket_mode: int = 0o660
    socket_gid: int | None = None
    listen: tuple[str, int] | None = None
    """Address and port of the loopback interface."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The whole file."""

    source: str = "built-in defaults"
    broker: BrokerSettings = field(default_factory=BrokerSettings)
    limits: Limits = field(default_factory=Limits)
    enclaves: tuple[EnclavePolicy, ...] = ()
    create: tuple[CreateRule, ...] = ()
    administrators: Administrators = field(default_factory=Administrators)
    metrics: MetricsSettings = field(default_factory=MetricsSettings)

    def entry_for(self, old: EnclavePolicy, *, requested: bool) -> EnclavePolicy | None:
        """What the file says now of an enclave that is there already; None when it says nothing any more.

        What a client had made (`requested`) keeps what only the client said.
        """
        for policy in self.enclaves:
            if policy.name == old.name:
                return replace(policy, debug=old.debug, require_sdk=False) if requested else policy
        return None


def _broker(table: Table, base: Path) -> BrokerSettings:
    state_directory = table.text("state_directory", default_state_directory())
    gids = table.gids("socket_group")
    if gids is not None and len(gids) != 1:
        raise table.error("socket_group", "expected one group")
    settings = BrokerSettings(
        socket=table.text("socket", DEFAULT_SOCKET),
        socket_mode=table.octal("socket_mode", 0o666),
        socket_gid=next(iter(gids)) if gids else None,
        backend=table.choice("backend", "auto", ("auto", "sim", "sgx")),
        warden_deadline=table.number("warden_deadline", 2.0, 0.01, 600.0),
        warden_failures=table.whole("warden_failures", 5, 1, 1000),
        cgroup_hierarchy=table.text("cgroup_hierarchy", "auto"),
        trust_pid=table.flag("trust_pid", False),
        resume_grace=table.number("resume_grace", 30.0, 1.0, 3600.0),
        ahead=table.whole("ahead", 8, 0, 64),
        state_directory=(base / state_directory).absolute() if state_directory else None,
    )
    table.finish()
    return settings


def _metrics(table: Table) -> MetricsSettings:
    gids = table.gids("socket_group")
    if gids is not None and len(gids) != 1:
        raise table.error("socket_group", "expected one group")
    settings = MetricsSettings(
        socket=table.text("socket", "") or None,
        socket_mode=table.octal("socket_mode", 0o660),
        socket_gid=next(iter(gids)) if gids else None,
        listen=_loopback(table, "listen"),
    )
    table.finish()
    return settings


def _loopback(table: Table, key: str) -> tuple[str, int] | None:
    text = table.text(key, "")
    if not text:
        return None
    host, _, port = text.rpartition(":")
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        raise table.error(key, f'expected an address and a port, "127.0.0.1:9842", not {text!r}') from None
    if not address.is_loopback:
        raise table.error(key, f"{address} is no address of this host alone: a proxy may pass metrics on")
    if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise table.error(key, f"expected a port from 1 to 65535, not {port!r}")
    return str(address), int(port)


def _limits(table: Table) -> Limits:
    default = Limits()
    limits = Limits(
        connections=table.whole("connections", default.connections, 1),
        handshakes=table.whole("handshakes", default.handshakes, 1),
        handshake_seconds=table.number("handshake_seconds", default.handshake_seconds, 0.01, 3600.0),
        requests=table.whole("requests", default.requests, 1),
        queued_bytes=table.whole("queued_bytes", default.queued_bytes, 65536),
        grants=table.whole("grants", default.grants),
        slots=table.whole("slots", default.slots),
        pages=table.whole("pages", default.pages),
        descriptors_received=table.whole("descriptors_received", default.descriptors_received, 1),
        descriptors_sent=table.whole("descriptors_sent", default.descriptors_sent, 2),
        requests_per_second=table.number("requests_per_second", default.requests_per_second, 1.0),
        burst=table.whole("burst", default.burst, 1),
    )
    table.finish()
    return limits


def _rule(table: Table) -> Rule:
    conditions = [key for key in ("uid", "gid", "cgroup") if table.has(key)]
    if not conditions:
        raise table.error("uid", 'a rule names a uid, gid or cgroup; everybody is uid = "*"')
    any_uid = table.has("uid") and table.texts("uid") == ("*",) if _is_text(table, "uid") else False
    cgroups = table.texts("cgroup")
    for glob in cgroups or ():
        try:
            glob_to_regex(glob)
        except ValueError as error:
            raise table.error("cgroup", str(error)) from None
    return Rule(
        uids=None if any_uid else table.uids("uid"),
        any_uid=any_uid,
        gids=table.gids("gid"),
        cgroups=cgroups,
    )


def _is_text(table: Table, key: str) -> bool:
    try:
        return table.texts(key) is not None
    except PolicyError:
        return False


def _name(table: Table) -> str:
    name = table.text("name")
    if not _NAME.fullmatch(name):
        raise table.error("name", f"{name!r}: 1 to 64 letters, digits, dots, dashes and underscores")
    return name


def _enclave(table: Table, base: Path, default_owner: int) -> EnclavePolicy:
    start = table.choice("start", "boot", ("boot", "create"))
    image = table.text("image", "")
    if start == "boot" and not image:
        raise table.error("image", 'is missing; an enclave whose image comes later has start = "create"')
    sigstruct = table.text("sigstruct", "") or (str(Path(image).with_suffix(".sig")) if image else "")
    owners = table.uids("owner") or frozenset({default_owner})
    if len(owners) != 1:
        raise table.error("owner", "expected one user")
    unfenced = table.has("share_between_owners")
    if unfenced:
        table.choice("share_between_owners", "", ("unfenced",))
    rules = []
    for attach in table.tables("attach"):
        rules.append(_rule(attach))
        attach.finish()
    policy = EnclavePolicy(
        name=_name(table),
        image=base / image if image else None,
        sigstruct=base / sigstruct if sigstruct else None,
        owner=next(iter(owners)),
        start=start,
        debug=table.flag("debug", False),
        require_sdk=table.flag("require_sdk", True),
        backend=table.choice("backend", "auto", ("auto", "sim", "sgx")),
        attach=tuple(rules),
        slots_per_client=table.whole("slots_per_client", 16, 0, 4096),
        clients_per_uid=table.whole("clients_per_uid", 1024, 1),
        wait=table.number("wait", 30.0, 0.0, 86400.0),
        with_cgroup=table.choice("identity", "uid", ("uid", "uid+cgroup")) == "uid+cgroup",
        share_sim=table.flag("insecure_sim_sharing", False),
        share_sgx=unfenced,
        revoke_grace=table.number("revoke_grace", 5.0, 0.0, 3600.0),
        revoke_kill=table.flag("revoke_kill", False),
        rebuild_limit=table.whole("rebuild_limit", 5, 0, 1000),
        rebuild_window=table.number("rebuild_window", 3600.0, 1.0, 2592000.0),
        rebuild_pause=table.number("rebuild_pause", 1.0, 0.0, 3600.0),
        storage=table.flag("storage", False),
        storage_limit=table.whole("storage_limit", 1 << 30, 4096),
        io=table.choice("io", "warden", ("warden", "client")),
    )
    if policy.io == "client" and not policy.storage:
        raise table.error("io", "there are no files that clients could read and write: set storage = true")
    if policy.io == "client" and not policy.revoke_kill:
        raise table.error(
            "io",
            "a client that does not leave when it is revoked may be about to write, over what its successor"
            " has written by then: set revoke_kill = true",
        )
    if (policy.share_sim or policy.share_sgx) and policy.debug:
        raise table.error(
            "debug", "a debug enclave is never shared between owners: its memory is open to all of them"
        )
    table.finish()
    return policy


def _hashes(table: Table, key: str) -> frozenset[bytes] | None:
    texts = table.texts(key)
    if texts is None:
        return None
    for text in texts:
        if not re.fullmatch("[0-9a-fA-F]{64}", text):
            raise table.error(key, f"expected 64 hexadecimal digits, not {text!r}")
    return frozenset(bytes.fromhex(text) for text in texts)


def _create(table: Table) -> CreateRule:
    rule = CreateRule(
        who=_rule(table),
        mrsigner=_hashes(table, "mrsigner"),
        mrenclave=_hashes(table, "mrenclave"),
        min_isvsvn=table.whole("min_isvsvn", 0, 0, 65535),
        debug=table.flag("debug", False),
        require_sdk=table.flag("require_sdk", True),
        pages=table.whole("pages", 1 << 20, 1),
    )
    table.finish()
    return rule


def load_policy(path: Path, *, default_owner: int) -> Policy:
    """Read the policy file; relative paths in it count from the file's folder.

    Raises
    ------
    PolicyError
        With file, line and key.

    """
    top = read_toml(path)
    administrators = top.table("administrators")
    policy = Policy(
        source=str(path),
        broker=_broker(top.table("broker"), path.parent),
        limits=_limits(top.table("limits")),
        enclaves=tuple(_enclave(table, path.parent, default_owner) for table in top.tables("enclave")),
        create=tuple(_create(table) for table in top.tables("create")),
        metrics=_metrics(top.table("metrics")),
        administrators=Administrators(
            uids=administrators.uids("uids") or frozenset(), gids=administrators.gids("gids") or frozenset()
        ),
    )
    administrators.finish()
    top.finish()
    seen: set[str] = set()
    for index, enclave in enumerate(policy.enclaves):
        if enclave.name in seen:
            raise top.tables("enclave")[index].error("name", f"{enclave.name!r} is defined twice")
        seen.add(enclave.name)
        if enclave.storage and policy.broker.state_directory is None:
            raise top.tables("enclave")[index].error(
                "storage",
                "there is nowhere to keep its files: set [broker] state_directory, or StateDirectory= in the"
                " service's unit",
            )
    return policy
