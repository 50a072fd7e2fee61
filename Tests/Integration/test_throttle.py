"""Limits: how exact they are, whom they hold up and whom not, and what survives the daemon."""

import json
import struct
import subprocess
import threading
import time

import pytest

from harness import KiB, MiB, SLOWNESS, environment, run, wait_for
from wire import CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, Session

LIMITS = ("read_bps", "write_bps", "read_iops", "write_iops", "burst_ms")
BLOCK = 4096


def connect(daemon, volume):
    session = Session(daemon.nbd_socket).greet()
    session.go(volume)
    return session


def limits(daemon, volume):
    info = daemon.json("info", volume)
    return tuple(info[key] for key in LIMITS)


def fio(uri, kind, block, depth, seconds, size="64M"):
    """The figures of both directions of one fio run."""
    command = [
        "fio", "--name=throttle", "--ioengine=nbd", f"--uri={uri}", f"--rw={kind}", f"--bs={block}",
        f"--iodepth={depth}", f"--runtime={seconds}", "--time_based", f"--size={size}", "--randrepeat=0",
        "--output-format=json",
    ]  # fmt: skip
    result = run(command, timeout=seconds + 60).succeeded()
    job = json.loads(result.out[result.out.index("{") :])["jobs"][0]
    assert job["error"] == 0, result
    return {side: (job[side]["bw_bytes"], job[side]["iops"]) for side in ("read", "write")}


def check_rate(daemon, volume, given, kind, block, depth, seconds, tolerance):
    """Under the limits `given`, what the tightest of them allows is what fio gets, in each direction it uses."""
    daemon.qbd("throttle", volume, "-t", ",".join(f"{key}={value}" for key, value in given.items())).succeeded()
    figures = fio(daemon.uri(volume), kind, block, depth, seconds)
    size = {"4k": 4 * KiB, "16k": 16 * KiB, "64k": 64 * KiB, "256k": 256 * KiB, "1M": MiB}[block]
    for side in ("read", "write"):
        bandwidth, iops = figures[side]
        if not bandwidth:
            continue
        allowed = [given[key] / size for key in (f"{side}_bps",) if given.get(key)]
        allowed += [given[key] for key in (f"{side}_iops",) if given.get(key)]
        ratio = iops / min(allowed)
        assert abs(ratio - 1) <= tolerance, (
            f"{side} of {kind} {block} at depth {depth} under {given}: {iops:.1f} per second, {ratio:.4f} of the limit")


def reset(daemon, volume):
    daemon.qbd("throttle", volume, "-t", "bps=0,iops=0", "--burst", "100").succeeded()


# Each limit alone, and all at once so that each direction has another one that counts.
ALONE = {
    "read_bps": ({"read_bps": 40_000_000}, "randread"),
    "write_bps": ({"write_bps": 40_000_000}, "randwrite"),
    "read_iops": ({"read_iops": 0}, "randread"),
    "write_iops": ({"write_iops": 0}, "randwrite"),
}
# Rates of operations that any machine reaches with blocks of that size, one at a time.
OPERATIONS = {"4k": 2000, "16k": 2000, "64k": 1000, "256k": 400, "1M": 100}


def grid(blocks):
    for block in blocks:
        for depth in (1, 32):
            for name, (given, kind) in ALONE.items():
                given = {key: value or OPERATIONS[block] for key, value in given.items()}
                yield pytest.param(given, kind, block, depth, id=f"{name}-{block}-{depth}")
            operations = OPERATIONS[block]
            for name, given in {
                "all-bytes": {"read_bps": 30_000_000, "write_bps": 20_000_000, "iops": 1_000_000},
                "all-mixed": {"read_bps": 20_000_000, "write_iops": operations // 2, "write_bps": 1 << 40,
                              "read_iops": 1_000_000},
            }.items():
                yield pytest.param(given, "randrw", block, depth, id=f"{name}-{block}-{depth}")


@pytest.mark.long
@pytest.mark.deadline(120)
@pytest.mark.parametrize("given, kind, block, depth", grid(("4k", "16k", "64k", "256k", "1M")))
def test_limits_hold_within_two_percent(daemon, given, kind, block, depth):
    daemon.volume("ram/foo")
    given = dict(given)
    if "iops" in given:
        given["read_iops"] = given["write_iops"] = given.pop("iops")
    if kind == "randrw":
        # fio keeps the two directions at par, so that the tighter one holds up the other: one job for each.
        check_both(daemon, given, block, depth, 10, 0.02)
    else:
        check_rate(daemon, "ram/foo", given, kind, block, depth, 10, 0.02)


def check_both(daemon, given, block, depth, seconds, tolerance):
    """A reader and a writer at the same time."""
    failures = []

    def one(kind):
        try:
            check_rate(daemon, "ram/foo", given, kind, block, depth, seconds, tolerance)
        except AssertionError as failure:
            failures.append(str(failure))

    threads = [threading.Thread(target=one, args=(kind,)) for kind in ("randread", "randwrite")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("given, kind, block, depth", [
    ({"read_bps": 40_000_000}, "randread", "4k", 32), ({"write_bps": 40_000_000}, "randwrite", "64k", 1),
    ({"read_iops": 2000}, "randread", "4k", 1), ({"write_iops": 1000}, "randwrite", "4k", 32),
    ({"write_bps": 20_000_000, "write_iops": 500, "read_bps": 1}, "randwrite", "16k", 32),
], ids=str)  # fmt: skip
def test_limits_hold(daemon, given, kind, block, depth):
    """The long group has it for all sizes and depths, over 10 s, within 2 %."""
    daemon.volume("ram/foo")
    # What is saved up at the start alone is 5 %; the rest is for machines that are busy.
    check_rate(daemon, "ram/foo", given, kind, block, depth, 2, 0.2)


def test_large_write_waits_its_turn_and_reads_are_not_stuck_behind_it(daemon, pool):
    volume = f"{pool}/foo"
    daemon.volume(volume)
    daemon.qbd("throttle", volume, "-t", "bps=4K").succeeded()
    session = connect(daemon, volume)
    pending = {}
    for index in range(2):
        pending[session.request(CMD_WRITE, index * MiB, payload=b"x" * MiB)] = (CMD_WRITE, index * MiB, MiB)
    # The first one passes and is paid for afterwards; the second one waits for minutes.
    assert session.answer(pending).error == 0
    info = wait_for(
        lambda: (i := daemon.json("info", volume)["held_back"])["requests"] == 1 and i, "the second write waits")
    assert info["by"] == "throttle"
    assert "they wait for their limits" in daemon.qbd("info", volume).succeeded().out
    started = time.monotonic()
    read = session.request(CMD_READ, 8 * MiB, 512)
    answer = session.answer({**pending, read: (CMD_READ, 8 * MiB, 512)})
    assert answer.cookie == read and answer.error == 0
    flush = session.request(CMD_FLUSH)
    answer = session.answer({**pending, flush: (CMD_FLUSH, 0, 0)})
    assert answer.cookie == flush, "a flush is never throttled"
    assert time.monotonic() - started < 5 * SLOWNESS
    # Lifting the limit lets what waits go at once.
    daemon.qbd("throttle", volume, "-t", "write_bps=0").succeeded()
    assert session.answer(pending).error == 0
    assert time.monotonic() - started < 10 * SLOWNESS
    assert session.read(MiB, BLOCK) == b"x" * BLOCK
    assert limits(daemon, volume) == (4096, 0, 0, 0, 100)


def test_writes_keep_their_order(daemon):
    """Also across a suspension, and a change of the limits."""
    volume = "ram/foo"
    daemon.volume(volume)
    daemon.qbd("throttle", volume, "-t", "write_iops=1").succeeded()
    session = connect(daemon, volume)
    pending = {}

    def send(first, last):
        for number in range(first, last):
            session.request(CMD_WRITE, 0, payload=struct.pack(">Q", number) * (BLOCK // 8), cookie=number)
            pending[number] = (CMD_WRITE, 0, BLOCK)

    def waiting(count):
        wait_for(lambda: daemon.json("info", volume)["held_back"]["requests"] == count, f"{count} writes wait")

    send(1, 11)
    assert session.answer(pending).cookie == 1
    wait_for(lambda: 7 <= daemon.json("info", volume)["held_back"]["requests"] <= 9, "the others wait")
    daemon.qbd("suspend", volume).succeeded()
    send(11, 21)
    wait_for(lambda: daemon.json("info", volume)["held_back"]["requests"] >= 16, "the new ones too")
    assert daemon.json("info", volume)["held_back"]["by"] == "suspended"
    daemon.qbd("throttle", volume, "-t", "write_iops=100").succeeded()
    daemon.qbd("resume", volume, "-t", "normal").succeeded()
    send(21, 31)
    order = []
    while pending:
        answer = session.answer(pending)
        assert answer.error == 0
        order.append(answer.cookie)
    assert order == list(range(2, 31))
    assert session.read(0, BLOCK)[:8] == struct.pack(">Q", 30)


def test_waiting_requests_fail_or_are_discarded_with_the_others(daemon):
    volume = "ram/foo"
    daemon.volume(volume)
    daemon.qbd("throttle", volume, "-t", "iops=1").succeeded()
    for mode, error in (("error", 5), ("discard", 0)):
        session = connect(daemon, volume)
        pending = {}
        for index in range(20):
            command = CMD_WRITE if index % 2 else CMD_READ
            payload = b"x" * BLOCK if index % 2 else b""
            pending[session.request(command, MiB, BLOCK, payload=payload)] = (command, MiB, BLOCK)
        wait_for(lambda: daemon.json("info", volume)["held_back"]["requests"] >= 14, "most of them wait")
        daemon.qbd("resume", volume, "-t", mode).succeeded()
        answers = [session.answer(pending) for _ in range(20)]
        assert sum(answer.error == error for answer in answers) >= 14
        daemon.qbd("resume", volume, "-t", "normal").succeeded()


def test_commands_that_count(daemon):
    """Zeroes count as writes of their length, trims as operations, flushes not at all."""
    volume = "ram/foo"
    daemon.volume(volume)
    session = connect(daemon, volume)

    def passes(command, length):
        cookie = session.request(command, 0, length)
        other = session.request(CMD_FLUSH)
        pending = {cookie: (command, 0, length), other: (CMD_FLUSH, 0, 0)}
        first = session.answer(pending).cookie
        if first == cookie:
            session.answer(pending)
        else:
            wait_for(lambda: daemon.json("info", volume)["held_back"]["requests"] == 1, "it waits")
            reset(daemon, volume)
            session.answer(pending)
        return first == cookie

    for limit, trims, zeroes in (("write_bps=4K", True, False), ("write_iops=1", False, False)):
        reset(daemon, volume)
        daemon.qbd("throttle", volume, "-t", limit, "--burst", "1000").succeeded()
        # What is saved up goes, and more.
        assert passes(CMD_WRITE_ZEROES, MiB)
        assert passes(CMD_TRIM, MiB) == trims
        if trims:
            assert passes(CMD_WRITE_ZEROES, MiB) == zeroes


def test_limits_survive_the_daemon(daemon):
    volume = "disk/foo"
    daemon.create(volume)
    daemon.qbd(
        "map", "--export", volume, "--read-bps", "10M", "--write-iops", "2K", "--burst", "250",
    ).succeeded()  # fmt: skip
    assert limits(daemon, volume) == (10 * MiB, 0, 0, 2000, 250)
    fields = daemon.qbd("list").succeeded().out.splitlines()[1].split()
    assert fields[5:] == ["10485760", "0", "0", "2000"]
    for how in (daemon.stop, daemon.kill):
        daemon.qbd("throttle", volume, "-t", "iops=9K,read_bps=0").succeeded()
        how()
        daemon.start()
        assert limits(daemon, volume) == (0, 0, 9000, 9000, 250)
    # Mapping it again changes nothing.
    daemon.qbd("map", "--export", volume, "--read-bps", "1").succeeded()
    assert limits(daemon, volume) == (0, 0, 9000, 9000, 250)
    daemon.qbd("throttle", volume, "--burst", "100", "-t", "iops=0").succeeded()
    assert limits(daemon, volume) == (0, 0, 0, 0, 100)
    daemon.qbd("unmap", volume).succeeded()
    daemon.map(volume)
    assert limits(daemon, volume) == (0, 0, 0, 0, 100)


def test_names_of_limits(daemon):
    daemon.volume("disk/foo")
    for text, expected in (
        ("read_bps=1,write_bps=2,read_iops=3,write_iops=4", (1, 2, 3, 4, 100)),
        ("bps_rd=5,bps_wr=6,iops_rd=7,iops_wr=8", (5, 6, 7, 8, 100)),
        ("bps=1G", (1 << 30, 1 << 30, 7, 8, 100)),
        ("iops=0", (1 << 30, 1 << 30, 0, 0, 100)),
        ("bps=0", (0, 0, 0, 0, 100)),
    ):
        daemon.qbd("-s", "disk/foo", "-t", text).succeeded()
        assert limits(daemon, "disk/foo") == expected
    answer = daemon.json("throttle", "disk/foo", "-t", "write_bps=3K")
    assert answer == {"read_bps": 0, "write_bps": 3072, "read_iops": 0, "write_iops": 0, "burst_ms": 100}


def test_end_of_a_daemon_whose_volumes_wait(daemon):
    """What waits for its limits runs before the end, and nothing is delayed."""
    volume = "disk/foo"
    daemon.volume(volume)
    daemon.qbd("throttle", volume, "-t", "write_iops=1").succeeded()
    session = connect(daemon, volume)
    pending = {}
    for index in range(50):
        pending[session.request(CMD_WRITE, index * BLOCK, payload=b"x" * BLOCK)] = (CMD_WRITE, index * BLOCK, BLOCK)
    wait_for(lambda: daemon.json("info", volume)["held_back"]["requests"] >= 40, "most of them wait")
    started = time.monotonic()
    daemon.stop()
    assert time.monotonic() - started < 4 * SLOWNESS
    while pending:
        assert session.answer(pending).error == 0
    session.assert_closed()


def test_a_client_that_waits_and_leaves_is_forgotten(daemon):
    volume = "disk/foo"
    daemon.volume(volume)
    daemon.qbd("throttle", volume, "-t", "write_iops=1").succeeded()
    session = connect(daemon, volume)
    for index in range(50):
        session.request(CMD_WRITE, index * BLOCK, payload=b"x" * BLOCK)
    wait_for(lambda: daemon.json("info", volume)["held_back"]["requests"] >= 40, "most of them wait")
    session.close()
    wait_for(lambda: daemon.json("info", volume)["held_back"]["requests"] == 0, "they are forgotten")
    assert daemon.json("info", volume)["connections"] == 0


def test_changes_under_load(daemon, pool):
    """Limits that come and go while fio verifies: no error, nothing hangs."""
    volume = f"{pool}/foo"
    uri = daemon.volume(volume)
    command = [
        "fio", "--name=verify", "--ioengine=nbd", f"--uri={uri}", "--rw=randrw", "--bsrange=4k-256k", "--iodepth=16",
        "--size=32M", "--verify=crc32c", "--verify_fatal=1", "--verify_backlog=32", "--time_based", "--runtime=4",
        # Or else it reads while it writes to the same place, and what it finds is both.
        "--serialize_overlap=1", "--verify_state_save=0",
    ]  # fmt: skip
    load = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())
    changes = 0
    while load.poll() is None:
        for text in ("bps=5M", "iops=50", "bps=0,iops=0", "read_bps=1K,write_iops=3", "bps=100M,iops=1G"):
            daemon.qbd("throttle", volume, "-t", text).succeeded()
            changes += 1
    assert load.returncode == 0, load.stdout.read()
    assert changes > 10


@pytest.mark.parametrize(
    "words, status, text",
    [
        (["throttle", "disk/none", "-t", "bps=1"], 25, "disk/none is not mapped"),
        (["throttle", "disk/foo"], 64, "-t KEY=NUMBER or --burst MS is missing"),
        (["throttle", "disk/foo", "-t", ""], 64, "-t needs a value"),
        (["throttle", "disk/foo", "-t", "bps"], 22, "KEY=NUMBER"),
        (["throttle", "disk/foo", "-t", "bps="], 22, "'bps': a rate in bytes per second is missing"),
        (["throttle", "disk/foo", "-t", "bps=1,,iops=1"], 22, "KEY=NUMBER"),
        (["throttle", "disk/foo", "-t", "total_bps=1"], 22, "'total_bps' is no limit"),
        (["throttle", "disk/foo", "-t", "bps=-1"], 22, "negative"),
        (["throttle", "disk/foo", "-t", "bps=1.5M"], 22, "whole number"),
        (["throttle", "disk/foo", "-t", "iops=1X"], 22, "suffix"),
        (["throttle", "disk/foo", "-t", "bps=99999999P"], 22, "too large"),
        (["throttle", "disk/foo", "-t", "bps=1,read_bps=2"], 22, "read_bps is given twice"),
        (["throttle", "disk/foo", "-t", "burst_ms=0"], 22, "1 to 60000"),
        (["throttle", "disk/foo", "--burst", "60001"], 22, "1 to 60000"),
        (["throttle", "disk/foo", "--burst", "1K"], 22, "1 to 60000"),
        (["throttle", "disk/foo", "--burst"], 64, "burst"),
        (["map", "--export", "disk/new", "--read-bps", "fast"], 22, "'--read-bps'"),
        (["map", "--export", "disk/new", "--write-bps=-5"], 22, "'--write-bps'"),
        (["map", "--export", "disk/new", "--burst", "0"], 22, "1 to 60000"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_inputs(daemon, words, status, text):
    daemon.volume("disk/foo")
    daemon.create("disk/new")
    daemon.qbd(*words).failed(status, text)
    assert limits(daemon, "disk/foo") == (0, 0, 0, 0, 100)
    assert len(daemon.json("list")) == 1


@pytest.mark.parametrize("fields", [
    {"read_bps": -1}, {"read_bps": "1"}, {"read_bps": 1.5}, {"burst_ms": 0}, {"burst_ms": 60001}, {"read_bps": 1 << 64},
], ids=json.dumps)  # fmt: skip
def test_wrong_requests(daemon, fields):
    daemon.volume("disk/foo")
    for command, volume in (("QBD_IOC_SET_THROTTLE", "disk/foo"), ("QBD_IOC_MAP_VOLUME", "disk/new")):
        status, answer = daemon.post(command, volume=volume, config=str(daemon.config), export=True, **fields)
        assert status == 400 and answer["error"]["code"] == 22, answer
    assert limits(daemon, "disk/foo") == (0, 0, 0, 0, 100)
