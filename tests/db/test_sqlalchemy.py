"""SQLAlchemy's Core and ORM work on a database in an enclave, by `creator`."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import Any

import pytest

import teemate
from teemate import db

sa = pytest.importorskip("sqlalchemy", reason="SQLAlchemy is not installed (pip install '.[test]')")
orm = pytest.importorskip("sqlalchemy.orm")


@pytest.fixture
def engine(enclave: teemate.Enclave) -> Iterator[Any]:
    """An engine whose one connection is in the enclave."""
    engine = sa.create_engine(
        "sqlite://", creator=lambda: db.connect(enclave), module=db, poolclass=sa.pool.StaticPool
    )
    yield engine
    engine.dispose()


def test_core_makes_tables_and_reads_what_it_wrote(engine: Any) -> None:
    metadata = sa.MetaData()
    table = sa.Table(
        "account",
        metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("owner", sa.String(40), nullable=False, unique=True),
        sa.Column("balance", sa.Numeric(10, 2)),
        sa.Column("opened", sa.Date),
        sa.Column("seen", sa.DateTime),
        sa.Column("key", sa.LargeBinary),
        sa.Column("extra", sa.JSON),
        sa.Column("active", sa.Boolean),
    )
    metadata.create_all(engine)
    day, moment = datetime.date(2026, 2, 28), datetime.datetime(2026, 2, 28, 23, 59, 1, 20)
    rows = [
        {
            "owner": f"owner {n}",
            "balance": n,
            "opened": day,
            "seen": moment,
            "key": bytes([n]),
            "extra": {"n": [n, None]},
            "active": n % 2 == 0,
        }
        for n in range(50)
    ]
    with engine.begin() as connection:
        assert connection.execute(table.insert(), rows).rowcount == 50
        one = connection.execute(table.insert().values(owner="last").returning(table.c.id)).scalar_one()
        assert one == 51
    with engine.connect() as connection:
        query = sa.select(table).where(table.c.owner.like("owner 1%"), table.c.active).order_by(table.c.id)
        read = [dict(row) for row in connection.execute(query).mappings()]
        assert [row["owner"] for row in read] == [f"owner {n}" for n in (10, 12, 14, 16, 18)]
        assert {**read[0], "id": None} == {**rows[10], "id": None}
        total = connection.execute(sa.select(sa.func.sum(table.c.balance))).scalar_one()
        assert total == sum(range(50))
    assert [column["name"] for column in sa.inspect(engine).get_columns("account")][:2] == ["id", "owner"]
    twice = [{"owner": "new"}, {"owner": "last"}]
    with engine.begin() as connection:
        with pytest.raises(sa.exc.IntegrityError, match="UNIQUE constraint failed"):
            connection.execute(table.insert(), twice)
        connection.rollback()
    with engine.connect() as connection:
        count = sa.select(sa.func.count()).select_from(table)
        assert connection.execute(count).scalar_one() == 51


def test_the_orm_keeps_objects_and_what_they_refer_to(engine: Any) -> None:
    base = orm.declarative_base()

    class Person(base):  # type: ignore[misc]
        __tablename__ = "person"
        id = sa.Column(sa.Integer, primary_key=True)
        name = sa.Column(sa.String)
        letters = orm.relationship("Letter", back_populates="writer", order_by="Letter.id")

    class Letter(base):  # type: ignore[misc]
        __tablename__ = "letter"
        id = sa.Column(sa.Integer, primary_key=True)
        text = sa.Column(sa.Text)
        writer_id = sa.Column(sa.ForeignKey("person.id"))
        writer = orm.relationship(Person, back_populates="letters")

    base.metadata.create_all(engine)
    with orm.Session(engine) as session:
        session.add(Person(name="Ada", letters=[Letter(text="first"), Letter(text="second")]))
        session.add(Person(name="Alan"))
        session.commit()
    with orm.Session(engine) as session:
        query = sa.select(Person).options(orm.selectinload(Person.letters)).order_by(Person.name)
        ada, alan = session.scalars(query).all()
        assert [letter.text for letter in ada.letters] == ["first", "second"]
        alan.letters.append(ada.letters[1])
        session.flush()
        with session.begin_nested() as savepoint:
            alan.name = "nobody"
            session.flush()
            savepoint.rollback()
        session.commit()
        assert (ada.letters[-1].text, alan.letters[0].text, alan.name) == ("first", "second", "Alan")
        session.delete(ada.letters[0])
        session.rollback()
        assert session.scalar(sa.select(sa.func.count(Letter.id))) == 2
