"""qbd's device beside nbd-client's onto nbdkit: both in memory, both with four connections, in the same VM."""

import json
import statistics

import pytest

from harness import wait_for
from machine import BlockDevice, connected_devices, run, sh

SECONDS = 3
ROUNDS = 3
SIZE = 128
LOADS = {
    "4k random": ["--rw=randrw", "--bs=4k", "--iodepth=32"],
    "128k sequential": ["--rw=rw", "--bs=128k", "--iodepth=16"],
}


def rate(device, load):
    """Operations a second."""
    out = sh(
        "fio", "--name=rate", f"--filename={device}", "--ioengine=libaio", "--direct=1", f"--size={SIZE}M",
        "--time_based", f"--runtime={SECONDS}", "--randrepeat=0", "--output-format=json", *LOADS[load],
        cwd="/tmp",
    )  # fmt: skip
    job = json.loads(out[out.index("{") :])["jobs"][0]
    assert job["error"] == 0
    return job["read"]["iops"] + job["write"]["iops"]


@pytest.fixture
def peer(daemon, processes):
    """nbd-client's device onto nbdkit's memory."""
    sh("modprobe", "nbd")
    socket = daemon.directory / "nbdkit.sock"
    processes("nbdkit", "--foreground", "--exit-with-parent", "--unix", socket, "memory", f"{SIZE}M")
    wait_for(lambda: run(["nbdinfo", f"nbd+unix:///?socket={socket}"]).status == 0, "nbdkit answers")
    sh("nbd-client", "-unix", socket, "/dev/nbd15", "-C", "4", "-b", "512")
    device = BlockDevice("/dev/nbd15")
    # The map does it for ours.
    (device.sys / "queue/scheduler").write_text("none")
    yield device
    sh("nbd-client", "-d", "/dev/nbd15")
    wait_for(lambda: "nbd15" not in connected_devices(), "the kernel lets go of nbd15")


@pytest.mark.deadline(240)
def test_at_least_as_fast_as_nbd_client_onto_nbdkit(new_daemon, daemon, peer, report):
    ours = daemon.disk("ram/a", f"{SIZE}M")
    for device in (ours, peer):
        sh("dd", "if=/dev/urandom", f"of={device}", "bs=1M", f"count={SIZE}", "oflag=direct", "conv=nocreat")
    ratios = {}
    for load in LOADS:
        rates = {ours: [], peer: []}
        # They take turns, so that what else the machine does meets both.
        for turn in range(ROUNDS):
            for device in (ours, peer) if turn % 2 else (peer, ours):
                rates[device].append(rate(device, load))
        medians = {device: statistics.median(values) for device, values in rates.items()}
        ratios[load] = medians[ours] / medians[peer]
        report(f"throughput {load}: qbd {medians[ours]:.0f}/s, nbd-client onto nbdkit {medians[peer]:.0f}/s, "
               f"ratio {ratios[load]:.2f}")  # fmt: skip
    assert min(ratios.values()) >= 1.0, f"qbd should be at least as fast: {ratios}"
