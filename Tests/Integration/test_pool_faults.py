"""What becomes of a local pool's data when something goes wrong in it: errors, kills, neighbours, other people's files.

Single system calls that fail are the subject of Tests/Faults; here stands what has a shape of its own.
"""

import contextlib
import errno
import fcntl
import os
import re
import subprocess
import threading
import time

import nbd
import pytest

from harness import KiB, MiB, run, wait_for
from test_snapshots import CLUSTER, connected, contents, files, snapshot, tidy

SIZE = 4 * MiB


def write(daemon, volume, data, offset=0, flush=False):
    with connected(daemon.uri(volume)) as handle:
        handle.pwrite(data, offset)
        if flush:
            handle.flush()


def layer_maps(daemon):
    return sorted(daemon.pool_path.glob("@*.map"))


@contextlib.contextmanager
def held_lock(path):
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def mounted(path, *options):
    result = run(["mount", *options, path])
    if result.status != 0:
        pytest.skip(f"mounting needs root: {result.err}")
    try:
        yield
    finally:
        run(["umount", "-l", path]).succeeded()


@pytest.mark.parametrize("snapshots", [0, 1])
def test_zeros_where_the_file_system_makes_none(daemon, snapshots):
    """Tmpfs has no FALLOC_FL_ZERO_RANGE: of several requests each finds that out, and none fails."""
    daemon.pool_path.mkdir(exist_ok=True)
    with mounted(daemon.pool_path, "-t", "tmpfs", "none"):
        daemon.volume("disk/v", SIZE)
        for _ in range(snapshots):
            snapshot(daemon, "create", "disk/v@s")
        write(daemon, "disk/v", b"x" * SIZE)
        errors = []
        with connected(daemon.uri("disk/v")) as handle:
            for number in range(32):
                handle.aio_zero(
                    CLUSTER * 2, number * CLUSTER * 2, flags=nbd.CMD_FLAG_NO_HOLE,
                    completion=lambda error: errors.append(error.value) or 1)  # fmt: skip
            while handle.aio_in_flight():
                handle.poll(1000)
            assert errors == [0] * 32
            assert handle.pread(SIZE, 0) == bytes(SIZE)
        daemon.qbd("unmap", "disk/v").succeeded()
        daemon.stop()


# A snapshot that is mapped


def test_a_mapped_snapshot_reads_the_same_after_older_ones_are_deleted(daemon, new_daemon):
    """Its data, its map and its lock are of the same files, whatever is merged beside it."""
    daemon.volume("disk/v", SIZE)
    expected = {}
    for number, name in enumerate(["s1", "s2", "s3"]):
        write(daemon, "disk/v", bytes([number + 1]) * (CLUSTER * 20), CLUSTER * number * 10)
        snapshot(daemon, "create", f"disk/v@{name}")
        expected[name] = contents(daemon, f"disk/v@{name}")
    with connected(daemon.map("disk/v@s2")) as handle:
        snapshot(daemon, "delete", "disk/v@s1")
        daemon.qbd("unmap", "disk/v").succeeded()
        # A merge of others is a sign that those that could be made were made.
        snapshot(daemon, "delete", "disk/v@s3")
        wait_for(lambda: len(layer_maps(daemon)) <= 4, "merges of what nobody has mapped")
        assert handle.pread(SIZE, 0) == expected["s2"], "what was opened before"
        with connected(daemon.uri("disk/v@s2")) as other:
            assert other.pread(SIZE, 0) == expected["s2"], "what is opened after"
        other = new_daemon(pool_path=daemon.pool_path).start()
        for one in (daemon, other):
            result = one.qbd("snapshot", "delete", "disk/v@s2")
            assert result.status == errno.EBUSY, f"it is mapped: {result}"
    daemon.qbd("unmap", "disk/v@s2").succeeded()
    assert contents(other, "disk/v@s2") == expected["s2"]
    snapshot(other, "delete", "disk/v@s2")
    tidy(other, ["v.raw", "v.volume"])


# kill -9


def test_holes_say_nothing_after_a_kill(daemon):
    """A file system may allocate around a write: what looks like data there was never written."""
    old, new = os.urandom(SIZE), os.urandom(CLUSTER)
    daemon.volume("disk/v", SIZE)
    write(daemon, "disk/v", old, flush=True)
    snapshot(daemon, "create", "disk/v@s")
    write(daemon, "disk/v", new, 3 * CLUSTER)
    daemon.kill()
    head = next(path for path in daemon.pool_path.glob("@*.raw") if path.stat().st_nlink == 1 and is_head(daemon, path))
    with open(head, "r+b") as file:
        # Around what was written, and far from it.
        for cluster in (2, 4, 40):
            os.pwrite(file.fileno(), bytes(CLUSTER), cluster * CLUSTER)
    daemon.start()
    expected = old[: 3 * CLUSTER] + new + old[4 * CLUSTER :]
    assert contents(daemon, "disk/v") == expected


def is_head(daemon, path):
    description = (daemon.pool_path / "v.volume").read_text()
    head = int(re.search(r"^head = (0x[0-9a-f]+)$", description, re.M)[1], 16)
    return path.name == f"@{head:016x}.raw"


def test_marks_of_another_boot_do_not_count(daemon):
    """A power cut may keep the mark and lose the data: only what was flushed counts then."""
    old, flushed, lost = os.urandom(SIZE), os.urandom(CLUSTER), os.urandom(CLUSTER)
    daemon.volume("disk/v", SIZE)
    write(daemon, "disk/v", old, flush=True)
    snapshot(daemon, "create", "disk/v@s")
    write(daemon, "disk/v", flushed, 3 * CLUSTER, flush=True)
    write(daemon, "disk/v", lost, 5 * CLUSTER)
    daemon.kill()
    for path in layer_maps(daemon):
        text = path.read_bytes()
        boot = re.search(rb"^boot = ([0-9a-f-]{36})$", text[:512], re.M)
        if boot:
            with open(path, "r+b") as file:
                os.pwrite(file.fileno(), b"0" * 36, boot.start(1))
    head = next(path for path in daemon.pool_path.glob("@*.raw") if is_head(daemon, path))
    with open(head, "r+b") as file:
        os.pwrite(file.fileno(), bytes(CLUSTER), 5 * CLUSTER)
    daemon.start()
    expected = bytearray(old)
    expected[3 * CLUSTER : 4 * CLUSTER] = flushed
    assert contents(daemon, "disk/v") == bytes(expected)
    # And the mark of then is not taken for one of now after the next kill.
    daemon.map("disk/v")
    daemon.kill()
    daemon.start()
    assert contents(daemon, "disk/v") == bytes(expected)


def test_a_failed_snapshot_loses_nothing_with_the_next_kill(daemon):
    """Whatever synchronisation fails while a snapshot is made, what is acknowledged afterwards is there after kill -9."""
    before, after = os.urandom(SIZE), os.urandom(CLUSTER)
    daemon.volume("disk/v", SIZE)
    write(daemon, "disk/v", before)
    snapshot(daemon, "create", "disk/v@first")
    for count in range(1, 30):
        with Tracer(daemon, "fdatasync,fsync", f"error=EIO:when={count}"):
            result = daemon.qbd("snapshot", "create", f"disk/v@s{count}")
        value = after[: CLUSTER - 512] + bytes(512)
        with contextlib.suppress(nbd.Error):
            write(daemon, "disk/v", value, CLUSTER * (count % 60))
        expected = contents(daemon, "disk/v")
        assert expected[CLUSTER * (count % 60) :][:CLUSTER] == value
        daemon.kill()
        daemon.start()
        assert contents(daemon, "disk/v") == expected, f"after fsync number {count} failed"
        if result.status == 0:
            break
    else:
        pytest.fail("a snapshot should be made in the end")
    assert count > 3, "some of them should have failed"


class Tracer:
    """strace that injects into a daemon while it is entered."""

    def __init__(self, daemon, calls, what):
        self.process = subprocess.Popen(
            ["strace", "-f", "-p", str(daemon.pid), "-e", f"trace={calls}", "-e", f"inject={calls}:{what}", "-o",
             "/dev/null"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self):
        assert "attached" in self.process.stderr.readline()

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
        self.process.stderr.close()


# Locks


def test_no_io_waits_for_the_lock_of_the_pool(daemon):
    """A snapshot waits for it, but with the volume's I/O running, and until somebody wants something else."""
    daemon.volume("disk/v", SIZE)
    for command in (["resume", "disk/v", "-t", "normal"], ["unmap", "--force", "disk/v"]):
        with connected(daemon.uri("disk/v")) as handle, held_lock(daemon.pool_path / "~lock"):
            answers = []
            snapshotting = threading.Thread(
                target=lambda: answers.append(daemon.qbd("snapshot", "create", "disk/v@s", timeout=60))
            )
            snapshotting.start()
            begun = time.monotonic()
            while time.monotonic() - begun < 1:
                moment = time.monotonic()
                handle.pwrite(os.urandom(4096), 0)
                handle.pread(4096, 0)
                assert time.monotonic() - moment < 0.5, "I/O should not wait"
            moment = time.monotonic()
            daemon.qbd(*command).succeeded()
            assert time.monotonic() - moment < 5, f"{command} should not wait"
            snapshotting.join()
            assert answers[0].status == errno.ECANCELED, f"the snapshot should be given up: {answers[0]}"
    assert daemon.json("snapshot", "list", "disk/v") == []


@pytest.mark.long
@pytest.mark.deadline(240)
def test_a_disk_that_does_not_answer_holds_io_back_for_a_limited_time(daemon):
    """A snapshot whose synchronisation takes too long is given up; the volume goes on, and loses nothing by it."""
    daemon.volume("disk/v", SIZE)
    snapshot(daemon, "create", "disk/v@first")
    expected = bytearray(SIZE)
    with connected(daemon.uri("disk/v")) as handle:
        with Tracer(daemon, "fdatasync", "delay_enter=20000000:when=1"):
            answers = []
            snapshotting = threading.Thread(
                target=lambda: answers.append(daemon.qbd("snapshot", "create", "disk/v@s", timeout=200))
            )
            snapshotting.start()
            longest, number = 0, 0
            while snapshotting.is_alive():
                number += 1
                offset = number % 60 * CLUSTER
                expected[offset : offset + 4096] = data = os.urandom(4096)
                moment = time.monotonic()
                handle.pwrite(data, offset)
                longest = max(longest, time.monotonic() - moment)
                time.sleep(0.01)
            snapshotting.join()
        assert answers[0].status == errno.ETIMEDOUT, f"it should be given up: {answers[0]}"
        assert 10 < longest < 18, f"I/O was held back for {longest} s"
        assert handle.pread(SIZE, 0) == expected
    daemon.kill()
    daemon.start()
    assert contents(daemon, "disk/v") == expected
    snapshot(daemon, "create", "disk/v@s")
    assert contents(daemon, "disk/v@s") == expected


# Space


@pytest.mark.deadline(120)
def test_snapshots_are_deleted_where_no_byte_is_free(daemon):
    with mounted(daemon.pool_path, "-t", "tmpfs", "-o", "size=24m", "qbd"):
        full_pool(daemon)
        daemon.stop()
    daemon.start()


@pytest.mark.deadline(120)
def test_snapshots_are_deleted_where_no_byte_is_free_on_ext4(daemon, tmp_path):
    image = tmp_path / "disk"
    with open(image, "wb") as file:
        file.truncate(32 * MiB)
    run(["mkfs.ext4", "-q", "-m", "0", "-J", "size=4", image]).succeeded()
    with mounted(daemon.pool_path, "-o", "loop", image):
        full_pool(daemon)
        daemon.stop()
    daemon.start()


def full_pool(daemon):
    """Deletes snapshots and volumes with the file system full to the last byte."""
    daemon.volume("disk/v", SIZE)
    write(daemon, "disk/v", os.urandom(SIZE), flush=True)
    for name in ("s1", "s2"):
        snapshot(daemon, "create", f"disk/v@{name}")
        write(daemon, "disk/v", os.urandom(SIZE), flush=True)
    daemon.volume("disk/w", SIZE)
    daemon.qbd("unmap", "disk/w").succeeded()
    expected = contents(daemon, "disk/v")
    filler = daemon.pool_path / "filler"
    with open(filler, "wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(64 * KiB))
            file.flush()
    with open(filler, "ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(512))
    before = free(daemon)
    with pytest.raises(OSError, match="No space left"), open(daemon.pool_path / "more", "wb") as file:
        file.write(bytes(4096))
    for name in ("s1", "s2"):
        daemon.qbd("snapshot", "delete", f"disk/v@{name}").succeeded()
    # What two layers had of the same clusters.
    wait_for(lambda: free(daemon) >= before + 2 * SIZE - 256 * KiB, "their space should be free", seconds=30)
    assert contents(daemon, "disk/v") == expected
    daemon.qbd("delete", "disk/w").succeeded()
    filler.unlink()


def free(daemon):
    status = os.statvfs(daemon.pool_path)
    return status.f_bfree * status.f_frsize


# Neighbours


def test_a_damaged_volume_hinders_no_other(daemon):
    daemon.volume("disk/good", SIZE)
    write(daemon, "disk/good", b"x" * CLUSTER)
    snapshot(daemon, "create", "disk/good@s")
    (daemon.pool_path / "empty.volume").touch()
    (daemon.pool_path / "binary.volume").write_bytes(os.urandom(600))
    os.mkfifo(daemon.pool_path / "fifo.volume")
    (daemon.pool_path / "link.volume").symlink_to("good.volume")
    (daemon.pool_path / "folder.volume").mkdir()
    daemon.create("disk/kept", SIZE)
    (daemon.pool_path / "kept.volume").write_text("")
    result = daemon.qbd("volumes", "disk")
    assert "disk/good" in result.out, f"what can be read should be listed: {result}"
    daemon.create("disk/new", SIZE)
    snapshot(daemon, "create", "disk/good@t")
    snapshot(daemon, "delete", "disk/good@s")
    daemon.qbd("clone", "disk/good@t", "disk/clone").succeeded()
    assert contents(daemon, "disk/clone")[:CLUSTER] == b"x" * CLUSTER
    for name in ("empty", "binary", "fifo", "link", "folder", "kept"):
        result = daemon.qbd("map", "--export", f"disk/{name}")
        assert result.status not in (0, None), f"{name} cannot be mapped: {result}"
        result = daemon.qbd("delete", f"disk/{name}")
        assert result.status not in (0, None) and "--force" in result.err, f"{name} may have good data: {result}"
    assert (daemon.pool_path / "kept.raw").exists()


# Special files


@pytest.mark.parametrize("name", ["~lock", "v.raw", "v.volume", "~layers", "map", "raw"])
def test_special_files_are_not_waited_for(daemon, name):
    """A FIFO where a file is expected hangs nothing, and leaves the other volumes what they are."""
    daemon.volume("disk/v", SIZE)
    snapshot(daemon, "create", "disk/v@s")
    daemon.qbd("unmap", "disk/v").succeeded()
    daemon.create("disk/other", SIZE)
    path = daemon.pool_path / name
    if name in ("map", "raw"):
        path = sorted(daemon.pool_path.glob(f"@*.{name}"))[0]
    saved = path.read_bytes() if path.exists() else None
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    for command in (
        ["volumes", "disk"],
        ["map", "--export", "disk/v"],
        ["snapshot", "list", "disk/v"],
        ["snapshot", "create", "disk/v@t"],
        ["snapshot", "delete", "disk/v@s"],
        ["delete", "disk/v"],
        ["resize", "disk/v", "-k", "8M"],
    ):
        result = daemon.qbd(*command, timeout=20)
        assert result.status is not None, f"{command} should not wait: {result}"
    daemon.stop()
    daemon.start()
    if name != "~lock":
        result = daemon.qbd("map", "--export", "disk/other", timeout=20).succeeded()
    path.unlink(missing_ok=True)
    if saved is not None:
        path.write_bytes(saved)


# Media that can only be read


def test_a_pool_that_can_only_be_read(daemon):
    data, old = os.urandom(SIZE), os.urandom(SIZE)
    daemon.volume("disk/v", SIZE)
    write(daemon, "disk/v", old)
    snapshot(daemon, "create", "disk/v@s")
    write(daemon, "disk/v", data)
    daemon.volume("disk/plain", SIZE)
    write(daemon, "disk/plain", data)
    # As it is after a crash: the next daemon cannot clear up.
    daemon.kill()
    with mounted(daemon.pool_path, "--bind", daemon.pool_path):
        run(["mount", "-o", "remount,bind,ro", daemon.pool_path]).succeeded()
        for document in daemon.state.glob("*.mapping"):
            document.unlink()
        daemon.start()
        listed = {one["volume"] for one in daemon.json("volumes", "disk")}
        assert {"disk/v", "disk/plain"} <= listed, f"{listed}"
        for volume, expected in (("disk/v", data), ("disk/plain", data), ("disk/v@s", old)):
            with connected(daemon.map(volume, read_only="@" not in volume)) as handle:
                assert handle.is_read_only()
                assert handle.pread(SIZE, 0) == expected, volume
            daemon.qbd("unmap", volume).succeeded()
        for command in (["map", "--export", "disk/v"], ["create", "disk/new", "-k", "1M"], ["delete", "disk/plain"],
                        ["snapshot", "create", "disk/v@t"]):  # fmt: skip
            result = daemon.qbd(*command)
            assert result.status == errno.EROFS, f"{command}: {result}"
        assert "read-only" in daemon.qbd("map", "--export", "disk/v").err
        daemon.stop()
    daemon.start()
    assert contents(daemon, "disk/v") == data


# Leftovers


def test_what_nobody_needs_is_kept_aside_for_a_while(daemon):
    daemon.volume("disk/v", SIZE)
    write(daemon, "disk/v", b"x" * CLUSTER)
    snapshot(daemon, "create", "disk/v@s")
    (daemon.pool_path / "@00000000000000ab.raw").write_bytes(b"precious")
    (daemon.pool_path / "~layers").touch()
    daemon.qbd("snapshot", "list", "disk/v").succeeded()
    daemon.qbd("volumes", "disk").succeeded()
    aside = [path for path in daemon.pool_path.glob("~aside-*") if path.name.endswith("@00000000000000ab.raw")]
    assert len(aside) == 1 and aside[0].read_bytes() == b"precious", f"{files(daemon)}"
    assert aside[0].name in daemon.log(), "a line of the log should say so"
    # Long ago.
    old = daemon.pool_path / re.sub(r"-\d+-", f"-{int(time.time()) - 1000}-", aside[0].name)
    aside[0].rename(old)
    daemon.qbd("volumes", "disk").succeeded()
    assert not old.exists(), "and when that while is over, it is removed"
