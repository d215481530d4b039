"""A client of its own that attaches to the selftest enclave and does one operation in it.

selftest_client.py SOCKET put VALUE, or selftest_client.py SOCKET get: prints what came out.
"""

from __future__ import annotations

import sys

import teemate


def main() -> None:
    """Do it."""
    from selftest_operations import Operations

    socket, operation, *values = sys.argv[1:]
    with teemate.connect(socket) as broker:
        with broker.attach("selftest", slots=1) as enclave, enclave.slot() as slot:
            operations = Operations(slot)
            if operation == "put":
                operations.put_buffer(int(values[0], 0))
            print(hex(operations.get_buffer()))


if __name__ == "__main__":
    main()
