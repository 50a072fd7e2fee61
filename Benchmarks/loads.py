"""What is done to a server and what is read off it."""

import contextlib
import dataclasses
import json
import subprocess
import tempfile
import time

from servers import Failure

KiB = 1024
MiB = 1024 * KiB


@dataclasses.dataclass(frozen=True)
class Load:
    kind: str
    block: str
    depth: int

    def __str__(self):
        return f"{self.kind} {self.block} qd{self.depth}"


LOADS = [
    Load("randread", "4k", 1), Load("randread", "4k", 32), Load("randwrite", "4k", 32), Load("read", "128k", 8),
    Load("write", "128k", 8),
]  # fmt: skip

# Those whose allocations are counted.
COUNTED = [Load("randread", "4k", 32), Load("randwrite", "4k", 32)]


def start_fio(server, load, seconds, output, uri=None):
    return subprocess.Popen(
        ["fio", "--name=bench", "--ioengine=nbd", f"--uri={uri or server.uri}", f"--rw={load.kind}", f"--bs={load.block}",
         f"--iodepth={load.depth}", f"--runtime={seconds}", "--time_based", f"--size={server.size}",
         "--output-format=json", f"--output={output}"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish_fio(fio, load, server, output):
    """Fio's figures of the direction the load has."""
    text, _ = fio.communicate()
    if fio.returncode:
        raise Failure(f"fio, {load} on {server.name}: exit status {fio.returncode}\n{text}\n{server.tail()}")
    job = json.load(output)["jobs"][0]
    if job["error"]:
        raise Failure(f"fio, {load} on {server.name}: error {job['error']}\n{text}\n{server.tail()}")
    return job["read" if "read" in load.kind else "write"]


def measure(server, load, seconds):
    """One run: rates, latencies, and the server's CPU time for each I/O."""
    with tempfile.NamedTemporaryFile(suffix=".json") as output:
        before = server.cpu_seconds()
        fio = start_fio(server, load, seconds, output.name)
        side = finish_fio(fio, load, server, output)
        cpu = server.cpu_seconds() - before
    percentile = side["clat_ns"]["percentile"]
    return {
        "iops": side["iops"],
        "mbps": side["bw_bytes"] / 1e6,
        "cpu_us_per_io": cpu * 1e6 / max(side["total_ios"], 1),
        "p50_us": percentile["50.000000"] / 1e3,
        "p99_us": percentile["99.000000"] / 1e3,
    }


def run_together(server, jobs, seconds):
    """Loads at the same time, each on a URI: fio's figures, in their order."""
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.NamedTemporaryFile(suffix=".json")) for _ in jobs]
        running = [
            start_fio(server, load, seconds, output.name, uri) for (uri, load), output in zip(jobs, outputs)
        ]
        return [
            finish_fio(fio, load, server, output) for fio, (_, load), output in zip(running, jobs, outputs)
        ]


def count_allocations(server, load, seconds):
    """Allocations for each I/O while the load runs, without its first and last moments."""
    with tempfile.NamedTemporaryFile(suffix=".json") as output:
        fio = start_fio(server, load, seconds + 2, output.name)
        time.sleep(1)
        first, began = server.allocations(), time.monotonic()
        time.sleep(seconds)
        last, ended = server.allocations(), time.monotonic()
        side = finish_fio(fio, load, server, output)
    if last == 0:
        raise Failure("no allocation was counted since the server's start, so the count cannot be believed")
    return (last - first) / max(side["iops"] * (ended - began), 1)
