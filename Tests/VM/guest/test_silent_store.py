"""A store of a cluster that takes commands and answers none: the daemon can be killed, and holds up nothing else."""

import signal
import subprocess

import pytest

from harness import QBD, environment, wait_for
from machine import IO_ERROR, BlockDevice, connected_devices, read_pattern, write_pattern
from pureflash import Store


@pytest.fixture
def store():
    store = Store()
    with store.config.open("a") as config:
        config.write("[pool.net]\ntype=memory\n")
    try:
        yield store.start()
    finally:
        store.finish()


@pytest.fixture
def daemon(store, new_daemon):
    return new_daemon(
        configuration=f"[conductor]\nendpoints={store.address}:{store.conductor_port}\n"
        f"[client]\nstore_port={store.data_port}\n"
    ).start()


def begin(processes, daemon, *words):
    """Starts a command whose daemon will be killed."""
    return processes(
        QBD, *words, env=environment(**daemon.variables), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def waits_for_io(direction):
    """Whether a device waits for reads or for writes."""
    column = {"read": 0, "write": 1}[direction]
    devices = [BlockDevice(f"/dev/{name}") for name in connected_devices()]
    return any(device.attribute("inflight").split()[column] != "0" for device in devices)


def kill(daemon):
    """kill -9; the process must be gone, not only marked."""
    daemon.expected_to_run = False
    daemon.process.send_signal(signal.SIGKILL)
    try:
        daemon.process.wait(20)
    except subprocess.TimeoutExpired:
        raise AssertionError("the daemon does not end") from None


def kill_in_the_first_look(daemon, store, processes):
    """Maps net/a while its store is silent, and kills the daemon while the kernel reads the partition table."""
    daemon.create("net/a")
    store.faults(stop=1)
    mapping = begin(processes, daemon, "map", "net/a")
    wait_for(lambda: waits_for_io("read"), "the kernel reads the partition table")
    kill(daemon)
    assert mapping.wait(20) != 0


def test_killed_in_the_first_look_at_a_device(daemon, store, processes, kernel_log):
    other = daemon.disk("disk/other")
    write_pattern(other, "other")
    kill_in_the_first_look(daemon, store, processes)
    daemon.start()
    assert read_pattern(other) == "other"
    store.faults(stop=0)
    device = daemon.map("net/a")
    write_pattern(device, "after")
    assert read_pattern(device) == "after"
    assert kernel_log.matching(IO_ERROR) == []


def test_the_daemon_s_own_look_at_a_device_is_no_use_of_it(daemon, store, processes):
    """What a killed daemon began waits in the kernel for the volume, and must not keep that from being given up."""
    kill_in_the_first_look(daemon, store, processes)
    daemon.config.write_text(daemon.config.read_text().replace("[conductor]", "[not.read]"))
    daemon.start()
    assert "not taken over" in daemon.json("info", "net/a")["waits"]
    daemon.qbd("unmap", "net/a").succeeded()
    assert connected_devices() == [] and daemon.rows() == []


def test_growing_does_not_wait_for_the_store(daemon, store, processes):
    """From Linux 6.11 on the driver would, and would let no device be connected or disconnected meanwhile."""
    device = daemon.disk("net/a")
    store.faults(stop=1)
    writer = processes("dd", "if=/dev/zero", f"of={device}", "bs=64k", "count=4", "oflag=direct", "conv=nocreat")
    wait_for(lambda: waits_for_io("write"), "a write waits for the store")
    growing = begin(processes, daemon, "resize", "net/a", "-k", "128M")
    while growing.poll() is None:
        daemon.disk("disk/b")
        daemon.unmap("disk/b")
        daemon.qbd("delete", "disk/b").succeeded()
    daemon.qbd("resize", "net/a", "--to-store-size").failed(16, "net/a has grown", "in flight", "--to-store-size")
    assert device.size == 64 << 20
    kill(daemon)
    daemon.start()
    store.faults(stop=0)
    assert writer.wait(60) == 0
    daemon.qbd("resize", "net/a", "--to-store-size").succeeded()
    assert device.size == 128 << 20
