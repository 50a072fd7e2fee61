"""A power cut at any moment leaves a clean file system, in which everything is whole that was synced.

dm-log-writes records what reaches a device, flushes and FUA included, in the order of durability; the record is
replayed to a random point, which is a power cut there.
"""

import contextlib
import hashlib
import os
import pathlib
import random
import struct

import pytest

from machine import SCRATCH, boot_again, mounted, run, sh

POINTS = 20
POINTS_BELOW = 5


class WriteLog:
    """The record of dm-log-writes (Linux, Documentation/admin-guide/device-mapper/log-writes.rst).

    A super block, then entries: a header of one sector, for a mark with its text in it, then the data unless discarded.
    """

    MAGIC = 0x6A736677736872
    FLUSH, FUA, DISCARD, MARK, METADATA = 1, 2, 4, 8, 16

    def __init__(self, path):
        self.file = open(path, "rb")
        magic, version, self.count, self.sector_size = struct.unpack("<QQQI", self.file.read(28))
        assert magic == self.MAGIC and version == 1, f"{path} is no record of dm-log-writes"

    def entries(self):
        """(number, flags, sector, bytes or None, mark or "") of each."""
        position = self.sector_size
        for number in range(self.count):
            self.file.seek(position)
            header = self.file.read(self.sector_size)
            sector, sectors, flags, length = struct.unpack_from("<QQQQ", header)
            position += self.sector_size
            data, mark = None, ""
            if flags & self.MARK:
                mark = header[32 : 32 + length].rstrip(b"\0").decode()
            elif flags & self.DISCARD:
                data = sectors * self.sector_size
            elif sectors:
                data = self.file.read(sectors * self.sector_size)
                assert len(data) == sectors * self.sector_size, f"entry {number} is cut off"
                position += len(data)
            yield number, flags, sector * self.sector_size, data, mark

    def close(self):
        self.file.close()


def replay(log, image, points):
    """Applies the record to a file, and yields each point when everything before it is applied."""
    points = sorted(points)
    with open(image, "r+b") as target:
        for number, _, offset, data, _ in log.entries():
            while points and points[0] == number:
                target.flush()
                yield points.pop(0)
            if isinstance(data, bytes):
                target.seek(offset)
                target.write(data)
            elif data:
                # A discarded block may be anything afterwards; zeros would hide that one is still needed.
                target.seek(offset)
                target.write(b"\xdb" * data)
        target.flush()
    for point in points:
        yield point


@contextlib.contextmanager
def recorded(device, size):
    """A dm-log-writes device over `device`; the log is a file of the scratch disk."""
    path = SCRATCH / "write.log"
    path.unlink(missing_ok=True)
    with open(path, "wb") as file:
        file.truncate(size)
    sh("modprobe", "-a", "dm-log-writes", "loop")
    loop = sh("losetup", "--find", "--show", path).strip()
    sectors = sh("blockdev", "--getsz", device).strip()
    sh("dmsetup", "create", "test-log", "--table", f"0 {sectors} log-writes {device} {loop}")
    try:
        yield "/dev/mapper/test-log", path
    finally:
        run(["dmsetup", "remove", "--retry", "test-log"])
        sh("losetup", "--detach", loop)


def mark(text):
    sh("dmsetup", "message", "test-log", "0", "mark", text)


def sync_files(directory, choose, count, on_synced):
    """Writes files, synced and not, and some twice; {name: SHA-256 of the latest synced content}.

    A synced file is never touched again, so that it must be whole after every later power cut.
    """
    synced = {}
    folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    for number in range(count):
        noise = pathlib.Path(directory) / f"noise-{number % 5}"
        noise.write_bytes(choose.randbytes(choose.randrange(1, 200_000)))
        if choose.random() < 0.2:
            noise.unlink()
        name = f"synced-{number}"
        content = choose.randbytes(choose.randrange(1, 100_000))
        temporary = pathlib.Path(directory) / f"{name}.new"
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(temporary.with_suffix(""))
        os.fsync(folder)
        synced[name] = hashlib.sha256(content).hexdigest()
        on_synced(name)
    os.close(folder)
    return synced


def check_files(directory, expected):
    for name, digest in expected.items():
        content = (pathlib.Path(directory) / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest, f"{name} should be whole"


def marks(log):
    return {text: number for number, _, _, _, text in log.entries() if text}


@pytest.mark.deadline(300)
def test_file_system_on_the_device_survives_power_cuts(daemon, report):
    seed = random.randrange(1 << 32)
    choose = random.Random(seed)
    device = daemon.disk("disk/a", "32M")
    with recorded(device, 1 << 30) as (logged, path):
        sh("mkfs.ext4", "-q", "-E", "nodiscard", "-J", "size=4", logged)
        mark("made")
        with mounted(logged, "-o", "commit=1") as directory:
            expected = sync_files(directory, choose, 40, mark)
    log = WriteLog(path)
    at = marks(log)
    flushes = sum(1 for _, flags, _, _, _ in log.entries() if flags & (log.FLUSH | log.FUA))
    assert flushes >= len(expected), "every fsync should have flushed"
    image = SCRATCH / "replayed"
    image.unlink(missing_ok=True)
    with open(image, "wb") as file:
        file.truncate(device.size)
    cut = SCRATCH / "cut"
    points = choose.sample(range(at["made"] + 1, log.count), POINTS)
    for point in replay(log, image, points):
        due = {name: digest for name, digest in expected.items() if at[name] < point}
        try:
            sh("cp", "--sparse=always", image, cut)
            # What a boot does: the mount replays the journal; then there is nothing left to repair.
            with mounted(cut, "-o", "loop") as directory:
                check_files(directory, due)
            sh("fsck.ext4", "-f", "-n", cut)
        except (AssertionError, OSError) as failure:
            raise AssertionError(f"seed {seed}, power cut before entry {point} of {log.count}: {failure}") from None
    log.close()
    report(f"power cuts over the device: {POINTS} points of {log.count} entries, {flushes} flushes: all clean")


class Snapshots:
    """Of disk/a, made and deleted while files are written to it; what is in them is known."""

    def __init__(self, daemon):
        self.daemon = daemon
        self.digests = {}

    def step(self, number):
        if number % 5 == 4:
            name = f"disk/a@s{number}"
            self.daemon.qbd("snapshot", "create", name).succeeded()
            mark(name)
            self.digests[name] = self.digest(self.daemon, name)
        if number == 12:
            mark("deleting")
            self.daemon.qbd("snapshot", "delete", "disk/a@s4").succeeded()

    @staticmethod
    def digest(daemon, name):
        device = daemon.map(name)
        assert device.attribute("ro") == "1", f"{name} can only be read"
        digest = sh("sha256sum", device).split()[0]
        daemon.unmap(name)
        return digest

    def check(self, daemon, at, point):
        """Those made before the power cut are there, and hold what they held."""
        there = {one["snapshot"] for one in daemon.json("snapshot", "list", "disk/a")}
        for name, digest in self.digests.items():
            if name == "disk/a@s4" and at["deleting"] < point:
                continue
            if at[name] < point:
                assert name in there, f"{name} should be there"
                assert self.digest(daemon, name) == digest, f"{name} should hold what it held"


@pytest.mark.deadline(400)
@pytest.mark.parametrize("with_snapshots", [False, True], ids=["plain", "snapshots"])
def test_local_pool_survives_power_cuts_of_its_own_disk(new_daemon, report, with_snapshots):
    """The same one floor deeper: the disk that the pool's file system is on loses power, the daemon and all."""
    seed = random.randrange(1 << 32)
    choose = random.Random(seed)
    disk = SCRATCH / "pool.disk"
    with open(disk, "wb") as file:
        file.truncate(96 << 20)
    sh("modprobe", "loop")
    below = sh("losetup", "--find", "--show", disk).strip()
    try:
        with recorded(below, 2 << 30) as (logged, path):
            sh("mkfs.ext4", "-q", "-E", "nodiscard", logged)
            with mounted(logged, name="pool") as pool:
                daemon = new_daemon(pool_path=pool / "volumes").start()
                device = daemon.disk("disk/a", "32M")
                sh("mkfs.ext4", "-q", "-E", "nodiscard", "-J", "size=4", device)
                with mounted(device, "-o", "commit=1") as directory:
                    mark("made")
                    snapshots = Snapshots(daemon)

                    def on_synced(name):
                        mark(name)
                        if with_snapshots:
                            snapshots.step(int(name.split("-")[1]))

                    expected = sync_files(directory, choose, 20, on_synced)
                daemon.unmap("disk/a")
                daemon.terminate()
        log = WriteLog(path)
        at = marks(log)
        image = SCRATCH / "replayed"
        image.unlink(missing_ok=True)
        with open(image, "wb") as file:
            file.truncate(96 << 20)
        cut = SCRATCH / "cut"
        points = choose.sample(range(at["made"] + 1, log.count), POINTS_BELOW)
        for point in replay(log, image, points):
            due = {name: digest for name, digest in expected.items() if at[name] < point}
            try:
                sh("cp", "--sparse=always", image, cut)
                with mounted(cut, "-o", "loop", name="pool") as pool:
                    boot_again()
                    daemon = new_daemon(pool_path=pool / "volumes").start()
                    device = daemon.map("disk/a")
                    with mounted(device) as directory:
                        check_files(directory, due)
                    sh("fsck.ext4", "-f", "-n", device)
                    daemon.unmap("disk/a")
                    snapshots.check(daemon, at, point)
                    daemon.terminate()
            except (AssertionError, OSError) as failure:
                raise AssertionError(f"seed {seed}, power cut before entry {point} of {log.count}: {failure}") from None
        log.close()
        report(f"power cuts under the pool: {POINTS_BELOW} points of {log.count} entries: all clean")
    finally:
        sh("losetup", "--detach", below)
