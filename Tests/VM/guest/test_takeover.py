"""The daemon may die, be restarted or stay away: devices stay, I/O waits, nothing is lost, nothing is mixed up."""

import contextlib
import os
import pathlib
import random
import re
import signal
import threading
import time

import pytest

from harness import wait_for
from load import Load
from machine import IO_ERROR, BlockDevice, Poll, connected_devices, mounted, names, read_pattern, run, sh, write_pattern

RESTARTS = 20


def restart_under_load(daemon, device, load, how):
    """Ends the daemon RESTARTS times at moments of any kind, also while it is still taking over."""
    seed = random.randrange(1 << 32)
    choose = random.Random(seed)
    poll = Poll(device, f"/dev/qbd/{daemon.rows()[0].volume}")
    try:
        for _ in range(RESTARTS):
            load.run_for(choose.choice((0, choose.uniform(0, 0.5), choose.uniform(0.5, 2))))
            daemon.restart(how, away=choose.choice((0, 0, choose.uniform(0, 1))))
        load.run_for(1)
        load.finish()
    except AssertionError as failure:
        raise AssertionError(f"seed {seed}: {failure}") from None
    finally:
        faults = poll.faults()
    assert faults == [], f"seed {seed}: the device should be there all the time"


@pytest.mark.deadline(240)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["kill-9", "SIGTERM"])
def test_load_does_not_notice_restarts(daemon, kernel_log, how):
    device = daemon.disk("disk/a")
    with Load(device) as load:
        restart_under_load(daemon, device, load, how)
    assert kernel_log.matching(IO_ERROR) == []
    assert daemon.mapped() == {"disk/a"}


@pytest.mark.deadline(240)
def test_load_does_not_notice_restarts_while_another_volume_comes_and_goes(daemon, kernel_log):
    device = daemon.disk("disk/a")
    daemon.create("ram/b")
    stop = threading.Event()
    strange = []
    cycles = []

    def come_and_go():
        while not stop.is_set():
            for word in ("map", "unmap"):
                result = daemon.qbd(word, "ram/b")
                # The daemon is away again and again; a memory pool's volume is gone when it comes back, and one whose
                # map was cut off may be mapped or not.
                if result.status not in (0, 2, 16, 25, 104, 111):
                    strange.append(str(result))
                if result.status == 2:
                    daemon.qbd("create", "ram/b", "-k", "64M")
                cycles.append(word)

    other = threading.Thread(target=come_and_go)
    other.start()
    try:
        with Load(device) as load:
            restart_under_load(daemon, device, load, signal.SIGKILL)
    finally:
        stop.set()
        other.join()
    assert strange == []
    assert len(cycles) > 10
    # What the kernel still reads of a memory pool's volume when that is gone does fail.
    errors = [line for line in kernel_log.matching(IO_ERROR) if re.search(rf"\b{device.kernel_name}\b", line)]
    assert errors == []
    assert daemon.mapped() - {"ram/b"} == {"disk/a"}


def test_mounted_file_system_survives_a_kill(daemon, kernel_log):
    sh("mkfs.ext4", "-q", daemon.disk("disk/a", "128M"))
    with mounted("/dev/qbd/disk/a") as path:
        (path / "before").write_bytes(os.urandom(1 << 20))
        daemon.kill()
        command = ["dd", "if=/dev/zero", f"of={path}/during", "bs=1M", "count=8", "conv=fsync"]
        writing = threading.Thread(target=sh, args=command)
        writing.start()
        writing.join(2)
        assert writing.is_alive(), "a write should wait while the daemon is away"
        daemon.start()
        writing.join(60)
        assert not writing.is_alive(), "the write should go on when the daemon is back"
        sh("sync", "--file-system", path)
    sh("fsck.ext4", "-f", "-n", "/dev/qbd/disk/a")
    assert kernel_log.matching(IO_ERROR) == []


def test_export_comes_back_under_its_name(daemon):
    daemon.create("disk/exported")
    daemon.create("disk/mapped")
    uri = daemon.qbd("map", "--export", "disk/exported").succeeded().out.strip()
    device = daemon.map("disk/mapped")
    daemon.restart()
    wait_for(lambda: run(["nbdinfo", uri]).status == 0, "the export is there again")
    assert {row.volume: (row.dev_id, row.device) for row in daemon.rows()} == {
        "disk/exported": (0, "-"),
        "disk/mapped": (1, "qbd1"),
    }
    daemon.wait_until_usable(device)


def test_several_devices_are_taken_over_under_their_numbers(daemon):
    volumes = [f"disk/v{number}" for number in range(4)]
    devices = {volume: daemon.disk(volume, f"{32 + number}M") for number, volume in enumerate(volumes)}
    for volume, device in devices.items():
        write_pattern(device, volume)
    # A hole in the numbers, so that order alone would be wrong.
    daemon.unmap(volumes.pop(1))
    daemon.restart()
    for volume in volumes:
        assert BlockDevice(f"/dev/qbd/{volume}").number == devices[volume].number
        assert str(devices[volume]) == f"/dev/{ {row.volume: row.device for row in daemon.rows()}[volume] }"
        assert read_pattern(devices[volume]) == volume
    assert str(daemon.map("disk/v1")) == "/dev/qbd1"


@pytest.mark.parametrize("options", [(), ("--read-only",)], ids=["read-write", "read-only"])
def test_read_only_survives_a_restart(daemon, options):
    daemon.create("disk/a")
    device = daemon.map("disk/a", *options)
    daemon.restart()
    daemon.wait_until_usable(device)
    done = run(["dd", "if=/dev/zero", f"of={device}", "bs=4096", "count=1", "oflag=direct", "conv=nocreat"])
    assert (done.status != 0) == bool(options), str(done)


@pytest.mark.deadline(180)
def test_daemon_that_stays_away_lets_io_fail(new_daemon):
    daemon = new_daemon(reattach_timeout=4).start()
    device = daemon.disk("disk/a")
    write_pattern(device, "before")
    daemon.kill()
    started = time.monotonic()
    done = run(["dd", "if=/dev/zero", f"of={device}", "bs=4096", "count=1", "oflag=direct", "conv=nocreat"], timeout=30)
    assert done.status != 0 and "Input/output error" in done.err, f"I/O should fail: {done}"
    assert 2 < time.monotonic() - started < 30, "it should fail after reattach_timeout"
    daemon.start()
    result = daemon.qbd("unmap", "disk/a")
    assert result.status in (0, 25), f"unmap should work: {result}"
    wait_for(lambda: names() == set() and connected_devices() == [], "the device is gone")
    device = daemon.map("disk/a")
    assert read_pattern(device) == "before"
    write_pattern(device, "after")
    assert read_pattern(device) == "after"


def test_reattach_timeout_counts_anew_after_each_takeover(new_daemon):
    daemon = new_daemon(reattach_timeout=6).start()
    device = daemon.disk("disk/a")
    with Load(device, mebibytes=2) as load:
        for _ in range(3):
            daemon.restart(away=3)
            load.run_for(1)
        load.finish()


def documents(daemon):
    return sorted(daemon.state.glob("*.mapping"))


def swap_files(first, second):
    texts = first.read_text(), second.read_text()
    first.write_text(texts[1])
    second.write_text(texts[0])


def swap_identifiers(first, second):
    """What a careful person would do to exchange two mappings: everything agrees, and it is wrong."""
    texts = [first.read_text(), second.read_text()]
    found = [re.search(r'"identifier"\s*:\s*"([^"]*)"', text)[1] for text in texts]
    first.write_text(texts[0].replace(found[0], found[1]))
    second.write_text(texts[1].replace(found[1], found[0]))


@pytest.mark.parametrize("sizes", [("64M", "96M"), ("64M", "64M")], ids=["sizes-differ", "same-size"])
@pytest.mark.parametrize("swap", [swap_files, swap_identifiers])
def test_swapped_state_attaches_nothing_wrongly(new_daemon, swap, sizes):
    # Short, because a device that nothing is attached to lets its readers wait so long.
    daemon = new_daemon(reattach_timeout=3).start()
    devices = {}
    for volume, size in zip(("disk/a", "disk/b"), sizes):
        devices[volume] = daemon.disk(volume, size)
        write_pattern(devices[volume], volume)
    daemon.kill()
    before = len(daemon.log())
    swap(*documents(daemon))
    daemon.start()
    log = daemon.log()[before:]
    complaints = [line for line in log.splitlines() if re.search(r" (WARNING|ERROR|CRITICAL) ", line)]
    assert any("disk/a" in line or "disk@a" in line for line in complaints), f"a clear error should be logged:\n{log}"
    for volume, device in devices.items():
        # Whatever the kernel's device answers, it is never the other volume's data.
        reading = ["dd", f"if={device.kernel_path}", "bs=4096", "count=1", "iflag=direct"]
        done = run(reading)
        if done.status == 0 and done.out:
            assert done.out[:15].strip() == volume, f"{device.kernel_path} is {volume}'s"
        link = pathlib.Path("/dev/qbd") / volume
        if link.exists() and BlockDevice(link).is_connected:
            assert BlockDevice(link).number == device.number, f"{link} should not change its device"
    # A person sorts it out: everything can be unmapped and mapped again.
    for volume in devices:
        result = daemon.qbd("unmap", volume)
        assert result.status in (0, 25), str(result)
    daemon.terminate()
    for file in daemon.state.glob("*.mapping"):
        file.unlink()
    daemon.start()
    wait_for(lambda: connected_devices() == [], "devices with our cookie and without a mapping are disconnected")
    for volume in devices:
        assert read_pattern(daemon.map(volume)) == volume


def test_device_without_its_document_is_disconnected(daemon):
    daemon.disk("disk/a")
    daemon.kill()
    for file in documents(daemon):
        file.unlink()
    daemon.start()
    wait_for(lambda: connected_devices() == [], "the device with our cookie is disconnected")
    wait_for(lambda: names() == set(), "its names are gone")
    assert daemon.rows() == []


def test_document_without_its_device_is_forgotten(daemon):
    device = daemon.disk("disk/a")
    daemon.kill()
    sh("nbd-client", "-d", device.kernel_path)
    wait_for(lambda: connected_devices() == [], "the kernel lets go of the device")
    before = len(daemon.log())
    daemon.start()
    assert daemon.rows() == [] and documents(daemon) == []
    wait_for(lambda: names() == set(), "its names are gone")
    assert "disk/a" in daemon.log()[before:], "the log says that the mapping is forgotten"


def test_volume_that_is_gone_is_not_taken_over(daemon):
    """The memory pool's volumes end with the daemon: there is nothing that could answer for the device."""
    device = daemon.disk("ram/a")
    daemon.kill()
    before = len(daemon.log())
    daemon.start()
    assert re.search(r"ram/a", daemon.log()[before:]), "the log says what became of the mapping"
    result = daemon.qbd("unmap", "ram/a")
    assert result.status in (0, 25), str(result)
    wait_for(lambda: names() == set() and not device.is_connected, "the device is gone")


def test_remap_under_load_has_no_error(daemon, kernel_log):
    device = daemon.disk("disk/a")
    poll = Poll(device)
    with Load(device) as load:
        for _ in range(10):
            load.run_for(0.3)
            daemon.remap("disk/a")
        daemon.qbd("-r", "disk/a").succeeded()
        load.finish()
    assert poll.faults() == []
    assert kernel_log.matching(IO_ERROR) == []


def test_remap_of_what_is_not_mapped_is_25(daemon):
    daemon.create("disk/a")
    daemon.qbd("remap", "disk/a").failed(25, "disk/a")


@contextlib.contextmanager
def pool_away(daemon):
    """Something else is mounted where the pool is, or what should be mounted there is not."""
    sh("mount", "-t", "tmpfs", "none", daemon.pool_path)
    try:
        yield
    finally:
        # The daemon may have a look at it just now.
        sh("umount", "--lazy", daemon.pool_path)


def test_device_whose_volume_is_away_waits_for_it(daemon, kernel_log):
    """Nobody else gets its number, its name or its volume, and its document stays."""
    device = daemon.disk("disk/a", "128M")
    sh("mkfs.ext4", "-q", device)
    with mounted("/dev/qbd/disk/a") as path:
        (path / "before").write_bytes(os.urandom(1 << 20))
        sh("sync", "--file-system", path)
        daemon.kill()
        with pool_away(daemon):
            daemon.start()
            document = documents(daemon)[0].read_text()
            assert [(row.dev_id, row.device, row.volume) for row in daemon.rows()] == [(0, "qbd0", "disk/a")]
            assert "not taken over" in daemon.json("info", "disk/a")["waits"]
            daemon.create("ram/b")
            assert str(daemon.map("ram/b")) == "/dev/qbd1"
            daemon.qbd("map", "disk/a").failed(16, "disk/a", "not taken over", device.kernel_name)
            daemon.qbd("delete", "disk/a").failed(16, "disk/a", "not taken over")
            daemon.qbd("remap", "disk/a").failed(16, "disk/a", "not taken over")
            daemon.qbd("unmap", "disk/a").failed(16, "disk/a", str(path))
            daemon.unmap("ram/b")
            assert [file.read_text() for file in documents(daemon)] == [document]
            # Another restart changes nothing.
            daemon.restart(signal.SIGTERM)
            assert [file.read_text() for file in documents(daemon)] == [document]
            assert BlockDevice("/dev/qbd/disk/a").number == device.number and device.is_connected
        (path / "after").write_bytes(os.urandom(1 << 20))
        sh("sync", "--file-system", path)
    wait_for(lambda: "waits" not in daemon.json("info", "disk/a"), "it is taken over", 30)
    sh("fsck.ext4", "-f", "-n", "/dev/qbd/disk/a")
    assert kernel_log.matching(IO_ERROR) == []


def test_map_takes_over_a_device_that_waits(daemon):
    device = daemon.disk("disk/a")
    write_pattern(device, "before")
    daemon.kill()
    with pool_away(daemon):
        daemon.start()
    assert daemon.map("disk/a").number == device.number
    assert read_pattern(device) == "before"


def test_device_with_a_damaged_document_is_nobody_else_s(daemon):
    """Its number stays its own, it is not mapped a second time, and unmap ends it."""
    device = daemon.disk("disk/a")
    daemon.kill()
    documents(daemon)[0].write_text('{"volume": "di')
    daemon.start()
    daemon.create("ram/b")
    assert str(daemon.map("ram/b")) == "/dev/qbd1"
    daemon.qbd("map", "disk/a").failed(16, "disk/a", "damaged")
    assert device.is_connected and documents(daemon)[0].read_text() == '{"volume": "di'
    daemon.unmap("disk/a")
    assert [file.name for file in documents(daemon)] == ["ram@b.mapping"]
    assert str(daemon.map("disk/a")) == "/dev/qbd0"


def test_a_name_in_the_way_costs_the_name_alone(daemon, kernel_log):
    """A mounted device gets its connections whatever is wrong in /dev."""
    sh("mkfs.ext4", "-q", daemon.disk("disk/a", "128M"))
    with mounted("/dev/qbd0") as path:
        before = len(daemon.log())
        daemon.kill()
        os.unlink("/dev/qbd0")
        os.mkdir("/dev/qbd0")
        try:
            daemon.start()
            (path / "file").write_bytes(os.urandom(1 << 20))
            sh("sync", "--file-system", path)
            assert daemon.mapped() == {"disk/a"} and "waits" not in daemon.json("info", "disk/a")
            assert "/dev/qbd0" in daemon.log()[before:], "the log says what is in the way"
        finally:
            os.rmdir("/dev/qbd0")
    daemon.remap("disk/a")
    assert BlockDevice("/dev/qbd0").kernel_name == BlockDevice("/dev/qbd/disk/a").kernel_name
    assert kernel_log.matching(IO_ERROR) == []
