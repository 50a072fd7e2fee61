"""suspend and resume: what is held back, in which order it goes on, and what survives the daemon."""

import contextlib
import errno
import hashlib
import json
import os
import re
import select
import struct
import threading
import time

import nbd
import pytest

from bystander import Bystander
from harness import KiB, MiB, SANITIZER, SLOWNESS, wait_for
from wire import CMD_BLOCK_STATUS, CMD_CACHE, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, Session

BLOCK = 4096


def connect(daemon, volume, **options):
    session = Session(daemon.nbd_socket).greet()
    session.go(volume, **options)
    return session


def state(daemon, volume):
    return daemon.json("info", volume)["state"]


def held(daemon, volume):
    return daemon.json("info", volume)["held_back"]["requests"]


def wait_held(daemon, volume, count):
    wait_for(lambda: held(daemon, volume) == count, f"{count} requests are held back")


def fingerprint(daemon, volume):
    """Of everything at the store: contents, time of the last change, space taken."""
    path = daemon.pool_path / (volume.split("/")[1] + ".raw")
    status = path.stat()
    return hashlib.sha256(path.read_bytes()).hexdigest(), status.st_mtime_ns, status.st_blocks


class Sequencer(threading.Thread):
    """One client that writes numbers that count up, block after block round a ring, `depth` of them at a time.

    A block is written again only when its last write was answered. Where the store answers in order, so must the
    daemon; everywhere each block holds the last number that was written to it.
    """

    def __init__(self, daemon, volume, ordered, depth=32, blocks=256):
        super().__init__(daemon=True)
        self.session = connect(daemon, volume)
        self.ordered = ordered
        self.depth = depth
        self.blocks = blocks
        self.last = {}
        self.acknowledged = 0
        self.failure = None
        self.stopping = threading.Event()
        self.start()

    def run(self):
        try:
            pending = {}
            number = 0
            while pending or not self.stopping.is_set():
                while len(pending) < self.depth and not self.stopping.is_set():
                    number += 1
                    offset = number % self.blocks * BLOCK
                    self.session.request(
                        CMD_WRITE, offset, payload=struct.pack(">Q", number) * (BLOCK // 8), cookie=number)
                    pending[number] = (CMD_WRITE, offset, BLOCK)
                oldest = next(iter(pending), None)
                if oldest is None:
                    break
                answer = self.session.answer(pending)
                assert answer.error == 0, f"write {answer.cookie} failed with {answer.error}"
                if self.ordered:
                    assert answer.cookie == oldest, f"write {answer.cookie} was answered before {oldest}"
                self.last[answer.cookie % self.blocks] = max(answer.cookie, self.last.get(answer.cookie % self.blocks, 0))
                self.acknowledged += 1
            for block, number in self.last.items():
                data = self.session.read(block * BLOCK, BLOCK)
                assert data == struct.pack(">Q", number) * (BLOCK // 8), (
                    f"block {block} holds {struct.unpack_from('>Q', data)[0]} instead of {number}")
        except Exception as failure:  # any: it is reported by the thread that asks
            self.failure = failure

    def gets_on(self, count=1, seconds=20):
        goal = self.acknowledged + count
        wait_for(lambda: self.failure or self.acknowledged >= goal, "the writer gets on", seconds)
        assert self.failure is None, f"the writer failed: {self.failure!r}"

    def stop(self):
        self.stopping.set()
        self.join(20 * SLOWNESS)
        assert not self.is_alive(), "the writer hangs"
        assert self.failure is None, f"the writer failed: {self.failure!r}"
        self.session.close()


class Comer(threading.Thread):
    """A client that comes, leaves a write behind without waiting, and is gone, over and over."""

    def __init__(self, daemon, volume, offset):
        super().__init__(daemon=True)
        self.arguments = daemon, volume, offset
        self.rounds = 0
        self.failure = None
        self.stopping = threading.Event()
        self.start()

    def run(self):
        daemon, volume, offset = self.arguments
        try:
            while not self.stopping.is_set():
                with connect(daemon, volume) as session:
                    session.request(CMD_WRITE, offset, payload=b"c" * BLOCK)
                    session.request(CMD_FLUSH)
                self.rounds += 1
                time.sleep(0.005)
        except Exception as failure:  # any: it is reported by the thread that asks
            self.failure = failure

    def stop(self):
        self.stopping.set()
        self.join(20 * SLOWNESS)
        assert self.failure is None and not self.is_alive(), f"the client that comes and goes failed: {self.failure!r}"


def cycles(daemon, volume, count):
    """Suspends and resumes `count` times under a verifying load, while clients come and go."""
    uri = daemon.volume(volume)
    verifier = Bystander(uri, (16 * MiB, 16 * MiB), pause=0)
    writer = Sequencer(daemon, volume, ordered=volume.startswith("ram/"))
    comer = Comer(daemon, volume, 48 * MiB)
    for cycle in range(count):
        status, answer = daemon.post("QBD_IOC_SUSPEND_VOLUME", volume=volume)
        assert status == 200, f"suspend {cycle}: {answer}"
        before = daemon.post("QBD_IOC_VOLUME_INFO", volume=volume)[1]
        assert before["state"] == "suspended"
        if cycle % 8 == 0:
            # Everybody runs into the gate, and nothing gets through.
            wait_for(lambda: held(daemon, volume) >= writer.depth + 1, "the load is held back")
            after = daemon.post("QBD_IOC_VOLUME_INFO", volume=volume)[1]
            for key in ("reads", "writes", "written_bytes"):
                assert after["counters"][key] == before["counters"][key], f"{key} ran while the volume was suspended"
        status, answer = daemon.post("QBD_IOC_RESUME_VOLUME", volume=volume, mode="normal")
        assert status == 200, f"resume {cycle}: {answer}"
        if cycle % 4 == 0:
            writer.gets_on()
            verifier.assert_unharmed(rounds=1, seconds=20)
    for client in (writer, verifier, comer):
        client.stop()
    assert comer.rounds > 0
    info = daemon.json("info", volume)
    assert info["state"] == "normal" and info["counters"]["errors"] == 0


def test_cycles_under_load(daemon, pool):
    cycles(daemon, f"{pool}/foo", 40 if SANITIZER is None else 8)


@pytest.mark.long
@pytest.mark.deadline(600)
def test_a_thousand_cycles_under_load(daemon, pool):
    cycles(daemon, f"{pool}/foo", 1000)


def test_everything_is_held_back_and_goes_on(daemon, pool):
    volume = f"{pool}/foo"
    daemon.volume(volume)
    session = connect(daemon, volume, meta=True)
    session.call(CMD_WRITE, 0, payload=b"a" * BLOCK)
    daemon.qbd("suspend", volume).succeeded()
    pending = {}
    for command, offset, length in (
        (CMD_WRITE, 0, BLOCK), (CMD_READ, 8192, BLOCK), (CMD_FLUSH, 0, 0), (CMD_TRIM, 8192, BLOCK),
        (CMD_WRITE_ZEROES, 4096, BLOCK), (CMD_CACHE, 0, BLOCK), (CMD_BLOCK_STATUS, 0, MiB),
    ):
        cookie = session.request(command, offset, length, payload=b"b" * length if command == CMD_WRITE else b"")
        pending[cookie] = (command, offset, length)
    wait_held(daemon, volume, 7)
    session.assert_silent()
    info = wait_for(
        lambda: (i := daemon.json("info", volume))["held_back"]["oldest_ms"] > 100 and i, "the wait is counted")
    assert info["state"] == "suspended" and info["since"] <= time.time()
    assert re.search(r"held back: +7, the oldest for \d+\.", daemon.qbd("info", volume).succeeded().out)
    assert daemon.json("list")[0]["state"] == "suspended"
    daemon.qbd("suspend", volume).succeeded()
    daemon.qbd("resume", volume, "-t", "normal").succeeded()
    while pending:
        assert session.answer(pending).error == 0
    assert session.read(0, BLOCK) == b"b" * BLOCK
    assert daemon.json("info", volume)["held_back"] == {"requests": 0, "oldest_ms": 0}
    daemon.qbd("resume", volume, "-t", "normal").succeeded()


def test_what_is_held_back_is_bounded(daemon):
    """Slots run out, and clients are not read from: the daemon grows by what it holds, and not by what is sent."""
    volume = "disk/foo"
    daemon.volume(volume)
    daemon.qbd("suspend", volume).succeeded()
    size = daemon.resident()
    sessions = [connect(daemon, volume) for _ in range(4)]
    one = struct.pack(">IHHQQI", 0x25609513, 0, CMD_WRITE, 1, 0, 64 * KiB) + bytes(64 * KiB)
    for session in sessions:
        session.socket.setblocking(False)
        sent = 0
        while select.select([], [session.socket], [], 0.3)[1]:
            sent += session.socket.send(one[sent % len(one) :])
            assert sent < 32 * MiB, "a client can send without end"
    wait_for(lambda: held(daemon, volume) > 4 * 64, "much is held back")
    assert daemon.resident() - size < (4 * 24 * MiB) * SLOWNESS
    for session in sessions:
        session.close()
    wait_held(daemon, volume, 0)
    daemon.qbd("resume", volume, "-t", "normal").succeeded()
    assert daemon.json("info", volume)["counters"]["writes"] == 0, "requests of clients that have gone ran"


def test_error_fails_everything(daemon, pool):
    volume = f"{pool}/foo"
    daemon.volume(volume)
    session = connect(daemon, volume, meta=True)
    session.call(CMD_WRITE, 0, payload=b"a" * BLOCK)
    daemon.qbd("suspend", volume).succeeded()
    pending = {}
    for command, length in (
        (CMD_WRITE, BLOCK), (CMD_READ, BLOCK), (CMD_FLUSH, 0), (CMD_TRIM, BLOCK), (CMD_WRITE_ZEROES, BLOCK),
        (CMD_CACHE, BLOCK), (CMD_BLOCK_STATUS, BLOCK),
    ):
        cookie = session.request(command, 0, length, payload=b"b" * length if command == CMD_WRITE else b"")
        pending[cookie] = (command, 0, length)
    wait_held(daemon, volume, 7)
    daemon.qbd("resume", volume, "-t", "error").succeeded()
    while pending:
        assert session.answer(pending).error == errno.EIO
    # Later I/O as well, and that of new clients.
    other = connect(daemon, volume)
    for client in (session, other):
        for command, payload in ((CMD_WRITE, b"c" * BLOCK), (CMD_READ, b""), (CMD_FLUSH, b"")):
            length = 0 if command == CMD_FLUSH else BLOCK
            assert client.call(command, 0, length, payload=payload).error == errno.EIO
    assert state(daemon, volume) == "error"
    daemon.qbd("resume", volume, "-t", "normal").succeeded()
    assert session.read(0, BLOCK) == b"a" * BLOCK
    assert other.call(CMD_FLUSH).error == 0


def test_discard_writes_nothing(daemon):
    volume = "disk/foo"
    daemon.volume(volume, "80M")
    session = connect(daemon, volume, meta=True)
    session.call(CMD_WRITE, 0, payload=b"a" * MiB)
    session.call(CMD_FLUSH)
    daemon.qbd("suspend", volume).succeeded()
    before = fingerprint(daemon, volume)
    pending = {}
    cookie = session.request(CMD_WRITE, 0, payload=b"b" * MiB)
    pending[cookie] = (CMD_WRITE, 0, MiB)
    wait_held(daemon, volume, 1)
    daemon.qbd("resume", volume, "-t", "discard").succeeded()
    assert session.answer(pending).error == 0
    for offset in (0, 4096, 64 * MiB - 512):
        assert session.call(CMD_WRITE, offset, payload=b"c" * 64 * KiB).error == 0
    for command in (CMD_TRIM, CMD_WRITE_ZEROES, CMD_CACHE):
        assert session.call(command, 0, MiB).error == 0
    assert session.call(CMD_FLUSH).error == 0
    # The longest read there is.
    assert session.read(0, 32 * MiB) == bytes(32 * MiB)
    extents = session.call(CMD_BLOCK_STATUS, 0, 2 * MiB).extents
    assert extents == [(2 * MiB, 3)], "all of it is a hole"
    assert fingerprint(daemon, volume) == before, "something was written"
    assert daemon.json("list")[0]["state"] == "discard" and state(daemon, volume) == "discard"
    daemon.qbd("suspend", volume).succeeded()
    daemon.qbd("resume", volume, "-t", "normal").succeeded()
    assert session.read(0, MiB) == b"a" * MiB
    assert session.call(CMD_WRITE, 0, payload=b"d" * BLOCK).error == 0
    assert session.read(0, BLOCK) == b"d" * BLOCK


def test_discarding_under_load(daemon, pool):
    """In and out of it, and of errors, while writes and reads of all sizes run: nothing hangs, nothing crashes."""
    volume = f"{pool}/foo"
    uri = daemon.volume(volume)
    handle = nbd.NBD()
    handle.connect_uri(uri)
    for mode in ("discard", "error", "normal") * 4:
        cookies = [handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(256 * KiB)), i * MiB) for i in range(32)]
        cookies += [handle.aio_pread(nbd.Buffer(256 * KiB), i * MiB) for i in range(32)]
        daemon.qbd("resume", volume, "-t", mode).succeeded()
        while cookies:
            handle.poll(1000)
            done = []
            for cookie in cookies:
                with contextlib.suppress(nbd.Error):
                    if not handle.aio_command_completed(cookie):
                        continue
                done.append(cookie)
            cookies = [cookie for cookie in cookies if cookie not in done]
    assert handle.pread(BLOCK, 0) == bytes(BLOCK)


@pytest.mark.parametrize("before", [0, 300])
def test_a_payload_on_its_way_does_not_land_behind_the_gate(daemon, before):
    """A write whose payload is still arriving, where it would be kept, does not hold up a suspend, and nothing of it
    reaches the store afterwards; also not when the writer has long been waited for alone."""
    volume = "ram/foo"
    daemon.volume(volume)
    writer, reader = connect(daemon, volume), connect(daemon, volume)
    reader.call(CMD_WRITE, 0, payload=b"a" * MiB)
    for _ in range(before):
        writer.call(CMD_WRITE, 0, payload=b"a" * BLOCK * 16)
    pending = {7: (CMD_WRITE, 0, MiB)}
    writer.send(struct.pack(">IHHQQI", 0x25609513, 0, CMD_WRITE, 7, 0, MiB), b"b" * (MiB // 2))
    wait_for(lambda: writer.unread == 0, "the first half has landed")
    daemon.qbd("suspend", volume, "--timeout", "5").succeeded()
    writer.send(b"b" * (MiB // 2))
    wait_held(daemon, volume, 1)
    daemon.qbd("resume", volume, "-t", "discard").succeeded()
    assert writer.answer(pending).error == 0
    daemon.qbd("resume", volume, "-t", "normal").succeeded()
    assert reader.read(0, MiB) == b"b" * (MiB // 2) + b"a" * (MiB // 2)
    # The connection is in step, and what follows lands.
    writer.call(CMD_WRITE, 0, payload=b"c" * MiB)
    assert reader.read(0, MiB) == b"c" * MiB


@pytest.mark.parametrize("mode", ["suspended", "error", "discard"])
@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
def test_state_survives_the_daemon(daemon, mode, how):
    volume = "disk/foo"
    daemon.volume(volume)
    session = connect(daemon, volume)
    session.call(CMD_WRITE, 0, payload=b"a" * BLOCK)
    daemon.qbd("suspend", volume).succeeded()
    if mode != "suspended":
        daemon.qbd("resume", volume, "-t", mode).succeeded()
    before = fingerprint(daemon, volume)
    since = daemon.json("info", volume)["since"]
    session.request(CMD_WRITE, 0, payload=b"b" * BLOCK)
    if mode == "suspended":
        wait_held(daemon, volume, 1)
    if how == "SIGTERM":
        started = time.monotonic()
        daemon.stop()
        assert time.monotonic() - started < 4 * SLOWNESS, "what is held back delays the end"
    else:
        daemon.kill()
    if mode == "suspended":
        session.assert_closed()
    daemon.start()
    info = daemon.json("info", volume)
    assert (info["state"], info["since"]) == (mode, since)
    session = connect(daemon, volume)
    cookie = session.request(CMD_WRITE, 0, payload=b"b" * BLOCK)
    pending = {cookie: (CMD_WRITE, 0, BLOCK)}
    if mode == "suspended":
        wait_held(daemon, volume, 1)
        session.assert_silent()
    else:
        assert session.answer(pending).error == (errno.EIO if mode == "error" else 0)
    assert fingerprint(daemon, volume) == before
    daemon.qbd("resume", volume, "-t", "normal").succeeded()
    if mode == "suspended":
        assert session.answer(pending).error == 0
    assert session.read(0, BLOCK) == (b"b" if mode == "suspended" else b"a") * BLOCK
    daemon.stop()
    daemon.start()
    assert state(daemon, volume) == "normal"


@contextlib.contextmanager
def state_folder_away(daemon):
    """The state folder cannot be written, not even by root: a file stands in its place."""
    away = daemon.state.rename(daemon.directory / "away")
    daemon.state.touch()
    try:
        yield
    finally:
        daemon.state.unlink()
        away.rename(daemon.state)


@pytest.mark.parametrize("mode", ["normal", "error", "discard"])
def test_resume_works_without_the_state_folder(daemon, mode):
    """What is held back may be what would make room there. A daemon that is killed then is suspended again."""
    volume = "disk/foo"
    daemon.volume(volume)
    daemon.qbd("suspend", volume).succeeded()
    session = connect(daemon, volume)
    pending = {session.request(CMD_WRITE, 0, payload=b"b" * BLOCK): (CMD_WRITE, 0, BLOCK)}
    wait_held(daemon, volume, 1)
    with state_folder_away(daemon):
        result = daemon.qbd("resume", volume, "-t", mode).succeeded()
        assert result.out == ""
        assert "warning: " in result.err and str(daemon.state) in result.err and "repeat" in result.err, result
        assert session.answer(pending).error == (errno.EIO if mode == "error" else 0)
        assert state(daemon, volume) == mode
        assert "not written down" in daemon.qbd("resume", volume, "-t", mode).succeeded().err
    daemon.kill()
    daemon.start()
    assert state(daemon, volume) == "suspended"


@pytest.mark.parametrize("how", ["repeated", "at the end"])
def test_a_resume_is_written_down_as_soon_as_that_works(daemon, how):
    volume = "disk/foo"
    daemon.volume(volume)
    daemon.qbd("suspend", volume).succeeded()
    with state_folder_away(daemon):
        daemon.qbd("resume", volume, "-t", "normal").succeeded()
    if how == "repeated":
        result = daemon.qbd("resume", volume, "-t", "normal").succeeded()
        assert result.err == "", result
        daemon.kill()
    else:
        daemon.stop()
    daemon.start()
    assert state(daemon, volume) == "normal"


def test_what_is_not_stuck_needs_the_state_folder(daemon):
    volume = "disk/foo"
    daemon.volume(volume)
    with state_folder_away(daemon):
        for mode in ("error", "discard"):
            daemon.qbd("resume", volume, "-t", mode).failed(errno.ENOTDIR, str(daemon.state))
            assert state(daemon, volume) == "normal"
        daemon.qbd("suspend", volume).failed(errno.ENOTDIR, str(daemon.state))
        assert state(daemon, volume) == "normal"
    daemon.qbd("resume", volume, "-t", "error").succeeded()
    with state_folder_away(daemon):
        assert "not written down" in daemon.qbd("resume", volume, "-t", "normal").succeeded().err
    assert state(daemon, volume) == "normal"


def test_suspend_survives_kills_under_load(daemon):
    """Suspend, kill -9, restart, resume: what was acknowledged is there each time."""
    volume = "disk/foo"
    daemon.volume(volume)
    number = 0
    for _ in range(10 if SANITIZER is None else 3):
        session = connect(daemon, volume)
        last = 0
        if number:
            last = struct.unpack(">Q", session.read(0, BLOCK)[:8])[0]
            assert last >= number, f"{number} was acknowledged, and {last} is there"
        number = last
        stop = time.monotonic() + 0.05
        while time.monotonic() < stop:
            assert session.call(CMD_WRITE, 0, payload=struct.pack(">Q", number + 1) * (BLOCK // 8)).error == 0
            number += 1
        daemon.qbd("suspend", volume).succeeded()
        session.request(CMD_WRITE, 0, payload=struct.pack(">Q", number + 1) * (BLOCK // 8))
        wait_held(daemon, volume, 1)
        daemon.kill()
        daemon.start()
        assert state(daemon, volume) == "suspended"
        daemon.qbd("resume", volume, "-t", "normal").succeeded()


def test_unmap_of_a_suspended_volume(daemon, pool):
    """A client that waits keeps it mapped; by force its requests fail. Without a client nothing is in the way."""
    volume = f"{pool}/foo"
    daemon.volume(volume)
    session = connect(daemon, volume)
    daemon.qbd("suspend", volume).succeeded()
    pending = {}
    for command in (CMD_WRITE, CMD_FLUSH):
        payload = b"b" * BLOCK if command == CMD_WRITE else b""
        pending[session.request(command, 0, payload=payload)] = (command, 0, len(payload))
    wait_held(daemon, volume, 2)
    daemon.qbd("unmap", volume).failed(16, volume, "client")
    result = daemon.qbd("unmap", "--force", volume).succeeded()
    assert result.seconds < 4 * SLOWNESS
    while pending:
        assert session.answer(pending).error == errno.ESHUTDOWN
    session.assert_closed()
    daemon.map(volume)
    assert state(daemon, volume) == "normal"
    assert connect(daemon, volume).read(0, BLOCK) == bytes(BLOCK)
    daemon.qbd("suspend", volume).succeeded()
    wait_for(lambda: daemon.qbd("unmap", volume).status == 0, "a suspended volume without clients is unmapped")


def test_a_client_that_waits_and_leaves_is_forgotten(daemon, pool):
    volume = f"{pool}/foo"
    daemon.volume(volume)
    daemon.qbd("suspend", volume).succeeded()
    gone = connect(daemon, volume)
    stays = connect(daemon, volume)
    for session in (gone, stays, gone):
        session.request(CMD_WRITE, 0, payload=(b"g" if session is gone else b"s") * BLOCK, cookie=9)
    wait_held(daemon, volume, 3)
    gone.close()
    wait_held(daemon, volume, 1)
    assert daemon.json("info", volume)["connections"] == 1
    daemon.qbd("resume", volume, "-t", "normal").succeeded()
    assert stays.answer({9: (CMD_WRITE, 0, BLOCK)}).error == 0
    assert stays.read(0, BLOCK) == b"s" * BLOCK


def test_resize_of_a_suspended_volume_is_refused(daemon, pool):
    volume = f"{pool}/foo"
    daemon.volume(volume)
    daemon.qbd("suspend", volume).succeeded()
    daemon.qbd("resize", volume, "-k", "1G").failed(16, volume, "suspended", "resume")
    assert daemon.json("info", volume)["size"] == 64 * MiB
    daemon.qbd("resume", volume, "-t", "normal").succeeded()
    daemon.qbd("resize", volume, "-k", "1G").succeeded()


def test_both_spellings(daemon):
    daemon.volume("disk/foo")
    daemon.qbd("-S", "disk/foo").succeeded()
    assert state(daemon, "disk/foo") == "suspended"
    daemon.qbd("-R", "disk/foo", "-t", "error").succeeded()
    assert state(daemon, "disk/foo") == "error"
    daemon.qbd("--suspend", "disk/foo").succeeded()
    assert state(daemon, "disk/foo") == "suspended"
    result = daemon.qbd("--resume=tcp://disk/foo", "-V", "-t", "normal").succeeded()
    assert state(daemon, "disk/foo") == "normal" and result.out == "" and "disk/foo" in result.err


@pytest.mark.parametrize(
    "words, status, text",
    [
        (["suspend", "disk/none"], 25, "disk/none is not mapped"),
        (["resume", "disk/none", "-t", "normal"], 25, "disk/none is not mapped"),
        (["suspend", "disk/foo", "--timeout", "0"], 22, "1 to 86400"),
        (["suspend", "disk/foo", "--timeout", "86401"], 22, "1 to 86400"),
        (["suspend", "disk/foo", "--timeout", "-1"], 22, "1 to 86400"),
        (["suspend", "disk/foo", "--timeout", "soon"], 22, "1 to 86400"),
        (["suspend", "disk/foo", "-c", "/etc/other.conf"], 25, "/etc/other.conf"),
        (["suspend"], 64, "usage"),
        (["resume", "disk/foo"], 64, "usage"),
        (["resume", "disk/foo", "-t", "suspended"], 22, "normal, -t error or -t discard"),
        (["resume", "disk/foo", "-t", "Normal"], 22, "normal, -t error or -t discard"),
        (["resume", "disk/foo", "-t", ""], 64, "-t needs a value"),
        (["suspend", "disk/foo@snap"], None, "disk/foo@snap"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_inputs(daemon, words, status, text):
    daemon.volume("disk/foo")
    result = daemon.qbd(*words)
    if status is None:
        assert result.status not in (0, 64) and result.out == ""
    else:
        result.failed(status, text)
    assert state(daemon, "disk/foo") == "normal"


@pytest.mark.parametrize(
    "fields",
    [
        {"volume": "disk/foo", "mode": "suspended"}, {"volume": "disk/foo"}, {"mode": "normal"},
        {"volume": "disk/foo", "mode": 1},
    ],
    ids=json.dumps,
)
def test_wrong_requests(daemon, fields):
    daemon.volume("disk/foo")
    status, answer = daemon.post("QBD_IOC_RESUME_VOLUME", **fields)
    assert status == 400 and answer["error"]["code"] == 22, answer
    for timeout in (0, -1, 86401, 1 << 63, 1.5, "30"):
        status, answer = daemon.post("QBD_IOC_SUSPEND_VOLUME", volume="disk/foo", timeout=timeout)
        assert status == 400 and answer["error"]["code"] == 22, answer
    assert state(daemon, "disk/foo") == "normal"


def test_what_waits_while_all_is_quiet_goes_on(daemon):
    """A session holds a bounded number of bytes: the last large write is all there and not begun when memory is given
    back that was not used for a while. Nothing comes behind it that would wake the session."""
    uri = daemon.volume("ram/a", 64 * MiB)
    handle = nbd.NBD()
    handle.connect_uri(uri)
    handle.pwrite(bytes(BLOCK), 0)
    daemon.qbd("suspend", "ram/a").succeeded()
    data = os.urandom(28 * MiB)
    cookies = [
        handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data[: 20 * MiB])), 0),
        handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data[20 * MiB :])), 20 * MiB),
    ]
    # All of both is sent, as far as the daemon takes it.
    while handle.aio_get_direction() & nbd.AIO_DIRECTION_WRITE:
        handle.poll(1000)
    wait_for(lambda: daemon.json("info", "ram/a")["health"] == "idle", "the volume is idle")
    daemon.qbd("resume", "ram/a", "-t", "normal").succeeded()
    deadline = time.monotonic() + 20 * SLOWNESS
    for cookie in cookies:
        while not handle.aio_command_completed(cookie):
            assert time.monotonic() < deadline, "a write is not answered"
            handle.poll(1000)
    assert handle.pread(28 * MiB, 0) == data
