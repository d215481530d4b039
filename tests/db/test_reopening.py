"""What teemate.db has committed is there when broker and enclave were started anew."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from altered import altered_database
from backends import BACKEND
from connections import database_image
from images import Images, layout_options
from running_broker import run_broker

import teemate
from teemate import db
from teemate.image import SigParams, layout_image, sign_with_key


def test_a_database_outlives_broker_and_enclave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = (
        f'[broker]\nstate_directory = "{tmp_path / "state"}"\n'
        f'[[enclave]]\nname = "db"\nimage = "{database_image()}"\nstorage = true\n'
        f"[[enclave.attach]]\nuid = {os.geteuid()}\n"
    )
    for life in range(3):
        with run_broker(policy) as running:
            monkeypatch.setenv("TEEMATE_SOCKET", running.socket)
            with contextlib.closing(db.connect("db", "ledger", create=life == 0)) as connection:
                if not life:
                    connection.execute("CREATE TABLE entry(life INTEGER, text)")
                    connection.grant(uid=54321)
                with connection:
                    connection.executemany("INSERT INTO entry VALUES (?, ?)", [(life, "x" * 3000)] * 50)
                connection.execute("INSERT INTO entry VALUES (?, 'not committed')", (life,))
                counts = connection.execute(
                    "SELECT life, count(*) FROM entry WHERE length(text) = 3000 GROUP BY life"
                ).fetchall()
                assert counts == [(past, 50) for past in range(life + 1)]
            with contextlib.closing(db.connect("db", "ledger", create=False)) as connection:
                assert connection.execute("SELECT count(*) FROM entry").fetchone() == (50 * (life + 1),)
                assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                if life == 1:
                    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                description = connection.describe()
                assert description.owner == os.getuid()
                assert [right.id for right in description.rights] == [54321]
    files = {path.name: path for path in (tmp_path / "state" / "enclaves" / "db").iterdir()}
    assert set(files) == {"ledger", "ledger-root", "ledger-wal"}
    for path in files.values():
        assert path.stat().st_mode & 0o777 == 0o600
        assert b"xxxxxxxx" not in path.read_bytes()


def test_a_database_of_an_earlier_format_is_refused_as_that_and_its_owner_can_delete_it(
    images: Images, storage: Path, tmp_path: Path
) -> None:
    earlier = altered_database(images, tmp_path, "DB_FORMAT=2u")
    present = tmp_path / "present.sgxs"  # of the same signer
    elf = database_image().with_suffix(".elf")
    built = layout_image(elf, present, layout_options("db", heap="16M", slots=3))
    signature = sign_with_key(SigParams().unsigned(built.mrenclave), images.key)
    present.with_suffix(".sig").write_bytes(signature.to_bytes())

    def life(image: Path) -> teemate.Enclave:
        return teemate.create_enclave(image, image.with_suffix(".sig"), backend=BACKEND, storage=storage)

    for _ in range(2):
        with life(earlier) as enclave, contextlib.closing(db.connect(enclave, "ledger")) as connection:
            connection.executescript("CREATE TABLE IF NOT EXISTS t(v)")
    with life(present) as enclave:
        for create in (True, False):
            with pytest.raises(db.NotSupportedError, match="an earlier version of this enclave has made"):
                db.connect(enclave, "ledger", create=create)
        with contextlib.closing(db.connect(enclave, "other")) as connection:
            enclave_names = {listing.name for listing in db.databases(enclave)}
            assert enclave_names == {"ledger", "other"}
            db.delete(enclave, "ledger")
            connection.execute("SELECT 1")
        with contextlib.closing(db.connect(enclave, "ledger")) as connection:
            assert connection.execute("SELECT count(*) FROM sqlite_schema").fetchone() == (0,)
