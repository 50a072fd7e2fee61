"""What survives the daemon, and what it may not believe of it: errors are not absence, and nothing is waited for."""

import contextlib
import errno
import fcntl
import os
import shutil
import subprocess
import time

import pytest

from harness import KiB, MiB, QBDD, SANITIZER, environment, run, wait_for
from wire import CMD_FLUSH, CMD_READ, CMD_WRITE, Session

needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None or SANITIZER is not None, reason="strace is missing, or a sanitizer traces itself"
)
# Far more than any of these takes, and far less than for ever.
PROMPT = 15
LONG = "n" * 128


@contextlib.contextmanager
def failing(daemon, *injections):
    """System calls of the daemon fail as strace(1) is told."""
    calls = ",".join(one.split(":")[0] for one in injections)
    tracer = subprocess.Popen(
        ["strace", "-f", "-p", str(daemon.pid), "-e", f"trace={calls}", "-o", "/dev/null",
         *(word for one in injections for word in ("-e", f"inject={one}"))],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert "attached" in tracer.stderr.readline()
        yield
    finally:
        tracer.terminate()
        tracer.wait()
        tracer.stderr.close()


def start_failing(daemon, path, injection):
    """A start of the daemon, to its end, at which system calls on this path fail."""
    call = injection.split(":")[0]
    return run(
        ["strace", "-f", "-o", "/dev/null", "-P", path, "-e", f"trace={call}", "-e", f"inject={injection}", QBDD,
         *daemon.options],
        timeout=PROMPT, env=environment(**daemon.variables),
    )  # fmt: skip


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# A failed flush


@needs_strace
@pytest.mark.parametrize("snapshots", [False, True])
def test_the_next_daemon_knows_that_a_flush_failed(daemon, snapshots):
    daemon.create("disk/a", 16 * MiB)
    if snapshots:
        daemon.qbd("snapshot", "create", "disk/a@one").succeeded()
    # Where io_uring is refused, threads make the calls.
    with failing(daemon, "io_uring_setup:error=EPERM"):
        daemon.map("disk/a")
    with failing(daemon, "fdatasync:error=EIO"):
        session = Session(daemon.nbd_socket).greet()
        session.go("disk/a")
        assert session.call(CMD_WRITE, 0, payload=b"x" * 64 * KiB).error == 0
        assert session.call(CMD_FLUSH, 0, 0).error == errno.EIO
        daemon.kill()
        daemon.process.wait()
    for _ in range(2):
        daemon.start()
        info = daemon.json("info", "disk/a")
        assert info["health"] == "failed"
        assert abs(info["flushes_fail_since"] - time.time()) < 60
        assert "flushes fail: since" in " ".join(daemon.qbd("info", "disk/a").succeeded().out.split())
        session = Session(daemon.nbd_socket).greet()
        session.go("disk/a")
        assert session.call(CMD_READ, 0, 4096).data == b"x" * 4096
        assert session.call(CMD_FLUSH, 0, 0).error == errno.EIO
        # What is written for another reason keeps it.
        daemon.qbd("throttle", "disk/a", "-t", "read_iops=100000").succeeded()
        daemon.kill()
        daemon.process.wait()
    daemon.start()
    daemon.qbd("unmap", "disk/a").succeeded()
    daemon.map("disk/a")
    assert "flushes_fail_since" not in daemon.json("info", "disk/a")
    session = Session(daemon.nbd_socket).greet()
    session.go("disk/a")
    assert session.call(CMD_FLUSH, 0, 0).error == 0


# What cannot be read


@needs_strace
@pytest.mark.parametrize(
    "file, injection",
    [("", "getdents64:error=EIO"), ("", "getdents64:error=ENOMEM"), ("id", "read:error=EIO")],
)
def test_a_daemon_that_cannot_read_its_state_changes_nothing(daemon, file, injection):
    daemon.volume("disk/a", MiB)
    daemon.kill()
    daemon.process.wait()
    before = contents(daemon.state)
    result = start_failing(daemon, daemon.state / file, injection)
    assert result.status not in (0, -9), f"it should say that it cannot start: {result}"
    assert str(daemon.state) in result.err
    assert contents(daemon.state) == before
    daemon.start()
    assert [one["volume"] for one in daemon.json("list")] == ["disk/a"]


def test_a_document_that_is_none_hinders_no_other(daemon):
    daemon.volume("disk/a", MiB)
    daemon.kill()
    daemon.process.wait()
    (daemon.state / "disk@empty.mapping").write_bytes(b"")
    (daemon.state / "disk@damaged.mapping").write_text("{")
    (daemon.state / "disk@folder.mapping").mkdir()
    (daemon.state / "disk@link.mapping").symlink_to("disk@a.mapping")
    os.mkfifo(daemon.state / "disk@fifo.mapping")
    daemon.start()
    assert [one["volume"] for one in daemon.json("list")] == ["disk/a"]
    for name in ("empty", "damaged", "folder", "link", "fifo"):
        assert f"disk/{name} is not taken over" in daemon.log(), name
    for name in ("empty", "damaged", "link", "fifo"):
        daemon.volume(f"disk/{name}", MiB)
        daemon.qbd("unmap", f"disk/{name}").succeeded()
    daemon.stop()


# Long names


def test_names_may_be_as_long_as_the_manual_says(new_daemon):
    daemon = new_daemon(configuration="")
    daemon.config.write_text(daemon.config.read_text() + f"\n[pool.{LONG}]\ntype=local\npath={daemon.pool_path}/long\n")
    daemon.start()
    volumes = [f"{LONG}/{LONG}", f"{LONG}/{LONG[:-1]}m"]
    for volume in volumes:
        daemon.volume(volume, MiB)
        daemon.qbd("snapshot", "create", f"{volume}@{LONG}").succeeded()
        daemon.map(f"{volume}@{LONG}", read_only=True)
    everything = sorted([*volumes, *(f"{volume}@{LONG}" for volume in volumes)])
    assert sorted(one["volume"] for one in daemon.json("list")) == everything
    daemon.qbd("throttle", volumes[0], "-t", "read_iops=1000").succeeded()
    daemon.kill()
    daemon.process.wait()
    daemon.start()
    assert sorted(one["volume"] for one in daemon.json("list")) == everything
    run(["qemu-io", "-f", "raw", "-c", "write -P 7 0 64k", daemon.uri(volumes[0])]).succeeded()
    # Its hook would have a name that no file can have: it has none.
    file = daemon.directory / "map.conf"
    file.write_text(f"{volumes[0]}@{LONG} export=1 readonly=1\n")
    daemon.qbd("map-all", "-f", file, variables={"QBD_HOOKS": daemon.directory / "hooks"}).succeeded()
    for volume in reversed(everything):
        daemon.qbd("unmap", volume).succeeded()
    assert not list(daemon.state.glob("*.mapping"))
    for volume in volumes:
        daemon.qbd("delete", volume, "--snapshots").succeeded()


# Special files


@pytest.mark.parametrize("file", ["qbd.conf", "state/~lock", "state/id", "ctl.sock.lock", "nbd.sock", "ctl.sock"])
def test_a_fifo_in_the_way_of_a_start_is_not_waited_for(new_daemon, file):
    daemon = new_daemon()
    path = daemon.directory / file
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    result = run([QBDD, *daemon.options], timeout=PROMPT, env=environment(**daemon.variables))
    assert result.status > 0, result
    assert str(path) in result.err


def test_a_fifo_in_the_way_of_a_command_is_not_waited_for(daemon):
    daemon.create("disk/a", MiB)
    fifo = daemon.directory / "fifo"
    os.mkfifo(fifo)
    daemon.qbd("create", "disk/b", "-k", "1M", "-c", fifo, timeout=PROMPT).failed(errno.EINVAL, str(fifo))
    daemon.qbd("volumes", "-c", fifo, timeout=PROMPT).failed(errno.EINVAL, str(fifo))
    daemon.qbd("map-all", "-f", fifo, timeout=PROMPT).failed(errno.EINVAL, str(fifo))
    daemon.qbd("list", "--socket", fifo, timeout=PROMPT).failed(errno.ENOTSOCK)
    # What a crash may have left beside the list of volumes is replaced, whatever it is.
    file = daemon.directory / "map.conf"
    os.mkfifo(daemon.directory / ".map.conf.new")
    daemon.qbd("map", "--export", "disk/a", "--save", "-f", file, timeout=PROMPT).succeeded()
    assert "disk/a" in file.read_text()
    # A hook cannot be run then, which is said.
    hooks = daemon.directory / "hooks"
    (hooks / "disk").mkdir(parents=True)
    os.mkfifo(hooks / "disk" / "a")
    daemon.qbd("unmap", "disk/a", timeout=PROMPT, variables={"QBD_HOOKS": hooks}).failed(errno.ECHILD, "disk/a")


def test_a_lock_of_the_list_that_others_have_is_not_waited_for_for_ever(daemon):
    """The folder of map.conf can be locked by whoever may read it."""
    daemon.create("disk/a", MiB)
    file = daemon.directory / "map.conf"
    holder = os.open(daemon.directory, os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        started = time.monotonic()
        result = daemon.qbd("map", "--export", "disk/a", "--save", "-f", file, timeout=50)
        assert result.status == errno.EBUSY and str(file) in result.err, result
        assert time.monotonic() - started > 5
    finally:
        os.close(holder)


# Sockets


def test_a_socket_that_somebody_else_has_put_there_stays(new_daemon):
    daemon = new_daemon().start()
    daemon.nbd_socket.unlink()
    daemon.nbd_socket.write_text("somebody's")
    lock = daemon.socket.with_name(daemon.socket.name + ".lock")
    lock.unlink()
    lock.write_text("somebody's")
    daemon.stop()
    assert daemon.nbd_socket.read_text() == "somebody's"
    assert lock.read_text() == "somebody's"


# Pools


@pytest.fixture
def small_pool(new_daemon):
    """A daemon whose local pool lies on a file system of 64 MiB."""
    daemon = new_daemon()
    if os.geteuid() != 0 or run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", daemon.pool_path]).status != 0:
        pytest.skip("no file system can be mounted here")
    try:
        yield daemon.start()
    finally:
        with contextlib.suppress(AssertionError):
            if daemon.alive:
                daemon.stop()
        run(["umount", daemon.pool_path])


def test_a_pool_that_is_nearly_full_says_so(small_pool):
    daemon = small_pool
    daemon.create("disk/a", MiB)
    assert daemon.qbd("volumes").succeeded().err == ""
    filler = daemon.pool_path / "filler"
    filler.write_bytes(bytes(62 * MiB))
    result = daemon.qbd("volumes", "disk").succeeded()
    assert "the pool disk is nearly full" in result.err and "disk/a" in result.out
    assert daemon.json("volumes", "disk")[0]["pool_nearly_full"] is True
    daemon.map("disk/a")
    wait_for(lambda: daemon.json("info", "disk/a").get("pool", {}).get("nearly_full"), "info says so")
    assert "NEARLY FULL" in daemon.qbd("info", "disk/a").succeeded().out
    wait_for(lambda: daemon.log().count("the pool disk is nearly full") == 1, "the log says so once")
    filler.unlink()
    daemon.qbd("unmap", "disk/a").succeeded()
    daemon.map("disk/a")
    wait_for(lambda: "the pool disk has room again" in daemon.log(), "the log says when it is over")
    assert daemon.qbd("volumes").succeeded().err == ""
    assert daemon.log().count("the pool disk is nearly full") == 1


def test_damaged_volumes_are_named_and_can_be_deleted(daemon):
    for volume in ("disk/a", "disk/b", "disk/c"):
        daemon.create(volume, MiB)
    (daemon.pool_path / "b.volume").write_bytes(b"")
    for words in (("volumes",), ("volumes", "disk")):
        result = daemon.qbd(*words).succeeded()
        assert "disk/a" in result.out and "disk/c" in result.out and "disk/b" not in result.out
        assert "disk/b is damaged: " in result.err
    rows = {one["volume"]: one for one in daemon.json("volumes", "disk")}
    assert sorted(rows) == ["disk/a", "disk/b", "disk/c"]
    assert "damaged" in rows["disk/b"] and "damaged" not in rows["disk/a"]
    daemon.map("disk/a")
    daemon.create("disk/d", MiB)
    assert daemon.qbd("map", "--export", "disk/b").status != 0
    refused = daemon.qbd("delete", "disk/b")
    assert refused.status != 0 and "--force" in refused.err, refused
    daemon.qbd("delete", "disk/b", "--force").succeeded()
    assert daemon.qbd("volumes").succeeded().err == ""
    daemon.create("disk/b", MiB)
