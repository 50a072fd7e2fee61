"""A device grows under the file system that is mounted on it."""

import pytest

from harness import run, wait_for
from load import Load
from machine import IO_ERROR, BlockDevice, mounted, partition, sh

STEPS = 10
MiB = 1 << 20


@pytest.mark.deadline(400)
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_growing_under_a_mounted_file_system(daemon, kernel_log, kind):
    start, step = {"ext4": (64, 32), "xfs": (320, 64)}[kind]
    device = daemon.disk("disk/a", f"{start}M")
    sh(f"mkfs.{kind}", "-q", device)
    with mounted(device) as path:
        (path / "load").touch()
        with Load(path / "load", mebibytes=16, depth=16) as load:
            load.run_for(1)
            for number in range(1, STEPS + 1):
                size = start + step * number
                daemon.qbd("resize", "disk/a", "-k", f"{size}M").succeeded()
                assert device.size == size * MiB, "the device has its size when resize answers"
                sh(*{"ext4": ["resize2fs", device], "xfs": ["xfs_growfs", path]}[kind])
                total = int(sh("stat", "-f", "-c", "%b", path)) * int(sh("stat", "-f", "-c", "%S", path))
                assert total > (size - step) * MiB * 0.8, f"the file system should have grown to {size} MiB: {total}"
                load.keep_running()
            load.finish()
        # What is new can be used to its end.
        sh("dd", "if=/dev/urandom", f"of={path / 'big'}", "bs=1M", f"count={step * STEPS // 2}", "conv=fsync")
    sh(*{"ext4": ["fsck.ext4", "-f", "-n"], "xfs": ["xfs_repair", "-n"]}[kind], device)
    assert kernel_log.matching(IO_ERROR) == []


def test_what_is_no_growth_leaves_the_device(daemon):
    device = daemon.disk("disk/a", "64M")
    for size in ("64M", "63M"):
        daemon.qbd("resize", "disk/a", "-k", size).failed(22, "67108864")
    for size in ("0", "-1", "1X", "99999999P"):
        daemon.qbd("resize", "disk/a", "-k", size).failed(64, "usage: qbd resize")
    assert device.size == 64 * MiB


def test_partitions_are_read_again_on_request(daemon):
    device = daemon.disk("disk/a", "64M")
    partition(device, "label: dos\nsize=20M\nsize=20M\n")
    daemon.qbd("resize", "disk/a", "-k", "128M", "--rescan-partitions").succeeded()
    assert BlockDevice("/dev/qbd0p2").size == 20 * MiB
    sh("mkfs.ext4", "-q", "/dev/qbd0p1")
    with mounted("/dev/qbd0p1"):
        daemon.qbd("resize", "disk/a", "-k", "192M", "--rescan-partitions").failed(16, "partition", "201326592")
        assert device.size == 192 * MiB
        daemon.qbd("resize", "disk/a", "-k", "256M").succeeded()
        assert BlockDevice("/dev/qbd0p1").size == 20 * MiB
    assert device.size == 256 * MiB


def test_a_daemon_that_died_while_it_grew_is_followed_by_one_that_finishes(daemon):
    """The store has grown and the device has not, as after a crash in between."""
    device = daemon.disk("disk/a", "64M")
    daemon.kill()
    description = daemon.pool_path / "a.volume"
    with open(daemon.pool_path / "a.raw", "r+b") as file:
        file.truncate(96 * MiB)
    description.write_text(description.read_text().replace(str(64 * MiB), str(96 * MiB)))
    daemon.start()
    wait_for(lambda: device.size == 96 * MiB, "the device has the size of its volume")
    daemon.wait_until_usable(device)
    sh("dd", "if=/dev/urandom", f"of={device}", "bs=1M", "seek=95", "count=1", "oflag=direct", "conv=nocreat")


def test_the_size_of_the_store_is_taken_over(daemon):
    device = daemon.disk("disk/a", "64M")
    with open(daemon.pool_path / "a.raw", "r+b") as file:
        file.truncate(80 * MiB)
    daemon.qbd("resize", "disk/a", "--to-store-size").succeeded()
    assert device.size == 80 * MiB
    assert run(["blockdev", "--getsize64", device]).out.strip() == str(80 * MiB)
