"""What of a statement is seen from outside: its first word, and its parameters."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from teemate.db._errors import ProgrammingError

__all__ = ["Statement", "complete_statement", "statement_of"]

# In the order of SQLite's own tokenizer; what none matches is one character that means nothing here.
_TOKEN = re.compile(
    r"""
    (?P<blank> [ \t\n\f\r]+ | --[^\n]* | /\*.*?(?:\*/|\Z) )
    | (?P<quoted> '(?:[^']|'')*(?:'|\Z) | "(?:[^"]|"")*(?:"|\Z) | `(?:[^`]|``)*(?:`|\Z) | \[[^]]*(?:\]|\Z) )
    | \? (?P<number> \d* )
    | (?P<name> [:@][\w$]+ | \$[\w$]+(?:::[\w$]+)*(?:\([^)\s]*\))? )
    | (?P<word> [\w$]+ )
    | (?P<end> ; )
    """,
    re.VERBOSE | re.DOTALL,
)
_CHANGES = frozenset({"insert", "update", "delete", "replace"})


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement as it is sent."""

    text: str
    """Without the comments and blanks before it, as the enclave looks at the first word."""
    sql: bytes
    changes: bool
    """Whether it is an INSERT, UPDATE, DELETE or REPLACE: what transactions begin for by themselves."""
    parameters: int
    names: tuple[str, ...]
    """Of its named parameters, without the first character, each once."""
    unnamed: int
    """The first parameter without a name, from 1; 0 when all have one."""


@lru_cache(maxsize=256)
def statement_of(text: str) -> Statement:
    """Look at `text`.

    Raises :class:`ProgrammingError` for a NUL, :class:`UnicodeEncodeError` for a lone surrogate.
    """
    if "\0" in text:
        raise ProgrammingError("the query contains a null character")
    begin = 0
    while match := _TOKEN.match(text, begin):
        if match.lastgroup not in ("blank", "end"):
            break
        begin = match.end()
    stripped = text[begin:]
    first = _TOKEN.match(stripped)
    word = first.group("word") if first else None
    numbers: dict[str, int] = {}
    most = unnamed = 0
    for token in _TOKEN.finditer(stripped):
        number, name = token.group("number"), token.group("name")
        if number is not None and not number:
            most += 1
            unnamed = unnamed or most
        elif number is not None:
            numbers[f"?{number}"] = int(number)
            most = max(most, int(number))
        elif name is not None and name not in numbers:
            most += 1
            numbers[name] = most
    names = tuple(dict.fromkeys(name[1:] for name in numbers))
    changes = word is not None and word.lower() in _CHANGES
    return Statement(stripped, stripped.encode(), changes, most, names, unnamed)


def complete_statement(statement: str) -> bool:
    """Whether `statement` ends with a semicolon that is in no string, comment or trigger."""
    last, trigger, words = "", False, list[str]()
    for token in _TOKEN.finditer(statement):
        kind = token.lastgroup
        if kind == "blank":
            if token.group().startswith("/*") and not token.group().endswith("*/"):
                return False
            continue
        if kind == "word":
            words.append(token.group().lower())
            trigger = trigger or (words[0] == "create" and words[-1] == "trigger" and len(words) <= 3)
        last = ";" if kind == "end" else token.group().lower()
        if last == ";" and not (trigger and words[-1:] != ["end"]):
            trigger, words = False, []
    return last == ";" and not words
