"""The VM itself, with other people's NBD programs: when this fails, it is not qbd's fault."""

from harness import wait_for
from load import Load
from machine import IO_ERROR, BlockDevice, connected_devices, mounted, run, sh


def test_kernel_client_and_file_systems_work(processes, kernel_log):
    sh("modprobe", "nbd")
    server = processes("nbdkit", "--foreground", "--exit-with-parent", "--unix", "/tmp/nbdkit.sock", "memory", "512M")
    wait_for(lambda: run(["nbdinfo", "nbd+unix:///?socket=/tmp/nbdkit.sock"]).status == 0, "nbdkit answers")
    sh("nbd-client", "-unix", "/tmp/nbdkit.sock", "/dev/nbd7", "-C", "2", "-b", "512")
    device = BlockDevice("/dev/nbd7")
    assert device.is_connected
    with Load(device) as load:
        load.finish()
    for kind in ("ext4", "xfs"):
        sh(f"mkfs.{kind}", "-q", *(["-F"] if kind == "ext4" else ["-f"]), device)
        with mounted(device) as path:
            (path / "file").write_text(kind)
    sh("nbd-client", "-d", device)
    wait_for(lambda: "nbd7" not in connected_devices(), "the kernel lets go of nbd7")
    assert server.poll() is None
    assert kernel_log.matching(IO_ERROR) == []


def test_every_kind_of_device_mapper_target_is_there():
    sh("modprobe", "-a", "dm-flakey", "dm-log-writes", "loop")
    targets = sh("dmsetup", "targets")
    assert "flakey" in targets and "log-writes" in targets
