"""The guest: its block devices, its kernel's log, and programs that are run with a deadline."""

import contextlib
import os
import pathlib
import re
import signal
import stat
import subprocess
import threading
import time
import uuid

import harness
from harness import MiB, run, wait_for  # noqa: F401

# Emulated processors are some twenty times slower than those that the other tests run on.
harness.SLOWNESS = 3

SCRATCH = pathlib.Path("/scratch")
MOUNTS = pathlib.Path("/run/mounts")

# What the kernel logs when a program has found a fault in it, or waits for ever.
SPLAT = re.compile(r"BUG:|WARNING:|Oops|general protection|blocked for more than|refcount_t|soft lockup|rcu.*stall")
IO_ERROR = re.compile(r"I/O error, dev |Buffer I/O error|lost async page write|EXT4-fs error|XFS .*(error|Corruption)")


def sh(*command, timeout=60, **options):
    """Runs a program that must succeed, and returns its stdout."""
    return run(command, timeout, **options).succeeded().out


class KernelLog:
    """The lines the kernel has logged since this was made."""

    def __init__(self):
        self.descriptor = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(self.descriptor, 0, os.SEEK_END)
        self._lines = []

    def lines(self):
        while True:
            try:
                record = os.read(self.descriptor, 8192).decode(errors="replace")
            except BlockingIOError:
                return self._lines
            except BrokenPipeError:
                # Overwritten before it was read.
                continue
            prefix, _, text = record.partition(";")
            seconds = int(prefix.split(",")[2]) / 1e6
            self._lines.append(f"[{seconds:.3f}] {text.splitlines()[0]}")

    def matching(self, pattern):
        return [line for line in self.lines() if pattern.search(line)]

    def close(self):
        os.close(self.descriptor)


class BlockDevice:
    """A block device by any of its names."""

    def __init__(self, path):
        self.path = pathlib.Path(path)
        status = os.stat(self.path)
        assert stat.S_ISBLK(status.st_mode), f"{path} is no block device"
        self.number = status.st_rdev
        # Where a partition is, this is its directory below the disk's.
        self.sys = pathlib.Path(f"/sys/dev/block/{os.major(self.number)}:{os.minor(self.number)}").resolve()
        self.kernel_name = self.sys.name
        self.kernel_path = pathlib.Path("/dev") / self.kernel_name

    def __fspath__(self):
        return str(self.path)

    def __str__(self):
        return str(self.path)

    def attribute(self, name):
        """What sysfs says, or None when the file is not there."""
        with contextlib.suppress(OSError):
            return (self.sys / name).read_text().strip()
        return None

    @property
    def size(self):
        return int(self.attribute("size")) * 512

    @property
    def is_connected(self):
        """Whether the kernel's NBD client holds on to it."""
        return self.attribute("pid") is not None


def is_block_device(path):
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


def names():
    """Every name of ours in /dev, as in {"qbd0", "qbd0p1", "qbd/disk/a"}."""
    found = {name for name in os.listdir("/dev") if re.fullmatch(r"qbd\d+(p\d+)?", name)}
    for directory, _, files in os.walk("/dev/qbd"):
        found |= {os.path.relpath(os.path.join(directory, file), "/dev") for file in files}
    return found


def connected_devices():
    """The kernel's NBD devices that are in use, as in ["nbd0"]."""
    return sorted(file.parent.name for file in pathlib.Path("/sys/block").glob("nbd*/pid"))


def mount_points():
    """Every mount point of the guest, the newest last."""
    points = [line.split()[4] for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines()]
    return [re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), point) for point in points]


def is_mount_point(path):
    return str(path) in mount_points()


def partition(device, script):
    """Writes a partition table as sfdisk(8) reads it from its standard input."""
    file = SCRATCH / "sfdisk"
    file.write_text(script)
    sh("bash", "-c", 'sfdisk --quiet --wipe always "$0" <"$1"', device, file)


@contextlib.contextmanager
def mounted(device, *options, name="a", check=True):
    """A file system mounted at /run/mounts/NAME."""
    path = MOUNTS / name
    path.mkdir(parents=True, exist_ok=True)
    sh("mount", *options, device, path)
    try:
        yield path
    finally:
        if is_mount_point(path):
            done = run(["umount", path])
            if check:
                done.succeeded()
            elif done.status:
                run(["umount", "--lazy", path])


@contextlib.contextmanager
def mapped_disk(name, size, *options):
    """A disk of `size` bytes with ext4 on it, mounted, behind the device mapper as test-NAME; the loop device below it,
    and where it is mounted. Whatever a test did to it, it answers again in the end."""
    mapper = f"test-{name}"
    path = SCRATCH / f"{name}.disk"
    with open(path, "wb") as file:
        file.truncate(size)
    sh("modprobe", "-a", "dm-mod", "loop")
    loop = sh("losetup", "--find", "--show", path).strip()
    sh("dmsetup", "create", mapper, "--table", f"0 {size // 512} linear {loop} 0")
    sh("mkfs.ext4", "-q", *options, f"/dev/mapper/{mapper}")
    with contextlib.ExitStack() as stack:
        stack.callback(sh, "losetup", "--detach", loop)
        stack.callback(sh, "dmsetup", "remove", "--retry", mapper)
        where = stack.enter_context(mounted(f"/dev/mapper/{mapper}", name=name))
        stack.callback(run, ["dmsetup", "resume", mapper])
        yield loop, where


BOOT_ID = pathlib.Path("/proc/sys/kernel/random/boot_id")


def boot_again():
    """From now on it is another boot, for whoever asks the kernel which one it is: what a power cut comes with."""
    file = pathlib.Path("/run/boot_id")
    file.write_text(f"{uuid.uuid4()}\n")
    if not is_mount_point(BOOT_ID):
        sh("mount", "--bind", file, BOOT_ID)
    assert BOOT_ID.read_text() == file.read_text()


def write_pattern(device, word, offset=0, length=MiB):
    """Writes `word` again and again, past the page cache, in a process of its own."""
    data = (f"{word:<15}\n".encode() * (length // 16))[:length]
    path = SCRATCH / "pattern"
    path.write_bytes(data)
    sh("dd", f"if={path}", f"of={device}", "bs=1M", f"seek={offset}", "oflag=direct,seek_bytes", "conv=notrunc,nocreat")


def read_pattern(device, offset=0):
    """The word that write_pattern wrote, or "" when it is none; fails when the device cannot be read."""
    done = run(["dd", f"if={device}", "bs=4096", "count=1", f"skip={offset}", "iflag=direct,skip_bytes"])
    assert done.status == 0, f"reading {device} should succeed: {done}"
    return done.out[:15].strip("\0 \n")


class Deadline:
    """Ends a test that takes too long, and the whole run when a test cannot even be ended."""

    GRACE = 30

    def __init__(self, seconds, on_expiry):
        self.seconds = seconds
        self.on_expiry = on_expiry
        self.last_resort = threading.Timer(seconds + self.GRACE, self._give_up)
        self.last_resort.daemon = True

    def _expire(self, *_):
        blocked_tasks()
        self.on_expiry()
        raise AssertionError(f"not done within {self.seconds} s; the console has the blocked tasks")

    def _give_up(self):
        """A task that waits for its device cannot be killed: nothing that comes after would say anything."""
        blocked_tasks()
        with open("/dev/console", "w") as console:
            console.write(f"\nthe test cannot be ended after {self.seconds} s; the rest is not run\n")
            console.write("vm: exit status 99\n")
        time.sleep(1)
        pathlib.Path("/proc/sysrq-trigger").write_text("b")

    def __enter__(self):
        signal.signal(signal.SIGALRM, self._expire)
        signal.alarm(self.seconds)
        self.last_resort.start()
        return self

    def __exit__(self, *_):
        signal.alarm(0)
        self.last_resort.cancel()


def blocked_tasks():
    """Makes the kernel say on the console where each task waits that cannot be woken."""
    level = pathlib.Path("/proc/sys/kernel/printk")
    before = level.read_text()
    level.write_text("8")
    pathlib.Path("/proc/sysrq-trigger").write_text("w")
    level.write_text(before)


class Poll:
    """A process that looks at a device 20 times a second, and tells what was ever missing."""

    PROGRAM = r"""
import os, sys, time
number, size, sysfs, *paths = sys.argv[1:]
print("looking", flush=True)
while True:
    for path in paths:
        try:
            if str(os.stat(path).st_rdev) != number:
                print(f"{path} is another device", flush=True)
        except OSError as error:
            print(error, flush=True)
    with open(sysfs + "/size") as file:
        sectors = file.read().strip()
        if sectors != size:
            print(f"{sysfs} has {sectors} sectors instead of {size}", flush=True)
    if not os.path.exists(sysfs + "/pid"):
        print(f"{sysfs} is not connected", flush=True)
    time.sleep(0.05)
"""

    def __init__(self, device, *paths):
        size = device.attribute("size")
        self.process = subprocess.Popen(
            ["/usr/bin/python3", "-c", self.PROGRAM, str(device.number), size, device.sys, device.path, *paths],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert self.process.stdout.readline() == "looking\n"

    def faults(self):
        """Ends it; the first few sightings."""
        self.process.kill()
        lines = self.process.communicate()[0].splitlines()
        return lines[:10]


def uptime():
    return time.clock_gettime(time.CLOCK_BOOTTIME)
