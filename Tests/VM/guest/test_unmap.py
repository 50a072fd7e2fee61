"""unmap refuses what is in use and says by whom; when it answers, everything is free again."""

import concurrent.futures
import errno
import pathlib
import random

import pytest

from harness import QBD, REPOSITORY, wait_for
from machine import MOUNTS, connected_devices, is_mount_point, mounted, names, run, sh

BUSY, NOT_MAPPED = 16, 25


def test_not_mapped_is_25(daemon):
    daemon.create("disk/a")
    daemon.qbd("unmap", "disk/a").failed(NOT_MAPPED, "disk/a")


def test_names_the_mount_point(daemon):
    device = daemon.disk("disk/a", "128M")
    sh("mkfs.ext4", "-q", device)
    with mounted(device, name="with a blank") as path:
        daemon.qbd("unmap", "disk/a").failed(BUSY, str(path), "disk/a")
        (path / "file").write_text("still writable")
        daemon.wait_until_usable(device)
    daemon.unmap("disk/a")


def test_names_the_process(daemon, processes):
    device = daemon.disk("disk/a")
    holder = processes("tail", "-f", "/dev/null", stdin=open(device, "rb"))
    daemon.qbd("unmap", "disk/a").failed(BUSY, "tail", str(holder.pid))
    holder.kill()
    holder.wait()
    daemon.unmap("disk/a")


def test_names_the_device_mapper_device(daemon):
    device = daemon.disk("disk/a")
    sh("dmsetup", "create", "test-holder", "--table", f"0 2048 linear {device} 0")
    try:
        daemon.qbd("unmap", "disk/a").failed(BUSY, "test-holder")
    finally:
        sh("dmsetup", "remove", "--retry", "test-holder")
    daemon.unmap("disk/a")


def test_names_the_swap(daemon):
    device = daemon.disk("disk/a")
    sh("mkswap", device)
    sh("swapon", device)
    try:
        daemon.qbd("unmap", "disk/a").failed(BUSY, "swap")
    finally:
        sh("swapoff", device)
    daemon.unmap("disk/a")


def test_shutdown_unmounts_and_unmaps(daemon, processes):
    """What qbdd.service runs before it stops the daemon: it waits for who uses a file system, and unmounts it then."""
    programs = daemon.directory / "programs"
    programs.mkdir()
    (programs / "qbd").write_text(f'#!/bin/sh\nQBD_SOCKET={daemon.socket} exec {QBD} "$@"\n')
    script = programs / "unmap-at-shutdown"
    shipped = REPOSITORY / "etc/systemd/unmap-at-shutdown"
    script.write_text(shipped.read_text().replace("PATH=/usr/local/bin", f"PATH={programs}"))

    def system_is(state):
        (programs / "systemctl").write_text(f"#!/bin/sh\necho {state}\n")
        for program in programs.iterdir():
            program.chmod(0o755)

    device = daemon.disk("disk/a", "128M")
    daemon.disk("disk/b")
    sh("mkfs.ext4", "-q", device)
    with mounted(device) as path:
        system_is("running")
        sh(script)
        assert daemon.mapped() == {"disk/a", "disk/b"}
        system_is("stopping")
        with open(path / "file", "w"):
            result = run([script, "1"], timeout=60)
            assert result.status == 1 and str(path) in result.err, str(result)
            assert daemon.mapped() == {"disk/a"} and is_mount_point(path)
            stopping = processes(script)
        assert stopping.wait(60) == 0
        assert names() == set() and daemon.mapped() == set() and not is_mount_point(path)


def test_force_disconnects_a_mounted_device(daemon):
    device = daemon.disk("disk/a", "128M")
    sh("mkfs.ext4", "-q", device)
    with mounted(device, check=False) as path:
        (path / "file").write_text("x")
        result = daemon.qbd("unmap", "--force", "disk/a").succeeded()
        assert str(path) in result.err, f"--force warns who loses the device: {result}"
        assert names() == set()
        sh("umount", path, timeout=60)
    wait_for(lambda: connected_devices() == [], "the kernel lets go of the device")
    # What was on the volume before stays usable.
    with mounted(daemon.map("disk/a")):
        pass


@pytest.mark.deadline(240)
def test_fifty_cycles_use_the_first_free_number(daemon):
    seed = random.randrange(1 << 32)
    choose = random.Random(seed)
    volumes = [f"{pool}/v{number}" for pool in ("disk", "ram") for number in range(3)]
    for volume in volumes:
        daemon.create(volume, "16M")
    numbers = {}
    cycles = 0
    while cycles < 50:
        free = [volume for volume in volumes if volume not in numbers]
        if free and (not numbers or choose.random() < 0.5):
            volume = choose.choice(free)
            first_free = next(number for number in range(len(volumes)) if number not in numbers.values())
            device = daemon.map(volume)
            assert str(device) == f"/dev/qbd{first_free}", f"seed {seed}: {volume} should have the first free number"
            numbers[volume] = first_free
        else:
            volume = choose.choice(list(numbers))
            daemon.unmap(volume)
            del numbers[volume]
            cycles += 1
        expected = {f"qbd{number}" for number in numbers.values()} | {f"qbd/{volume}" for volume in numbers}
        assert names() == expected, f"seed {seed}: the names in /dev"
        assert len(connected_devices()) == len(numbers), f"seed {seed}: devices in use"


def test_maps_and_unmaps_of_one_name_at_once_answer_truly(daemon):
    """Each succeeds or says what became of it; and what `list` has at the end is what the kernel has."""
    daemon.create("disk/a")
    for _ in range(3):
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            words = ["map", "unmap", "map", "unmap"]
            results = list(pool.map(lambda word: (word, daemon.qbd(word, "disk/a")), words))
        for word, result in results:
            # An unmap gives up a map whose volume is not open yet.
            assert result.status in ((0, errno.ECANCELED) if word == "map" else (0, NOT_MAPPED)), f"{result}"
        is_mapped = daemon.mapped() == {"disk/a"}
        assert (names() != set()) == is_mapped
        assert (connected_devices() != []) == is_mapped


def test_somebody_else_s_device_is_not_touched(daemon, processes):
    sh("modprobe", "nbd")
    socket = daemon.directory / "nbdkit.sock"
    processes("nbdkit", "--foreground", "--exit-with-parent", "--unix", socket, "memory", "64M")
    wait_for(lambda: run(["nbdinfo", f"nbd+unix:///?socket={socket}"]).status == 0, "nbdkit answers")
    sh("nbd-client", "-unix", socket, "/dev/nbd0")
    try:
        device = daemon.disk("disk/a")
        assert device.kernel_name != "nbd0"
        daemon.restart()
        daemon.wait_until_usable(device)
        daemon.unmap("disk/a")
        assert connected_devices() == ["nbd0"]
        sh("dd", "if=/dev/nbd0", "of=/dev/null", "bs=4096", "count=1", "iflag=direct")
    finally:
        sh("nbd-client", "-d", "/dev/nbd0")
        wait_for(lambda: connected_devices() == [], "the kernel lets go of nbd0")


def test_two_daemons_share_a_host(new_daemon):
    first, second = new_daemon().start(), new_daemon().start()
    first.disk("disk/a")
    device = second.disk("ram/b")
    assert str(device) == "/dev/qbd1"
    # A name that is taken stays with whom it belongs to.
    second.create("disk/a")
    second.qbd("map", "disk/a").failed(17, "disk/a", "/dev/qbd/disk/a")
    assert names() == {"qbd0", "qbd/disk/a", "qbd1", "qbd/ram/b"}
    first.restart()
    assert first.mapped() == {"disk/a"} and second.mapped() == {"ram/b"}
    second.unmap("ram/b")
    first.unmap("disk/a")


def test_disconnected_by_somebody_else_is_noticed(daemon):
    """`nbd-client -d` on our device, under a mounted file system."""
    device = daemon.disk("disk/a", "128M")
    sh("mkfs.ext4", "-q", device)
    with mounted(device, check=False) as path:
        sh("nbd-client", "-d", device.kernel_path)
        run(["umount", path])
        if is_mount_point(path):
            sh("umount", "--lazy", path)
    wait_for(lambda: connected_devices() == [], "the kernel lets go of the device", seconds=20)
    result = daemon.qbd("unmap", "disk/a")
    assert result.status in (0, NOT_MAPPED), f"unmap of what is gone already: {result}"
    assert names() == set() and daemon.mapped() == set()
    with mounted(daemon.map("disk/a")):
        pass
    assert not pathlib.Path(MOUNTS / "a" / "lost+found").exists()


def test_module_is_reloaded_between_maps(daemon):
    for _ in range(3):
        daemon.disk("ram/a", "32M")
        daemon.unmap("ram/a")
        daemon.qbd("delete", "ram/a").succeeded()
        sh("modprobe", "--remove", "nbd")
        assert not pathlib.Path("/sys/module/nbd").exists()
    # With the module's own default there are no partitions; ours has them.
    daemon.disk("ram/a", "32M")
    assert int(pathlib.Path("/sys/module/nbd/parameters/max_part").read_text()) == 31


def test_module_in_use_cannot_be_removed(daemon):
    device = daemon.disk("disk/a")
    assert run(["modprobe", "--remove", "nbd"]).status != 0
    daemon.wait_until_usable(device)
