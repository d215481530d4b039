"""CPython's own tests of the sqlite3 module, as they are installed, with teemate.db in its place.

A program of its own, as it replaces a module: ``python cpython_suite.py IMAGE ANSWER`` writes one JSON
object: ``{"skipped": {test: reason}, "passed": [...], "failed": {test: last line}}``.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
import tempfile
import types
import unittest
import warnings
from pathlib import Path
from typing import Any

import teemate
from teemate import db

MODULES = ("dbapi", "transactions", "types", "factory", "dump")

CALLS_BACK = "calls back into the program from inside SQLite"
FILES = "opens a file of its own by path; databases of an enclave have names"
SERIALIZE = "serialize() would take the database out of the enclave in the clear"
SHARED = "enable_shared_cache(): switched off in the enclave, and gone from sqlite3 since 3.12"
PRIVATE = "the C implementation's own: statement objects, subclasses of its types"
FTS4 = "fts4 is not in the enclave's SQLite"
REMOVED = "OptimizedUnicode: gone from sqlite3 since 3.12"

# By "Class" or "Class.test".
SKIPPED = {
    "SerializeTests": SERIALIZE,
    "MultiprocessTests": FILES,
    "TransactionTests": FILES,
    "OpenTests.test_open_with_path_like_object": FILES,
    "OpenTests.test_open_with_undecodable_path": FILES,
    "OpenTests.test_open_uri": FILES,
    "OpenTests.test_open_unquoted_uri": FILES,
    "OpenTests.test_open_uri_readonly": FILES,
    "OpenTests.test_open_undecodable_uri": FILES,
    "ModuleTests.test_shared_cache_deprecated": SHARED,
    "ModuleTests.test_disallow_instantiation": PRIVATE,
    "ClosedConTests.test_closed_call": PRIVATE,
    "DumpTests.test_dump_virtual_tables": FTS4,
    "TextFactoryTests.test_optimized_unicode": REMOVED,
}


def stand_in(enclave: teemate.Enclave) -> types.ModuleType:
    """Return a module that looks like sqlite3 and opens its databases in `enclave`."""

    class Connection(db.Connection):
        def __init__(self, database: Any, *args: Any, **options: Any) -> None:
            for name, position in (("cached_statements", 5), ("uri", 6)):  # after check_same_thread
                options.pop(name, None)
                args = args[:position]
            super().__init__(enclave, database, *args, **options)

    def connect(
        database: Any,
        timeout: float = 5.0,
        detect_types: int = 0,
        isolation_level: str | None = "",
        check_same_thread: bool = True,
        factory: Any = Connection,
        **options: Any,
    ) -> Any:
        given = {
            "timeout": (timeout, 5.0),
            "detect_types": (detect_types, 0),
            "isolation_level": (isolation_level, ""),
            "check_same_thread": (check_same_thread, True),
        }
        options |= {name: value for name, (value, default) in given.items() if value != default}
        return factory(database, **options)

    module = types.ModuleType("sqlite3")
    names = {name: getattr(db, name) for name in db.__all__}
    module.__dict__.update(names, Connection=Connection, connect=connect, __getattr__=db.__getattr__)
    return module


def _each(suite: unittest.TestSuite) -> list[unittest.TestCase]:
    tests: list[unittest.TestCase] = []
    for test in suite:
        tests += _each(test) if isinstance(test, unittest.TestSuite) else [test]
    return tests


def main(image: Path, answer: Path) -> None:
    """Run the tests and write what came of them to `answer`."""
    warnings.simplefilter("ignore")
    skipped: dict[str, str] = {}
    result = unittest.TextTestResult(unittest.runner._WritelnDecorator(io.StringIO()), False, 0)
    ran: list[str] = []
    with teemate.create_enclave(image, image.with_suffix(".sig"), backend="sim") as enclave:
        package = importlib.import_module("test.test_sqlite3")
        sys.modules["sqlite3"] = stand_in(enclave)
        for name in MODULES:
            module = importlib.import_module(f"{package.__name__}.test_{name}")
            for test in _each(unittest.defaultTestLoader.loadTestsFromModule(module)):
                kind, method = type(test).__name__, test.id().rpartition(".")[2]
                shown = f"{name}: {kind}.{method}"
                reason = SKIPPED.get(kind) or SKIPPED.get(f"{kind}.{method}")
                if reason:
                    skipped[shown] = reason
                    continue
                before = len(result.skipped)
                test.run(result)
                if len(result.skipped) > before:
                    skipped[shown] = result.skipped[-1][1]
                else:
                    ran.append(shown)
    failed: dict[str, str] = {}
    for test, trace in result.failures + result.errors:
        whole = getattr(test, "test_case", test)  # of a subtest
        name, kind, method = whole.id().split(".")[-3:]
        failed[f"{name.removeprefix('test_')}: {kind}.{method}"] = trace.strip().splitlines()[-1]
    passed = [test for test in ran if test not in failed]
    answer.write_text(json.dumps({"skipped": skipped, "failed": failed, "passed": passed}))


if __name__ == "__main__":
    where, to = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        main(where, to)
