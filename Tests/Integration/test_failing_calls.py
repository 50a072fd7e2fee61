"""System calls of the daemon's loops that fail: they may cost the I/O or the connection that made them, not the daemon."""

import contextlib
import os
import shutil
import socket
import subprocess
import threading
import time

import pytest

from harness import MiB, SANITIZER, run, wait_for

pytestmark = pytest.mark.skipif(
    shutil.which("strace") is None or SANITIZER is not None, reason="strace is missing, or a sanitizer traces itself"
)

PATTERN = ["qemu-io", "-f", "raw", "-c", "write -P 7 0 8M", "-c", "flush", "-c", "read -P 7 0 8M"]


@contextlib.contextmanager
def failing(daemon, call, inject):
    """Has a system call of the daemon fail, as strace(1) describes it; yields the path of a list of those that it made."""
    calls = daemon.directory / f"strace-{time.monotonic_ns()}"
    tracer = subprocess.Popen(
        ["strace", "-f", "-p", str(daemon.pid), "-e", f"trace={call}", "-e", f"inject={call}:{inject}", "-o", str(calls)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert "attached" in tracer.stderr.readline()
        # It says so of each thread, and would wait where nobody reads that.
        drain = threading.Thread(target=tracer.stderr.read, daemon=True)
        drain.start()
        yield calls
    finally:
        tracer.terminate()
        tracer.wait()
    assert daemon.alive, f"the daemon ended:\n{daemon.log()}"


def drop_cache(daemon):
    """Has reads wait for the disk: they go to the ring."""
    for path in daemon.pool_path.glob("*.raw"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def processor_seconds(daemon):
    with open(f"/proc/{daemon.pid}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("error", ["ENOMEM", "EAGAIN", "EBUSY", "EINTR", "EPERM"])
def test_a_ring_that_the_kernel_takes_nothing_from(daemon, error):
    uri = daemon.volume("disk/a", 8 * MiB)
    with failing(daemon, "io_uring_enter", f"error={error}") as calls:
        for _ in range(3):
            run([*PATTERN, uri]).succeeded()
            drop_cache(daemon)
        assert "INJECTED" in calls.read_text(), "the ring was not used"
        before = processor_seconds(daemon)
        time.sleep(1)
        assert processor_seconds(daemon) - before < 0.3, "the daemon is busy though it has nothing to do"
    # It is used again when it works.
    with failing(daemon, "io_uring_enter", "delay_enter=1") as calls:
        run([*PATTERN, uri]).succeeded()
        assert " = 1" in calls.read_text()


def test_a_ring_that_the_kernel_takes_something_from_now_and_then(daemon):
    uri = daemon.volume("disk/a", 64 * MiB)
    run(["qemu-io", "-f", "raw", "-c", "write -P 7 0 64M", "-c", "flush", uri]).succeeded()
    # A call of many fails, and some that it failed with stay for the next.
    with failing(daemon, "io_uring_enter", "error=ENOMEM:when=2+3"):
        for _ in range(3):
            drop_cache(daemon)
            run(["nbdcopy", "--connections=2", "--requests=64", "--request-size=65536", uri, "null:"]).succeeded()
            run(["qemu-io", "-f", "raw", "-c", "read -P 7 0 64M", "-c", "flush", uri]).succeeded()


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("epoll_ctl", "ENOMEM"),
        ("epoll_pwait2", "ENOMEM"),
        ("epoll_pwait2", "EINTR"),
        ("timerfd_settime", "ENOMEM"),
        ("timerfd_create", "EMFILE"),
        ("eventfd2", "EMFILE"),
        ("epoll_create1", "ENFILE"),
        ("accept4", "EMFILE"),
        ("pipe2", "EMFILE"),
        ("clone3", "EAGAIN"),
        ("recvfrom", "ENOMEM"),
        ("sendto", "ENOBUFS"),
        ("sendmsg", "ENOBUFS"),
        ("write", "EINTR"),
        ("splice", "ENOMEM"),
    ],
)
def test_a_call_of_a_loop_that_fails_now_and_then(daemon, call, error):
    uri = daemon.volume("disk/a", 8 * MiB)
    memory = daemon.volume("ram/a", 8 * MiB)
    with failing(daemon, call, f"error={error}:when=1+5"):
        for _ in range(3):
            # Some of it may fail, and none of it may wait for ever.
            for name in (uri, memory):
                run([*PATTERN, name])
            daemon.qbd("create", "disk/b", "-k", "1M")
            daemon.qbd("map", "--export", "disk/b")
            daemon.qbd("unmap", "disk/b")
            daemon.qbd("delete", "disk/b")
    for name in (uri, memory):
        run([*PATTERN, name]).succeeded()
    daemon.qbd("unmap", "disk/b")
    daemon.qbd("delete", "disk/b")
    open_now = daemon.descriptors()
    for _ in range(3):
        daemon.volume("disk/b", MiB)
        daemon.qbd("unmap", "disk/b").succeeded()
        daemon.qbd("delete", "disk/b").succeeded()
    wait_for(lambda: daemon.descriptors() <= open_now + 4, "descriptors are given back")


@pytest.mark.parametrize("path", ["socket", "nbd_socket"])
def test_clients_that_cannot_be_accepted_wait(daemon, path):
    daemon.volume("disk/a", MiB)
    with socket.socket(socket.AF_UNIX) as client:
        with failing(daemon, "accept4", "error=EMFILE") as calls:
            client.connect(str(getattr(daemon, path)))
            wait_for(lambda: "EMFILE" in calls.read_text(), "it is tried")
            before = calls.read_text().count("EMFILE")
            time.sleep(1)
            tries = calls.read_text().count("EMFILE") - before
            assert tries < 50, f"the daemon has tried {tries} times in a second"
        run([*PATTERN[:4], "write -P 7 0 1M", daemon.uri("disk/a")]).succeeded()
        daemon.qbd("list").succeeded()
