"""A volume is a disk: file systems, partitions, names, and the data is there after unmap and map."""

import hashlib
import os
import pathlib

import pytest

from machine import IO_ERROR, BlockDevice, is_block_device, mounted, names, partition, run, sh

TREE = "/usr/lib/python3/dist-packages/_pytest"


def checksums(directory):
    """{relative path: SHA-256} of every file."""
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(pathlib.Path(directory).rglob("*"))
        if file.is_file()
    }


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_tree_survives_unmap_and_map(daemon, kernel_log, kind):
    device = daemon.disk(f"disk/{kind}", "512M")
    sh(f"mkfs.{kind}", "-q", device)
    with mounted(device) as path:
        sh("cp", "-a", TREE, path / "tree")
        (path / "big").write_bytes(os.urandom(8 << 20))
        expected = checksums(path)
    daemon.unmap(f"disk/{kind}")
    assert len(expected) > 50
    with mounted(daemon.map(f"disk/{kind}")) as path:
        found = checksums(path)
    differing = [name for name in expected if found.get(name) != expected[name]]
    assert differing == [] and found.keys() == expected.keys()
    # Both agree on what was freed and flushed, too.
    sh(*{"ext4": ["fsck.ext4", "-f", "-n"], "xfs": ["xfs_repair", "-n"]}[kind], f"/dev/qbd/disk/{kind}")
    assert kernel_log.matching(IO_ERROR) == []


def test_data_survives_the_end_of_the_daemon(daemon):
    sh("mkfs.ext4", "-q", daemon.disk("disk/a", "128M"))
    with mounted("/dev/qbd/disk/a") as path:
        (path / "file").write_text("here")
    daemon.unmap("disk/a")
    daemon.terminate()
    daemon.start()
    with mounted(daemon.map("disk/a")) as path:
        assert (path / "file").read_text() == "here"


def test_letters_do_the_same(daemon):
    daemon.create("disk/a")
    device = daemon.map("disk/a", letters=True)
    assert str(device) == "/dev/qbd0"
    result = daemon.qbd("-u", "disk/a").succeeded()
    assert result.out == ""
    assert names() == set() and not device.is_connected


def test_device_has_the_volume_s_geometry(daemon):
    device = daemon.disk("disk/a", "96M")
    assert device.size == 96 << 20
    assert device.attribute("ro") == "0"
    assert device.attribute("queue/logical_block_size") == "512"
    assert "[none]" in device.attribute("queue/scheduler")
    assert int(device.attribute("queue/max_sectors_kb")) >= 1024
    assert device.attribute("queue/write_cache") == "write back", "without it the kernel never flushes"
    assert int(device.attribute("queue/discard_max_bytes")) > 0


def test_block_size_of_the_volume_is_kept(daemon):
    daemon.create("disk/a", "64M", block_size=4096)
    device = daemon.map("disk/a")
    assert device.attribute("queue/logical_block_size") == "4096"


def test_list_has_the_device(daemon):
    daemon.create("disk/exported")
    daemon.qbd("map", "--export", "disk/exported").succeeded()
    device = daemon.disk("ram/a")
    rows = {row.volume: row for row in daemon.rows()}
    assert rows["disk/exported"].device == "-"
    assert rows["ram/a"].device == device.path.name == f"qbd{rows['ram/a'].dev_id}"


def test_mapping_again_changes_nothing(daemon):
    device = daemon.disk("disk/a")
    again = daemon.map("disk/a")
    assert (str(again), again.number) == (str(device), device.number)
    assert len(daemon.rows()) == 1


def test_read_only_volume_refuses_writes(daemon):
    daemon.create("disk/a")
    device = daemon.map("disk/a", "--read-only")
    assert device.attribute("ro") == "1"
    done = run(["dd", "if=/dev/zero", f"of={device}", "bs=4096", "count=1", "oflag=direct", "conv=nocreat"])
    assert done.status != 0
    sh("dd", f"if={device}", "of=/dev/null", "bs=4096", "count=1", "iflag=direct")


def test_named_kernel_device_is_used(daemon):
    daemon.create("disk/a")
    sh("modprobe", "nbd")
    device = daemon.map("disk/a", "--device", "/dev/nbd9")
    assert device.kernel_name == "nbd9"
    daemon.create("disk/b")
    daemon.qbd("map", "disk/b", "--device", "/dev/nbd9").failed(16, "nbd9")
    assert names() == {"qbd0", "qbd/disk/a"}


def test_partitions_have_names(daemon, kernel_log):
    device = daemon.disk("disk/a", "256M")
    partition(device, "label: gpt\nsize=100M\nsize=100M\n")
    parts = [pathlib.Path(f"/dev/qbd0p{number}") for number in (1, 2)]
    for part in parts:
        assert is_block_device(part), f"{part} should be there: {sorted(names())}"
        assert BlockDevice(part).size == 100 << 20
        assert BlockDevice(part).attribute("partition") == part.name[-1]
    sh("mkfs.ext4", "-q", parts[1])
    with mounted(parts[1]) as path:
        (path / "file").write_text("on the second")
        daemon.qbd("unmap", "disk/a").failed(16, str(path), "disk/a")
    daemon.unmap("disk/a")
    assert names() == set()
    # A second map finds them by itself.
    daemon.map("disk/a")
    with mounted(parts[1]) as path:
        assert (path / "file").read_text() == "on the second"


def test_removed_partitions_lose_their_names(daemon):
    device = daemon.disk("disk/a", "256M")
    partition(device, "label: dos\nsize=50M\nsize=50M\n")
    assert is_block_device("/dev/qbd0p2")
    daemon.unmap("disk/a")
    daemon.map("disk/a")
    sh("sfdisk", "--quiet", "--delete", device, "2")
    daemon.unmap("disk/a")
    daemon.map("disk/a")
    assert names() == {"qbd0", "qbd0p1", "qbd/disk/a"}


def test_nodes_are_made_where_nobody_makes_them(daemon):
    """A container's /dev may be a folder like any other."""
    daemon.disk("disk/a")
    daemon.unmap("disk/a")
    nodes = {path: os.stat(path) for path in pathlib.Path("/dev").glob("nbd*")}
    assert nodes
    try:
        for path in nodes:
            path.unlink()
        device = daemon.map("disk/a")
        partition(device, "label: gpt\nsize=8MiB\n")
        daemon.unmap("disk/a")
        for path in pathlib.Path("/dev").glob("nbd*"):
            path.unlink()
        device = daemon.map("disk/a")
        assert device.kernel_path.exists() and is_block_device("/dev/qbd0p1")
        daemon.kill()
        device.kernel_path.unlink()
        daemon.start()
        daemon.wait_until_usable(device)
        daemon.unmap("disk/a")
    finally:
        for path, status in nodes.items():
            if not path.exists():
                os.mknod(path, status.st_mode, status.st_rdev)
