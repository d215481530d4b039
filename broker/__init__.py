"""The broker daemon."""

import sys

# structlog loads rich, where that is installed, to print tracebacks in colours: 4 MiB that a broker has no
# use for.  It is hidden while structlog is imported, and there for whoever else wants it.
if "structlog" not in sys.modules and "rich" not in sys.modules:
    sys.modules["rich"] = None  # type: ignore[assignment]
    try:
        import structlog  # noqa: F401
    finally:
        del sys.modules["rich"]
