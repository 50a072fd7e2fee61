"""A machine with volumes in its fstab: booted by systemd, shut down, booted again. Tests/VM/boot has its configuration.

Boot 0 is the one of the other tests; in it the volumes are made. In boots 1 and 2 systemd is the init.
"""
# vm: --reboots 2

import os
import pathlib
import re
import shutil

import pytest

from machine import IO_ERROR, SCRATCH, BlockDevice, is_mount_point, mounted, sh, wait_for

POOL = SCRATCH / "pool"
# What the console has of a shutdown that does not go well.
BAD = re.compile(r"FAILED|Failed|[Tt]imed out|Killing|is busy|I/O error|[Hh]old off|running \(\d+min")
A, B, C, D = (pathlib.Path("/mnt") / name for name in "abcd")


def unit(name, *properties):
    """Properties of a unit, as systemd knows them."""
    lines = sh("systemctl", "show", name, *(f"--property={one}" for one in properties)).splitlines()
    return dict(line.split("=", 1) for line in lines)


def active(name):
    return unit(name, "ActiveState")["ActiveState"] == "active"


def when(name):
    """When it became active, in microseconds since the boot."""
    return int(unit(name, "ActiveEnterTimestampMonotonic")["ActiveEnterTimestampMonotonic"])


def assert_order(text, *patterns):
    position = 0
    for pattern in patterns:
        found = re.compile(pattern).search(text, position)
        assert found, f"{pattern!r} should come after what is before it in\n{text}"
        position = found.end()


def assert_booted():
    """What systemd and fstab make of map.conf, and in which order."""
    assert is_mount_point(A) and is_mount_point(B)
    for name in ("qbdd.service", "qbd-map.service", "mnt-a.mount", "mnt-b.mount", "remote-fs.target"):
        assert active(name), sh("systemctl", "status", "--no-pager", name)
    failed = sh("systemctl", "--failed", "--plain", "--no-legend")
    assert "qbd" not in failed and "mnt" not in failed, failed
    for name in ("mnt-a.mount", "mnt-b.mount"):
        assert when("qbdd.service") <= when("qbd-map.service") <= when("remote-fs-pre.target") <= when(name)
        assert when(name) <= when("remote-fs.target") or name == "mnt-b.mount", "nofail: nothing waits for it"
    assert "hook: map /dev/qbd" in sh("journalctl", "-b", "--no-pager", "-u", "qbd-map.service")


@pytest.mark.boot(0)
def test_volumes_are_made(new_daemon):
    (SCRATCH / "state").mkdir()
    daemon = new_daemon(pool_path=POOL)
    daemon.start()
    for name, kind in (("a", "ext4"), ("b", "xfs")):
        device = daemon.disk(f"disk/{name}", "512M")
        sh(f"mkfs.{kind}", "-q", device)
        with mounted(device) as path:
            (path / "from").write_text("boot 0")
        daemon.unmap(f"disk/{name}")


@pytest.mark.boot(1)
def test_fstab_mounts_volumes():
    assert_booted()
    for path in (A, B):
        assert (path / "from").read_text() == "boot 0"


@pytest.mark.boot(1)
def test_daemon_is_restarted_under_its_file_systems(kernel_log):
    """As at an upgrade: nothing is unmapped, and nobody sees it."""
    before = unit("qbdd.service", "MainPID")
    with open(A / "open", "w") as file:
        file.write("before")
        sh("systemctl", "restart", "qbdd.service")
        file.write(" and after")
        file.flush()
        os.fsync(file.fileno())
    assert unit("qbdd.service", "MainPID") != before
    sh("kill", "-9", unit("qbdd.service", "MainPID")["MainPID"])
    wait_for(lambda: active("qbdd.service"), "systemd starts it again", seconds=30)
    shutil.copy(A / "open", B / "open")
    sh("sync")
    assert (B / "open").read_text() == "before and after"
    assert active("qbd-map.service") and active("mnt-a.mount")
    assert kernel_log.matching(IO_ERROR) == []


@pytest.mark.boot(1)
def test_what_comes_beside_fstab():
    """A volume that is added to the list, and one that nobody wrote down, mounted as if it were a local disk."""
    for name in "cd":
        sh("qbd", "create", f"disk/{name}", "-k", "256M")
    with open("/etc/neonsan/map.conf", "a") as file:
        file.write("disk/c\n")
    sh("systemctl", "reload", "qbd-map.service")
    sh("qbd", "map", "disk/d")
    for name in "cd":
        sh("mkfs.ext4", "-q", BlockDevice(f"/dev/qbd/disk/{name}"))
    sh("mount", "-o", "_netdev", "/dev/qbd/disk/c", C)
    sh("mount", "/dev/qbd/disk/d", D)


@pytest.mark.boot(1)
def test_much_is_not_written_yet_when_the_shutdown_begins():
    for path in (A, B, C, D):
        (path / "from").write_text("boot 1")
        (path / "many").write_bytes(os.urandom(1 << 20) * 16)
        shutil.copy(path / "many", SCRATCH / f"many-{path.name}")


@pytest.mark.boot(2)
def test_shutdown_was_clean():
    """All was unmounted, unmapped and stopped in this order; nothing failed, and nothing was waited for in vain."""
    text = pathlib.Path("/run/vm/previous").read_text()
    text = text[text.rindex("vm: exit status") :]
    for name in "abc":
        assert_order(text, f"Unmounted mnt-{name}.mount", "Stopped qbd-map.service", "Stopped qbdd.service")
    # Nothing tells systemd that this needs the daemon; qbdd.service does it itself.
    assert_order(text, "Stopping qbdd.service", "Unmounted mnt-d.mount", "Stopped qbdd.service")
    assert_order(text, "Stopped qbdd.service", "Unmounted scratch.mount", "reboot: ")
    # /lib/modules is the VM's own, and mounted by nobody that systemd knows.
    bad = [line for line in text.splitlines() if BAD.search(line) and "usr-lib-modules" not in line]
    assert not bad, text


@pytest.mark.boot(2)
def test_data_is_there_after_the_next_boot():
    assert_booted()
    for name in "cd":
        sh("qbd", "map", f"disk/{name}")
    sh("mount", "/dev/qbd/disk/c", C)
    sh("mount", "/dev/qbd/disk/d", D)
    for path in (A, B, C, D):
        assert (path / "from").read_text() == "boot 1"
        assert (path / "many").read_bytes() == (SCRATCH / f"many-{path.name}").read_bytes()
    # Every file system was unmounted: none had to be repaired.
    assert not re.search(r"\(nbd\d+\): (recovery|orphan|Starting recovery|Unclean)", sh("dmesg")), sh("dmesg")
    for path in (C, D):
        sh("umount", path)
