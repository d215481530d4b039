"""Signals while a thread is inside: real interpreters, since signals change the whole process."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest
from backends import BACKEND, PATIENCE
from images import Images

Run = Callable[..., "subprocess.CompletedProcess[str]"]

PRELUDE = """
import faulthandler, os, signal, struct, sys, threading
import teemate

def number(value):
    return struct.pack("<Q", value)

enclave = teemate.create_enclave(sys.argv[1], sys.argv[2], sys.argv[3])

def is_inside(frame):
    # Whether the interrupted Python code is a call into the enclave.
    while frame is not None:
        if frame.f_code.co_name == "_run" and frame.f_code.co_filename.endswith("_slot.py"):
            return True
        frame = frame.f_back
    return False

def interrupt_when_inside():
    # Ctrl-C at the first alarm that comes during a call.
    def handler(number, frame):
        if is_inside(frame):
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
"""


@pytest.fixture
def run(images: Images) -> Run:
    """Run Python code with a private faults enclave; returns the finished process."""

    def run(code: str, expected: int = 0) -> subprocess.CompletedProcess[str]:
        image = images.faults
        done = subprocess.run(
            [
                sys.executable, "-c", PRELUDE + textwrap.dedent(code),
                str(image.sgxs), str(image.sigstruct), BACKEND,
            ],
            capture_output=True,
            text=True,
            timeout=120 * PATIENCE,
        )  # fmt: skip
        assert done.returncode == expected, done.stderr
        return done

    return run


def test_ctrl_c_ends_a_call_that_loops_and_costs_its_slot(run: Run) -> None:
    run("""
        interrupt_when_inside()
        with enclave.slot() as slot:
            try:
                slot.call("loop")
            except KeyboardInterrupt:
                assert "KeyboardInterrupt" in slot.broken
            else:
                sys.exit("the loop ended")
        with enclave.slot() as slot:
            assert slot.call("echo", b"next") == b"next"
    """)


def test_ctrl_c_that_nobody_handles_ends_the_program_with_a_traceback(run: Run) -> None:
    done = run(
        """
        interrupt_when_inside()
        with enclave.slot() as slot:
            slot.call("loop")
        """,
        expected=-2,
    )
    assert "KeyboardInterrupt" in done.stderr


def test_an_alarm_is_handled_while_inside_and_the_call_goes_on(run: Run) -> None:
    run("""
        inside = 0

        class Enough(Exception):
            pass

        def handler(number, frame):
            global inside
            inside += is_inside(frame)  # on a slow processor one may come before the call
            if inside == 5:
                signal.setitimer(signal.ITIMER_REAL, 0)  # the next may come before this one is handled
                raise Enough

        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.02)
        with enclave.slot() as slot:
            try:
                slot.call("loop")
            except Enough:
                pass
        assert inside == 5, inside
        assert enclave.statistics().abandoned == 1
    """)


def test_a_call_that_is_interrupted_again_and_again_gives_the_right_result(run: Run) -> None:
    run("""
        alarms = 0

        def handler(number, frame):
            global alarms
            alarms += 1

        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        with enclave.slot() as slot:
            total = 0
            while alarms < 20:
                total += 20000
                assert slot.call("count", number(20000)) == number(total)
        signal.setitimer(signal.ITIMER_REAL, 0)
    """)


def test_a_childs_end_is_noticed_while_inside(run: Run) -> None:
    run("""
        class ChildEnded(Exception):
            pass

        def handler(number, frame):
            raise ChildEnded

        signal.signal(signal.SIGCHLD, handler)
        start, go = os.pipe()
        child = os.fork()
        if child == 0:
            os.read(start, 1)
            os._exit(0)
        with enclave.slot() as slot:
            try:
                os.write(go, b"x")
                slot.call("loop")
            except ChildEnded:
                pass
        os.waitpid(child, 0)
    """)


def test_faulthandler_shows_the_stack_of_a_thread_that_is_inside(run: Run) -> None:
    done = run("""
        faulthandler.register(signal.SIGUSR1, all_threads=False)

        class Enough(Exception):
            pass

        def handler(number, frame):
            if is_inside(frame):
                os.kill(os.getpid(), signal.SIGUSR1)
                raise Enough

        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        with enclave.slot() as slot:
            try:
                slot.call("loop")
            except Enough:
                pass
        signal.setitimer(signal.ITIMER_REAL, 0)
    """)
    assert "_slot.py" in done.stderr


def test_faulthandler_dumps_all_threads_while_one_is_inside_for_long(run: Run) -> None:
    done = run("""
        import tempfile

        class Enough(Exception):
            pass

        def handler(number, frame):
            if is_inside(frame) and b"_slot.py" in os.pread(dumps.fileno(), 1 << 20, 0):
                signal.setitimer(signal.ITIMER_REAL, 0)
                raise Enough

        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        with tempfile.TemporaryFile() as dumps, enclave.slot() as slot:
            faulthandler.dump_traceback_later(0.1, repeat=True, file=dumps)
            try:
                slot.call("loop")
            except Enough:
                pass
            faulthandler.cancel_dump_traceback_later()
            dumps.seek(0)
            print(dumps.read().decode())
    """)
    assert "Timeout (" in done.stdout
    assert "_slot.py" in done.stdout


def test_faulthandler_that_is_enabled_later_does_not_take_the_enclaves_faults(run: Run) -> None:
    done = run("""
        with enclave.slot() as slot:
            slot.call("empty")
        faulthandler.enable()
        with enclave.slot() as slot:
            try:
                slot.call("divide", number(1))
            except teemate.EnclaveFault as fault:
                assert fault.detail["name"] == "#DE"
            else:
                sys.exit("no fault")
        with enclave.slot() as slot:
            slot.call("empty")
    """)
    assert "Fatal Python error" not in done.stderr


def test_a_crash_outside_the_enclave_still_reaches_faulthandler(run: Run) -> None:
    done = run(
        """
        faulthandler.enable()
        with enclave.slot() as slot:
            slot.call("empty")
        import ctypes
        ctypes.string_at(0)
        """,
        expected=-11,
    )
    assert "Fatal Python error: Segmentation fault" in done.stderr


def test_ctrl_c_reaches_the_main_thread_while_another_is_inside(run: Run) -> None:
    run("""
        errors = []
        started = threading.Event()

        def body():
            with enclave.slot() as slot:
                started.set()
                try:
                    slot.call("loop", timeout=60)
                except teemate.NotAttached as error:
                    errors.append(error)

        thread = threading.Thread(target=body)
        thread.start()
        started.wait()
        try:
            signal.signal(signal.SIGALRM, lambda number, frame: os.kill(os.getpid(), signal.SIGINT))
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            while thread.is_alive():
                thread.join(0.1)  # Python's own lock misses a signal that comes right before it waits
        except KeyboardInterrupt:
            enclave.detach()
        thread.join(60)
        assert len(errors) == 1
    """)


def test_a_thread_that_blocks_all_signals_can_still_be_timed_out(run: Run) -> None:
    """Servers do so in their worker threads; the library's own tick has to come through, and not pile up."""
    done = run("""
        def queued():  # for this thread: /proc tells of all processes of the user
            count = 0
            while signal.sigtimedwait(signal.valid_signals(), 0):
                count += 1
            return count

        def worker():
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
            for _ in range(2):
                try:
                    with enclave.slot() as slot:
                        slot.call("loop", timeout=0.2)
                except teemate.CallTimeout:
                    print("timed out")
            ticks = queued()
            print("not piled up" if ticks < 10 else f"{ticks} ticks are queued")
            missing = blocked - signal.pthread_sigmask(signal.SIG_BLOCK, ())
            print(f"not blocked any more: {missing}" if missing else "all blocked as before")

        thread = threading.Thread(target=worker)
        thread.start()
        thread.join()
    """)
    assert done.stdout.splitlines() == ["timed out", "timed out", "not piled up", "all blocked as before"]
