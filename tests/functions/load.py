"""Requests per second and p99 of the gateway, beside a plain hypercorn that echoes: needs wrk.

    .venv/bin/python tests/functions/load.py --seconds 10 --connections 16 --workers 2

A broker, the functions enclave and a function that gives back what it gets are behind the gateway.  Both
sides have as many workers, and are asked by turns; what is read is the ratio.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from processes import wait_until  # noqa: E402
from running_functions import run_functions  # noqa: E402
from running_gateway import run_gateway  # noqa: E402

import teemate  # noqa: E402
from teemate import wasm  # noqa: E402

ECHO = """
#include <unistd.h>
int main(void)
{
    static char piece[65536];
    ssize_t got;
    while ((got = read(0, piece, sizeof(piece))) > 0)
        if (write(1, piece, (size_t)got) != got)
            return 1;
    return got < 0;
}
"""
POST = 'wrk.method = "POST"\nwrk.body = string.rep("x", {size})\n'
UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}


@dataclass(frozen=True)
class Load:
    """What wrk saw."""

    side: str
    requests_per_second: float
    p50: float
    p99: float
    """Seconds."""
    errors: int


def ask(side: str, url: str, script: Path, seconds: int, connections: int) -> Load:
    """Load one side."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", str(script), url]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def percentile(which: str) -> float:
        value, unit = re.search(rf"^\s+{which}%\s+([\d.]+)(us|ms|s|m)$", told, re.MULTILINE).groups()
        return float(value) * UNITS[unit]

    bad = [int(count) for count in re.findall(r"Non-2xx or 3xx responses: (\d+)", told)]
    bad += [int(c) for counts in re.findall(r"Socket errors: (.*)", told) for c in re.findall(r"\d+", counts)]
    rate = float(re.search(r"^Requests/sec:\s+([\d.]+)$", told, re.MULTILINE).group(1))
    return Load(side, rate, percentile("50"), percentile("99"), sum(bad))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@contextmanager
def plain(port: int, workers: int) -> Iterator[None]:
    """Run hypercorn on trio with the echo."""
    command = [sys.executable, "-m", "hypercorn", "-k", "trio", "-w", str(workers), "-b", f"127.0.0.1:{port}"]
    process = subprocess.Popen([*command, "plain_echo:app"], cwd=HERE, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: listens(port), "hypercorn listens")
        yield
    finally:
        process.terminate()
        process.wait()


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=int, default=10, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--size", type=int, default=100, help="of a request's body, in bytes")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("needs wrk (Debian: apt install wrk)")
    loads: list[Load] = []
    with ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory()))
        (folder / "echo.c").write_text(ECHO)
        script = folder / "post.lua"
        script.write_text(POST.format(size=given.size))
        built = wasm.build_module([folder / "echo.c"], folder / "echo.wasm")
        slots = -(-given.connections // given.workers)
        broker = running.enter_context(run_functions(f"slots_per_client = {slots}"))
        with teemate.connect(broker.socket) as connection:
            connection.functions.deploy("echo", built.path.read_bytes())
        ports = {"gateway": free_port(), "plain": free_port()}
        options = ("--workers", str(given.workers), "--slots", str(slots), "--queue", str(given.connections))
        gateway = running.enter_context(
            run_gateway(*options, "--listen", f"127.0.0.1:{ports['gateway']}", broker=broker.socket)
        )
        running.enter_context(plain(ports["plain"], given.workers))
        for _ in range(given.rounds):
            for side, port in ports.items():
                url = f"http://127.0.0.1:{port}/fn/echo"
                loads.append(ask(side, url, script, given.seconds, given.connections))
        answered = Counter(str(record.get("status")) for record in gateway.log("request"))
        reasons = Counter(str(record["reason"]) for record in gateway.log("invocation failed"))
    medians = {
        side: {
            "requests_per_second": statistics.median(load.requests_per_second for load in of),
            "p50": statistics.median(load.p50 for load in of),
            "p99": statistics.median(load.p99 for load in of),
            "errors": sum(load.errors for load in of),
        }
        for side in ports
        if (of := [load for load in loads if load.side == side])
    }
    if given.json:
        rounds = [asdict(load) for load in loads]
        print(json.dumps({"medians": medians, "answered": answered, "rounds": rounds}, indent=2))
        return
    print(f"{'':10}{'requests/s':>12}{'p50':>12}{'p99':>12}{'errors':>8}")
    for side, row in medians.items():
        rate, p50, p99 = row["requests_per_second"], row["p50"] * 1e3, row["p99"] * 1e3
        print(f"{side:10}{rate:12.0f}{p50:9.2f} ms{p99:9.2f} ms{row['errors']:8.0f}")
    for status, count in sorted(answered.items()):
        print(f"the gateway answered {status}: {count}")
    for reason, count in reasons.most_common(5):
        print(f"{count} times: {reason}")


if __name__ == "__main__":
    main()
