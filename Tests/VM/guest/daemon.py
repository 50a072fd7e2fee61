"""A qbdd in the guest, with volumes that become devices."""

import contextlib
import dataclasses
import os
import pathlib
import re
import signal
import time

from harness import Daemon as BaseDaemon
from harness import run, wait_for
from machine import MOUNTS, SCRATCH, BlockDevice, connected_devices, is_block_device, mount_points, names, sh

HEADER = "dev_id vol_id device volume config read_bps write_bps read_iops write_iops".split()


@dataclasses.dataclass
class Row:
    """A line of `qbd list`."""

    dev_id: int
    device: str
    volume: str


class Daemon(BaseDaemon):
    """Its pool `disk` is a directory of the scratch disk's file system, its pool `ram` is memory."""

    def __init__(self, connections=None, reattach_timeout=None, configuration="", pool_path=None):
        super().__init__(root=SCRATCH, pool_path=pool_path)
        text = "\n[nbd]\n"
        if connections:
            text += f"connections={connections}\n"
        if reattach_timeout:
            text += f"reattach_timeout={reattach_timeout}\n"
        with open(self.config, "a") as config:
            config.write(text + configuration)

    # The process

    def terminate(self, seconds=10):
        """SIGTERM: ends cleanly and leaves the devices in place."""
        self.stop(seconds)

    def restart(self, how=signal.SIGKILL, away=0.0):
        """Ends the daemon and starts it again; returns when it accepts commands."""
        if how == signal.SIGKILL:
            self.kill()
        else:
            self.terminate()
        if away:
            time.sleep(away)
        return self.start()

    def thread_flags(self):
        """{thread's name and id: task flags} of every thread."""
        flags = {}
        for task in pathlib.Path(f"/proc/{self.pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError):
                text = (task / "stat").read_text()
                name, rest = text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2 :].split()
                # The ninth field of proc(5)'s list, the seventh after the name.
                flags[f"{name} {task.name}"] = int(rest[6])
        return flags

    # Mapping

    def map(self, volume, *options, letters=False, timeout=60):
        """Maps a volume and returns its device, after a look at all of its names."""
        words = ["-m", volume] if letters else ["map", volume]
        result = self.qbd(*words, *options, timeout=timeout).succeeded()
        assert re.fullmatch(r"/dev/qbd\d+\n", result.out), f"map prints the device and nothing else: {result}"
        device = BlockDevice(result.out.strip())
        link = pathlib.Path("/dev/qbd") / volume
        assert link.is_symlink(), f"{link} should be a link"
        assert BlockDevice(link).number == device.number, f"{link} and {device} should be the same device"
        assert device.is_connected, f"{device} ({device.kernel_name}) should be connected"
        assert device.size > 0, f"{device} ({device.kernel_name}) should have its size"
        return device

    def disk(self, volume, size="64M", *options):
        """Creates and maps a volume."""
        self.create(volume, size)
        return self.map(volume, *options)

    def unmap(self, volume, *options, timeout=60):
        """Unmaps a volume; nothing of it may stay."""
        device = BlockDevice(pathlib.Path("/dev/qbd") / volume)
        self.qbd("unmap", volume, *options, timeout=timeout).succeeded()
        assert f"qbd/{volume}" not in names(), f"/dev/qbd/{volume} should be gone"
        assert not device.is_connected, f"{device.kernel_name} should be free when unmap answers"
        assert device.size == 0, f"{device.kernel_name} should have no size when unmap answers"
        assert device.attribute("inflight").split() == ["0", "0"], f"{device.kernel_name} has I/O in flight"

    def remap(self, volume):
        self.qbd("remap", volume).succeeded()

    def rows(self):
        """The lines of `qbd list`, the ones of exports too."""
        lines = [line.split() for line in self.qbd("list").succeeded().out.splitlines()]
        assert lines[0] == HEADER, f"the header of list is {lines[0]}"
        assert all(len(line) == len(HEADER) for line in lines), f"every line of list has {len(HEADER)} fields: {lines}"
        return [Row(int(line[0]), line[2], line[3]) for line in lines[1:]]

    def mapped(self):
        """The volumes that `qbd list` has."""
        return {row.volume for row in self.rows()}

    def wait_until_usable(self, device, seconds=30):
        """Waits for one read past the page cache."""
        done = run(["dd", f"if={device}", "of=/dev/null", "bs=4096", "count=1", "iflag=direct"], timeout=seconds)
        assert done.status == 0, f"{device} should be readable: {done}"

    # The end

    def clean_up(self):
        """Unmaps everything, as a user would, then ends the daemon; asserts that nothing is left."""
        try:
            if not self.alive and self.process is not None and list(self.state.glob("*.mapping")):
                self.start()
            if self.alive:
                for row in reversed(self.rows()):
                    self.qbd("unmap", row.volume).succeeded()
                assert names() == set(), f"every name should be gone after unmap: {names()}"
                assert connected_devices() == [], f"no device should be connected: {connected_devices()}"
                left = [file.name for file in self.state.rglob("*") if file.suffix == ".mapping"]
                assert left == [], f"no mapping should be written down: {left}"
        finally:
            self.finish()


def force_clean():
    """After a failed test: lets go of every device by force, so that the next test has a chance."""
    for path in reversed(mount_points()):
        if path.startswith(f"{MOUNTS}/"):
            run(["umount", "--lazy", path])
    for line in pathlib.Path("/proc/swaps").read_text().splitlines()[1:]:
        run(["swapoff", line.split()[0]])
    for line in sh("dmsetup", "ls").splitlines():
        name = line.split()[0]
        if name.startswith("test-"):
            run(["dmsetup", "remove", "--force", name])
    for name in connected_devices():
        run(["nbd-client", "-d", f"/dev/{name}"])
    with contextlib.suppress(AssertionError):
        wait_for(lambda: not connected_devices(), "the kernel lets go of its devices", seconds=5)
    for name in names():
        path = pathlib.Path("/dev") / name
        if path.is_symlink() or is_block_device(path):
            with contextlib.suppress(OSError):
                os.unlink(path)
