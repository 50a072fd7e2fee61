"""TCP ports for servers of tests and benchmarks."""

import contextlib
import itertools
import random
import socket

# Below the range the kernel gives to connections and to port 0, so that neither takes one between the question and the
# server's start. Each is given once.
_first_port = random.randrange(10_000, 32_768)
_ports = itertools.chain(range(_first_port, 32_768), range(10_000, _first_port))


def free_port():
    """A TCP port that nobody has at any address, and that no other call returned."""
    for port in _ports:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise AssertionError("no TCP port below 32768 is left")
