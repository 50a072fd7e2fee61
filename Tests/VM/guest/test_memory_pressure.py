"""The daemon is in the write-back path: it must not wait for memory that only it can set free."""
# vm: --memory 512 --timeout 400

import resource

import pytest

from harness import MiB, run
from machine import IO_ERROR, mounted, sh

# include/linux/sched.h
PF_MEMALLOC_NOIO = 0x00080000
PF_LOCAL_THROTTLE = 0x00100000


def test_every_thread_is_marked_as_part_of_the_write_back_path(daemon):
    device = daemon.disk("disk/a")
    sh("dd", "if=/dev/zero", f"of={device}", "bs=1M", "count=8", "oflag=direct")
    flags = daemon.thread_flags()
    assert len(flags) >= 3, f"there should be the loop's thread and others: {flags}"
    assert any(name.startswith("qbd:") for name in flags), f"the volume's loop should have its name: {flags}"
    wanted = PF_MEMALLOC_NOIO | PF_LOCAL_THROTTLE
    wrong = {name: hex(value) for name, value in flags.items() if value & wanted != wanted}
    assert wrong == {}, "threads without PF_MEMALLOC_NOIO or PF_LOCAL_THROTTLE"


def test_daemon_is_kept_in_memory(daemon):
    daemon.disk("disk/a")
    with open(f"/proc/{daemon.pid}/oom_score_adj") as file:
        assert file.read().strip() == "-1000"
    assert daemon._status("VmLck") > 0, "the daemon's memory should be locked"
    assert resource.prlimit(daemon.pid, resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY


@pytest.mark.deadline(330)
def test_buffered_writes_of_four_times_the_memory_complete(daemon, kernel_log, report):
    device = daemon.disk("disk/a", "3G")
    sh("mkfs.ext4", "-q", device)
    with mounted(device) as path:
        before = daemon.resident()
        writes = ["dd", "if=/dev/zero", f"of={path}/file", "bs=1M", "count=2048", "conv=fsync"]
        done = run(writes, timeout=300)
        assert done.status == 0, f"the writes should complete: {done}"
        assert (path / "file").stat().st_size == 2048 * MiB
        report(f"memory pressure: 2 GiB buffered in 512 MiB took {done.seconds:.0f} s; qbdd {before >> 20} MiB resident "
               f"before, {daemon.resident() >> 20} MiB after")  # fmt: skip
    sh("fsck.ext4", "-f", "-n", device)
    assert kernel_log.matching(IO_ERROR) == []
