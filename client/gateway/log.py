"""The gateway's log: one record a line, JSON for programs or text for people, on standard error."""

from __future__ import annotations

import logging
import sys
from typing import cast

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, WrappedLogger

__all__ = ["configure_log"]


def configure_log(form: str, **facts: object) -> FilteringBoundLogger:
    """Return a logger whose records all have `facts`; `form` is ``json`` or ``text``."""
    render: structlog.typing.Processor = (
        structlog.processors.JSONRenderer(default=str)
        if form == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if form == "json" else [_printable]),
            structlog.processors.format_exc_info,
            render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    return cast(FilteringBoundLogger, structlog.get_logger().bind(**facts))


def _printable(_logger: WrappedLogger, _method: str, record: EventDict) -> EventDict:
    """Escape what a terminal would obey: paths and methods are the clients' choice."""
    return {
        name: ascii(value)[1:-1] if isinstance(value, str) and not value.isprintable() else value
        for name, value in record.items()
    }
