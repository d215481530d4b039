"""Other owners of signals in one process with ours: faulthandler, ASan, Go, the JVM, Node."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from sim_programs import Toolchain, run_program

PRELUDE = """
import faulthandler, signal, sys, threading, time
from cffi import FFI
ffi = FFI()
ffi.cdef("int probe_enter(int); int probe_spin(void); int probe_pause(void);")
ffi.cdef("int probe_resume(void); void probe_stop(void);")
ffi.cdef("int probe_spins(void); void probe_forget(void);")
probe = ffi.dlopen(sys.argv[1])
"""


def run_python(probe: Path, script: str, **environment: str) -> tuple[int, str, str]:
    result = run_program([sys.executable, "-c", PRELUDE + script, probe], **environment)
    return result.returncode, result.stdout, result.stderr


@pytest.mark.parametrize("when", ["before", "after", "before and after"])
def test_faulthandler_and_the_sim_share_a_process(probe: Path, when: str) -> None:
    script = "faulthandler.enable()\n" if "before" in when else ""
    script += "probe.probe_enter(20)\n"
    script += "faulthandler.enable()\n" if "after" in when else ""
    script += "probe.probe_enter(20)\nprint('went on', flush=True)\nfaulthandler._sigsegv()\n"
    code, output, errors = run_python(probe, script)
    assert output == "went on\n"
    assert code == -11
    assert errors.count("Fatal Python error: Segmentation fault") == 1
    assert 'File "<string>"' in errors


def test_faulthandler_switched_on_and_off_around_calls_is_survived(probe: Path) -> None:
    script = """
for _ in range(30):
    faulthandler.enable()
    probe.probe_enter(1)
    faulthandler.disable()
    probe.probe_enter(1)
print("done")
"""
    assert run_python(probe, script) == (0, "done\n", "")


def test_ctrl_c_and_alarms_are_handled_by_python_between_pauses(probe: Path) -> None:
    script = """
seen = []
signal.signal(signal.SIGALRM, lambda *_: seen.append("alarm"))
signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)  # again and again: one may come before the entry
assert probe.probe_pause() == 1
signal.setitimer(signal.ITIMER_REAL, 0)
assert set(seen) == {"alarm"}, seen
probe.probe_stop()
assert probe.probe_resume() == 0

def interrupt_when_inside():
    while not probe.probe_spins():
        time.sleep(0.001)
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

interrupter = threading.Thread(target=interrupt_when_inside)
try:
    probe.probe_forget()
    interrupter.start()
    assert probe.probe_pause() == 1
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted")
interrupter.join()
probe.probe_stop()
assert probe.probe_resume() == 0
"""
    code, output, errors = run_python(probe, script)
    assert (code, output) == (0, "interrupted\n"), errors


def test_a_dumping_timer_of_faulthandler_works_while_a_thread_is_inside(probe: Path) -> None:
    script = """
faulthandler.dump_traceback_later(0.05)
threading.Timer(0.3, probe.probe_stop).start()
probe.probe_spin()
print("done")
"""
    code, output, errors = run_python(probe, script)
    assert (code, output) == (0, "done\n"), errors
    assert "Timeout (0:00:00.050000)!" in errors


@pytest.fixture(scope="module")
def asan_tests(toolchain: Toolchain) -> Path:
    sources = ["main.c", "harness.c", "enclave.S"]
    sources += sorted(path.name for path in (Path(__file__).parent / "c").glob("*_tests.c"))
    return toolchain.link("sim-tests-asan", sources, "-fsanitize=address", "-fno-omit-frame-pointer")


def test_a_program_built_with_asan_enters(asan_tests: Path) -> None:
    for name in [
        "an_entry_has_the_registers_of_the_sdm",
        "a_page_fault_tells_the_page_and_no_more",
        "an_alarm_reaches_the_host_while_a_thread_is_inside",
        "calls_faults_and_ticks_mix",
        "a_child_of_fork_holds_nothing_and_attaches_itself",
    ]:
        result = run_program([asan_tests, name], ASAN_OPTIONS="detect_leaks=0")
        assert result.returncode == 0, (name, result.stderr)


def test_a_fork_right_after_the_first_entry_finds_no_lock_of_asan_held(asan_tests: Path) -> None:
    # The ticker's thread, half started at the fork, held libasan's locks for ever in the child.
    for _ in range(40):
        result = run_program(
            [asan_tests, "a_child_of_fork_holds_nothing_and_attaches_itself"], ASAN_OPTIONS="detect_leaks=0"
        )
        assert result.returncode == 0, result.stderr


def test_asan_still_reports_a_crash_of_the_host(toolchain: Toolchain) -> None:
    program = toolchain.link("asan-crash", ["crash.c", "harness.c", "enclave.S"], "-fsanitize=address")
    result = run_program([program], ASAN_OPTIONS="detect_leaks=0")
    assert "AddressSanitizer: SEGV on unknown address" in result.stderr
    assert result.returncode == 1


@pytest.mark.parametrize("sanitizer", ["thread"])
def test_tsan_is_a_clear_error(toolchain: Toolchain, sanitizer: str) -> None:
    program = toolchain.link("tsan", ["crash.c", "harness.c", "enclave.S"], f"-fsanitize={sanitizer}")
    result = run_program([program])
    assert "a program built with ThreadSanitizer cannot hold an enclave" in result.stderr


def test_the_stack_of_an_entry_can_be_unwound_by_gdb(sim_tests: Path) -> None:
    gdb = shutil.which("gdb")
    if gdb is None:
        pytest.skip("gdb is not here")
    commands = [
        "handle SIGILL SIGSEGV SIG62 SIG63 nostop noprint pass",
        "break stop_spinning",
        "run an_alarm_reaches_the_host_while_a_thread_is_inside",
        "backtrace",
    ]
    arguments = [part for command in commands for part in ("-ex", command)]
    result = run_program([gdb, "-nx", "-batch", *arguments, sim_tests], DEBUGINFOD_URLS="")
    frames = [line for line in result.stdout.splitlines() if line.startswith("#")]
    text = "\n".join(frames)
    assert "<signal handler called>" in text, result.stdout + result.stderr
    for name in ["stop_spinning", "sim_enter", "teemate_enter", "spin", "main"]:
        assert f" {name} (" in text, text


# Of Go's own packages hardly any: each is compiled, and the C library prints and sleeps as well.
GO = """
package main

/*
#cgo LDFLAGS: -ldl
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
static int enter(int rounds) {
    void *library = dlopen(getenv("PROBE"), RTLD_NOW);
    int (*probe)(int);
    if (!library) return -1;
    probe = (int (*)(int))dlsym(library, "probe_enter");
    return probe ? probe(rounds) : -2;
}
static void say(void) {
    puts("went on");
    fflush(stdout);
}
*/
import "C"

func nilPanics() (caught bool) {
    defer func() { caught = recover() != nil }()
    var p *int
    return *p == 0
}

func main() {
    stop, stopped := make(chan bool), make(chan bool)
    go func() { // goroutines that the runtime preempts by signal meanwhile
        defer close(stopped)
        for {
            select {
            case <-stop:
                return
            default:
                if !nilPanics() { panic("a nil dereference did not panic") }
                C.usleep(1000)
            }
        }
    }()
    for i := 0; i < 20; i++ {
        if C.enter(20) != 0 { panic("enter") }
        if !nilPanics() { panic("a nil dereference did not panic") }
    }
    close(stop)
    <-stopped
    C.say()
}
"""


def test_go_keeps_its_panics_and_preemption(toolchain: Toolchain, probe: Path, tmp_path: Path) -> None:
    go = shutil.which("go") or shutil.which("/usr/local/go/bin/go")
    if go is None:
        pytest.skip("go is not here")
    source = tmp_path / "main.go"
    source.write_text(GO)
    program = tmp_path / "program"
    cache = str(tmp_path / "cache")
    built = run_program(
        [go, "build", "-o", program, source], HOME=str(tmp_path), GOCACHE=cache, CGO_ENABLED="1"
    )
    assert built.returncode == 0, built.stderr
    result = run_program([program], PROBE=str(probe))
    assert (result.returncode, result.stdout) == (0, "went on\n"), result.stderr


JAVA = """
public class Probe {
    static int length(String text) { return text.length(); }

    public static void main(String[] arguments) {
        int caught = 0;
        for (int i = 0; i < 200000; i++) {   // compiled: null checks become SIGSEGV
            try { caught += length(i % 100 == 0 ? null : "x") > 1 ? 1 : 0; }
            catch (NullPointerException e) { caught++; }
        }
        System.load(arguments[0]);
        for (int i = 0; i < 200000; i++) {
            try { caught += length(i % 100 == 0 ? null : "x") > 1 ? 1 : 0; }
            catch (NullPointerException e) { caught++; }
        }
        System.gc();                         // safepoints poll by SIGSEGV
        System.out.println("went on " + caught);
    }
}
"""


def test_the_jvm_keeps_its_null_checks_and_safepoints(probe: Path, tmp_path: Path) -> None:
    java = shutil.which("java")
    if java is None:
        pytest.skip("java is not here")
    source = tmp_path / "Probe.java"
    source.write_text(JAVA)
    result = run_program([java, "-Xmx256m", source, probe], PROBE_ROUNDS="50")
    if "not found" in result.stderr and "compiler" in result.stderr:
        pytest.skip("this java has no compiler")
    assert (result.returncode, result.stdout) == (0, "probe: entered\nwent on 4000\n"), result.stderr


NODE = """
try { process.dlopen({exports: {}}, process.argv[1]); } catch (error) { /* it is no module; it has run */ }
let sum = 0;
for (let i = 0; i < 2e6; i++) sum += i;
const memory = new WebAssembly.Memory({initial: 1});
// (module (import "a" "b" (memory 1)) (func (export "c") (param i32) (result i32) local.get 0 i32.load))
const code = new Uint8Array([
    0, 97, 115, 109, 1, 0, 0, 0, 1, 6, 1, 96, 1, 127, 1, 127, 2, 8, 1, 1, 97, 1, 98, 2, 0, 1,
    3, 2, 1, 0, 7, 5, 1, 1, 99, 0, 0, 10, 9, 1, 7, 0, 32, 0, 40, 2, 0, 11]);
const instance = new WebAssembly.Instance(new WebAssembly.Module(code), {a: {b: memory}});
try { instance.exports.c(0x7fffffff); } catch (error) { console.log(error.constructor.name); }
"""


def test_node_keeps_its_webassembly_traps(probe: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not here")
    result = run_program([node, "-e", NODE, probe], PROBE_ROUNDS="50")
    assert (result.returncode, result.stdout) == (0, "probe: entered\nRuntimeError\n"), result.stderr
