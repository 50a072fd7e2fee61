#!/usr/bin/env python3
"""Measures qbd beside nbdkit and qemu-nbd: rates, latency, and the server's CPU time for each I/O.

The servers take turns, so that what else the machine does meets them all alike; the median of the rounds counts. All
data is random bytes before the first load, none of it holes. Ratios are those to nbdkit in the same run: absolute
figures move from machine to machine. Allocations are counted in a run of their own, with a preloaded library.

Rows go to .build/bench.json; those of suites that did not run now stay.
"""

import argparse
import contextlib
import json
import os
import pathlib
import platform
import statistics
import sys
import time

import nbd

from loads import COUNTED, LOADS, KiB, MiB, Load, count_allocations, measure, run_together
from servers import BIN, BRIDGES, REPOSITORY, SERVERS, Failure, Qbd, QbdStore, run

SUITES = ("onehop-memory", "onehop-local", "twohop", "client", "many", "snapshots", "throttle")
RESULTS = REPOSITORY / ".build" / "bench.json"
VOLUMES = 64
DEPTH = 20


class Bars:
    """What the figures are held against, and how it went."""

    def __init__(self):
        self.lines = []

    def check(self, suite, what, value, limit, at_least):
        good = value >= limit if at_least else value <= limit
        sign = ">=" if at_least else "<="
        self.lines.append(f"{'pass' if good else 'MISS'}  {suite:14s} {what:55s} {value:7.3f}  (bar {sign} {limit:g})")

    def check_peer(self, suite, load, ours, nbdkit):
        iops, cpu = 1.0, 0.85
        if suite == "onehop-memory":
            # At small writes nbdkit's threads use a second core.
            iops = 0.9 if load == Load("randwrite", "4k", 32) else 1.0
            cpu = 0.8 if load.depth == 1 else 0.9 if load == Load("randwrite", "4k", 32) else 0.75
        self.check(suite, f"{load}: IOPS of nbdkit's", ours["iops"] / nbdkit["iops"], iops, True)
        self.check(suite, f"{load}: CPU per I/O of nbdkit's", ratio(ours, nbdkit, "cpu_us_per_io"), cpu, False)

    def check_bridge(self, load, medians):
        """Against the better of the peers, which may be another one for each figure."""
        ours = medians["qbd"]
        peers = [row for name, row in medians.items() if name != "qbd"]

        def best(key, of=min):
            return of(row[key] for row in peers)

        iops = ours["iops"] / best("iops", max)
        cpu = ours["cpu_us_per_io"] / best("cpu_us_per_io")
        if load.depth == 1:
            latency = ours["p50_us"] / best("p50_us")
            self.check("twohop", f"{load}: median latency of the better peer's", latency, 0.75, False)
            self.check("twohop", f"{load}: CPU per I/O of the better peer's", cpu, 0.6, False)
        else:
            small = load.block == "4k"
            self.check("twohop", f"{load}: IOPS of the better peer's", iops, 2.7 if small else 1.3, True)
            self.check("twohop", f"{load}: CPU per I/O of the better peer's", cpu, 0.3 if small else 0.65, False)

    def report(self):
        if self.lines:
            print("\nThe bars:")
            print("\n".join(f"  {line}" for line in self.lines))


def ratio(ours, theirs, key):
    return ours[key] / max(theirs[key], 1e-9)


def fill(server, random):
    run("nbdcopy", "--flush", random, server.uri)


def beside_peers(suite, options, bars):
    """The servers with the same loads in turns: those that hold the data, or bridges to a store."""
    directory = options.directory if suite == "onehop-local" else None

    def server(name, **more):
        if suite == "twohop":
            return BRIDGES[name](options.size, **more)
        return SERVERS[name](options.size, directory=directory, **more)

    rows = []
    with contextlib.ExitStack() as stack:
        scratch = pathlib.Path(directory or "/dev/shm")
        random = random_file(scratch, options.size)
        stack.callback(random.unlink)
        servers = [stack.enter_context(server(name)) for name in options.servers]
        for each in servers:
            fill(each, random)
        for load in options.loads:
            samples = {each.name: [] for each in servers}
            for turn in range(options.rounds):
                # Nobody is always first.
                first = turn % len(servers)
                for each in servers[first:] + servers[:first]:
                    if directory:
                        os.sync()
                    samples[each.name].append(measure(each, load, options.seconds))
            medians = {
                name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                for name, runs in samples.items()
            }
            print_load(suite, load, medians)
            rows += [{"suite": suite, "load": str(load), "server": name, **row} for name, row in medians.items()]
            if suite == "twohop" and "qbd" in medians and len(medians) > 1:
                bars.check_bridge(load, medians)
            elif suite != "twohop" and "qbd" in medians and "nbdkit" in medians:
                bars.check_peer(suite, load, medians["qbd"], medians["nbdkit"])
    if "qbd" in options.servers:
        count(suite, lambda: server("qbd", counting=True), options, rows, bars)
    return rows


def print_load(suite, load, medians):
    base = medians.get("nbdkit")
    print(f"\n{suite}: {load}")
    print(f"  {'server':10s} {'IOPS':>9s} {'MB/s':>9s} {'us CPU/IO':>10s} {'p50 us':>8s} {'p99 us':>8s}"
          f" {'IOPS/nbdkit':>12s} {'CPU/nbdkit':>11s}")
    for name, row in medians.items():
        of_base = f" {ratio(row, base, 'iops'):12.2f} {ratio(row, base, 'cpu_us_per_io'):11.2f}" if base else ""
        print(f"  {name:10s} {row['iops']:9.0f} {row['mbps']:9.1f} {row['cpu_us_per_io']:10.2f}"
              f" {row['p50_us']:8.0f} {row['p99_us']:8.0f}{of_base}", flush=True)


def count(suite, start, options, rows, bars):
    """Adds `allocs_per_io` to our rows of the loads that are counted."""
    loads = [load for load in COUNTED if load in options.loads]
    if not loads:
        return
    with start() as server:
        print(f"\n{suite}: allocations of qbd in the steady state")
        for load in loads:
            # Once without counting: pools and buffers grow to what the load needs.
            measure(server, load, 1)
            allocations = count_allocations(server, load, options.seconds)
            print(f"  {str(load):18s} {allocations:.4f} for each I/O", flush=True)
            for row in rows:
                if row["load"] == str(load) and row["server"] == "qbd":
                    row["allocs_per_io"] = allocations
            bars.check(suite, f"{load}: allocations for each I/O", round(allocations, 2), 0, False)


def client(options, bars):
    """The client of a store without the hop of NBD: a load inside its process."""
    rows = []
    print("\nclient: 4 KiB at a qbd-store over TCP, the load inside the process")
    print(f"  {'load':18s} {'IOPS':>9s} {'us CPU/IO':>10s}")
    with QbdStore(options.size) as store:
        for kind in ("randread", "randwrite"):
            for depth in (16, 64):
                load = Load(kind, "4k", depth)
                runs = []
                for _ in range(options.rounds):
                    words = [f"127.0.0.1:{store.conductor}", store.port, options.size, kind, depth, options.seconds]
                    runs.append(json.loads(run(BIN / "client-load", *words)))
                row = {key: statistics.median(one[key] for one in runs) for key in runs[0]}
                print(f"  {str(load):18s} {row['iops']:9.0f} {row['cpu_us_per_io']:10.2f}", flush=True)
                rows.append({"suite": "client", "load": str(load), "server": "qbd", **row})
                bars.check("client", f"{load}: us of CPU for each I/O", row["cpu_us_per_io"], 8, False)
    return rows


def many(options, bars):
    """Resident memory of volumes that are exported and idle."""
    rows = []
    with Qbd(64 * MiB, options.directory, volumes=0) as server:
        empty = server.resident()
        print(f"\nmany: resident memory of qbdd with {VOLUMES} volumes\n  empty daemon {empty / MiB:.2f} MiB")

        def note(what, barred=True):
            each = (server.resident() - empty) / VOLUMES
            print(f"  {what}: {server.resident() / MiB:.2f} MiB, {each / MiB:.3f} MiB each", flush=True)
            rows.append({"suite": "many", "load": what, "server": "qbd", "rss_bytes_per_volume": round(each)})
            if barred:
                bars.check("many", f"{what}: MiB for each volume", each / MiB, 1, False)

        uris = [server.export(f"bench/volume{index}") for index in range(VOLUMES)]
        note("exported")
        clients = []
        for uri in uris:
            client = nbd.NBD()
            client.connect_uri(uri)
            clients.append(client)
        note("exported, an idle client each")
        data = os.urandom(MiB)
        for client in clients:
            client.pwrite(data, 0)
            if client.pread(len(data), 0) != data:
                raise Failure("a volume does not read back what was written")
        note("the same, right after 1 MiB written and read on each", barred=False)
        # The daemon gives memory back when a connection is quiet for a while.
        time.sleep(options.seconds)
        note(f"the same, {options.seconds} s later")
        for client in clients:
            client.shutdown()
    return rows


def layered(server, volume):
    """Gives the server's volume snapshots, each layer with a part of the data; returns the seconds that each took."""
    client = nbd.NBD()
    client.connect_uri(server.uri)
    pause = []
    for depth in range(DEPTH):
        # A twentieth of the volume, in pieces of 64 KiB, so that neighbours are in different layers.
        for place in range(depth * 64 * KiB, server.size, DEPTH * 64 * KiB):
            client.pwrite(os.urandom(64 * KiB), place)
        began = time.monotonic()
        server.qbd("snapshot", "create", f"{volume}@s{depth}")
        pause.append(time.monotonic() - began)
    client.flush()
    client.shutdown()
    return pause


def snapshots(options, bars):
    """A volume without snapshots beside one that is as large and has 20, each layer with a part of the data."""
    rows = []
    loads = [load for load in options.loads if "write" not in load.kind] + [Load("randwrite", "4k", 32)]
    with Qbd(options.size, options.directory, volumes=2) as server:
        plain, deep = [server.qbd("map", "--export", f"bench/volume{index}").strip() for index in range(2)]
        random = random_file(options.directory, options.size)
        for uri in (plain, deep):
            run("nbdcopy", "--flush", random, uri)
        random.unlink()
        server.uri = deep
        pause = layered(server, "bench/volume1")
        print(f"\nsnapshots: {DEPTH} made in {statistics.median(pause) * 1000:.0f} ms each")
        for load in loads:
            samples = {"plain": [], "deep": []}
            for turn in range(options.rounds):
                for name, uri in (("plain", plain), ("deep", deep))[:: 1 if turn % 2 else -1]:
                    server.uri = uri
                    samples[name].append(measure(server, load, options.seconds))
            medians = {
                name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                for name, runs in samples.items()
            }
            print_load("snapshots", load, medians)
            rows += [{"suite": "snapshots", "load": str(load), "server": name, **row} for name, row in medians.items()]
            if load.kind == "randread":
                of_plain = medians["deep"]["iops"] / medians["plain"]["iops"]
                bars.check("snapshots", f"{load}: IOPS {DEPTH} deep of those without", of_plain, 0.9, True)
    return rows


# Seconds over which limits have to hold.
THROTTLE_SECONDS = 10
OPERATIONS = {"4k": 2000, "1M": 100}


def throttle(options, bars):
    """How exact limits are, what they cost where they are not reached, and what a limited volume costs another."""
    rows = []

    def note(what, value, bar, at_least=True):
        rows.append({"suite": "throttle", "load": what, "server": "qbd", "ratio": value})
        bars.check("throttle", what, value, bar, at_least)

    with Qbd(128 * MiB, volumes=5) as server:
        uris = [f"nbd+unix:///bench/volume{index}?socket={server.home / 'nbd.sock'}" for index in range(5)]

        # Or else the first writes cost what the memory behind them costs, and limits are not reached.
        random = random_file("/dev/shm", server.size)
        for uri in uris:
            run("nbdcopy", "--flush", random, uri)
        random.unlink()

        def limit(volume, text):
            server.qbd("throttle", f"bench/volume{volume}", "-t", text)

        print("\nthrottle: what each limit lets through, of what it says")
        for block, size in (("4k", 4 * KiB), ("1M", MiB)):
            operations = OPERATIONS[block]
            alone = [
                ("read_bps", "randread", 40_000_000, size), ("write_bps", "randwrite", 40_000_000, size),
                ("read_iops", "randread", operations, 1), ("write_iops", "randwrite", operations, 1),
            ]  # fmt: skip
            for depth in (1, 32):
                jobs = []
                for volume, (key, kind, rate, _) in enumerate(alone):
                    limit(volume, f"{key}={rate}")
                    jobs.append((uris[volume], Load(kind, block, depth)))
                # All at once, another one of each direction counting.
                limit(4, f"read_bps=30000000,read_iops=1M,write_iops={operations // 2},write_bps=1T")
                jobs += [(uris[4], Load(kind, block, depth)) for kind in ("randread", "randwrite")]
                sides = run_together(server, jobs, THROTTLE_SECONDS)
                expected = [rate / size for _, _, rate, size in alone] + [30_000_000 / size, operations / 2]
                names = [key for key, *_ in alone] + ["all: read_bps", "all: write_iops"]
                for name, side, rate in zip(names, sides, expected):
                    error = abs(side["iops"] / rate - 1)
                    note(f"{name} {block} qd{depth}: error", error, 0.02, at_least=False)
                for volume in range(5):
                    limit(volume, "bps=0,iops=0")

        print("\nthrottle: IOPS under limits that are not reached, and beside a limited volume, of those without")
        for load in (Load("randread", "4k", 32), Load("randwrite", "4k", 32)):
            samples = {"none": [], "not reached": [], "beside": []}
            for _ in range(options.rounds):
                for kind, runs in samples.items():
                    limit(0, "bps=1P,iops=1G" if kind == "not reached" else "bps=0,iops=0")
                    jobs = [(uris[0], load)]
                    if kind == "beside":
                        limit(1, "iops=500")
                        jobs.append((uris[1], load))
                    runs.append(run_together(server, jobs, options.seconds)[0]["iops"])
            base = statistics.median(samples["none"])
            for kind in ("not reached", "beside"):
                note(f"{load}: {kind}", statistics.median(samples[kind]) / base, 0.97)
    return rows


def random_file(directory, size):
    """A file of random bytes, removed by the caller."""
    path = pathlib.Path(directory) / f"bench-random-{os.getpid()}"
    with open(path, "wb") as file:
        left = size
        while left:
            left -= file.write(os.urandom(min(left, 16 * MiB)))
    return path


def describe(options):
    """The machine and the programs, for whoever reads the figures later."""

    def first_line(*command):
        return run(*command).splitlines()[0]

    with open("/proc/cpuinfo") as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / MiB / 1024
    file_system = first_line("stat", "-f", "-c", "%T", options.directory)
    print(f"machine: {model}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, Linux {platform.release()},"
          f" {file_system} at {options.directory}; load before the start {os.getloadavg()[0]:.2f}")
    versions = [first_line("fio", "--version"), first_line("nbdkit", "--version"), first_line("qemu-nbd", "--version")]
    if "qbd" in options.servers:
        versions.insert(0, first_line(BIN / "qbd", "version"))
    print(f"programs: {'; '.join(versions)}")
    print(f"medians of {options.rounds} rounds of {options.seconds} s on {options.size // MiB} MiB of random bytes",
          flush=True)


def write(rows, suites):
    kept = []
    if RESULTS.exists():
        kept = [row for row in json.loads(RESULTS.read_text()) if row["suite"] not in suites]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(kept + rows, indent=1) + "\n")
    print(f"\n{len(rows)} rows written to {RESULTS.relative_to(REPOSITORY)}")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", action="append", choices=SUITES, help="only this one; more than one may be given")
    parser.add_argument("--load", action="append", help="only loads that contain this text, as in '4k qd32'")
    parser.add_argument("--seconds", type=int, default=4, help="of each run (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each load and server (%(default)s)")
    parser.add_argument("--size", type=int, default=1024, help="MiB of data in each server (%(default)s)")
    parser.add_argument("--servers", default=",".join(SERVERS), help="which to run (%(default)s)")
    parser.add_argument("--directory", type=pathlib.Path, default=REPOSITORY / ".build" / "bench",
                        help="where the files of onehop-local and many are (.build/bench)")
    options = parser.parse_args()
    options.size *= MiB
    options.servers = options.servers.split(",")
    for name in options.servers:
        if name not in SERVERS:
            parser.error(f"there is no server '{name}'; there are {', '.join(SERVERS)}")
    options.loads = [load for load in LOADS if not options.load or any(text in str(load) for text in options.load)]
    if not options.loads:
        parser.error(f"no load contains that; there are {', '.join(map(str, LOADS))}")
    options.suites = [suite for suite in SUITES if not options.suite or suite in options.suite]
    return options


def main():
    options = arguments()
    options.directory.mkdir(parents=True, exist_ok=True)
    bars = Bars()
    rows = []
    describe(options)
    for suite in options.suites:
        alone = {"client": client, "many": many, "snapshots": snapshots, "throttle": throttle}.get(suite)
        rows += alone(options, bars) if alone else beside_peers(suite, options, bars)
    bars.report()
    write(rows, options.suites)


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        sys.exit(f"bench: {failure}")
