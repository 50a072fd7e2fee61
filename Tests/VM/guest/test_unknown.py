"""What cannot be read is not known: it is neither gone, nor unused, nor somebody else's. And names of any length map."""

import contextlib
import os
import shutil
import subprocess

import pytest

from harness import SANITIZER, wait_for
from machine import connected_devices, mounted, names, sh

EIO, BUSY = 5, 16
LONG = "n" * 128

needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None or SANITIZER is not None, reason="strace is missing, or a sanitizer traces itself"
)


@contextlib.contextmanager
def without_sysfs():
    """An empty folder covers it. What would show without the mount is the folder of the machine that runs the VM."""
    sh("mount", "-t", "tmpfs", "none", "/sys")
    try:
        yield
    finally:
        sh("umount", "/sys")


@contextlib.contextmanager
def unreadable(daemon, path):
    """The daemon cannot open the path."""
    tracer = subprocess.Popen(
        ["strace", "-f", "-p", str(daemon.pid), "-P", path, "-e", "trace=openat", "-e", "inject=openat:error=EIO",
         "-o", "/dev/null"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        # A line for the path may come first.
        while "attached" not in (line := tracer.stderr.readline()):
            assert line, "strace should have attached"
        yield
    finally:
        tracer.terminate()
        tracer.wait()
        tracer.stderr.close()


def test_a_mapping_is_not_forgotten_while_sysfs_is_away(daemon):
    device = daemon.disk("disk/a")
    daemon.create("disk/b", "1M")
    daemon.qbd("map", "--export", "disk/b").succeeded()
    daemon.kill()
    with without_sysfs():
        daemon.start()
        assert daemon.mapped() == {"disk/a", "disk/b"}
        assert "/sys/block" in daemon.json("info", "disk/a")["waits"]
        # Nothing is given up that may be there.
        daemon.qbd("unmap", "disk/a").failed(2, "/sys/block")
        daemon.create("ram/c", "1M")
        daemon.qbd("map", "ram/c").failed(2)
    wait_for(lambda: daemon.json("info", "disk/a")["health"] != "reconnecting", "it is taken over", seconds=30)
    daemon.wait_until_usable(device)


@needs_strace
@pytest.mark.parametrize("path", ["/proc/self/mountinfo", "/proc/swaps", "/sys/block"])
def test_a_disk_is_not_unmapped_when_it_cannot_be_told_who_uses_it(daemon, path):
    device = daemon.disk("disk/a", "128M")
    sh("mkfs.ext4", "-q", device)
    with mounted(device) as folder:
        with unreadable(daemon, path):
            daemon.qbd("unmap", "disk/a").failed(EIO, "disk/a", path.removeprefix("/proc/self"))
        (folder / "file").write_text("still writable")
        daemon.qbd("unmap", "disk/a").failed(BUSY, str(folder))
    daemon.unmap("disk/a")


@needs_strace
def test_a_device_is_not_let_go_when_it_cannot_be_told_whose_it_is(daemon):
    device = daemon.disk("disk/a")
    with unreadable(daemon, f"/sys/block/{device.kernel_name}/backend"):
        daemon.qbd("unmap", "disk/a").failed(EIO, "backend")
    assert daemon.mapped() == {"disk/a"} and "qbd0" in names()
    daemon.wait_until_usable(device)
    daemon.unmap("disk/a")


def test_names_of_any_length_become_devices(new_daemon):
    daemon = new_daemon()
    os.makedirs(daemon.pool_path / "long")
    with open(daemon.config, "a") as config:
        config.write(f"\n[pool.{LONG}]\ntype=local\npath={daemon.pool_path}/long\n")
    daemon.start()
    volume = f"{LONG}/{LONG}"
    daemon.disk(volume, "1M")
    daemon.qbd("snapshot", "create", f"{volume}@{LONG}").succeeded()
    # Its name below /dev/qbd would be too long for a file's.
    assert daemon.qbd("map", f"{volume}@{LONG}").succeeded().out == "/dev/qbd1\n"
    assert {"qbd0", "qbd1"} <= names()
    daemon.restart()
    wait_for(lambda: daemon.mapped() == {volume, f"{volume}@{LONG}"}, "both are there again")
    sh("dd", "if=/dev/qbd1", "of=/dev/null", "bs=64k", "iflag=direct")
    daemon.qbd("unmap", f"{volume}@{LONG}").succeeded()
    daemon.unmap(volume)
    assert connected_devices() == []
