"""Suspend, resume and limits of a volume that is a device: the kernel waits, and nothing is lost."""

import random
import signal
import threading
import time

import pytest

from harness import wait_for
from load import Load
from machine import IO_ERROR


def state(daemon, volume):
    return daemon.json("info", volume)["state"]


def held_back(daemon, load):
    load.keep_running()
    return daemon.json("info", "disk/a")["held_back"]["requests"]


def suspend_under_load(daemon, device, cycles, also=lambda: None):
    with Load(device) as load:
        for _ in range(cycles):
            load.run_for(random.uniform(0, 0.2))
            also()
            daemon.qbd("suspend", "disk/a").succeeded()
            before = daemon.json("info", "disk/a")["counters"]
            time.sleep(random.uniform(0, 0.3))
            assert daemon.json("info", "disk/a")["counters"]["writes"] == before["writes"]
            daemon.qbd("resume", "disk/a", "-t", "normal").succeeded()
        load.run_for(1)
        load.finish()


@pytest.mark.deadline(240)
def test_load_does_not_notice_suspensions(daemon, kernel_log):
    suspend_under_load(daemon, daemon.disk("disk/a"), 15)
    assert kernel_log.matching(IO_ERROR) == []


@pytest.mark.deadline(240)
def test_load_does_not_notice_suspensions_during_reconnects(daemon, kernel_log):
    device = daemon.disk("disk/a")
    stop = threading.Event()
    failures = []

    def reconnect():
        while not stop.is_set():
            result = daemon.qbd("remap", "disk/a")
            if result.status != 0:
                failures.append(str(result))
            time.sleep(0.1)

    other = threading.Thread(target=reconnect)
    other.start()
    try:
        suspend_under_load(daemon, device, 10)
    finally:
        stop.set()
        other.join()
    assert failures == []
    assert kernel_log.matching(IO_ERROR) == []


@pytest.mark.deadline(240)
def test_suspended_device_survives_a_kill(daemon, kernel_log):
    """Suspend, kill -9, restart, resume, with a verifying load: the device stays, and its I/O waits all the time."""
    device = daemon.disk("disk/a")
    with Load(device) as load:
        for _ in range(2):
            load.run_for(0.5)
            daemon.qbd("suspend", "disk/a").succeeded()
            daemon.restart(signal.SIGKILL)
            assert state(daemon, "disk/a") == "suspended"
            # The kernel sends again what was in flight when the interval is over that it was told for suspensions.
            wait_for(lambda: held_back(daemon, load) > 0, "the load waits", 60)
            daemon.qbd("resume", "disk/a", "-t", "normal").succeeded()
        load.run_for(1)
        load.finish()
    assert kernel_log.matching(IO_ERROR) == []
