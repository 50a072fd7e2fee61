"""Snapshots and clones of volumes of a local pool: what is in them, in any order, under load and after kill -9."""

import contextlib
import errno
import hashlib
import os
import random
import shutil
import subprocess
import threading
import time

import nbd
import pytest

from harness import QBD, KiB, MiB, SANITIZER, SLOWNESS, environment, run, wait_for
from wire import CMD_READ, Session

CLUSTER = 64 * KiB


@contextlib.contextmanager
def connected(uri):
    handle = nbd.NBD()
    handle.add_meta_context("base:allocation")
    handle.connect_uri(uri)
    try:
        yield handle
    finally:
        with contextlib.suppress(nbd.Error):
            handle.shutdown()


def read_all(handle):
    size = handle.get_size()
    return b"".join(handle.pread(min(4 * MiB, size - offset), offset) for offset in range(0, size, 4 * MiB))


def contents(daemon, volume):
    """What a volume or snapshot holds, mapped for that if it is not."""
    mapped = volume in {one["volume"] for one in daemon.json("list")}
    uri = daemon.uri(volume) if mapped else daemon.map(volume)
    with connected(uri) as handle:
        data = read_all(handle)
    if not mapped:
        daemon.qbd("unmap", volume).succeeded()
    return data


def snapshot(daemon, what, name):
    daemon.qbd("snapshot", what, name).succeeded()


def files(daemon):
    """Of the pool, without what a crash has left and nobody needs: that is kept aside for a while."""
    return sorted(path.name for path in daemon.pool_path.iterdir() if not path.name.startswith("~aside-"))


def tidy(daemon, expected=None, seconds=20):
    """Waits until the files are those of volumes without snapshots."""
    expected = sorted(["~lock", *(expected or ["a.raw", "a.volume"])])
    wait_for(lambda: files(daemon) == expected, f"{expected}", seconds)


class Model:
    """A volume and what it should hold."""

    def __init__(self, size, seed):
        self.data = bytearray(size)
        self.chance = random.Random(seed)

    def place(self, block=512, longest=3 * CLUSTER):
        length = self.chance.choice([block, 4096, 4096 * 3, CLUSTER, CLUSTER + block, longest])
        offset = self.chance.randrange(0, (len(self.data) - length) // block + 1) * block
        if self.chance.random() < 0.3:
            offset -= offset % CLUSTER
        return offset, length

    def step(self, handle):
        offset, length = self.place()
        kind = self.chance.random()
        if kind < 0.7:
            data = self.chance.randbytes(length)
            handle.pwrite(data, offset, nbd.CMD_FLAG_FUA if self.chance.random() < 0.1 else 0)
            self.data[offset : offset + length] = data
        elif kind < 0.9:
            flags = self.chance.choice([0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FUA])
            handle.zero(length, offset, flags)
            self.data[offset : offset + length] = bytes(length)
        else:
            # What is trimmed may keep its contents, and keeps what it has.
            handle.trim(length, offset)
            self.data[offset : offset + length] = handle.pread(length, offset)
        if self.chance.random() < 0.05:
            handle.flush()

    def check(self, handle):
        offset, length = self.place()
        assert handle.pread(length, offset) == self.data[offset : offset + length]


# What commands say


def test_snapshots_are_listed_in_order(daemon):
    daemon.volume("disk/a", 4 * MiB)
    header = daemon.qbd("snapshot", "list", "disk/a").succeeded().out.split()
    assert header == ["snap_id", "snapshot", "size", "created"]
    for name in ("s2", "s1", "S.3_-"):
        assert daemon.qbd("snapshot", "create", f"disk/a@{name}").succeeded().out == ""
    listed = daemon.json("snapshot", "list", "disk/a")
    assert [one["snapshot"] for one in listed] == ["disk/a@s2", "disk/a@s1", "disk/a@S.3_-"]
    assert {one["size"] for one in listed} == {4 * MiB}
    assert len({one["snap_id"] for one in listed}) == 3
    assert len(daemon.qbd("snapshot", "list", "disk/a").succeeded().out.splitlines()) == 4


def test_errors_of_snapshots(daemon):
    daemon.create("disk/a", 4 * MiB)
    daemon.qbd("snapshot", "create", "disk/a@s").succeeded()
    for words, status, text in [
        (["snapshot", "create", "disk/a@s"], errno.EEXIST, "disk/a@s"),
        (["snapshot", "create", "disk/a"], errno.EINVAL, "takes a snapshot"),
        (["snapshot", "create", "disk/a@"], errno.EINVAL, "empty"),
        (["snapshot", "create", "disk/a@.."], errno.EINVAL, "'..'"),
        (["snapshot", "create", "disk/a@b c"], errno.EINVAL, "allowed"),
        (["snapshot", "create", f"disk/a@{'x' * 129}"], errno.EINVAL, "128"),
        (["snapshot", "create", "disk/gone@s"], errno.ENOENT, "gone"),
        (["snapshot", "delete", "disk/a@gone"], errno.ENOENT, "disk/a@gone"),
        (["snapshot", "rollback", "disk/a@gone"], errno.ENOENT, "qbd snapshot list disk/a"),
        (["snapshot", "list", "disk/a@s"], errno.EINVAL, "takes a volume"),
        (["snapshot", "list", "disk/gone"], errno.ENOENT, "gone"),
        (["clone", "disk/a@s", "disk/a"], errno.EEXIST, "disk/a"),
        (["clone", "disk/a@s", "ram/b"], errno.EINVAL, "different pools"),
        (["clone", "disk/a", "disk/b"], errno.EINVAL, "takes a snapshot"),
        (["clone", "disk/a@s", "disk/b@s"], errno.EINVAL, "takes a volume"),
        (["clone", "disk/a@gone", "disk/b"], errno.ENOENT, "disk/a@gone"),
        (["map", "--export", "disk/a@gone"], errno.ENOENT, "disk/a@gone"),
        (["create", "disk/a@t", "-k", "1M"], errno.EINVAL, "takes a volume"),
        (["resize", "disk/a@s", "-k", "8M"], errno.EINVAL, "takes a volume"),
        (["delete", "disk/a@s"], errno.EINVAL, "takes a volume"),
        (["delete", "disk/a"], errno.EBUSY, "--snapshots"),
        (["snapshot"], 64, "usage"),
        (["snapshot", "destroy", "disk/a@s"], 64, "usage"),
        (["snapshot", "create"], 64, "usage"),
        (["clone", "disk/a@s"], 64, "usage"),
    ]:
        daemon.qbd(*words).failed(status, text)
    assert [one["snapshot"] for one in daemon.json("snapshot", "list", "disk/a")] == ["disk/a@s"]
    assert [one["volume"] for one in daemon.json("volumes", "disk")] == ["disk/a"]


def test_a_pool_in_memory_says_that_it_has_none(daemon):
    daemon.volume("ram/a", 4 * MiB)
    for words in (["snapshot", "create", "ram/a@s"], ["snapshot", "list", "ram/a"], ["snapshot", "delete", "ram/a@s"],
                  ["snapshot", "rollback", "ram/a@s"], ["clone", "ram/a@s", "ram/b"],
                  ["map", "--export", "ram/a@s"]):  # fmt: skip
        daemon.qbd(*words).failed(errno.EOPNOTSUPP, "ram", "snapshots", "local")


# What is in them


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "not mapped"])
def test_a_snapshot_keeps_what_was_there(daemon, mapped):
    uri = daemon.volume("disk/a", 4 * MiB)
    old, new = os.urandom(4 * MiB), os.urandom(MiB)
    with connected(uri) as handle:
        handle.pwrite(old, 0)
        if not mapped:
            handle.shutdown()
            daemon.qbd("unmap", "disk/a").succeeded()
        snapshot(daemon, "create", "disk/a@s")
        if not mapped:
            daemon.map("disk/a")
    with connected(uri) as handle:
        handle.pwrite(new, MiB + 512)
        handle.zero(MiB, 3 * MiB)
        assert read_all(handle) == old[: MiB + 512] + new + old[2 * MiB + 512 : 3 * MiB] + bytes(MiB)
        result = daemon.qbd("map", "--export", "disk/a@s").succeeded()
        assert result.out.strip() == daemon.uri("disk/a@s")
        with connected(result.out.strip()) as reader:
            assert reader.is_read_only()
            assert read_all(reader) == old
    daemon.qbd("snapshot", "delete", "disk/a@s").failed(errno.EBUSY, "disk/a@s")
    assert {one["volume"]: one["read_only"] for one in daemon.json("list")} == {"disk/a": False, "disk/a@s": True}
    daemon.kill()
    daemon.start()
    assert contents(daemon, "disk/a@s") == old
    daemon.qbd("unmap", "disk/a@s").succeeded()
    snapshot(daemon, "delete", "disk/a@s")
    tidy(daemon)
    assert contents(daemon, "disk/a")[MiB + 512 : 2 * MiB + 512] == new


def test_a_volume_without_snapshots_is_as_before(daemon):
    daemon.volume("disk/a", 4 * MiB)
    before = (daemon.pool_path / "a.volume").read_text()
    snapshot(daemon, "create", "disk/a@s")
    assert "a.raw" not in files(daemon)
    snapshot(daemon, "delete", "disk/a@s")
    tidy(daemon)
    assert (daemon.pool_path / "a.volume").read_text() == before
    assert (daemon.pool_path / "a.raw").stat().st_size == 4 * MiB


def test_snapshots_are_thin(daemon):
    uri = daemon.volume("disk/a", 256 * MiB)
    with connected(uri) as handle:
        handle.pwrite(os.urandom(16 * MiB), 0)
        handle.flush()
        for number in range(5):
            snapshot(daemon, "create", f"disk/a@s{number}")
            handle.pwrite(os.urandom(4096), number * MiB)
            handle.zero(64 * MiB, 128 * MiB)
            handle.flush()
    assert daemon.used() < 16 * MiB + 5 * (CLUSTER + 64 * KiB)


def test_rollback_and_clone(daemon):
    uri = daemon.volume("disk/a", 4 * MiB)
    first, second = os.urandom(4 * MiB), os.urandom(4 * MiB)
    with connected(uri) as handle:
        handle.pwrite(first, 0)
    snapshot(daemon, "create", "disk/a@one")
    daemon.qbd("resize", "disk/a", "-k", "6M").succeeded()
    with connected(uri) as handle:
        handle.pwrite(second, MiB)
    snapshot(daemon, "create", "disk/a@two")
    daemon.qbd("snapshot", "rollback", "disk/a@one").failed(errno.EBUSY, "unmap")
    daemon.qbd("unmap", "disk/a").succeeded()
    snapshot(daemon, "rollback", "disk/a@one")
    assert contents(daemon, "disk/a") == first
    daemon.qbd("clone", "disk/a@two", "disk/b").succeeded()
    changed = bytearray(first[:MiB] + second + bytes(MiB))
    assert contents(daemon, "disk/b") == changed
    with connected(daemon.map("disk/b")) as handle:
        handle.pwrite(b"clone" * 1000 + bytes(120), 12345 * 512 % (5 * MiB))
        offset = 12345 * 512 % (5 * MiB)
        changed[offset : offset + 5120] = b"clone" * 1000 + bytes(120)
    # Newer snapshots stay, and one can go back and forth.
    snapshot(daemon, "rollback", "disk/a@two")
    assert contents(daemon, "disk/a") == first[:MiB] + second + bytes(MiB)
    # A clone outlives the volume and its snapshots.
    daemon.qbd("delete", "disk/a").failed(errno.EBUSY, "one, two")
    daemon.qbd("delete", "disk/a", "--snapshots").succeeded()
    assert contents(daemon, "disk/b") == changed
    tidy(daemon, ["b.raw", "b.volume"])
    assert contents(daemon, "disk/b") == changed
    daemon.qbd("unmap", "disk/b").succeeded()
    daemon.qbd("delete", "disk/b").succeeded()
    assert files(daemon) == ["~lock"]


def test_growing_with_snapshots(daemon):
    """A size that is no whole cluster, grown over its end, which must be zeros whatever is below."""
    uri = daemon.volume("disk/a", MiB + 5 * 512)
    data = os.urandom(MiB + 5 * 512)
    with connected(uri) as handle:
        handle.pwrite(data, 0)
    snapshot(daemon, "create", "disk/a@s")
    with connected(uri) as handle:
        handle.pwrite(b"x" * 512, MiB)
    daemon.qbd("resize", "disk/a", "-k", 3 * MiB + 512).succeeded()
    expected = data[:MiB] + b"x" * 512 + data[MiB + 512 :] + bytes(2 * MiB - 4 * 512)
    with connected(uri) as handle:
        assert read_all(handle) == expected
        handle.pwrite(b"y" * 512, 3 * MiB)
    expected = expected[: 3 * MiB] + b"y" * 512
    daemon.kill()
    daemon.start()
    assert contents(daemon, "disk/a") == expected
    assert contents(daemon, "disk/a@s") == data
    snapshot(daemon, "delete", "disk/a@s")
    tidy(daemon)
    assert contents(daemon, "disk/a") == expected
    assert (daemon.pool_path / "a.raw").stat().st_size == 3 * MiB + 512


def test_block_status_through_the_layers(daemon):
    uri = daemon.volume("disk/a", 16 * MiB)
    with connected(uri) as handle:
        handle.pwrite(os.urandom(4 * MiB), 0)
        handle.pwrite(os.urandom(MiB), 8 * MiB)
        snapshot(daemon, "create", "disk/a@s")
        handle.zero(2 * MiB, MiB)
        handle.pwrite(os.urandom(4096), 12 * MiB)
        handle.flush()
        map_ = []
        while (offset := sum(length for length, _ in map_)) < 16 * MiB:
            found = []
            handle.block_status(16 * MiB - offset, offset, lambda context, at, entries, error: found.extend(entries))
            map_ += list(zip(found[::2], found[1::2]))
        flags = []
        for length, flag in map_:
            if flags and flags[-1][1] == flag:
                flags[-1][0] += length
            else:
                flags.append([length, flag])
        assert flags[:6] == [[MiB, 0], [2 * MiB, 3], [MiB, 0], [4 * MiB, 3], [MiB, 0], [3 * MiB, 3]]
        assert flags[6][1] == 0 and flags[6][0] in (4096, CLUSTER) and flags[7][1] == 3
    copy = daemon.directory / "copy"
    run(["nbdcopy", uri, copy]).succeeded()
    assert copy.read_bytes() == contents(daemon, "disk/a")


@pytest.mark.deadline(180)
@pytest.mark.parametrize("seed", range(2 if SANITIZER else 4))
def test_random_operations_match_a_model(daemon, seed):
    """Writes, zeroes, trims, snapshots, rollbacks, clones, growing and restarts, in any order; then deleting all."""
    chance = random.Random(seed)
    model = Model(3 * MiB + 512 * chance.randrange(128), seed)
    daemon.volume("disk/a", len(model.data))
    kept = {}
    for turn in range(25):
        with connected(daemon.map("disk/a")) as handle:
            for _ in range(chance.randrange(40)):
                model.step(handle)
            for _ in range(20):
                model.check(handle)
        action = chance.random()
        if action < 0.5:
            name = f"s{turn}"
            snapshot(daemon, "create", f"disk/a@{name}")
            kept[name] = bytes(model.data)
        elif action < 0.7 and kept:
            name = chance.choice(sorted(kept))
            snapshot(daemon, "delete", f"disk/a@{name}")
            del kept[name]
        elif action < 0.8 and kept:
            name = chance.choice(sorted(kept))
            daemon.qbd("unmap", "disk/a").succeeded()
            snapshot(daemon, "rollback", f"disk/a@{name}")
            model.data = bytearray(kept[name])
        elif action < 0.9:
            model.data += bytes(512 * chance.randrange(1, 300))
            daemon.qbd("resize", "disk/a", "-k", len(model.data)).succeeded()
        else:
            daemon.kill()
            daemon.start()
    assert contents(daemon, "disk/a") == model.data
    names = sorted(kept)
    chance.shuffle(names)
    if names:
        daemon.qbd("clone", f"disk/a@{names[0]}", "disk/b").succeeded()
        clone = kept[names[0]]
    for name in names:
        for other in kept:
            assert contents(daemon, f"disk/a@{other}") == kept[other], f"{other} before {name} goes"
        snapshot(daemon, "delete", f"disk/a@{name}")
        del kept[name]
        assert contents(daemon, "disk/a") == model.data, f"the volume, when {name} is gone"
    if names:
        assert contents(daemon, "disk/b") == clone
        daemon.qbd("delete", "disk/b").succeeded()
    tidy(daemon)
    assert contents(daemon, "disk/a") == model.data


# Under load


def test_a_snapshot_under_load_has_what_was_acknowledged(daemon):
    """Writers count up in their own places; a snapshot holds every number acknowledged before it was asked for, none
    that was sent after it was answered, and no hole in the numbers. No writer sees an error."""
    uri = daemon.volume("disk/a", 64 * MiB)
    writers, slots = 4, 512
    acknowledged = [0] * writers
    sent = [0] * writers
    stop = threading.Event()
    failures = []

    def write(number):
        try:
            with connected(uri) as handle:
                while not stop.is_set():
                    sequence = acknowledged[number] + 1
                    sent[number] = sequence
                    place = (number * slots + sequence % slots) * 16 * KiB + 512 * (sequence % 3)
                    handle.pwrite(sequence.to_bytes(8, "little") * 64, place)
                    acknowledged[number] = sequence
        except nbd.Error as failure:
            failures.append(failure)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(writers)]
    for thread in threads:
        thread.start()
    wait_for(lambda: min(acknowledged) > 100, "the writers get going")
    limits = []
    for turn in range(8):
        before = list(acknowledged)
        started = time.monotonic()
        snapshot(daemon, "create", f"disk/a@s{turn}")
        limits.append((before, list(sent), time.monotonic() - started))
        wait_for(lambda: min(now - then for now, then in zip(acknowledged, before)) > 50, "the writers go on")
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    for turn, (before, after, _) in enumerate(limits):
        with connected(daemon.map(f"disk/a@s{turn}")) as handle:
            data = read_all(handle)
        for number in range(writers):
            found = set()
            for slot in range(slots):
                base = (number * slots + slot) * 16 * KiB
                found |= {int.from_bytes(data[base + 512 * k : base + 512 * k + 8], "little") for k in range(3)}
            newest = max(found)
            assert before[number] <= newest <= after[number], f"snapshot {turn}, writer {number}"
            missing = set(range(max(1, newest - slots + 1), newest + 1)) - found
            assert missing == set(), f"snapshot {turn}, writer {number} has holes"
    print("seconds for a snapshot under load:", " ".join(f"{seconds:.3f}" for _, _, seconds in limits))


@pytest.mark.deadline(120)
def test_snapshots_come_and_go_under_a_verifying_load(daemon):
    """fio verifies what it wrote while 20 snapshots are made and deleted in another order."""
    uri = daemon.volume("disk/a", 64 * MiB)
    fio = subprocess.Popen(
        ["fio", "--name=load", "--ioengine=nbd", f"--uri={uri}", "--rw=randrw", "--bsrange=4k-128k", "--iodepth=16",
         # Not time_based: with that fio begins the next pass while it still verifies the last, and reads what it writes.
         "--size=48M", "--loops=10000", "--verify=crc32c", "--verify_fatal=1", "--verify_backlog=64", "--runtime=12",
         "--randseed=5"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=daemon.directory,
    )  # fmt: skip
    chance = random.Random(2)
    there = []
    made = 0
    while fio.poll() is None and made < 20:
        if len(there) < 6:
            there.append(f"disk/a@s{made}")
            snapshot(daemon, "create", there[-1])
            made += 1
        else:
            snapshot(daemon, "delete", there.pop(chance.randrange(len(there))))
    out = fio.communicate(timeout=60 * SLOWNESS)[0]
    assert fio.returncode == 0, out
    for name in there:
        snapshot(daemon, "delete", name)
    before = contents(daemon, "disk/a")
    tidy(daemon)
    assert contents(daemon, "disk/a") == before


def test_snapshot_of_a_suspended_volume(daemon):
    uri = daemon.volume("disk/a", 4 * MiB)
    with connected(uri) as handle:
        handle.pwrite(b"x" * 4096, 0)
        daemon.qbd("suspend", "disk/a").succeeded()
        snapshot(daemon, "create", "disk/a@s")
        assert daemon.json("info", "disk/a")["state"] == "suspended"
        # The volume's own file is the snapshot's now.
        assert contents(daemon, "disk/a@s")[:4096] == b"x" * 4096
        daemon.qbd("resume", "disk/a", "-t", "normal").succeeded()
        handle.pwrite(b"y" * 4096, 0)
    assert contents(daemon, "disk/a@s")[:4096] == b"x" * 4096


def test_replies_that_nobody_takes_outlive_the_store(daemon):
    """What is answered and still to be sent when another store takes the place of the volume's keeps its data."""
    size, each = 8 * MiB, MiB
    uri = daemon.volume("disk/a", size)
    handle = nbd.NBD()
    handle.connect_uri(uri)
    data = os.urandom(size)
    handle.pwrite(data, 0)
    with Session(daemon.nbd_socket) as session:
        session.greet().go("disk/a", structured=True)
        pending = {session.request(CMD_READ, offset, each): (CMD_READ, offset, each) for offset in range(0, size, each)}
        # The socket takes some of it.
        wait_for(lambda: daemon.json("info", "disk/a")["counters"]["in_flight"] > len(pending) / 2, "they are answered")
        daemon.qbd("snapshot", "create", "disk/a@s").succeeded()
        handle.pwrite(bytes(size), 0)
        order = dict(pending)
        while pending:
            answer = session.answer(pending)
            _, offset, _ = order[answer.cookie]
            assert answer.error == 0 and answer.data == data[offset : offset + each], f"the reply to {offset}"
    assert handle.pread(size, 0) == bytes(size)
    handle.shutdown()


@pytest.mark.deadline(120)
def test_twenty_deep(daemon):
    uri = daemon.volume("disk/a", 16 * MiB)
    model = Model(16 * MiB, 11)
    sums = []
    with connected(uri) as handle:
        for depth in range(20):
            for _ in range(30):
                model.step(handle)
            snapshot(daemon, "create", f"disk/a@s{depth}")
            sums.append(hashlib.sha256(model.data).hexdigest())
    for depth in range(20):
        assert hashlib.sha256(contents(daemon, f"disk/a@s{depth}")).hexdigest() == sums[depth]
    assert contents(daemon, "disk/a") == model.data
    order = list(range(20))
    random.Random(1).shuffle(order)
    for depth in order:
        snapshot(daemon, "delete", f"disk/a@s{depth}")
    assert contents(daemon, "disk/a") == model.data
    tidy(daemon)
    assert contents(daemon, "disk/a") == model.data


# kill -9


def killing(daemon, turns, seed):
    """Kills the daemon in the middle of snapshot operations under a load, and looks at everything then."""
    chance = random.Random(seed)
    size = 8 * MiB
    model = Model(size, seed)
    with connected(daemon.volume("disk/a", size)) as handle:
        data = chance.randbytes(size)
        handle.pwrite(data, 0)
        model.data[:] = data
    daemon.qbd("unmap", "disk/a").succeeded()
    kept = {}
    outcomes = {}
    for turn in range(turns):
        mapped = chance.random() < 0.7
        unsure = []
        if mapped:
            with connected(daemon.map("disk/a")) as handle:
                for _ in range(chance.randrange(1, 12)):
                    model.step(handle)
        name = f"s{turn}"
        if mapped:
            kind = chance.choice(["create", "create", "delete"])
        else:
            kind = chance.choice(["create", "delete", "rollback", "clone"])
        if kind != "create" and not kept:
            kind = "create"
        victim = name if kind == "create" else chance.choice(sorted(kept))
        words = ["clone", f"disk/a@{victim}", "disk/c"] if kind == "clone" else ["snapshot", kind, f"disk/a@{victim}"]
        writing = mapped and chance.random() < 0.5
        stop = threading.Event()

        def write():
            """Writes in flight when the daemon dies: each is there, or not, or in part."""
            with contextlib.suppress(nbd.Error), connected(daemon.uri("disk/a")) as handle:
                while not stop.is_set():
                    offset, length = model.place()
                    data = chance.randbytes(length)
                    unsure.append((offset, length))
                    handle.pwrite(data, offset)
                    model.data[offset : offset + length] = data
                    unsure.pop()

        before = bytes(model.data)
        asked = subprocess.Popen(
            [QBD, *words],
            env=environment(**daemon.variables), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        writer = threading.Thread(target=write) if writing else None
        if writer:
            writer.start()
        time.sleep(chance.uniform(0, 0.06))
        daemon.kill()
        stop.set()
        asked.wait()
        if writer:
            writer.join()
        daemon.start()
        there = {one["snapshot"].split("@")[1] for one in daemon.json("snapshot", "list", "disk/a")}
        volumes = {one["volume"] for one in daemon.json("volumes", "disk")}
        if kind == "create":
            assert there - {victim} == set(kept)
            done = victim in there
        elif kind == "delete":
            assert there | {victim} == set(kept)
            done = victim not in there
        else:
            assert there == set(kept)
            done = "disk/c" in volumes
        outcomes[kind, done] = outcomes.get((kind, done), 0) + 1
        now = bytearray(contents(daemon, "disk/a"))
        if kind == "rollback":
            assert now in (before, kept[victim]), f"turn {turn}: rollback is done or not"
            model.data[:] = now
        elif writing:
            for offset, length in unsure:
                model.data[offset : offset + length] = now[offset : offset + length]
        assert now == model.data, f"turn {turn}: {kind}, mapped {mapped}, the volume"
        if kind == "create" and done:
            found = contents(daemon, f"disk/a@{victim}")
            if not writing:
                assert found == before, f"turn {turn}: the snapshot"
            kept[victim] = found
        elif kind == "delete" and done:
            del kept[victim]
        elif kind == "clone" and done:
            assert contents(daemon, "disk/c") == kept[victim]
            daemon.qbd("delete", "disk/c").succeeded()
        for other in kept:
            assert contents(daemon, f"disk/a@{other}") == kept[other], f"turn {turn}: {kind}, snapshot {other}"
        if "disk/a" in {one["volume"] for one in daemon.json("list")}:
            daemon.qbd("unmap", "disk/a").succeeded()
        while len(kept) > 5:
            oldest = chance.choice(sorted(kept))
            snapshot(daemon, "delete", f"disk/a@{oldest}")
            del kept[oldest]
    print(f"killed {turns} times: {outcomes}")
    for name in sorted(kept):
        snapshot(daemon, "delete", f"disk/a@{name}")
    tidy(daemon)
    assert contents(daemon, "disk/a") == model.data


@pytest.mark.deadline(240)
def test_kill_at_random_moments(daemon):
    killing(daemon, 30, 3)


@pytest.mark.long
@pytest.mark.deadline(1500)
def test_kill_at_random_moments_two_hundred_times(daemon):
    killing(daemon, 200, 4)


# Death at each system call that changes a file or a folder

CALLS = "openat,renameat,renameat2,linkat,unlinkat,fsync,fdatasync,ftruncate,pwrite64,write,fallocate,copy_file_range"

OPERATIONS = {
    "create": ["snapshot", "create", "disk/a@new"],
    "create-mapped": ["snapshot", "create", "disk/a@new"],
    "first": ["snapshot", "create", "disk/plain@new"],
    "delete": ["snapshot", "delete", "disk/a@one"],
    "delete-mapped": ["snapshot", "delete", "disk/a@two"],
    "rollback": ["snapshot", "rollback", "disk/a@one"],
    "clone": ["clone", "disk/a@one", "disk/new"],
    "remove": ["delete", "disk/a", "--snapshots"],
}


def dying_at(daemon, operation, call, count):
    """Runs the operation while the daemon dies when one of its threads makes the call for the `count`th time.

    Returns whether it died; also when it did so in what it does in the background afterwards.
    """
    tracer = subprocess.Popen(
        ["strace", "-f", "-p", str(daemon.pid), "-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={count}",
         "-o", "/dev/null"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert "attached" in tracer.stderr.readline()
    daemon.qbd(*OPERATIONS[operation])
    deadline = time.monotonic() + 0.3
    while daemon.alive and time.monotonic() < deadline:
        time.sleep(0.005)
    died = not daemon.alive
    if not died:
        daemon.kill()
    tracer.wait()
    tracer.stderr.close()
    daemon.expected_to_run = False
    return died


def dying(daemon, operation, calls):
    """At every such call in turn: what was done is done or not, everything else is as it was, and nothing is left."""
    size = MiB + 512
    chance = random.Random(operation)
    expected = {}
    for name in ("one", "two", "head"):
        data = bytearray(expected.get("one", bytes(size)))
        data[64 * KiB * 3 :] = chance.randbytes(size - 64 * KiB * 3)
        expected[name] = bytes(data)
        with connected(daemon.map("disk/a") if "one" in expected and name != "one" else daemon.volume("disk/a", size)) as handle:
            handle.pwrite(data, 0)
        if name != "head":
            snapshot(daemon, "create", f"disk/a@{name}")
    daemon.qbd("unmap", "disk/a").succeeded()
    with connected(daemon.volume("disk/plain", size)) as handle:
        handle.pwrite(expected["one"], 0)
    daemon.qbd("unmap", "disk/plain").succeeded()
    daemon.stop()
    model = daemon.directory / "model"
    shutil.copytree(daemon.pool_path, model)
    deaths = 0
    for call in calls:
        for count in range(1, 100):
            shutil.rmtree(daemon.pool_path)
            run(["cp", "-a", "--sparse=always", model, daemon.pool_path]).succeeded()
            for mapping in daemon.state.glob("*.mapping"):
                mapping.unlink()
            daemon.start()
            if operation.endswith("mapped"):
                daemon.map("disk/a")
            died = dying_at(daemon, operation, call, count)
            daemon.start()
            where = f"{operation}, {call} {count}"
            volumes = {one["volume"] for one in daemon.json("volumes", "disk")}
            if "disk/a" in volumes:
                there = {one["snapshot"].split("@")[1] for one in daemon.json("snapshot", "list", "disk/a")}
                head = contents(daemon, "disk/a")
                assert head == expected["head"] or (operation == "rollback" and head == expected["one"]), where
                for name in there:
                    assert contents(daemon, f"disk/a@{name}") == expected["head" if name == "new" else name], where
                gone = {"delete": {"one"}, "delete-mapped": {"two"}}.get(operation, set())
                assert {"one", "two"} - there <= gone, where
                assert there <= {"one", "two", "new"}, where
            else:
                assert operation == "remove", where
            if "disk/plain@new" in {f"disk/plain@{one['snapshot'].split('@')[1]}" for one in
                                    daemon.json("snapshot", "list", "disk/plain")}:  # fmt: skip
                assert contents(daemon, "disk/plain@new") == expected["one"], where
            assert contents(daemon, "disk/plain") == expected["one"], where
            if "disk/new" in volumes:
                assert contents(daemon, "disk/new") == expected["one"], where
            for one in daemon.json("list"):
                daemon.qbd("unmap", one["volume"]).succeeded()
            for volume in volumes:
                daemon.qbd("delete", volume, "--snapshots").succeeded()
            wait_for(lambda: files(daemon) == ["~lock"], f"nothing is left of {where}: {files(daemon)}")
            daemon.stop()
            if not died:
                break
            deaths += 1
    print(f"{operation}: died {deaths} times")
    return deaths


needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None or SANITIZER is not None, reason="strace is missing, or a sanitizer traces itself"
)


@needs_strace
@pytest.mark.deadline(300)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_death_at_each_change_of_the_folder(daemon, operation):
    assert dying(daemon, operation, ["renameat,renameat2"]) >= 1


@needs_strace
@pytest.mark.long
@pytest.mark.deadline(1500)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_death_at_each_system_call(daemon, operation):
    assert dying(daemon, operation, CALLS.split(",")) >= 10
