"""A store that does not answer: nobody else waits for it, nothing is written twice in the wrong order."""

import pathlib
import re
import subprocess
import threading
import time

import pytest

from harness import wait_for
from load import Load
from machine import IO_ERROR, connected_devices, mapped_disk, names, read_pattern, sh, write_pattern

# What the driver logs when it ends a connection for a request that takes too long.
GIVEN_UP = re.compile(r"Connection timed out, retrying")


class Store:
    """A disk with a file system for a pool, which can stop answering."""

    def __init__(self, path):
        self.path = path

    def stop(self):
        sh("dmsetup", "suspend", "--nolockfs", "test-store")

    def go_on(self):
        sh("dmsetup", "resume", "test-store")


@pytest.fixture
def store():
    with mapped_disk("store", 512 << 20) as (_, path):
        yield Store(path / "pool")


@pytest.fixture
def daemon(store, new_daemon):
    return new_daemon(pool_path=store.path).start()


@pytest.fixture
def writer(daemon, store, processes):
    """A writer on disk/a whose write waits for the store."""
    device = daemon.disk("disk/a")
    write_pattern(device, "before")
    store.stop()
    writer = processes(
        "dd", "if=/dev/zero", f"of={device}", "bs=64k", "count=4", "oflag=direct,dsync", "conv=nocreat",
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(lambda: device.attribute("inflight").split()[1] != "0", "a write waits for the store")
    return writer


def test_forced_unmap_does_not_wait_for_the_store(daemon, store, writer):
    daemon.qbd("unmap", "disk/a").failed(16, "dd", str(writer.pid))
    # Other volumes come and go meanwhile.
    stop = threading.Event()
    cycles = []

    def come_and_go():
        daemon.create("ram/b")
        while not stop.is_set():
            daemon.map("ram/b")
            daemon.unmap("ram/b")
            cycles.append(True)

    other = threading.Thread(target=come_and_go)
    other.start()
    try:
        result = daemon.qbd("unmap", "--force", "disk/a", timeout=40).succeeded()
        done = len(cycles)
        wait_for(lambda: len(cycles) > done + 1, "other volumes are mapped and unmapped")
    finally:
        stop.set()
        other.join()
    assert "dd" in result.err and "still with the store" in result.err
    assert names() == set()
    err = writer.communicate(timeout=60)[1]
    assert "Input/output error" in err, err
    wait_for(lambda: connected_devices() == [], "the kernel lets go of the device")
    assert daemon.mapped() == set()
    # The store is still busy with it; then it is free.
    daemon.qbd("map", "disk/a").failed(16, "disk/a")
    store.go_on()
    wait_for(lambda: daemon.qbd("map", "disk/a").status == 0, "the volume can be mapped again")


def test_plain_unmap_is_refused_while_the_store_does_not_answer(daemon, store):
    device = daemon.disk("disk/a")
    write_pattern(device, "before", length=8 << 20)
    store.stop()
    daemon.qbd("unmap", "disk/a", timeout=90).failed(16, "disk/a", "does not answer", "--force")
    assert "qbd/disk/a" in names() and device.is_connected
    store.go_on()
    wait_for(lambda: daemon.qbd("unmap", "disk/a").status == 0, "it can be unmapped when the store answers")
    assert read_pattern(daemon.map("disk/a")) == "before"


def test_remap_does_not_wait_for_the_store(daemon, store, writer, kernel_log):
    started = time.monotonic()
    daemon.remap("disk/a")
    assert time.monotonic() - started < 45
    assert writer.poll() is None
    store.go_on()
    err = writer.communicate(timeout=60)[1]
    assert writer.returncode == 0, err
    device = "/dev/qbd/disk/a"
    assert read_pattern(device) == ""
    write_pattern(device, "after")
    assert read_pattern(device) == "after"
    assert kernel_log.matching(IO_ERROR) == []


@pytest.fixture
def suspended(daemon, processes):
    """disk/a, suspended, with a writer that waits."""
    device = daemon.disk("disk/a")
    write_pattern(device, "before")
    daemon.qbd("suspend", "disk/a").succeeded()
    writer = processes(
        "dd", "if=/dev/zero", f"of={device}", "bs=64k", "count=4", "oflag=direct", "conv=nocreat",
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(lambda: device.attribute("inflight").split()[1] != "0", "a write is held back")
    return writer


def test_suspended_device_is_unmapped_when_nothing_waits(daemon):
    write_pattern(daemon.disk("disk/a"), "before")
    daemon.qbd("suspend", "disk/a").succeeded()
    daemon.unmap("disk/a")
    assert read_pattern(daemon.map("disk/a")) == "before"


def test_forced_unmap_of_a_suspended_device(daemon, suspended):
    daemon.qbd("unmap", "disk/a").failed(16, "dd", str(suspended.pid))
    daemon.qbd("unmap", "--force", "disk/a").succeeded()
    err = suspended.communicate(timeout=60)[1]
    assert "Input/output error" in err, err
    wait_for(lambda: connected_devices() == [], "the kernel lets go of the device")
    assert read_pattern(daemon.map("disk/a")) == "before"


def test_suspended_device_is_taken_over_and_holds_up_nobody(daemon, suspended, kernel_log):
    other = daemon.disk("disk/b")
    daemon.restart()
    write_pattern(other, "other")
    daemon.remap("disk/a")
    assert suspended.poll() is None
    daemon.qbd("resume", "disk/a", "-t", "normal").succeeded()
    err = suspended.communicate(timeout=100)[1]
    assert suspended.returncode == 0, err
    assert read_pattern("/dev/qbd/disk/a") == ""
    assert kernel_log.matching(IO_ERROR) == []


@pytest.mark.deadline(240)
def test_connections_that_the_kernel_gives_up_cost_nothing(store, new_daemon, kernel_log):
    """Of several connections it ends one on which a request takes too long, and sends its requests again on another."""
    daemon = new_daemon(connections=2, pool_path=store.path).start()
    device = daemon.disk("disk/a")
    assert len(list((device.sys / "mq").iterdir())) == 2
    patience = pathlib.Path(device.sys / "queue/io_timeout")
    with Load(device, options=["--fdatasync=16"]) as load:
        for _ in range(4):
            load.run_for(2)
            # A new connection may come with the usual patience. What is in flight keeps the one it began with.
            if patience.read_text().strip() != "1000":
                patience.write_text("1000")
                load.run_for(2)
            before = len(kernel_log.matching(GIVEN_UP))
            store.stop()

            def given_up():
                # A round that had no more to write has ended.
                load.keep_running()
                return len(kernel_log.matching(GIVEN_UP)) > before

            wait_for(given_up, "the kernel gives a connection up")
            store.go_on()
        load.finish(seconds=100)
    assert kernel_log.matching(IO_ERROR) == []


@pytest.mark.deadline(240)
def test_several_connections_survive_a_kill(new_daemon, kernel_log):
    daemon = new_daemon(connections=2).start()
    device = daemon.disk("disk/a")
    with Load(device) as load:
        load.run_for(1)
        daemon.restart()
        load.run_for(1)
        daemon.remap("disk/a")
        load.finish(seconds=150)
    assert kernel_log.matching(IO_ERROR) == []
