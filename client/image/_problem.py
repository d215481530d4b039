"""The one way in which this package raises :class:`teemate.errors.ImageError`."""

from __future__ import annotations

from ..errors import ImageError

__all__ = ["problem"]


def problem(step: str, reason: str, *, offset: int | None = None, **facts: object) -> ImageError:
    """Return an ImageError of `step`; `offset` is where in the file or structure it is wrong, in bytes.

    ``detail`` has ``step``, ``reason``, ``offset`` where one is known, and `facts`, so
    that programs need not read the sentence.
    """
    place = "" if offset is None else f" at offset {offset:#x}"
    detail: dict[str, object] = {"step": step, "reason": reason, **facts}
    if offset is not None:
        detail["offset"] = offset
    return ImageError(f"{step}{place}: {reason}", detail)
