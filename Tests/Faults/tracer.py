"""A daemon under the tracer of faults.c, which is told through a file that both have mapped what is to happen when."""

import contextlib
import mmap
import os
import pathlib
import signal
import struct
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "Integration"))

from harness import QBDD, REPOSITORY, Daemon, wait_for  # noqa: E402

TRACER = pathlib.Path(os.environ.get("QBD_FAULTS", REPOSITORY / ".build" / "faults"))
MODES = {"record": 0, "fail": 1, "short": 2, "kill-before": 3, "kill-after": 4}


class Control:
    """struct control of faults.c."""

    KEY = 512
    LOG = 1 << 20
    FIELDS = {"armed": 0, "mode": 4, "error": 8, "ring": 12, "hit": 16, "pid": 20, "status": 24, "ended": 28,
              "calls": 32, "without_ring": 36}  # fmt: skip
    KEY_AT = 40
    LOGGED_AT = KEY_AT + KEY
    LOG_AT = LOGGED_AT + 4
    SIZE = LOG_AT + LOG

    def __init__(self, path):
        self.path = path
        with open(path, "a+b") as file:
            file.truncate(self.SIZE)
            self.memory = mmap.mmap(file.fileno(), self.SIZE)
        self.rounds = 0

    def __getattr__(self, name):
        return struct.unpack_from("<i", self.memory, self.FIELDS[name])[0]

    def set(self, name, value):
        struct.pack_into("<i", self.memory, self.FIELDS[name], value)

    def arm(self, mode, error=0, key=""):
        """From now on calls are counted, from 1."""
        self.disarm()
        text = key.encode() + b"\0"
        self.memory[self.KEY_AT : self.KEY_AT + len(text)] = text
        self.set("mode", MODES[mode])
        self.set("error", error)
        self.set("hit", 0)
        struct.pack_into("<I", self.memory, self.LOGGED_AT, 0)
        self.rounds += 1
        self.set("armed", self.rounds)

    def disarm(self):
        self.set("armed", 0)

    def log(self):
        """The keys that were met since it was armed to record them, in their order."""
        (length,) = struct.unpack_from("<I", self.memory, self.LOGGED_AT)
        return self.memory[self.LOG_AT : self.LOG_AT + length].decode().splitlines()

    def settle(self, quiet=0.05, limit=5):
        """Waits until the daemon touches no file any more: what it does in the background is done."""
        deadline = time.monotonic() + limit
        calls, since = self.calls, time.monotonic()
        while not self.ended and time.monotonic() < deadline and time.monotonic() < since + quiet:
            time.sleep(0.004)
            if self.calls != calls:
                calls, since = self.calls, time.monotonic()


class TracedDaemon(Daemon):
    """A qbdd of which single system calls can be made to fail. It lies in a folder that is given."""

    def __init__(self, root):
        super().__init__(root=root)
        self.control = Control(self.directory / "control")

    @property
    def folders(self):
        """By the names that they have in keys."""
        return {
            "pool": self.pool_path, "state": self.state, "config": self.config, "ctl": self.socket,
            "ctl.lock": f"{self.socket}.lock", "nbd": self.nbd_socket, "nbd.lock": f"{self.nbd_socket}.lock",
            "dev": "/dev", "sys": "/sys", "proc": "/proc",
        }  # fmt: skip

    def launch(self, options, variables):
        for field in ("ended", "status", "pid"):
            self.control.set(field, 0)
        folders = [f"{name}={path}" for name, path in self.folders.items()]
        self.executable = str(TRACER)
        return super().launch(
            [self.control.path, *folders, "--", QBDD, *options],
            # The order of what is gone through in a table is the same each time.
            {**variables, "SWIFT_DETERMINISTIC_HASHING": "1"},
        )

    @property
    def alive(self):
        return super().alive and not self.control.ended

    @property
    def pid(self):
        return self.control.pid

    def kill(self):
        self.expected_to_run = False
        with contextlib.suppress(ProcessLookupError):
            if self.control.pid and not self.control.ended:
                os.kill(self.control.pid, signal.SIGKILL)
        try:
            self.process.wait(10)
        except Exception:
            self.process.kill()
            self.process.wait()

    def terminate(self, seconds=10):
        """Asks it to end and returns what waitpid(2) said of it, or None when it does not."""
        self.expected_to_run = False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.control.pid, signal.SIGTERM)
        try:
            wait_for(lambda: self.control.ended, "it ends", seconds)
        except AssertionError:
            return None
        self.process.wait(10)
        return self.control.status

    def end(self):
        """How it ended: None while it runs, a signal as a negative number, or its exit status."""
        if not self.control.ended:
            return None
        return os.waitstatus_to_exitcode(self.control.status & 0xFFFF)


def threads(pid):
    """Where the threads of a process are, for somebody who looks into why it hangs."""
    lines = []
    for task in sorted(pathlib.Path(f"/proc/{pid}/task").glob("*"), key=lambda path: int(path.name)):
        with contextlib.suppress(OSError):
            comm = (task / "comm").read_text().strip()
            call = (task / "syscall").read_text().split()[0]
            state = (task / "stat").read_text().rsplit(")", 1)[1].split()[0]
            stack = ""
            with contextlib.suppress(OSError):
                stack = " ".join(line.split()[-1].split("+")[0] for line in (task / "stack").read_text().splitlines())
            lines.append(f"{task.name} {comm}: {state}, system call {call} {stack}")
    return "\n".join(lines)
