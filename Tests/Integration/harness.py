"""Runs the built qbd and qbdd as a user does, each daemon in a directory of its own.

Every path of a daemon is overridden, so any number of them run side by side, and beside an installed one.
"""

import contextlib
import dataclasses
import http.client
import json
import mmap
import os
import pathlib
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time

from ports import free_port

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
BIN = pathlib.Path(os.environ.get("QBD_BIN_DIR", REPOSITORY / ".build" / "release")).resolve()
QBD = str((BIN / "qbd").resolve())
QBDD = str((BIN / "qbdd").resolve())

KiB = 1024
MiB = 1024 * KiB


def _sanitizer():
    """The sanitizer qbdd was built with, or None: such a build is several times slower and bigger."""
    with contextlib.suppress(OSError, ValueError):
        with open(QBDD, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            for name, mark in (("address", b"__asan_init"), ("thread", b"__tsan_init")):
                if text.find(mark) >= 0:
                    return name
    return None


SANITIZER = _sanitizer()
# Deadlines are multiplied by it, counts of long loops divided by it.
SLOWNESS = 8 if SANITIZER else 1

# What a healthy daemon never logs, whatever a client does to it. Modprobe's word for a missing module is no disaster.
DISASTER = re.compile(r"(?<!modprobe: )fatal|crash|sanitizer|runtime error|stack dump", re.IGNORECASE)


def wait_for(condition, what, seconds=10, pause=0.005):
    """Polls `condition` until it is true and returns its value; fails with `what` after `seconds`."""
    deadline = time.monotonic() + seconds * SLOWNESS
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds * SLOWNESS} s: {what}")
        time.sleep(pause)


@dataclasses.dataclass
class Result:
    """What a command left behind."""

    command: list
    status: int
    out: str
    err: str
    seconds: float

    def __str__(self):
        return (
            f"{' '.join(self.command)}: exit status {self.status} after {self.seconds:.2f} s"
            f"\n--- stdout\n{self.out}--- stderr\n{self.err}"
        )

    def succeeded(self):
        assert self.status == 0, f"should have succeeded: {self}"
        return self

    def failed(self, status, *words):
        """Asserts the exit status, a clean stdout, and one line on stderr that has every one of `words`."""
        assert self.status == status, f"should have failed with status {status}: {self}"
        assert self.out == "", f"stdout must stay clean on errors: {self}"
        lines = self.err.splitlines()
        if status == 64:
            assert lines, f"a usage error must say what was wrong: {self}"
        else:
            assert len(lines) == 1 and lines[0].strip(), f"stderr must be one line: {self}"
        for word in words:
            assert word.lower() in self.err.lower(), f"stderr should say {word!r}: {self}"
        return self


def environment(**extra):
    """This process's environment without what would steer a daemon, and with `extra`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("QBD_", "LISTEN_", "NOTIFY_")) or name == "QBD_BIN_DIR"
    }
    kept.update({name: str(value) for name, value in extra.items()})
    return kept


def connections(address, port):
    """The rows of /proc/net/tcp of the connections that were accepted at an IPv4 address, split at blanks."""
    wanted = f"{int.from_bytes(socket.inet_aton(address), 'little'):08X}:{port:04X}"
    with open("/proc/net/tcp") as file:
        rows = [line.split() for line in file.readlines()[1:]]
    return [row for row in rows if row[1] == wanted and row[3] == "01"]


def keepalive(address, port):
    """Seconds until the kernel asks each client of an address for a sign; of those with a timer for that."""
    timers = [row[5].split(":") for row in connections(address, port)]
    return [int(left, 16) / 100 for kind, left in timers if kind == "02"]


def run(command, timeout=60, **options):
    """Runs a program to its end."""
    command = [str(word) for word in command]
    options.setdefault("env", environment())
    started = time.monotonic()
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=timeout * SLOWNESS,
        **options,
    )
    return Result(
        command,
        done.returncode,
        done.stdout.decode(errors="replace"),
        done.stderr.decode(errors="replace"),
        time.monotonic() - started,
    )


class Server:
    """A process that serves, in a folder of its own, and its log. Subclasses say when it `accepts`."""

    def __init__(self, executable, root="/tmp"):
        self.executable = executable
        self.name = os.path.basename(executable)
        # Short, because a Unix socket's path has at most 107 bytes.
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="qbd-", dir=root))
        self.log_path = self.directory / "log"
        self.process = None
        # Set by a test that ends it itself or expects disasters in its log.
        self.expected_to_run = True

    def launch(self, options, variables):
        """Starts it and returns when it accepts."""
        self.expected_to_run = True
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                [self.executable, *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                env=environment(**variables),
            )
        wait_for(lambda: self.accepts() or not self.alive, f"{self.name} accepts", pause=0.002)
        assert self.alive, f"{self.name} ended at its start with {self.process.returncode}:\n{self.log()}"
        return self

    @property
    def alive(self):
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self):
        return self.process.pid

    def stop(self, seconds=10):
        """Asks it to end, as systemd does, and asserts that it ends cleanly."""
        assert self.alive, f"{self.name} was not running any more:\n{self.log()}"
        self.process.send_signal(signal.SIGTERM)
        self.wait_exit(seconds)

    def wait_exit(self, seconds=10):
        try:
            status = self.process.wait(seconds * SLOWNESS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.name} did not end within {seconds * SLOWNESS} s of SIGTERM") from None
        self.expected_to_run = False
        assert status == 0, f"{self.name} ended with status {status} after SIGTERM:\n{self.log()}"

    def kill(self):
        """kill -9."""
        self.expected_to_run = False
        self.process.kill()
        self.process.wait()

    def finish(self):
        """The end of a test: it lives unless the test ended it, ends with 0, and logged no disaster."""
        try:
            if self.process is not None and self.expected_to_run:
                assert self.alive, f"{self.name} died, status {self.process.returncode}:\n{self.log()}"
                self.stop()
            bad = [line for line in self.log().splitlines() if DISASTER.search(line)]
            assert not bad, "the log has\n" + "\n".join(bad)
        finally:
            if self.alive:
                self.kill()
            shutil.rmtree(self.directory, ignore_errors=True)

    def log(self):
        with contextlib.suppress(FileNotFoundError):
            return self.log_path.read_text(errors="replace")
        return ""

    # What the kernel knows of the process

    def resident(self):
        """Resident memory in bytes."""
        return self._status("VmRSS") * KiB

    def threads(self):
        return self._status("Threads")

    def descriptors(self):
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def _status(self, key):
        with open(f"/proc/{self.pid}/status") as file:
            for line in file:
                if line.startswith(key + ":"):
                    return int(line.split()[1])
        raise KeyError(key)


class Daemon(Server):
    """One qbdd with two pools, `disk` (type=local) and `ram` (type=memory)."""

    POOLS = ("disk", "ram")

    def __init__(self, tcp=False, configuration="", root="/tmp", pool_path=None):
        super().__init__(QBDD, root)
        self.socket = self.directory / "ctl.sock"
        self.nbd_socket = self.directory / "nbd.sock"
        self.config = self.directory / "qbd.conf"
        self.state = self.directory / "state"
        self.pool_path = pathlib.Path(pool_path or self.directory / "pool")
        self.pool_path.mkdir(exist_ok=True)
        self.state.mkdir()
        self.port = free_port() if tcp else None
        text = f"[pool.disk]\ntype=local\npath={self.pool_path}\n\n[pool.ram]\ntype=memory\n"
        if self.port:
            text += f"\n[nbd]\nlisten=127.0.0.1:{self.port}\n"
        self.config.write_text(text + configuration)

    # The process

    @property
    def options(self):
        return [
            "--config", str(self.config), "--socket", str(self.socket),
            "--nbd-socket", str(self.nbd_socket), "--state", str(self.state),
        ]  # fmt: skip

    @property
    def variables(self):
        return {
            "QBD_CONFIG": str(self.config),
            "QBD_SOCKET": str(self.socket),
            "QBD_NBD_SOCKET": str(self.nbd_socket),
            "QBD_STATE": str(self.state),
        }

    def start(self, options=None, variables=None):
        """Starts the daemon and returns when its control socket accepts."""
        return self.launch(self.options if options is None else options, variables or {})

    def accepts(self):
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self.socket))
                return True
            except OSError:
                return False

    # The command

    def qbd(self, *words, timeout=30, variables=None, **options):
        """Runs `qbd` against this daemon."""
        return run([QBD, *words], timeout, env=environment(**{**self.variables, **(variables or {})}), **options)

    def json(self, *words):
        """The parsed output of a `qbd` command with --json."""
        result = self.qbd(*words, "--json").succeeded()
        try:
            return json.loads(result.out)
        except ValueError:
            raise AssertionError(f"--json must print JSON and nothing else: {result}") from None

    def post(self, command, **fields):
        """Asks the control socket without qbd: (HTTP status, parsed answer)."""
        connection = http.client.HTTPConnection("qbdd", timeout=30 * SLOWNESS)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(30 * SLOWNESS)
        connection.sock.connect(str(self.socket))
        try:
            connection.request("POST", f"/v1/{command}", json.dumps(fields), {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def create(self, volume, size="64M", block_size=None):
        self.qbd("create", volume, "-k", str(size), *(["--block-size", block_size] if block_size else [])).succeeded()

    def map(self, volume, read_only=False):
        """Exports a volume and returns its URI."""
        result = self.qbd("map", "--export", volume, *(["--read-only"] if read_only else [])).succeeded()
        assert result.out == self.uri(volume) + "\n", f"map --export prints the URI and nothing else: {result}"
        return self.uri(volume)

    def volume(self, name, size="64M", block_size=None, read_only=False):
        """Creates and exports a volume and returns its URI."""
        self.create(name, size, block_size)
        return self.map(name, read_only)

    def uri(self, volume):
        return f"nbd+unix:///{volume}?socket={self.nbd_socket}"

    def used(self):
        """Bytes that the pool's directory takes on its file system."""
        return sum(path.stat().st_blocks * 512 for path in self.pool_path.rglob("*") if path.is_file())


class Watchdog:
    """A process beside this one that kills the daemons of a test that ran out of its time, so that whatever waits for
    them sees an end of file.

    A client blocked inside a C library, maybe with the interpreter's lock, cannot be interrupted any other way.
    """

    def __init__(self):
        reader, self.writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(self.writer)
                self._watch(reader)
            finally:
                os._exit(0)
        os.close(reader)

    @contextlib.contextmanager
    def limit(self, seconds):
        seconds *= SLOWNESS
        started = time.monotonic()
        os.write(self.writer, struct.pack("d", seconds))
        try:
            yield
        finally:
            os.write(self.writer, struct.pack("d", 0))
        elapsed = time.monotonic() - started
        assert elapsed < seconds, f"the test ran for {elapsed:.0f} s; after {seconds} s its daemons were killed"

    def close(self):
        os.close(self.writer)
        os.waitpid(self.pid, 0)

    @staticmethod
    def _watch(reader):
        """Every message sets the limit anew, 0 means none; the end of the pipe is the end."""
        deadline = None
        while True:
            wait = None if deadline is None else max(0, deadline - time.monotonic())
            if select.select([reader], [], [], wait)[0]:
                message = os.read(reader, 8)
                if not message:
                    return
                (seconds,) = struct.unpack("d", message)
                deadline = time.monotonic() + seconds if seconds else None
            else:
                kill_daemons(os.getppid())
                # Once more a little later, should the test start another one.
                deadline = time.monotonic() + 1


def kill_daemons(parent):
    """kill -9 for every qbdd that `parent` has started."""
    for status in pathlib.Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            pid = int(status.parent.name)
            if f"\nPPid:\t{parent}\n" in status.read_text() and os.readlink(f"/proc/{pid}/exe") == QBDD:
                os.kill(pid, signal.SIGKILL)
