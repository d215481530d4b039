"""Sources of small enclaves, and how to call the command in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import IO

BARE = """
        .text
        .globl  _start
        .type   _start, @function
_start:
        xorl    %edi, %edi
        movq    word(%rip), %rdx
        movq    %rcx, %rbx
        movl    $4, %eax
        enclu
        .size   _start, . - _start
        .data
word:   .quad   word
"""

SAMPLE = """\
#include "tmsdk.h"

static const char *const texts[] = {"one", "two"};
static uint64_t table[1024];

__attribute__((noipa)) static uint64_t divide(uint64_t a, uint64_t b)
{
    return a / b; /* LINE: divide */
}

TM_ECALL(hello)
{
    const char *text = texts[rq->in_len & 1];

    table[rq->in_len & 1023] = divide(rq->out_cap, rq->in_len);
    return tm_reply(rq, text, 3);
}
"""


def run_teemate(
    *args: object, cwd: Path | None = None, stdout: IO[bytes] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command as it is installed, in a process of its own."""
    program = Path(sys.executable).with_name("teemate")
    return subprocess.run(
        [str(program), *map(str, args)],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=stdout or subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=120,
    )
