"""The full-screen view, with textual: two tables, keys to sort and filter, to revoke and to drain."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import DataTable, Footer, Input, Static

from teemate._broker import connect
from teemate.errors import ConnectionLost, Error
from teemate.top._model import SORTS, Observer, View, select
from teemate.top._text import (
    CLAIMS,
    CLIENT_HEADINGS,
    ENCLAVE_HEADINGS,
    LEFT,
    client_cells,
    enclave_cells,
    summary,
)

__all__ = ["TopApp"]

_DRAIN_SECONDS = 30.0


def _cell(heading: str, text: str) -> Text:
    return Text(f" {text}", justify="left" if heading in LEFT else "right")


class _Question(ModalScreen[bool]):
    """Asks before anything is done; only `y` is yes."""

    CSS = """
    _Question { align: center middle; }
    _Question > Vertical {
        width: 70; height: auto; border: heavy $error; padding: 0 1; background: $surface;
    }
    """
    BINDINGS: ClassVar = [
        Binding("y", "answer(True)", "yes"),
        Binding("n,escape,q,enter", "answer(False)", "no"),
    ]

    def __init__(self, question: str) -> None:
        super().__init__()
        self._question = question

    def compose(self) -> ComposeResult:
        with Vertical():
            yield Static(self._question, markup=False, id="question")
            yield Static("y: yes   any of n, Esc, Enter: no", markup=False)

    def action_answer(self, yes: bool) -> None:
        self.dismiss(yes)


class _Filter(Input):
    """Leaves the box with Enter at once: the next key is for the tables already."""

    def __init__(self, leave: Callable[[], None], **options: Any) -> None:
        super().__init__(**options)
        self._leave = leave

    async def action_submit(self) -> None:
        self._leave()


class TopApp(App[None]):
    """Looks at the broker at `path` every `interval` seconds."""

    TITLE = "teemate top"
    CSS = """
    #summary, #status { height: 1; }
    #enclaves { height: auto; max-height: 8; }
    #clients { height: 1fr; }
    #filter { display: none; height: 1; border: none; padding: 0; }
    #filter.shown { display: block; }
    #status { color: $text-muted; }
    DataTable { scrollbar-size: 1 1; }
    """
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar = [
        Binding("q", "quit", "Quit"),
        Binding("s", "sort", "Sort"),
        Binding("slash", "filter", "Filter", key_display="/"),
        Binding("r", "revoke", "Revoke"),
        Binding("d", "drain", "Drain"),
        Binding("u", "undrain", "Undrain"),
        Binding("tab", "switch", "Table", priority=True),
        Binding("escape", "clear", "All", show=False),
    ]

    def __init__(self, path: str | None, interval: float, sort: str = "calls", wanted: str = "") -> None:
        super().__init__()
        self._path = path
        self._interval = interval
        self._sort = sort
        self._wanted = wanted
        self._view: View | None = None
        self._observer: Observer | None = None
        self._broker: Any = None
        self._said = ""
        self._looking = False

    def compose(self) -> ComposeResult:
        yield Static("", id="summary", markup=False)
        yield DataTable(id="enclaves", cursor_type="row", cell_padding=0)
        yield DataTable(id="clients", cursor_type="row", cell_padding=0)
        hint = "filter: name, container, enclave, uid N, pid N"
        yield _Filter(self._leave_filter, placeholder=hint, id="filter", compact=True)
        yield Static("", id="status", markup=False)
        yield Footer(show_command_palette=False, compact=True)

    def on_mount(self) -> None:
        for table, headings in (("#enclaves", ENCLAVE_HEADINGS), ("#clients", CLIENT_HEADINGS)):
            found = self.query_one(table, DataTable)
            for heading in headings:
                found.add_column(_cell(heading, heading), key=heading)
        self.query_one("#clients", DataTable).focus()
        self._look()
        self.set_interval(self._interval, self._look)

    def on_unmount(self) -> None:
        if self._broker is not None:
            self._broker.close()

    # ---- looking, in a thread: the broker may be away, and is waited for ----------------------------

    def _look(self) -> None:
        if not self._looking:
            self._looking = True
            self.run_worker(self._fetch, thread=True)

    def _fetch(self) -> None:
        try:
            view = self._connected().look()
        except Error as error:
            if isinstance(error, ConnectionLost):
                self._observer = None
            self.call_from_thread(self._say, str(error))
        else:
            self.call_from_thread(self._show, view)
        finally:
            self._looking = False

    def _connected(self) -> Observer:
        if self._observer is None:
            self._broker = connect(self._path, client="teemate top")
            self._observer = Observer(self._broker)
        return self._observer

    def _show(self, view: View) -> None:
        self._view = view
        self._draw()

    def _say(self, text: str) -> None:
        self._said = text
        self._draw()

    def _draw(self) -> None:
        view = self._view
        only = f"only {self._wanted!r}, Esc for all" if self._wanted else ""
        status = self._said or only or CLAIMS
        if view is None:
            self.query_one("#status", Static).update(status)
            return
        self.query_one("#summary", Static).update(summary(view, self._sort))
        shown = select(view.clients, self._sort, self._wanted)
        self._fill("#enclaves", [(row.name, enclave_cells(row)) for row in view.enclaves], ENCLAVE_HEADINGS)
        self._fill("#clients", [(str(row.client), client_cells(row)) for row in shown], CLIENT_HEADINGS)
        self.query_one("#status", Static).update(view.note or status)

    def _fill(self, name: str, rows: list[tuple[str, tuple[str, ...]]], headings: tuple[str, ...]) -> None:
        """New rows; the cursor stays on what it was on, wherever that is now."""
        table = self.query_one(name, DataTable)
        chosen = self._chosen(name)
        table.clear()
        for key, cells in rows:
            table.add_row(*map(_cell, headings, cells), key=key)
        keys = [key for key, _ in rows]
        if chosen in keys:
            table.move_cursor(row=keys.index(chosen))

    def _chosen(self, name: str) -> str | None:
        table = self.query_one(name, DataTable)
        if not table.row_count:
            return None
        key: str | None = table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value
        return key

    # ---- keys ---------------------------------------------------------------------------------------

    def action_sort(self) -> None:
        names = list(SORTS)
        self._sort = names[(names.index(self._sort) + 1) % len(names)]
        self._say("")

    def action_switch(self) -> None:
        enclaves = self.query_one("#enclaves", DataTable)
        (self.query_one("#clients", DataTable) if enclaves.has_focus else enclaves).focus()

    def action_filter(self) -> None:
        box = self.query_one("#filter", Input)
        box.add_class("shown")
        box.value = self._wanted
        box.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        self._wanted = event.value
        self._say("")

    def action_clear(self) -> None:
        self._wanted = ""
        self._leave_filter()
        self._say("")

    def _leave_filter(self) -> None:
        self.query_one("#filter", Input).remove_class("shown")
        self.query_one("#clients", DataTable).focus()

    def action_revoke(self) -> None:
        chosen = self._chosen("#clients")
        clients = self._view.clients if self._view is not None else ()
        row = next((row for row in clients if str(row.client) == chosen), None)
        if row is None:
            self._say("no client is chosen: move to one with the arrow keys")
            return
        who = f"client {row.client} ({row.where or row.name}, pid {row.pid}, uid {row.uid})"
        self._ask(
            f"Take back everything that {who} holds: {row.slots} slots of {row.enclaves or 'nothing'}?",
            f"revoking {who} …",
            partial(self._revoke, row.client),
        )

    def _revoke(self, client: int) -> str:
        done = self._broker.revoke(client=client, reason="asked for in teemate top")
        return (
            f"revoked {done.grants} grants: {done.cleared} slots cleared, {done.quarantined} quarantined,"
            f" {done.leaked} leaked"
        )

    def action_drain(self) -> None:
        name = self._chosen("#enclaves")
        if name is None:
            self._say("there is no enclave")
            return
        self._ask(
            f"Drain {name}: no new grants, and wait up to {_DRAIN_SECONDS:g} s for the old ones?",
            f"draining {name} …",
            partial(self._drain, name),
        )

    def _drain(self, name: str) -> str:
        (done,) = self._broker.drain(name, deadline=_DRAIN_SECONDS, reason="asked for in teemate top")
        return f"{name}: {done.held} grants were held, {done.left} are held still; u takes it into use again"

    def action_undrain(self) -> None:
        name = self._chosen("#enclaves")
        if name is not None:
            self._ask(f"Take {name} into use again?", f"undraining {name} …", partial(self._undrain, name))

    def _undrain(self, name: str) -> str:
        self._broker.undrain(name)
        return f"{name}: in use again"

    def _ask(self, question: str, doing: str, do: Callable[[], str]) -> None:
        def answered(yes: bool | None) -> None:
            if yes:
                self._say(doing)
                self.run_worker(partial(self._do, do), thread=True)
            else:
                self._say("nothing was done")

        self.push_screen(_Question(question), answered)

    def _do(self, do: Callable[[], str]) -> None:
        try:
            said = do()
        except Error as error:
            said = str(error)
        self.call_from_thread(self._say, said)
        self.call_from_thread(self._look)
