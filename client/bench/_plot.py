"""Pictures of results, one message each; matplotlib is loaded when one is drawn."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teemate.bench._rows import TARGETS, Row, Series
from teemate.errors import Unsupported

if TYPE_CHECKING:
    from teemate.bench._run import Report

__all__ = ["draw", "require_plotting"]

_SHARED, _OTHER, _QUIET = "#1f5fa8", "#c0561f", "#777777"


def require_plotting(path: Path) -> None:
    """Raise :class:`Unsupported` when nothing can be drawn into `path`: no matplotlib, or no such format."""
    if importlib.util.find_spec("matplotlib") is None:
        raise Unsupported("drawing needs matplotlib, which is not installed: pip install 'teemate[plot]'")
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:] not in formats:
        raise Unsupported(f"cannot draw into {path}: its name has to end with one of {', '.join(formats)}")


def draw(report: Report, path: Path) -> None:
    """Draw what `report` shows into `path`, in the format that its name ends with.

    Raises
    ------
    Unsupported
        There is no matplotlib, or it knows no such format.

    """
    require_plotting(path)
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style = {
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "teemate",
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained", facecolor="white")
        axes = figure.add_subplot()
        _PICTURES[report.bench](axes, report)
        where = f"backend {report.backend}, {report.host['cores']} cores"
        axes.set_xlabel(f"{axes.get_xlabel()}\n[{where}]")
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


# ---- one picture for each benchmark -----------------------------------------------------------------


def _draw_attach(axes: Any, report: Report) -> None:
    private, shared = report.result.series
    _lines(axes, (private, shared), (_OTHER, _SHARED), "ms")
    _whole_ticks(axes, shared)
    axes.set_yscale("log")
    _plain_numbers(axes.yaxis)
    axes.set_xlabel("heap of the enclave (MiB)")
    axes.set_ylabel("until the first reply from inside (ms)")
    last = shared.points[-1]
    _say(axes, f"Attaching takes about {last[1]:.1f} ms, however large the enclave is")


def _draw_memory(axes: Any, report: Report) -> None:
    private, shared = report.result.series
    _lines(axes, (private, shared), (_OTHER, _SHARED), "MiB")
    axes.set_xticks([x for x, _ in shared.points if x == 1 or x > 4])
    axes.set_xlabel("clients")
    axes.set_ylabel("all memory, enclaves included (MiB)")
    axes.set_ylim(bottom=0)
    clients, ours = shared.points[-1]
    theirs = dict(private.points).get(clients)
    more = f", {theirs / 1024:.1f} GiB in one each" if theirs else ""
    _say(axes, f"{clients:.0f} clients take {ours / 1024:.1f} GiB in one shared enclave{more}")


def _draw_scale(axes: Any, report: Report) -> None:
    half, most = report.result.series
    _lines(axes, (most, half), (_QUIET, _SHARED), "ms")
    _whole_ticks(axes, half)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("clients that are attached already")
    axes.set_ylabel("attach, to the first reply from inside (ms)")
    _say(axes, f"Beside {half.points[-1][0]:,.0f} clients an attach takes {half.points[-1][1]:.1f} ms")


def _draw_churn(axes: Any, report: Report) -> None:
    (memory,) = report.result.series
    axes.plot(*zip(*memory.points, strict=True), color=_SHARED)
    axes.set_ylim(0, 1.3 * max(y for _, y in memory.points))
    axes.set_xlabel("clients that have come, called once and left")
    axes.set_ylabel("memory of the broker (MiB)")
    left = next(row for row in report.result.rows if row.figure == "churn_bytes_left")
    _say(axes, f"Of {memory.points[-1][0]:,.0f} clients each left {left.value:.0f} bytes behind")


def _draw_call(axes: Any, report: Report) -> None:
    names = {
        "floor_transition": "entering and leaving",
        "empty_call": "empty call, from C",
        "empty_call_py": "empty call, from Python",
        "call_with_ocall_py": "call with an OCALL, from Python",
        "call_4_kib_py": "4 KiB there and back, from Python",
    }
    rows = _bars(axes, report, names, quiet="floor_transition", unit="µs")
    empty = next(row for row in rows if row.figure == "empty_call")
    _say(axes, f"An empty call costs {empty.ratio:.2f} times what entering and leaving costs")


def _draw_container(axes: Any, report: Report) -> None:
    names = {
        "container_empty": "does nothing",
        "container_attach_c": "attaches, in C",
        "container_attach": "attaches, in Python",
        "container_conventional": "builds an enclave, in Python",
    }
    rows = {row.figure: row for row in _bars(axes, report, names, quiet="container_empty", unit="ms")}
    axes.set_ylabel("a container that starts and")
    attached, built = (rows[f"container_{way}"].value for way in ("attach", "conventional"))
    _say(axes, f"A container's first reply takes {attached:.0f} ms attaching, {built:.0f} ms building")


def _draw_db(axes: Any, report: Report) -> None:
    lines = report.result.series
    half = len(lines) // 2
    colours = (_SHARED, _OTHER, _QUIET)
    figure = axes.figure
    figure.set_size_inches(10.5, 4.4)
    grid = figure.add_gridspec(1, 2)
    axes.set_subplotspec(grid[0])
    _lines(axes, lines[half:], colours, "MiB")
    second = figure.add_subplot(grid[1])
    _lines(second, lines[:half], colours, "ms")
    for one, label in (
        (axes, "all memory, enclaves included (MiB)"),
        (second, "open, to the first answer (ms)"),
    ):
        one.set_yscale("log")
        _plain_numbers(one.yaxis)
        _whole_ticks(one, lines[0])
        one.set_xlabel("processes with one database")
        one.set_ylabel(label)
    rows = {row.figure: row.value for row in report.result.rows}
    less, sooner = (rows[f"db_{what}_ratio"] for what in ("memory", "open_unloaded"))
    _say(
        axes,
        f"8 processes in one enclave: 1/{less:.1f} of the memory, and one is ready {sooner:.0f} times sooner",
    )


def _draw_functions(axes: Any, report: Report) -> None:
    figure = axes.figure
    figure.set_size_inches(10.5, 4.4)
    grid = figure.add_gridspec(1, 2)
    axes.set_subplotspec(grid[0])
    names = {
        "fn_cold_native": "a program, no enclave",
        "fn_cold_shared": "a function,\none shared enclave",
        "fn_cold_private": "a function,\none enclave each",
    }
    starts = {row.figure: row.value for row in _bars(axes, report, names, quiet="fn_cold_native", unit="ms")}
    axes.set_xlabel("new process to first byte of output (ms)")
    memory = figure.add_subplot(grid[1])
    private, shared = report.result.series
    _lines(memory, (private, shared), (_OTHER, _SHARED), "MiB")
    memory.set_xticks([x for x, _ in shared.points if x == 1 or x > 4])
    memory.set_xlabel("processes with a function at once")
    memory.set_ylabel("all memory, enclaves included (MiB)")
    memory.set_ylim(bottom=0)
    ours = starts["fn_cold_shared"]
    sooner = starts["fn_cold_private"] / ours
    less = next(row.value for row in report.result.rows if row.figure == "fn_memory_ratio")
    _say(
        axes,
        f"A function's first byte comes after {ours:.1f} ms, {sooner:.0f} times sooner than in an enclave of"
        f" its own;\n16 of them take 1/{less:.0f} of the memory",
    )


def _draw_floor(axes: Any, report: Report) -> None:
    names = {
        "floor_getppid": "one system call (getppid)",
        "floor_transition": "enter an enclave and leave",
        "floor_warm": "be sent a descriptor and map it",
        "floor_cold": "the same, and connect first",
        "floor_creation": "allocate and hash an enclave's pages",
    }
    scale = {"ns": 1e-3, "us": 1.0, "ms": 1e3}
    rows = [row for row in report.result.rows if row.figure in names]
    rows.sort(key=lambda row: list(names).index(row.figure))
    values = [row.value * scale[row.unit] for row in rows]
    _dots(axes, [names[row.figure] for row in rows], values, [_QUIET] * len(rows), "µs")
    axes.set_xlabel("time (µs)")
    _say(axes, "What cannot be done faster on this host")


def _draw_all(axes: Any, report: Report) -> None:
    # A difference that came out at nothing or less has no place on a logarithmic axis.
    rows = [row for row in report.result.rows if row.met is not None and row.value > 0]
    numbers = [_of_target(row) for row in rows]
    colours = [_SHARED if row.met else _OTHER for row in rows]
    _dots(axes, [row.figure for row in rows], numbers, colours)
    axes.axvline(1, color="black", linewidth=1)
    axes.figure.set_size_inches(7.2, 1.2 + 0.32 * len(rows))
    axes.set_xlabel("measured, as a multiple of its bound (1: just met; less is better)")
    _say(axes, f"{sum(bool(row.met) for row in rows)} of {len(rows)} figures are within their bounds")


def _of_target(row: Row) -> float:
    target = TARGETS[row.figure]
    number = row.value if row.ratio is None else row.ratio
    return number / target.limit if target.at_most else target.limit / number


_PICTURES: dict[str, Callable[[Any, Report], None]] = {
    "all": _draw_all,
    "attach": _draw_attach,
    "call": _draw_call,
    "churn": _draw_churn,
    "container": _draw_container,
    "db": _draw_db,
    "floor": _draw_floor,
    "functions": _draw_functions,
    "memory": _draw_memory,
    "scale": _draw_scale,
}


# ---- what they have in common -------------------------------------------------------------------------


def _lines(axes: Any, lines: Sequence[Series], colours: Sequence[str], unit: str) -> None:
    """Draw lines that are named where they end."""
    for line, colour in zip(lines, colours, strict=True):
        if not line.points:
            continue
        axes.plot(*zip(*line.points, strict=True), color=colour, marker="o", markersize=4)
        x, y = line.points[-1]
        axes.annotate(
            f"{line.name}: {_short(y)} {unit}",
            (x, y),
            xytext=(0, 9),
            textcoords="offset points",
            color=colour,
            ha="right",
            va="bottom",
        )
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _bars(axes: Any, report: Report, names: dict[str, str], *, quiet: str, unit: str) -> list[Row]:
    """Draw a horizontal bar for each figure in `names` that was measured; returns these rows.

    That of `quiet` is what the others are to be seen beside.
    """
    rows = [row for row in report.result.rows if row.figure in names]
    rows.sort(key=lambda row: list(names).index(row.figure))
    values = [row.value for row in rows]
    colours = [_QUIET if row.figure == quiet else _SHARED for row in rows]
    bars = axes.barh(range(len(rows)), values, color=colours, height=0.62)
    axes.bar_label(bars, [f"{value:,.1f} {unit}" for value in values], padding=4)
    axes.set_xlim(right=1.25 * max(values))
    _name_lines(axes, [names[row.figure] for row in rows])
    axes.set_xlabel(f"time ({unit})")
    return rows


def _dots(
    axes: Any, names: Sequence[str], values: Sequence[float], colours: Sequence[str], unit: str = ""
) -> None:
    """Draw one dot in a line for each name, over a logarithmic axis (where a bar's length says nothing)."""
    axes.scatter(values, range(len(names)), c=colours, s=42, zorder=3)
    for line, (value, colour) in enumerate(zip(values, colours, strict=True)):
        axes.annotate(
            f"{_short(value)} {unit}",
            (value, line),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            color=colour,
        )
    _name_lines(axes, names)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_xscale("log")
    axes.set_xlim(0.5 * min(values), 14 * max(values))
    _plain_numbers(axes.xaxis)


def _name_lines(axes: Any, names: Sequence[str]) -> None:
    """Name the lines of a horizontal picture, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def _say(axes: Any, message: str) -> None:
    """Put what the picture says above all of it."""
    axes.figure.suptitle(message, x=0.01, ha="left", size=12.5, weight="bold")


def _whole_ticks(axes: Any, line: Series) -> None:
    """Put a logarithmic axis' ticks where something was measured."""
    axes.set_xscale("log", base=2)
    axes.set_xticks([x for x, _ in line.points], [f"{x:,.0f}" for x, _ in line.points])
    axes.minorticks_off()


def _plain_numbers(axis: Any) -> None:
    """10 and not 10¹, with more of them where the axis has few powers; what was drawn says how many."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    subs = tuple(range(1, 10)) if high < 8 * low else (1, 2, 5) if high < 1000 * low else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
