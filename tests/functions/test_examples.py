"""The example functions do what their references in Python do, and no payload makes them misbehave."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
import struct
from collections import Counter
from collections.abc import Iterator

import pytest
import references
from example_programs import EXAMPLES, NAMES, Failed, Programs, Run
from running_functions import Deployed, assemblyscript_module, run_functions

import teemate


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    with run_functions() as running, teemate.connect(running.socket) as broker:
        yield Deployed(broker.functions, tmp_path_factory.mktemp("modules"))


@pytest.fixture(params=["sanitized", "enclave"])
def run(request: pytest.FixtureRequest) -> Run:
    """The examples as programs of this host, and as functions in an enclave."""
    found: Run = request.getfixturevalue("programs" if request.param == "sanitized" else "deployed")
    return found


def lengths(block: int) -> list[int]:
    return [0, 1, block - 9, block - 8, block - 1, block, block + 1, 3 * block, 100_000]


def test_sha256_is_that_of_hashlib(run: Run) -> None:
    for length in lengths(64):
        data = random.Random(length).randbytes(length)
        assert run("sha256", data).decode() == hashlib.sha256(data).hexdigest() + "\n"


def test_gzip_is_read_by_zlib_and_smaller(run: Run) -> None:
    chance = random.Random(7)
    words = [chance.randbytes(chance.randrange(1, 9)) for _ in range(300)]
    text = b"".join(chance.choice(words) for _ in range(60_000))
    payloads = [
        b"",
        b"a",
        b"ab",
        b"aaa",
        b"a" * 100_000,
        bytes(range(256)) * 3,
        text,
        chance.randbytes(40_000),
    ]
    # Frequencies like Fibonacci's ask for a tree that is deeper than a code may be long.
    for rare in (7, 8, 10):
        frequencies = [1, 1]
        while len(frequencies) < rare:
            frequencies.append(sum(frequencies[-2:]))
        letters = [letter for letter, times in enumerate(frequencies) for _ in range(times)]
        letters += [chance.randrange(rare, 256) for _ in range(30_000 - len(letters))]
        chance.shuffle(letters)
        payloads.append(bytes(letters))
    for payload in payloads:
        assert gzip.decompress(run("gzip", payload)) == payload
    assert len(run("gzip", text)) < 1.1 * len(gzip.compress(text))
    assert len(run("gzip", b"a" * 100_000)) < 800


def test_product_has_the_same_bits(run: Run) -> None:
    chance = random.Random(8)
    for m, k, n in ((1, 1, 1), (3, 5, 2), (17, 33, 9), (2, 0, 3), (0, 4, 4), (40, 40, 40)):
        left = [chance.uniform(-1e9, 1e9) for _ in range(m * k)]
        right = [chance.uniform(-1e-3, 1e3) for _ in range(k * n)]
        result = run("matmul", references.matrix_payload(m, k, n, left, right))
        assert result == struct.pack(f"<{m * n}d", *references.product(m, k, n, left, right))


def test_json_is_that_of_python(run: Run) -> None:
    for text in references.json_texts(9, 60):
        assert run("json", text) == references.canonical(text)
    assert run("json", b'{"b": 1, "a": 2, "b": 3}') == b'{"a":2,"b":3}'  # the last of two


def test_json_looks_up_a_path(run: Run) -> None:
    document = json.dumps(
        {"users": [{"name": "Ada", "born": 1815}, {"name": "Alan", "born": 1912}], "n": 2}
    ).encode()
    assert run("json", document, [".users[].name"]) == b'["Ada","Alan"]'
    assert run("json", document, [".users[1]"]) == b'{"born":1912,"name":"Alan"}'
    assert run("json", document, [".n"]) == b"2"
    for path, status in ((".nobody", 1), (".users[2]", 1), (".n[0]", 1), ("users", 2), (".users[x]", 2)):
        with pytest.raises(Failed) as failed:
            run("json", document, [path])
        assert failed.value.status == status


@pytest.mark.parametrize(
    "text",
    [
        b"", b" ", b"{", b"[1,]", b'{"a"}', b"01", b"1.", b".5", b"+1", b"1e", b"nul", b'"', b'"\\x"',
        b'"\\ud800"', b'"\\ud800\\u0041"', b'"\\udc00"', b'"\n"', b"[1] 2", b"'a'", b"NaN", b"\xff",
        b'"\xc0\x80"', b'"\xed\xa0\x80"', b'"\xf4\x90\x80\x80"', b'"\xe2\x82"', b"[" * 1000 + b"]" * 1000,
    ],
)  # fmt: skip
def test_json_refuses_what_is_none(run: Run, text: bytes) -> None:
    with pytest.raises(Failed) as failed:
        run("json", text)
    assert failed.value.status == 1
    assert "at byte" in failed.value.log


def test_thumbnail_is_the_mean_of_what_it_covers(run: Run) -> None:
    chance = random.Random(10)
    for picture in references.pictures(10):
        for side in (1, 16, 64):
            result = run("thumbnail", references.qoi_write(picture, chance), [str(side)])
            assert references.qoi_read(result) == references.shrink(picture, side)
    assert (
        references.qoi_read(run("thumbnail", result))[:2] == references.shrink(picture, 64)[:2]
    )  # its own too


def test_bad_payloads_are_told_from_failures(run: Run) -> None:
    for name, payload, args, status in (
        ("matmul", b"", [], 1),
        ("matmul", struct.pack("<3I", 9000, 1, 1), [], 1),
        ("matmul", struct.pack("<3I", 8192, 8192, 8192), [], 1),
        ("thumbnail", b"qoif", [], 1),
        ("thumbnail", b"qoif" + struct.pack(">IIBB", 1 << 31, 1 << 31, 4, 0) + b"\0" * 8, [], 1),
        ("thumbnail", b"", ["0"], 2),
    ):
        with pytest.raises(Failed) as failed:
            run(name, payload, args)
        assert failed.value.status == status
        assert failed.value.log


def test_no_payload_makes_an_example_touch_what_is_not_its_own(
    programs: Programs, request: pytest.FixtureRequest
) -> None:
    """Mutated payloads, under sanitizers; a run ends with a result or with a reason."""
    rounds = 5_000 if request.config.getoption("--full") else 40
    chance = random.Random(11)
    seeds = {
        "json": references.json_texts(12, 20),
        "thumbnail": [references.qoi_write(picture, chance) for picture in references.pictures(12)],
        "matmul": [references.matrix_payload(2, 3, 4, [1.0] * 6, [2.0] * 12)],
    }
    ends = {0: 0, 1: 0, 3: 0}
    for _ in range(rounds):
        name = chance.choice(sorted(seeds))
        payload = bytearray(chance.choice(seeds[name]))
        for _ in range(chance.randrange(1, 4)):
            place = chance.randrange(len(payload) + 1)
            cut = chance.randrange(0, 3)
            payload[place : place + cut] = chance.randbytes(chance.randrange(0, 3))
        try:
            programs(name, bytes(payload))
            ends[0] += 1
        except Failed as failed:
            ends[failed.status] += 1
    assert ends[0] > 0
    assert ends[1] > 0


def test_a_function_in_another_language_counts_words(
    deployed: Deployed, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--full"):
        pytest.skip("has npm install a compiler: pytest --full tests/functions")
    deployed.functions.deploy("words", assemblyscript_module("words", deployed.folder))
    chance = random.Random(13)
    text = b" ".join(chance.choice([b"Foo", b"bar", b"x1", "québec".encode(), b"--"]) for _ in range(20_000))
    counted = Counter(re.findall(rb"[a-z0-9]+", text.lower()))
    lines = [
        b"%d %b\n" % (n, word) for word, n in sorted(counted.items(), key=lambda pair: (-pair[1], pair[0]))
    ]
    assert deployed.functions.invoke("words", text) == b"".join(lines)


def test_every_example_is_tested() -> None:
    # What works with keys wants a grant: test_function_keys.py.
    assert {path.stem for path in EXAMPLES.glob("*.c")} == {*NAMES, "keys"}
