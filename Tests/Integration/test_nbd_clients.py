"""The public NBD clients, unchanged, on volumes of each pool: libnbd and its tools, QEMU's tools, fio, nbdkit."""

import contextlib
import hashlib
import json
import os
import pathlib
import random
import subprocess
import tempfile

import nbd
import pytest

from harness import SANITIZER, KiB, MiB, environment, keepalive, run, wait_for

SIZE = 64 * MiB

# (offset, length) of the data in the sparse image; the rest are holes.
SPARSE = [(0, MiB), (5 * MiB, 64 * KiB), (17 * MiB, 3 * MiB), (40 * MiB + 64 * KiB, MiB), (63 * MiB, MiB)]


@pytest.fixture(params=[512, 4096])
def block_size(request):
    return request.param


@pytest.fixture
def uri(daemon, pool):
    """An exported volume of 64 MiB, on each pool."""
    return daemon.volume(f"{pool}/volume", SIZE)


@pytest.fixture
def any_uri(daemon, pool, block_size):
    """The same, with each block size."""
    return daemon.volume(f"{pool}/volume", SIZE, block_size)


@pytest.fixture(scope="module")
def images():
    with tempfile.TemporaryDirectory(prefix="qbd-", dir="/tmp") as path:
        yield pathlib.Path(path)


@pytest.fixture(scope="module")
def image(images):
    """64 MiB of random bytes."""
    path = images / "image"
    path.write_bytes(random.Random(7).randbytes(SIZE))
    return path


@pytest.fixture(scope="module")
def sparse_image(images):
    """An image with holes."""
    path = images / "sparse"
    with open(path, "wb") as file:
        file.truncate(SIZE)
        for offset, length in SPARSE:
            file.seek(offset)
            file.write(random.Random(offset).randbytes(length))
    assert file_map(path) == expected_map(SPARSE), "this file system does not keep holes where the test needs them"
    return path


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def expected_map(data):
    """[(offset, length, is data)] of a volume with data in these places and holes elsewhere."""
    extents = []
    position = 0
    for offset, length in [*data, (SIZE, 0)]:
        if offset > position:
            extents.append((position, offset - position, False))
        if length:
            extents.append((offset, length, True))
        position = offset + length
    return extents


def file_map(path):
    """The same of a file, as its file system tells it."""
    data = []
    with open(path, "rb") as file:
        position = 0
        with contextlib.suppress(OSError):
            while True:
                start = os.lseek(file.fileno(), position, os.SEEK_DATA)
                position = os.lseek(file.fileno(), start, os.SEEK_HOLE)
                data.append((start, position - start))
    return expected_map(data)


def volume_map(uri):
    """The same of a volume, as nbdinfo tells it."""
    extents = json.loads(run(["nbdinfo", "--map", "--json", uri]).succeeded().out)
    for extent in extents:
        assert extent["type"] in (0, 3), f"{extent} is neither data nor a hole of zeros"
    data = []
    for extent in extents:
        if extent["type"] == 0:
            if data and sum(data[-1]) == extent["offset"]:
                data[-1] = (data[-1][0], data[-1][1] + extent["length"])
            else:
                data.append((extent["offset"], extent["length"]))
    assert sum(extent["length"] for extent in extents) == SIZE
    return expected_map(data)


def connect(uri):
    handle = nbd.NBD()
    handle.connect_uri(uri)
    return handle


# libnbd's tools


def test_nbdinfo_json(daemon, pool, any_uri, block_size):
    described = json.loads(run(["nbdinfo", "--json", any_uri]).succeeded().out)
    assert described["protocol"] == "newstyle-fixed" and described["structured"] is True
    (export,) = described["exports"]
    assert export["export-name"] == f"{pool}/volume"
    assert export["export-size"] == SIZE
    assert export["block_size_minimum"] == block_size
    assert export["block_size_maximum"] == 32 * MiB
    assert "base:allocation" in export["contexts"]
    yes = ["can_cache", "can_df", "can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero"]
    for property in yes:
        assert export[property] is True, f"{property} in {export}"
    assert export["is_read_only"] is False and export["is_rotational"] is False


def test_nbdinfo_list(daemon):
    volumes = {f"{pool}/{name}" for pool in daemon.POOLS for name in ("a", "b.c", "D_e-f")}
    for volume in volumes:
        daemon.volume(volume, MiB)
    daemon.create("disk/unexported", MiB)
    listed = json.loads(run(["nbdinfo", "--list", "--json", daemon.uri("")]).succeeded().out)
    assert {export["export-name"] for export in listed["exports"]} == volumes
    assert all(export["export-size"] == MiB for export in listed["exports"])
    text = run(["nbdinfo", "--list", daemon.uri("")]).succeeded().out
    assert all(f'export="{volume}"' in text for volume in volumes)


def test_nbdinfo_list_without_exports(daemon):
    listed = json.loads(run(["nbdinfo", "--list", "--json", daemon.uri("")]).succeeded().out)
    assert listed["exports"] == []


def test_nbdinfo_can(daemon, pool):
    writable, sealed = daemon.volume(f"{pool}/volume"), daemon.volume(f"{pool}/sealed", read_only=True)
    for uri in (writable, sealed):
        for ability in ("connect", "read", "flush", "df", "multi-conn", "cache"):
            assert run(["nbdinfo", "--can", ability, uri]).status == 0, f"{ability} on {uri}"
        assert run(["nbdinfo", "--can", "structured-reply", uri]).status == 0
        # Status 2 is nbdinfo's "no".
        assert run(["nbdinfo", "--is", "rotational", uri]).status == 2
    assert run(["nbdinfo", "--can", "fua", writable]).status == 0
    for ability in ("write", "trim", "zero"):
        assert run(["nbdinfo", "--can", ability, writable]).status == 0
        assert run(["nbdinfo", "--can", ability, sealed]).status == 2
    assert run(["nbdinfo", "--is", "read-only", writable]).status == 2
    assert run(["nbdinfo", "--is", "read-only", sealed]).status == 0
    assert run(["nbdinfo", "--can", "connect", daemon.uri(f"{pool}/nothing")]).status != 0


def test_nbdinfo_size(any_uri):
    assert run(["nbdinfo", "--size", any_uri]).succeeded().out == f"{SIZE}\n"


def test_nbdinfo_map(uri):
    assert volume_map(uri) == expected_map([])
    handle = connect(uri)
    for offset, length in SPARSE:
        handle.pwrite(b"\x31" * length, offset)
    handle.shutdown()
    assert volume_map(uri) == expected_map(SPARSE)
    totals = run(["nbdinfo", "--map", "--totals", "--json", uri]).succeeded()
    sizes = {row["type"]: row["size"] for row in json.loads(totals.out)}
    assert sizes == {0: sum(length for _, length in SPARSE), 3: SIZE - sum(length for _, length in SPARSE)}


@pytest.mark.parametrize("connections", [1, 4])
def test_nbdcopy_in_and_out(any_uri, image, scratch, connections):
    options = [f"--connections={connections}", "--requests=16"]
    run(["nbdcopy", *options, "--flush", image, any_uri]).succeeded()
    run(["nbdcopy", *options, any_uri, scratch / "back"]).succeeded()
    assert digest(scratch / "back") == digest(image)


def test_nbdcopy_of_a_sparse_image_keeps_its_holes(any_uri, sparse_image, scratch):
    run(["nbdcopy", "--connections=4", "--flush", sparse_image, any_uri]).succeeded()
    assert volume_map(any_uri) == expected_map(SPARSE)
    run(["nbdcopy", "--connections=4", any_uri, scratch / "back"]).succeeded()
    assert (scratch / "back").stat().st_size == SIZE
    assert digest(scratch / "back") == digest(sparse_image)
    assert file_map(scratch / "back") == file_map(sparse_image)


def test_nbdcopy_of_a_sparse_image_over_old_data(uri, image, sparse_image, scratch):
    """Where the image has holes the old data must be gone, and its space be given back."""
    run(["nbdcopy", image, uri]).succeeded()
    run(["nbdcopy", "--flush", sparse_image, uri]).succeeded()
    assert volume_map(uri) == expected_map(SPARSE)
    run(["nbdcopy", uri, scratch / "back"]).succeeded()
    assert digest(scratch / "back") == digest(sparse_image)


def test_nbdcopy_from_volume_to_volume(daemon, image, scratch):
    source, target = daemon.volume("disk/source"), daemon.volume("ram/target")
    run(["nbdcopy", "--connections=2", image, source]).succeeded()
    run(["nbdcopy", "--connections=2", source, target]).succeeded()
    run(["nbdcopy", target, scratch / "back"]).succeeded()
    assert digest(scratch / "back") == digest(image)


# QEMU's tools


def test_qemu_img(any_uri, image, sparse_image, scratch):
    raw = ["-f", "raw"]
    assert run(["qemu-img", "compare", *raw, "-F", "raw", image, any_uri]).status == 1, "different, and found equal"
    for source in (image, sparse_image):
        run(["qemu-img", "convert", *raw, "-n", "-O", "raw", source, any_uri]).succeeded()
        run(["qemu-img", "compare", *raw, "-F", "raw", source, any_uri]).succeeded()
        run(["qemu-img", "convert", *raw, "-O", "raw", any_uri, scratch / "back"]).succeeded()
        assert digest(scratch / "back") == digest(source)
    with connected(any_uri) as handle:
        handle.pwrite(bytes(4096), 17 * MiB)
    different = run(["qemu-img", "compare", *raw, "-F", "raw", sparse_image, any_uri])
    assert different.status == 1 and str(17 * MiB) in different.out, f"{different}"


@contextlib.contextmanager
def connected(uri):
    handle = connect(uri)
    try:
        yield handle
    finally:
        handle.shutdown()


def test_qemu_img_map(uri, sparse_image):
    run(["qemu-img", "convert", "-f", "raw", "-n", "-O", "raw", sparse_image, uri]).succeeded()
    extents = json.loads(run(["qemu-img", "map", "-f", "raw", "--output=json", uri]).succeeded().out)
    assert [(one["start"], one["length"], one["data"]) for one in extents] == expected_map(SPARSE)
    assert all(one["zero"] != one["data"] for one in extents)


@pytest.mark.parametrize("mode", [[], ["-w"], ["-w", "--flush-interval=50"], ["-s", "65536"], ["-w", "-s", "1048576"]])
def test_qemu_img_bench(uri, mode):
    count = 500 if "1048576" in mode else 5000
    done = run(["qemu-img", "bench", "-f", "raw", "-c", count, "-d", "32", *mode, uri]).succeeded()
    assert "Run completed" in done.out


def qemu_io(uri, *commands, read_only=False):
    """Runs commands of qemu-io and asserts that every one of them succeeded."""
    words = ["qemu-io", "-f", "raw"] + ["-r"] * read_only
    for command in commands:
        words += ["-c", command]
    result = run([*words, uri])
    bad = [word for word in ("failed", "error", "unrecognized", "invalid") if word in (result.out + result.err).lower()]
    assert result.status == 0 and not bad, f"{result}"
    return result


def test_qemu_io(any_uri):
    qemu_io(
        any_uri,
        "write -P 0xaa 0 4M",
        "read -P 0xaa 0 4M",
        "write -z 1M 64k",
        "read -P 0 1M 64k",
        "read -P 0xaa 0 1M",
        "read -P 0xaa 1114112 1M",
        "write -z -u 2M 128k",
        "read -P 0 2M 128k",
        "read -P 0xaa 2228224 64k",
        "discard 3M 512k",
        "read -P 0 3M 512k",
        "flush",
        "write -f -P 0x55 8M 64k",
        "write -f -z 8M 4k",
        "flush",
        "read -P 0 8M 4k",
        "read -P 0x55 8392704 60k",
        "write -P 0x77 67104768 4k",
        "read -P 0x77 67104768 4k",
        "aio_write -P 0x11 16M 1M",
        "aio_write -P 0x22 17M 1M",
        "aio_flush",
        "read -P 0x11 16M 1M",
        "read -P 0x22 17M 1M",
        # Below the block size of one of the volumes: QEMU reads, changes and writes back.
        "write -P 0x99 1536 512",
        "read -P 0x99 1536 512",
        "read -P 0xaa 0 1536",
        "read -P 0xaa 2048 2k",
    )
    # A session of its own finds the same.
    qemu_io(any_uri, "read -P 0 1M 64k", "read -P 0x55 8392704 60k", "read -P 0x11 16M 1M")


def test_qemu_io_notices_wrong_data(uri):
    """The check of the check."""
    wrong = run(["qemu-io", "-f", "raw", "-c", "read -P 0xaa 0 4k", uri])
    assert "Pattern verification failed" in wrong.out


def test_qemu_io_on_a_read_only_export(daemon, pool):
    sealed = daemon.volume(f"{pool}/sealed", read_only=True)
    qemu_io(sealed, "read -P 0 0 4M", "flush", read_only=True)
    refused = run(["qemu-io", "-f", "raw", "-c", "write 0 4k", sealed])
    assert refused.status != 0, f"{refused}"


# fio


def fio(uri, *options):
    words = ["fio", "--ioengine=nbd", f"--uri={uri}", "--name=verify", "--group_reporting", "--output-format=json"]
    words += ["--verify_state_save=0"]
    result = run([*words, *options], timeout=50).succeeded()
    jobs = json.loads(result.out[result.out.index("{") :])["jobs"]
    assert all(job["error"] == 0 for job in jobs) and "verify" not in result.err.lower(), f"{result}"
    return jobs


VERIFY = ["--verify=crc32c", "--verify_fatal=1", "--iodepth=32"]
JOBS = ["--numjobs=4", "--size=12m", "--offset_increment=16m"]


@pytest.mark.parametrize("load", ["randrw", "randwrite", "write"])
def test_fio_verifies(any_uri, load):
    (jobs,) = fio(any_uri, f"--rw={load}", "--bs=4k", *VERIFY, *JOBS)
    written = jobs["write"]["io_bytes"]
    assert written >= (20 if load == "randrw" else 48) * MiB, f"fio wrote {written} bytes"
    assert jobs["read"]["io_bytes"] >= written, "fio verified less than it wrote"


def test_fio_verifies_mixed_sizes(any_uri):
    fio(any_uri, "--rw=randwrite", "--bssplit=4k/40:12k/20:64k/30:512k/10", *VERIFY, *JOBS)


def test_fio_verifies_sectors(uri):
    fio(uri, "--rw=randwrite", "--bs=512", *VERIFY, "--numjobs=2", "--size=2m", "--offset_increment=32m")


def test_fio_verifies_with_flushes_between(uri):
    fio(uri, "--rw=randwrite", "--bs=16k", "--fsync=8", *VERIFY, *JOBS)


def test_fio_notices_wrong_data(uri):
    """The check of the check: verify a volume that was never written."""
    words = ["fio", "--ioengine=nbd", f"--uri={uri}", "--name=verify", "--rw=read", "--bs=4k", "--size=1m", *VERIFY]
    assert run([*words, "--verify_state_save=0"]).status != 0


# libnbd


def test_read_only_export(daemon, pool, image):
    """The data is what was written before; nothing changes it; other options agree."""
    writable = daemon.volume(f"{pool}/volume")
    run(["nbdcopy", image, writable]).succeeded()
    daemon.qbd("unmap", f"{pool}/volume").succeeded()
    sealed = daemon.map(f"{pool}/volume", read_only=True)
    run(["qemu-img", "compare", "-f", "raw", "-F", "raw", image, sealed]).succeeded()
    assert run(["nbdcopy", image, sealed]).status != 0
    run(["qemu-img", "compare", "-f", "raw", "-F", "raw", image, sealed]).succeeded()


def test_flush_on_one_connection_covers_writes_on_all(uri):
    """Multi-connection: write on one, flush on another, read on a third."""
    writer, flusher, reader = connect(uri), connect(uri), connect(uri)
    assert writer.can_multi_conn()
    chance = random.Random(3)
    for turn in range(300):
        offset = chance.randrange(SIZE // 4096) * 4096
        content = chance.randbytes(4096)
        writer.pwrite(content, offset)
        if turn % 3 == 0:
            flusher.flush()
        assert reader.pread(4096, offset) == content, f"turn {turn}: the third connection reads old data"
        writer, flusher, reader = flusher, reader, writer
    for handle in (writer, flusher, reader):
        handle.shutdown()


def test_requests_in_flight_on_many_connections(uri):
    """Every block is written once, over eight connections with 32 requests in flight each."""
    handles = [connect(uri) for _ in range(8)]
    blocks = SIZE // (64 * KiB)
    order = list(range(blocks))
    random.Random(4).shuffle(order)
    failures = []
    for turn, block in enumerate(order):
        handle = handles[turn % 8]
        while handle.aio_in_flight() >= 32:
            handle.poll(1000)
        content = nbd.Buffer.from_bytearray(bytearray(block.to_bytes(8, "big") * (8 * KiB)))

        def completed(error, block=block):
            if error.value:
                failures.append((block, error.value))
            return 1

        handle.aio_pwrite(content, block * 64 * KiB, completion=completed)
    for handle in handles:
        while handle.aio_in_flight():
            handle.poll(1000)
    assert not failures
    handles[0].flush()
    for block in range(blocks):
        assert handles[block % 8].pread(64 * KiB, block * 64 * KiB) == block.to_bytes(8, "big") * (8 * KiB)
    for handle in handles:
        handle.shutdown()


def test_volume_behaves_as_an_array_of_bytes(any_uri, block_size):
    """Random writes, zeroings, trims and reads, beside the same done to bytes in memory."""
    chance = random.Random(block_size)
    space = 8 * MiB
    expected = bytearray(space)
    handles = [connect(any_uri) for _ in range(3)]
    for turn in range(1500):
        handle = chance.choice(handles)
        length = min(1 << chance.randrange(9, 20), space) // block_size * block_size or block_size
        offset = chance.randrange((space - length) // block_size + 1) * block_size
        flags = nbd.CMD_FLAG_FUA if turn % 50 == 0 else 0
        action = chance.choice(["write", "write", "zero", "allocate", "trim", "read", "read"])
        if action == "write":
            content = chance.randbytes(length)
            handle.pwrite(content, offset, flags)
            expected[offset : offset + length] = content
        elif action == "zero":
            handle.zero(length, offset, flags)
            expected[offset : offset + length] = bytes(length)
        elif action == "allocate":
            handle.zero(length, offset, flags | nbd.CMD_FLAG_NO_HOLE)
            expected[offset : offset + length] = bytes(length)
        elif action == "trim":
            handle.trim(length, offset, flags)
            found = handle.pread(length, offset)
            # What is trimmed may read as zeros or as before, each block for itself.
            for start in range(0, length, block_size):
                part = found[start : start + block_size]
                old = expected[offset + start : offset + start + block_size]
                assert part == old or not any(part), f"turn {turn}: trimmed {offset}+{length} reads as something else"
            expected[offset : offset + length] = found
        else:
            found = handle.pread(length, offset)
            assert found == expected[offset : offset + length], f"turn {turn}: wrong data in {offset}+{length}"
    assert handles[0].pread(space, 0) == expected
    for handle in handles:
        handle.shutdown()


def test_trim_gives_space_back(daemon):
    """Thin: a volume takes what was written, and less after a trim."""

    uri = daemon.volume("disk/thin", "1G")
    assert daemon.used() < MiB, "a new volume takes space"
    with connected(uri) as handle:
        handle.pwrite(b"\x12" * 32 * MiB, 0)
        handle.flush()
        assert 32 * MiB <= daemon.used() < 34 * MiB
        handle.trim(16 * MiB, 0)
        handle.flush()
        assert 16 * MiB <= daemon.used() < 18 * MiB
        handle.zero(8 * MiB, 16 * MiB)
        assert 8 * MiB <= daemon.used() < 10 * MiB
        handle.zero(4 * MiB, 0, nbd.CMD_FLAG_NO_HOLE)
        assert 12 * MiB <= daemon.used() < 14 * MiB


def test_volume_of_many_tebibytes(daemon, pool):
    if pool == "ram" and SANITIZER == "thread":
        pytest.skip("ThreadSanitizer takes nearly all of the address space")
    size = 15 << 40
    uri = daemon.volume(f"{pool}/huge", "15T")
    with connected(uri) as handle:
        assert handle.get_size() == size
        for offset in (0, (1 << 32) - 4096, 1 << 42, size - 4096):
            handle.pwrite(offset.to_bytes(8, "big") * 512, offset)
        handle.flush()
        for offset in (0, (1 << 32) - 4096, 1 << 42, size - 4096):
            assert handle.pread(4096, offset) == offset.to_bytes(8, "big") * 512
        assert handle.pread(4096, 1 << 40) == bytes(4096)
        handle.trim(1 << 30, 0)
        assert handle.pread(4096, 0) == bytes(4096)


def test_simple_replies_only(any_uri, image):
    """A client without structured replies, as the Linux kernel is."""
    handle = nbd.NBD()
    handle.set_request_structured_replies(False)
    handle.connect_uri(any_uri)
    assert not handle.get_structured_replies_negotiated()
    content = image.read_bytes()
    for offset in range(0, 16 * MiB, MiB):
        handle.pwrite(content[offset : offset + MiB], offset)
    handle.flush()
    assert b"".join(handle.pread(MiB, offset) for offset in range(0, 16 * MiB, MiB)) == content[: 16 * MiB]
    handle.shutdown()


# Elsewhere


def test_tcp(new_daemon, pool, image, scratch):
    daemon = new_daemon(tcp=True).start()
    uri = daemon.volume(f"{pool}/volume")
    remote = f"nbd://127.0.0.1:{daemon.port}/{pool}/volume"
    run(["nbdcopy", "--connections=4", image, remote]).succeeded()
    run(["nbdcopy", "--connections=4", uri, scratch / "back"]).succeeded()
    assert digest(scratch / "back") == digest(image)
    fio(remote, "--rw=randrw", "--bs=4k", *VERIFY, *JOBS)


def test_a_silent_tcp_client_is_asked_for_a_sign(new_daemon):
    daemon = new_daemon(tcp=True).start()
    daemon.volume("disk/a")
    client = nbd.NBD()
    client.connect_uri(f"nbd://127.0.0.1:{daemon.port}/disk/a")
    wait_for(lambda: keepalive("127.0.0.1", daemon.port), "its connection has a keep-alive timer")
    assert keepalive("127.0.0.1", daemon.port)[0] <= 60
    client.shutdown()


def test_no_tcp_unless_configured(daemon):
    sockets = set()
    for descriptor in os.listdir(f"/proc/{daemon.pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            sockets.add(os.readlink(f"/proc/{daemon.pid}/fd/{descriptor}"))
    for table in ("tcp", "tcp6"):
        with open(f"/proc/{daemon.pid}/net/{table}") as file:
            for line in list(file)[1:]:
                assert f"socket:[{line.split()[9]}]" not in sockets, f"qbdd has a TCP socket: {line}"


def test_nbdkit_in_front(daemon, pool, image, scratch):
    """nbdkit's nbd plugin is a client of ours; its delay filter makes requests complete in another order."""
    uri = daemon.volume(f"{pool}/volume")
    command = [
        "nbdkit", "--exit-with-parent", "-f", "-U", str(scratch / "front.sock"), "--filter=log", "--filter=delay",
        "nbd", uri, "shared=false", "rdelay=1ms", f"logfile={scratch / 'log'}",
    ]  # fmt: skip
    front = subprocess.Popen(command, env=environment(), stdin=subprocess.DEVNULL)
    try:
        wait_for(lambda: (scratch / "front.sock").exists() or front.poll() is not None, "nbdkit listens")
        through = f"nbd+unix:///?socket={scratch / 'front.sock'}"
        run(["nbdcopy", "--connections=4", image, through]).succeeded()
        run(["nbdcopy", "--connections=4", through, scratch / "back"]).succeeded()
        assert digest(scratch / "back") == digest(image)
    finally:
        front.terminate()
        front.wait(10)
