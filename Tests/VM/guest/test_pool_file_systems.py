"""A local pool on each kind of file system: no kill of the daemon, and no power cut, takes what it may not take.

Which clusters a layer has is told by its map alone; these file systems make data of holes, and holes of data: they
allocate around a write, or share what was copied.
"""

import contextlib
import dataclasses
import itertools
import os
import random
import re
import shutil
import threading
import time

import nbd
import pytest

from blocks import Blocks, Client
from harness import MiB, run
from machine import SCRATCH, boot_again, mounted, sh

SIZE = 6 * MiB
# Bytes of the disks, which are sparse. XFS wants that much.
DISK = 512 * MiB
LONG_ROUNDS = 6
STEPS = ("writes", "copy-up", "snapshot", "merge")


@dataclasses.dataclass
class Kind:
    """A file system for a pool."""

    type: str
    mount: tuple = ()
    # For xfs_io, on the folder of the pool: whatever is made in it inherits that.
    hints: tuple = ()
    # The pool is made elsewhere, and copied with reflinks.
    is_copied: bool = False

    @property
    def has_disk(self):
        return self.type != "tmpfs"


KINDS = {
    "ext4": Kind("ext4"),
    "xfs": Kind("xfs"),
    "xfs-extsize": Kind("xfs", hints=("extsize 1m", "cowextsize 1m")),
    "xfs-copied": Kind("xfs", is_copied=True),
    "btrfs": Kind("btrfs"),
    "tmpfs-huge": Kind("tmpfs", ("-o", f"huge=always,size={DISK}")),
}
ON_DISKS = [name for name, kind in KINDS.items() if kind.has_disk]


class Disk:
    """One that can lose power: a file, a loop device, and above it the device mapper, which can make all I/O wait."""

    NAME = "test-pool"

    def __init__(self, kind):
        self.kind = kind
        self.file = SCRATCH / "pool.disk"
        self.file.unlink(missing_ok=True)
        with open(self.file, "wb") as file:
            file.truncate(DISK)
        sh("modprobe", "-a", "dm-mod", "loop")
        self.attached = None
        with self._device() as device:
            sh(f"mkfs.{kind.type}", "-q", device)

    @contextlib.contextmanager
    def _device(self):
        with contextlib.ExitStack() as stack:
            loop = sh("losetup", "--find", "--show", self.file).strip()
            stack.callback(sh, "losetup", "--detach", loop)
            sh("dmsetup", "create", self.NAME, "--table", f"0 {DISK // 512} linear {loop} 0")
            stack.callback(sh, "dmsetup", "remove", "--retry", self.NAME)
            yield f"/dev/mapper/{self.NAME}"

    def attach(self):
        """Mounts it; where."""
        with contextlib.ExitStack() as stack:
            device = stack.enter_context(self._device())
            where = stack.enter_context(mounted(device, *self.kind.mount, "-t", self.kind.type, name="pool"))
            # Nobody can be told that the power is gone while I/O waits.
            stack.callback(run, ["dmsetup", "resume", self.NAME])
            self.attached = stack.pop_all()
        return where

    def detach(self):
        self.attached.close()

    @contextlib.contextmanager
    def power_cut(self):
        """Within it, nothing is written any more; then all that did not reach the disk is gone. Whoever has files of
        it open must have ended by then."""
        cut = SCRATCH / "pool.cut"
        sh("dmsetup", "suspend", "--nolockfs", self.NAME)
        try:
            sh("cp", "--sparse=always", self.file, cut)
        finally:
            sh("dmsetup", "resume", self.NAME)
        yield
        self.detach()
        cut.rename(self.file)
        self.attach()
        boot_again()


@contextlib.contextmanager
def file_system(kind):
    """Made and mounted; where, and its disk."""
    if not kind.has_disk:
        with mounted("none", "-t", kind.type, *kind.mount, name="pool") as where:
            yield where, None
        return
    disk = Disk(kind)
    where = disk.attach()
    try:
        yield where, disk
    finally:
        disk.detach()


class Asked(threading.Thread):
    """A request to a daemon that may end before it answers."""

    def __init__(self, ask, *words, **fields):
        super().__init__()
        self.outcome = None
        self.ask = lambda: ask(*words, **fields)
        self.start()

    def run(self):
        try:
            self.outcome = self.ask()
        except Exception as error:
            self.outcome = error

    def is_done(self):
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome is not None


class Volume:
    """disk/v and its snapshots, with what they may hold."""

    NAME = "disk/v"

    def __init__(self, daemon, choose):
        self.daemon = daemon
        self.choose = choose
        self.numbers = itertools.count(1)
        self.names = (f"{self.NAME}@s{number}" for number in itertools.count(1))
        self.blocks = Blocks(SIZE)
        self.snapshots = {}
        # Whether they are there is not known: their making or deleting had no end.
        self.uncertain = set()
        self.seconds = 0.5
        self.client = None
        self.requests = 0

    def connect(self):
        self.client = Client(self.daemon.uri(self.NAME), self.blocks, self.choose, self.numbers)

    def map(self):
        self.export(self.NAME)
        self.connect()

    def export(self, name):
        """Without a kernel's device, which would read and write, too."""
        self.ask("MAP_VOLUME", volume=name, export=True)
        return self.daemon.uri(name)

    def ask(self, command, **fields):
        """As qbd does, which takes a while to start on an emulated processor."""
        status, answer = self.daemon.post(f"QBD_IOC_{command}", config=str(self.daemon.config), **fields)
        assert status == 200, f"{command} {fields} should succeed: {status} {answer}"
        return answer

    def unmap(self):
        self.client.settle()
        self.client.close()
        self.ask("UNMAP_VOLUME", volume=self.NAME)

    def snapshot(self):
        """Makes one while nothing is written."""
        self.client.settle()
        name, started = next(self.names), time.monotonic()
        self.ask("CREATE_SNAPSHOT", snapshot=name)
        self.seconds = time.monotonic() - started
        self.snapshots[name] = self.blocks.snapshot()
        for block, number in self.blocks.acknowledged():
            self.blocks.keep(number, block)

    def begin(self, step):
        """Writes for a random time while `step` happens; returns at a random moment of it. The function that it returns
        is for what comes after a kill or a cut."""
        if step == "copy-up":
            self.snapshot()
        self.client.run(self.choose.uniform(0, 0.3))
        moment = self.choose.uniform(0, 1.5 * self.seconds)
        if step in ("writes", "copy-up"):
            self.client.run(moment)
            return lambda: None
        if step == "snapshot":
            name, command = next(self.names), "CREATE_SNAPSHOT"
            self.snapshots[name] = self.blocks.snapshot()
            self.client.watching.append(self.snapshots[name])
            acknowledged = self.blocks.acknowledged()
        else:
            name, command = self.choose.choice(list(self.snapshots)), "DELETE_SNAPSHOT"
        asked = Asked(self.ask, command, snapshot=name)
        self.client.run(moment)
        if not asked.is_done():
            self.uncertain.add(name)
        elif step == "snapshot":
            for block, number in acknowledged:
                self.blocks.keep(number, block)
        else:
            del self.snapshots[name]
        return asked.join

    def check(self, after_power_cut=False):
        there = {one["snapshot"] for one in self.ask("LIST_SNAPSHOT", volume=self.NAME)["snapshots"]}
        certain = self.snapshots.keys() - self.uncertain
        assert certain <= there <= self.snapshots.keys(), (
            f"snapshots are {sorted(there)}, should be {sorted(certain)}, may be {sorted(self.uncertain)}"
        )
        self.snapshots = {name: blocks for name, blocks in self.snapshots.items() if name in there}
        self.uncertain.clear()
        self._check(self.NAME, self.blocks, self.client.read(), after_power_cut)
        for name, blocks in self.snapshots.items():
            handle = nbd.NBD()
            handle.connect_uri(self.export(name))
            self._check(name, blocks, handle.pread(SIZE, 0))
            handle.shutdown()
            self.ask("UNMAP_VOLUME", volume=name)

    @staticmethod
    def _check(name, blocks, data, after_power_cut=False):
        try:
            blocks.check(data, after_power_cut)
        except AssertionError as failure:
            raise AssertionError(f"{name}: {failure}") from None

    def over(self):
        """The daemon has ended."""
        self.requests += self.client.acknowledged
        self.client.lost()


def prepare(kind, where, new_daemon, choose):
    """A running daemon and its mapped volume, with snapshots, and clusters that only the lowest has; the pool."""
    pool, first = where / "pool", where / ("original" if kind.is_copied else "pool")
    first.mkdir()
    for hint in kind.hints:
        sh("xfs_io", "-c", hint, first)
    daemon = new_daemon(pool_path=first).start()
    daemon.create(Volume.NAME, SIZE)
    volume = Volume(daemon, choose)
    volume.map()
    volume.client.fill(SIZE // 2)
    volume.snapshot()
    volume.client.run(0.3)
    volume.snapshot()
    if kind.is_copied:
        volume.unmap()
        daemon.terminate()
        sh("cp", "-a", "--reflink=always", first, pool)
        daemon = volume.daemon = new_daemon(pool_path=pool).start()
        volume.map()
    for file in pool.glob("*.raw") if kind.hints else ():
        found = sh("xfs_io", "-r", "-c", "extsize", "-c", "cowextsize", file)
        assert re.findall(r"\[(\d+)\]", found) == [str(MiB)] * 2, f"{file} should have its hints: {found}"
    return volume


def forget(daemon):
    """What a daemon knows of its mappings is in memory, which a boot begins without."""
    shutil.rmtree(daemon.state)
    daemon.state.mkdir()


def kill(volume, _, step):
    """The daemon is killed during a step, and maybe again while it starts."""
    after = volume.begin(step)
    volume.daemon.kill()
    volume.over()
    after()
    volume.daemon.start()
    if volume.choose.random() < 0.3:
        volume.daemon.kill()
        volume.daemon.start()
    volume.connect()
    volume.check()


def write_back(pool, choose):
    """What the kernel may do at any time, in any order: writes a part of what it has to write."""
    what = choose.choice(("@*.map", "@*.map", "@*.raw", "*", None))
    for file in pool.glob(what) if what else ():
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fdatasync(descriptor)
            os.close(descriptor)
    return what


def cut(volume, disk, step):
    """The disk loses power during a step, and the machine with it."""
    after = volume.begin(step)
    write_back(volume.daemon.pool_path, volume.choose)
    with disk.power_cut():
        volume.daemon.kill()
        volume.over()
        after()
    forget(volume.daemon)
    volume.daemon.start()
    volume.map()
    volume.check(after_power_cut=True)


def end(daemon):
    """Of a test that failed: its pool goes now."""
    if daemon.alive:
        daemon.kill()
        forget(daemon)


def interrupt(name, new_daemon, report, rounds, what):
    """Does it during every step, in each of the rounds."""
    kind = KINDS[name]
    seed = random.randrange(1 << 32)
    choose = random.Random(seed)
    print(f"seed {seed}")
    with file_system(kind) as (where, disk), contextlib.ExitStack() as stack:

        def make(**options):
            daemon = new_daemon(**options)
            stack.callback(end, daemon)
            return daemon

        volume = prepare(kind, where, make, choose)
        for turn in range(rounds):
            for step in choose.sample(STEPS, len(STEPS)):
                try:
                    if len(volume.snapshots) < 2:
                        volume.snapshot()
                    what(volume, disk, step)
                except (AssertionError, OSError, nbd.Error) as failure:
                    raise AssertionError(f"seed {seed}, {name}, {step} of round {turn}: {failure}") from None
        volume.unmap()
        volume.daemon.terminate()
    report(f"{what.__name__} on {name}: {rounds * len(STEPS)} times, {volume.requests} writes: nothing lost")


@pytest.mark.deadline(240)
@pytest.mark.parametrize("name", KINDS)
def test_kills(new_daemon, report, name):
    interrupt(name, new_daemon, report, 1, kill)


@pytest.mark.deadline(240)
@pytest.mark.parametrize("name", ON_DISKS)
def test_power_cuts(new_daemon, report, name):
    interrupt(name, new_daemon, report, 1, cut)


@pytest.mark.long
@pytest.mark.deadline(900)
@pytest.mark.parametrize("name", KINDS)
def test_kills_many_times(new_daemon, report, name):
    interrupt(name, new_daemon, report, LONG_ROUNDS, kill)


@pytest.mark.long
@pytest.mark.deadline(900)
@pytest.mark.parametrize("name", ON_DISKS)
def test_power_cuts_many_times(new_daemon, report, name):
    interrupt(name, new_daemon, report, LONG_ROUNDS, cut)
