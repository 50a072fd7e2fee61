"""A volume grows: at its store, while it is served, and over a restart."""

import errno
import os
import threading

import nbd
import pytest

from harness import MiB, run


def connected(uri):
    handle = nbd.NBD()
    handle.connect_uri(uri)
    return handle


@pytest.mark.parametrize("pool", ["disk", "ram"])
def test_an_export_has_the_new_size_at_the_next_connection(daemon, pool):
    volume = f"{pool}/a"
    uri = daemon.volume(volume, 4 * MiB)
    old = connected(uri)
    old.pwrite(b"\x5a" * 4096, 4 * MiB - 4096)
    result = daemon.qbd("resize", volume, "-k", "16M").succeeded()
    assert result.out == ""
    # Who is connected goes on within the size of his handshake.
    assert old.get_size() == 4 * MiB
    assert old.pread(4096, 4 * MiB - 4096) == b"\x5a" * 4096
    old.set_strict_mode(0)
    with pytest.raises(nbd.Error):
        old.pread(4096, 4 * MiB)
    new = connected(uri)
    assert new.get_size() == 16 * MiB
    assert new.pread(12 * MiB, 4 * MiB) == bytes(12 * MiB)
    new.pwrite(b"\xa5" * 4096, 16 * MiB - 4096)
    new.flush()
    assert new.pread(4096, 16 * MiB - 4096) == b"\xa5" * 4096
    old.shutdown()
    new.shutdown()
    assert {one["volume"]: one["size"] for one in daemon.json("list")} == {volume: 16 * MiB}
    assert daemon.json("info", volume)["size"] == 16 * MiB
    assert {one["volume"]: one["size"] for one in daemon.json("volumes", pool)} == {volume: 16 * MiB}


def test_a_restart_keeps_the_size(daemon):
    daemon.volume("disk/a", 4 * MiB)
    daemon.qbd("-z", "disk/a", "-k", "8M").succeeded()
    daemon.kill()
    daemon.start()
    assert connected(daemon.uri("disk/a")).get_size() == 8 * MiB


@pytest.mark.parametrize("pool", ["disk", "ram"])
def test_a_volume_that_is_not_mapped_grows_too(daemon, pool):
    daemon.create(f"{pool}/a", 4 * MiB)
    assert daemon.json("resize", f"{pool}/a", "-k", "8M")["size"] == 8 * MiB
    assert connected(daemon.map(f"{pool}/a")).get_size() == 8 * MiB


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "not mapped"])
@pytest.mark.parametrize(
    "size, words",
    [("4M", ("4194304", "same")), ("4194303", ("4194304", "4194303")), ("1M", ("4194304", "1048576")),
     ("4194305", ("multiple", "512"))],
)  # fmt: skip
def test_what_is_no_growth_is_refused(daemon, mapped, size, words):
    daemon.create("disk/a", 4 * MiB)
    if mapped:
        daemon.map("disk/a")
    before = daemon.json("volumes")
    daemon.qbd("resize", "disk/a", "-k", size).failed(errno.EINVAL, "disk/a", *words)
    assert daemon.json("volumes") == before
    assert (daemon.pool_path / "a.raw").stat().st_size == 4 * MiB


@pytest.mark.parametrize("size", ["0", "-1", "1X", "99999999P", "", "1.5G", "4 apples"])
def test_a_size_that_is_none_is_refused_with_the_usage(daemon, size):
    daemon.create("disk/a", 4 * MiB)
    for words in (["resize", "disk/a", f"--size={size}"], ["-z", "disk/a", "-k", size]):
        result = daemon.qbd(*words).failed(64, "usage: qbd resize")
        assert size in result.err


def test_a_volume_larger_than_the_file_system_can_hold(daemon):
    daemon.volume("disk/a", 4 * MiB)
    daemon.qbd("resize", "disk/a", "-k", "8191P").failed(errno.EFBIG, "disk/a:", "a.raw", "smaller")
    daemon.qbd("create", "disk/huge", "-k", "8191P").failed(errno.EFBIG, "disk/huge:", "smaller")
    daemon.qbd("resize", "disk/a", "-k", "8M").succeeded()
    assert connected(daemon.uri("disk/a")).get_size() == 8 * MiB


def test_missing_and_foreign_volumes(daemon, new_daemon):
    daemon.qbd("resize", "disk/gone", "-k", "8M").failed(errno.ENOENT, "gone")
    daemon.qbd("resize", "gone/gone", "-k", "8M").failed(errno.ENOENT, "gone")
    daemon.volume("disk/a", 4 * MiB)
    other = daemon.directory / "other.conf"
    other.write_text(daemon.config.read_text())
    daemon.qbd("resize", "disk/a", "-k", "8M", "-c", other).failed(errno.ENOTTY, "disk/a", "qbd.conf")
    # Another daemon has it open.
    second = new_daemon()
    second.config.write_text(daemon.config.read_text())
    second.start()
    second.qbd("resize", "disk/a", "-k", "8M").failed(errno.EBUSY, "in use")
    status, answer = daemon.post("QBD_IOC_RESIZE_VOLUME", volume="disk/b", size=8 * MiB)
    assert (status, answer["error"]["code"]) == (404, errno.ENOTTY)


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "not mapped"])
def test_a_size_that_grew_elsewhere_is_taken_over(daemon, mapped):
    daemon.create("disk/a", 4 * MiB)
    if mapped:
        daemon.map("disk/a")
    assert daemon.json("resize", "disk/a", "--to-store-size")["size"] == 4 * MiB
    os.truncate(daemon.pool_path / "a.raw", 9 * MiB + 100)
    assert daemon.json("resize", "disk/a", "--to-store-size")["size"] == 9 * MiB
    assert connected(daemon.map("disk/a")).get_size() == 9 * MiB


def test_read_only_mapping(daemon):
    daemon.volume("disk/a", 4 * MiB, read_only=True)
    daemon.qbd("resize", "disk/a", "-k", "8M").failed(errno.EROFS, "read-only")


def test_growing_under_load(daemon):
    """Twenty steps, each seen by the next client, while others write and read what they wrote."""
    uri = daemon.volume("disk/a", 16 * MiB)
    stop = threading.Event()
    failures = []

    def load(number):
        try:
            handle = connected(uri)
            turn = 0
            while not stop.is_set():
                turn += 1
                data = bytes([number, turn % 256]) * 32768
                offset = (number * 4 + turn % 4) * len(data)
                handle.pwrite(data, offset)
                assert handle.pread(len(data), offset) == data
            handle.shutdown()
        except Exception as failure:  # noqa: BLE001
            failures.append(failure)

    threads = [threading.Thread(target=load, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for step in range(1, 21):
        size = (16 + step) * MiB
        daemon.qbd("resize", "disk/a", "-k", size).succeeded()
        handle = connected(uri)
        assert handle.get_size() == size
        handle.pwrite(bytes([step]) * 4096, size - 4096)
        handle.shutdown()
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    handle = connected(uri)
    for step in range(1, 21):
        assert handle.pread(4096, (16 + step) * MiB - 4096) == bytes([step]) * 4096
    run(["nbdinfo", uri]).succeeded()
