"""``floor``: the least that each thing can cost on this host, which everything else is compared with."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import ExitStack

from teemate.bench._measured import PAUSE_US, by_turns
from teemate.bench._rows import Result, Row, Sample, measured, plain
from teemate.bench._setting import HEAP, Setting

__all__ = ["bench_floor", "hash_rate"]

_BLOCKS = 1000
"""That ``teemate-floor hash`` hashes at a time, of 4 KiB."""


def bench_floor(setting: Setting) -> Result:
    """Measure attaching, entering, creating and hashing, each done with nothing around it."""
    image = setting.image(heap=HEAP)
    with ExitStack() as stack:
        attach = setting.attach_floor(stack, image)
        creation = setting.creation_floor(stack, image)
        call = setting.call_floor(stack, image)
        rounds = setting.times(60, 10)
        found = by_turns(
            {
                "floor_warm": lambda: attach.ask("warm", 10, PAUSE_US),
                "floor_cold": lambda: attach.ask("cold", 10, PAUSE_US),
                "floor_warm_back_to_back": lambda: attach.ask("warm", 10),
                "floor_cold_back_to_back": lambda: attach.ask("cold", 10),
                "floor_transition": lambda: call.ask("bare", 100),
                "floor_getppid": lambda: call.ask("getppid", 100),
                "floor_creation": lambda: creation.ask("create"),
            },
            rounds,
            setting.listener,
            "what is the least",
        )
    units = {"floor_creation": "ms", "floor_getppid": "ns"}
    rows = [measured(name, sample, unit=units.get(name, "us")) for name, sample in found.items()]
    return Result((*rows, *hash_rate(setting)))


def hash_rate(setting: Setting) -> tuple[Row, ...]:
    """Compare the library's SHA-256 with that of ``openssl speed``; nothing where there is no openssl."""
    openssl = shutil.which("openssl")
    if openssl is None:
        setting.listener.phase("hash_rate is left out: there is no openssl here to compare with")
        return ()
    command = [openssl, "speed", "-seconds", "1", "-bytes", "4096", "-evp", "sha256"]

    def theirs() -> list[float]:
        done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - ours
        # The last line ends with thousands of bytes in a second, "1234567.89k".
        return [float(done.stdout.split()[-1].rstrip("k")) / 1e3]

    with setting.floor("hash") as hashing:
        setting.listener.phase("hashing, beside openssl", setting.times(5, 2))
        ours: list[float] = []
        other: list[float] = []
        hashing.ask("blocks", 20)
        for turn in range(setting.times(5, 2)):
            ours += [_BLOCKS * 4096 / ns * 1e3 for ns in hashing.ask("blocks", 100)]
            other += theirs()
            setting.listener.progress(turn + 1)
    rate, openssl_rate = Sample(ours), Sample(other)
    return (
        plain("hash_rate_openssl", openssl_rate.p50, "MB/s", n=openssl_rate.n, spread=openssl_rate.spread),
        plain(
            "hash_rate", rate.p50, "MB/s", n=rate.n, p99=rate.rank(1), relative_to="hash_rate_openssl",
            ratio=rate.p50 / openssl_rate.p50, spread=rate.spread,
        ),
    )  # fmt: skip
