"""How well a volume does: its state of health, slow requests, and a store that stands still."""

import contextlib
import errno
import os
import random
import re
import shutil
import subprocess
import time

import pytest

from harness import KiB, MiB, QBD, SLOWNESS, run, wait_for
from wire import CMD_FLUSH, CMD_READ, CMD_WRITE, Session

BLOCK = 4096


def connect(daemon, volume):
    session = Session(daemon.nbd_socket).greet()
    session.go(volume)
    return session


def health(daemon, volume):
    return daemon.json("info", volume)["health"]


@contextlib.contextmanager
def own_file_system(daemon):
    """Starts the daemon with its local pool on a file system of its own, in the image that is given."""
    image = daemon.directory / "image"
    with open(image, "wb") as file:
        file.truncate(64 * MiB)
    if os.geteuid() != 0 or run(["mkfs.ext4", "-q", image]).status != 0:
        pytest.skip("needs root and mkfs.ext4")
    mounted = run(["mount", "-o", "loop", image, daemon.pool_path])
    if mounted.status != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.err}")
    try:
        yield daemon.start() and image
    finally:
        run(["fsfreeze", "-u", daemon.pool_path])
        with contextlib.suppress(AssertionError):
            if daemon.alive:
                daemon.stop()
        run(["umount", daemon.pool_path])


@pytest.fixture
def frozen_store(new_daemon):
    """A daemon whose local pool lies on a file system of its own, and how to stop that file system and let it go on."""
    if not shutil.which("fsfreeze"):
        pytest.skip("needs fsfreeze")
    daemon = new_daemon(configuration="\n[client]\nslow_io_ms=200\n")

    def freeze():
        run(["fsfreeze", "-f", daemon.pool_path]).succeeded()

    def thaw():
        run(["fsfreeze", "-u", daemon.pool_path]).succeeded()

    with own_file_system(daemon):
        yield daemon, freeze, thaw


@pytest.mark.parametrize("piece", [16, 128], ids=["16k", "128k"])
def test_sectors_that_cannot_be_read(new_daemon, piece):
    """Also when asked for again: what could not be read lies in the page cache then, as if it had been."""
    daemon = new_daemon()
    piece *= KiB
    with own_file_system(daemon) as image:
        daemon.volume("disk/foo", 4 * MiB)
        session = connect(daemon, "disk/foo")
        data = random.Random(2).randbytes(4 * MiB)
        assert session.call(CMD_WRITE, 0, payload=data).error == 0
        assert session.call(CMD_FLUSH, 0, 0).error == 0
        raw = f"{daemon.pool_path}/foo.raw"
        end = lose_last_block(raw, image)
        descriptor = os.open(raw, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        for _ in range(3):
            assert session.read(0, piece) == data[:piece]
            assert session.read(MiB, piece) == data[MiB : MiB + piece]
            assert session.call(CMD_READ, end - piece, piece).error == errno.EIO
        # What is written is there again.
        assert session.call(CMD_WRITE, end - BLOCK, payload=b"x" * BLOCK).error == 0
        assert session.read(end - BLOCK, BLOCK) == b"x" * BLOCK


def lose_last_block(file, image):
    """Cuts the image where the file has its last block there; where that is in the file, the end of it, bytes."""
    extents = [
        [int(number) for number in match.groups()]
        for match in re.finditer(
            r"^ *\d+: +(\d+)\.\. +(\d+): +(\d+)\.\. +(\d+):", run(["filefrag", "-v", "-b4096", file]).succeeded().out,
            re.MULTILINE,
        )
    ]  # fmt: skip
    _, logical, _, physical = max(extents, key=lambda extent: extent[3])
    os.truncate(image, physical * BLOCK)
    return (logical + 1) * BLOCK


def test_idle_active_and_read_only(daemon, pool):
    volume = f"{pool}/foo"
    daemon.volume(volume)
    assert health(daemon, volume) == "idle"
    session = connect(daemon, volume)
    session.call(CMD_WRITE, 0, payload=b"x" * BLOCK)
    wait_for(lambda: health(daemon, volume) == "active", "requests make it active")
    wait_for(lambda: health(daemon, volume) == "idle", "a second without makes it idle")
    daemon.create(f"{pool}/bar")
    daemon.map(f"{pool}/bar", read_only=True)
    session = connect(daemon, f"{pool}/bar")
    session.read(0, BLOCK)
    assert health(daemon, f"{pool}/bar") == "read-only"


def test_where_it_is_shown(daemon):
    daemon.volume("disk/foo")
    short = daemon.qbd("list").succeeded().out.splitlines()
    long = daemon.qbd("list", "--long").succeeded().out.splitlines()
    assert short[0].split() == [
        "dev_id", "vol_id", "device", "volume", "config", "read_bps", "write_bps", "read_iops", "write_iops",
    ]  # fmt: skip
    assert long[0].split() == short[0].split() + ["state", "health"]
    assert long[1].split() == short[1].split() + ["normal", "idle"]
    assert daemon.qbd("-l", "--long").succeeded().out.splitlines() == long
    one = daemon.json("list")[0]
    assert one["health"] == "idle" and abs(time.time() - one["health_since"]) < 60
    assert re.search(r"^health: +idle since 20", daemon.qbd("info", "disk/foo").succeeded().out, re.MULTILINE)


def write_three(daemon):
    """Three writes at once to ram/foo, all answered; the session."""
    session = connect(daemon, "ram/foo")
    pending = {}
    for index in range(3):
        pending[session.request(CMD_WRITE, index * BLOCK, payload=b"x" * BLOCK)] = (CMD_WRITE, index * BLOCK, BLOCK)
    while pending:
        assert session.answer(pending).error == 0
    return session


def test_slow_request_is_told_once_and_counted(new_daemon):
    daemon = new_daemon(configuration="\n[client]\nslow_io_ms=100\n")
    daemon.start()
    daemon.volume("ram/foo")
    daemon.qbd("throttle", "ram/foo", "-t", "write_iops=1", "--burst", "1").succeeded()
    session = write_three(daemon)
    counters = daemon.json("info", "ram/foo")["counters"]
    assert counters["slow"] == 2
    lines = [line for line in daemon.log().splitlines() if " slow: " in line]
    assert len(lines) == 1 and "write of 4096 bytes at 4096 waits for the volume's limits" in lines[0], lines
    # It is not the store that is slow.
    assert health(daemon, "ram/foo") in ("idle", "active")
    # A suspended volume is not slow.
    daemon.qbd("suspend", "ram/foo").succeeded()
    cookie = session.request(CMD_READ, 0, BLOCK)
    wait_for(lambda: daemon.json("info", "ram/foo")["held_back"]["oldest_ms"] > 500, "it is held back")
    daemon.qbd("resume", "ram/foo", "-t", "normal").succeeded()
    assert session.answer({cookie: (CMD_READ, 0, BLOCK)}).error == 0
    assert daemon.json("info", "ram/foo")["counters"]["slow"] == 2


def test_slowness_is_of_the_configuration_of_the_map(daemon):
    other = daemon.directory / "other.conf"
    other.write_text("[pool.ram]\ntype=memory\n[client]\nslow_io_ms=50\n")
    daemon.qbd("create", "ram/foo", "-k", "1M", "-c", other).succeeded()
    daemon.qbd("map", "ram/foo", "--export", "-c", other, "--write-iops", "5", "--burst", "1").succeeded()
    write_three(daemon)
    # By the default, 2000 ms, none would be.
    assert daemon.json("info", "ram/foo")["counters"]["slow"] == 2


@pytest.mark.parametrize("value", ["0", "9", "-1", "3600001", "2s", ""])
def test_bad_limits_of_slowness_name_file_and_line(new_daemon, value):
    daemon = new_daemon(configuration=f"\n[client]\nslow_io_ms={value}\n")
    number = daemon.config.read_text().splitlines().index(f"slow_io_ms={value}") + 1
    with pytest.raises(AssertionError, match="ended at its start"):
        daemon.start()
    daemon.expected_to_run = False
    assert f"{daemon.config}:{number}: 'slow_io_ms'" in daemon.log()


def test_store_that_stands_still(frozen_store):
    """Suspending it takes too long and changes nothing; it is slow, and well again when it goes on; its I/O can be
    made to fail meanwhile."""
    daemon, freeze, thaw = frozen_store
    volume = "disk/foo"
    daemon.volume(volume, "32M")
    session = connect(daemon, volume)
    session.call(CMD_WRITE, 0, payload=b"a" * BLOCK)
    session.call(CMD_FLUSH)
    freeze()
    cookie = session.request(CMD_WRITE, 0, payload=b"b" * BLOCK)
    pending = {cookie: (CMD_WRITE, 0, BLOCK)}
    wait_for(lambda: health(daemon, volume) == "slow", "a request that waits at the store makes it slow")
    wait_for(lambda: "waits at the store" in daemon.log(), "the log says where it waits")
    assert daemon.json("info", volume)["counters"]["slow"] == 1
    started = time.monotonic()
    daemon.qbd("suspend", volume, "--timeout", "1").failed(110, volume, "in flight")
    assert 0.9 < time.monotonic() - started < 5 * SLOWNESS
    assert daemon.json("info", volume)["state"] == "normal"
    # What was held back by the attempt goes on: this one waits at the store, too.
    other = connect(daemon, volume)
    suspending = subprocess.Popen(
        [QBD, "suspend", volume, "--timeout", "60"], stderr=subprocess.PIPE, text=True,
        env={**os.environ, **daemon.variables})
    waiting = {}

    def read_is_held():
        if not waiting:
            waiting[other.request(CMD_READ, 0, BLOCK)] = (CMD_READ, 0, BLOCK)
        if daemon.json("info", volume)["held_back"]["requests"] == 1:
            return True
        other.answer(waiting)
        return False

    wait_for(read_is_held, "a read is held back")
    assert daemon.json("info", volume)["state"] == "normal", "it is not suspended before nothing is in flight"
    # Another word from an administrator ends the attempt, and what was held back goes on.
    daemon.qbd("resume", volume, "-t", "error").succeeded()
    assert suspending.wait(10 * SLOWNESS) == errno.ECANCELED, suspending.stderr.read()
    assert other.answer(waiting).error == 0
    assert other.call(CMD_READ, 0, BLOCK).error == errno.EIO
    daemon.qbd("resume", volume, "-t", "normal").succeeded()
    session.assert_silent()
    thaw()
    assert session.answer(pending).error == 0
    wait_for(lambda: health(daemon, volume) in ("idle", "active"), "it settles")
    assert daemon.log().count("health: slow") == 1, "the state flapped"
    daemon.qbd("suspend", volume).succeeded()
    daemon.qbd("resume", volume, "-t", "normal").succeeded()
    assert session.read(0, BLOCK) == b"b" * BLOCK
