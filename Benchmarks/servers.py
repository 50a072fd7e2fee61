"""The NBD servers that are measured: qbd and its peers, each in a process of its own, over a Unix socket.

Some hold the data; the bridges have it in a store behind them, which they reach over TCP.
"""

import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
sys.path.append(str(REPOSITORY / "Tests" / "Integration"))

from ports import free_port

BIN = pathlib.Path(os.environ.get("QBD_BIN_DIR", REPOSITORY / ".build" / "release")).resolve()
MALLOC_COUNT = REPOSITORY / ".build" / "malloc_count.so"


class Failure(Exception):
    """Something did not run; the text says what."""


def run(*command, env=None):
    """Runs a program to its end and returns its stdout."""
    command = [str(word) for word in command]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=env)
    if done.returncode:
        raise Failure(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr}")
    return done.stdout


class Server:
    """A process that serves one volume at `uri`. A context manager: running inside the `with`."""

    name = ""

    def __init__(self, size):
        self.size = size
        # Short, because a Unix socket's path has at most 107 bytes.
        self.home = pathlib.Path(tempfile.mkdtemp(prefix="qbd-bench-", dir="/tmp"))
        self.socket = self.home / "sock"
        self.uri = f"nbd+unix:///?socket={self.socket}"
        self.log = self.home / "log"
        self.process = None

    def command(self):
        raise NotImplementedError

    def environment(self):
        return dict(os.environ)

    def __enter__(self):
        try:
            with open(self.log, "wb") as log:
                self.process = subprocess.Popen(
                    [str(word) for word in self.command()], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    env=self.environment())
            self.wait_for(self.socket)
            self.started()
        except BaseException:
            self.__exit__()
            raise
        return self

    def started(self):
        pass

    def wait_for(self, address, seconds=20):
        """Until something accepts at the address: a Unix socket's path, or a host and a port."""
        deadline = time.monotonic() + seconds
        family = socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX
        while True:
            with socket.socket(family) as probe, contextlib.suppress(OSError):
                probe.connect(address if isinstance(address, tuple) else str(address))
                return
            if self.process.poll() is not None:
                raise Failure(f"{self.name} ended at its start with status {self.process.returncode}:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise Failure(f"{self.name} does not accept on {address} after {seconds} s:\n{self.tail()}")
            time.sleep(0.01)

    def tail(self):
        return self.log.read_text(errors="replace")[-4000:]

    def __exit__(self, *_):
        if self.process:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        shutil.rmtree(self.home, ignore_errors=True)

    def cpu_seconds(self):
        """User and system time of all its threads so far."""
        with open(f"/proc/{self.process.pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident(self):
        """Resident memory in bytes."""
        with open(f"/proc/{self.process.pid}/status") as file:
            for line in file:
                if line.startswith("VmRSS:"):
                    return int(line.split()[1]) * 1024
        raise Failure(f"{self.name} has no VmRSS")


class Qbd(Server):
    """qbdd with one pool, `bench`, in memory or in `directory`; it starts with `volumes` volumes exported."""

    name = "qbd"

    def __init__(self, size, directory=None, counting=False, volumes=1, programs=BIN):
        super().__init__(size)
        self.programs = programs
        self.pool = pathlib.Path(tempfile.mkdtemp(prefix="pool-", dir=directory)) if directory else None
        self.counter = self.home / "allocations" if counting else None
        self.volumes = volumes
        self.socket = self.home / "ctl.sock"
        self.paths = {
            "QBD_SOCKET": str(self.socket), "QBD_NBD_SOCKET": str(self.home / "nbd.sock"),
            "QBD_CONFIG": str(self.home / "qbd.conf"), "QBD_STATE": str(self.home / "state"),
        }

    def command(self):
        kind = f"type=local\npath={self.pool}" if self.pool else "type=memory"
        (self.home / "qbd.conf").write_text(f"[pool.bench]\n{kind}\n")
        (self.home / "state").mkdir()
        return [self.programs / "qbdd"]

    def environment(self):
        environment = {**os.environ, **self.paths}
        if self.counter:
            environment |= {"LD_PRELOAD": str(MALLOC_COUNT), "QBD_MALLOC_COUNT": str(self.counter)}
        return environment

    def started(self):
        for index in range(self.volumes):
            self.uri = self.export(f"bench/volume{index}")

    def export(self, volume):
        """Creates and exports a volume and returns its URI."""
        self.qbd("create", volume, "-k", self.size)
        return self.qbd("map", "--export", volume).strip()

    def qbd(self, *words):
        return run(self.programs / "qbd", *words, env={**os.environ, **self.paths})

    def allocations(self):
        """Calls of the allocator so far; only when started with `counting`."""
        return int.from_bytes(self.counter.read_bytes()[:8], "little")

    def __exit__(self, *_):
        super().__exit__()
        if self.pool:
            shutil.rmtree(self.pool, ignore_errors=True)


class Nbdkit(Server):
    """nbdkit's memory plugin, or its file plugin on a file in `directory`."""

    name = "nbdkit"

    def __init__(self, size, directory=None):
        super().__init__(size)
        self.image = image(size, directory) if directory else None

    def command(self):
        plugin = ["file", self.image] if self.image else ["memory", str(self.size)]
        return ["nbdkit", "--foreground", "--unix", self.socket, *plugin]

    def __exit__(self, *_):
        super().__exit__()
        if self.image:
            self.image.unlink(missing_ok=True)


class QemuNbd(Server):
    """qemu-nbd on a raw file in `directory`, which is in RAM for the memory suite."""

    name = "qemu-nbd"

    def __init__(self, size, directory=None):
        super().__init__(size)
        self.image = image(size, directory or "/dev/shm")

    def command(self):
        return ["qemu-nbd", "--socket", self.socket, "--format=raw", "--persistent", "--cache=writeback",
                "--aio=threads", "--shared=16", self.image]

    def __exit__(self, *_):
        super().__exit__()
        self.image.unlink(missing_ok=True)


class Store(Server):
    """What is behind a bridge: it listens on TCP, on the loopback interface."""

    def __init__(self, size):
        super().__init__(size)
        self.port = free_port()
        self.socket = ("127.0.0.1", self.port)


class QbdStore(Store):
    """qbd-store with one pool, `bench`, in memory."""

    name = "qbd-store"

    def __init__(self, size, programs=BIN):
        super().__init__(size)
        self.programs = programs
        self.conductor = free_port()

    def command(self):
        (self.home / "qbd.conf").write_text("[pool.bench]\ntype=memory\n")
        return [self.programs / "qbd-store", "--config", self.home / "qbd.conf", "--data-port", self.port,
                "--conductor-port", self.conductor, "--store-port", free_port()]

    def started(self):
        self.wait_for(("127.0.0.1", self.conductor))


class NbdStore(Store):
    """nbdkit's memory plugin."""

    name = "nbdkit"

    def command(self):
        return ["nbdkit", "--foreground", "--ipaddr", "127.0.0.1", "--port", self.port, "memory", str(self.size)]


class Bridge:
    """Mixed into a server: its data is in a store that runs as long as it does. The figures are the server's alone."""

    def __init__(self, size, **options):
        super().__init__(size, **options)
        self.store = self.make_store(size)

    def make_store(self, size):
        return NbdStore(size)

    def __enter__(self):
        self.store.__enter__()
        # Ends the store too when it fails.
        return super().__enter__()

    def __exit__(self, *_):
        super().__exit__()
        self.store.__exit__()


class QbdBridge(Bridge, Qbd):
    """qbdd with a volume of a PureFlash cluster, which is one qbd-store."""

    def make_store(self, size):
        return QbdStore(size, programs=self.programs)

    def command(self):
        command = super().command()
        (self.home / "qbd.conf").write_text(
            f"[conductor]\nendpoints=127.0.0.1:{self.store.conductor}\n[client]\nstore_port={self.store.port}\n")
        return command


class NbdkitBridge(Bridge, Nbdkit):
    """nbdkit's nbd plugin."""

    def command(self):
        return ["nbdkit", "--foreground", "--unix", self.socket, "nbd", f"uri=nbd://127.0.0.1:{self.store.port}"]


class QemuNbdBridge(Bridge, Server):
    """qemu-nbd with the store in place of an image."""

    name = "qemu-nbd"

    def command(self):
        return ["qemu-nbd", "--socket", self.socket, "--format=raw", "--persistent", "--shared=16",
                f"nbd://127.0.0.1:{self.store.port}"]


def image(size, directory):
    """A new sparse file."""
    handle, path = tempfile.mkstemp(prefix="bench-", suffix=".img", dir=directory)
    os.truncate(handle, size)
    os.close(handle)
    return pathlib.Path(path)


SERVERS = {server.name: server for server in (Qbd, Nbdkit, QemuNbd)}
BRIDGES = {server.name: server for server in (QbdBridge, NbdkitBridge, QemuNbdBridge)}
