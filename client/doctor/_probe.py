"""Create, map, enter and leave the smallest enclave: ``python -m teemate.doctor._probe BACKEND``.

Prints how long it took, and ends with status 0; else the reason goes to stderr, and the status is
1.  In a program of its own, so that the doctor outlives whatever happens.
"""

from __future__ import annotations

import resource
import sys
import time

from teemate import create_enclave
from teemate.errors import Error
from teemate.image import shipped

_EEXIT = 4


def main() -> int:
    backend = sys.argv[1]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is an answer, not something to keep
    try:
        image = shipped("bare")
        start = time.perf_counter()
        with create_enclave(image.sgxs, image.sigstruct, backend=backend) as enclave:
            with enclave.slot() as slot:
                function = slot.enter().function
        elapsed = time.perf_counter() - start
    except Error as error:
        print(f"{error.code}: {error}", file=sys.stderr)
        return 1
    if function != _EEXIT:
        print(f"the enclave was left by leaf {function} instead of EEXIT", file=sys.stderr)
        return 1
    print(f"an enclave was created, mapped, entered and left in {elapsed * 1e3:.1f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
