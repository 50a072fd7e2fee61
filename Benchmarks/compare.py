#!/usr/bin/env python3
"""Compares this tree with another commit, its base: rates, and CPU time for each I/O.

The base is built beside the tree, in .build/base-COMMIT, which is used again when it is there. Three sets of servers
take turns in each round: the base, the tree, and the base once more, which says how far two equal programs are apart on
this machine at this time. A load is worse when its median is by more than 3 % beyond that; then the exit status is 1. Where
the machine was too busy to tell, the verdict is "unclear".
"""

import argparse
import contextlib
import os
import pathlib
import shutil
import statistics
import subprocess
import sys

from bench import fill, layered, random_file
from loads import LOADS, MiB, Load, measure
from servers import BIN, REPOSITORY, Failure, Qbd, QbdBridge, run

SUITES = ("onehop-memory", "onehop-local", "twohop", "snapshots")
ALLOWED = 0.03
# A base that is further apart from itself has been measured on a machine too busy to say that nothing is worse.
QUIET = 0.1
WORSE = 1
# What is compared, and whether more of it is better.
FIGURES = {"iops": True, "cpu_us_per_io": False}


def build(commit):
    """Builds a commit beside the tree and returns where its programs are."""
    name = run("git", "-C", REPOSITORY, "rev-parse", "--verify", "--short=12", f"{commit}^{{commit}}").strip()
    directory = REPOSITORY / ".build" / f"base-{name}"
    programs, complete = directory / ".build" / "release", directory / ".build" / "complete"
    if not complete.exists():
        print(f"building {name} in {directory.relative_to(REPOSITORY)}", flush=True)
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        with subprocess.Popen(["git", "-C", REPOSITORY, "archive", name], stdout=subprocess.PIPE) as archive:
            unpacked = subprocess.run(["tar", "-x", "-C", directory], stdin=archive.stdout)
        if archive.returncode or unpacked.returncode:
            raise Failure(f"the files of {name} could not be had")
        with contextlib.suppress(FileNotFoundError):
            # The same versions of what it stands on.
            shutil.copy(REPOSITORY / "Package.resolved", directory)
        if subprocess.call(["swift", "build", "-c", "release", "--package-path", directory]):
            raise Failure(f"{name} could not be built")
        complete.touch()
    return name, programs.resolve()


def start(suite, options, programs, random):
    """A running server of the suite, with data, and how to end it."""
    if suite == "twohop":
        server = QbdBridge(options.size, programs=programs)
    else:
        directory = None if suite == "onehop-memory" else options.directory
        server = Qbd(options.size, directory=directory, programs=programs)
    with contextlib.ExitStack() as stack:
        stack.enter_context(server)
        fill(server, random)
        if suite == "snapshots":
            layered(server, "bench/volume0")
        return server, stack.pop_all()


def apart(one, other):
    return abs(one / max(other, 1e-9) - 1)


def spread(runs, again, figure):
    """How far the base is from itself: one set of its servers from the other, and its earlier rounds from the later."""
    half = len(runs) // 2
    of = lambda rows: statistics.median(row[figure] for row in rows)  # noqa: E731
    sets = apart(of(again), of(runs))
    return max(sets, apart(of(runs[half:] + again[half:]), of(runs[:half] + again[:half]))) if half else sets


class Table:
    """One line for each load, printed as it is known."""

    HEAD = (f"  {'load':32s} {'base':>15s} {'tree':>15s} {'IOPS':>6s} {'CPU':>6s} {'spread':>13s}  verdict\n"
            f"  {'':32s} {'IOPS, us':>15s} {'IOPS, us':>15s} {'ratio':>6s} {'ratio':>6s} {'IOPS, CPU':>13s}")

    def __init__(self):
        self.worse = []
        print(self.HEAD, flush=True)

    def add(self, name, base, tree, again):
        of = lambda rows, figure: statistics.median(row[figure] for row in rows)  # noqa: E731
        ratios, spreads, worse = {}, {}, []
        for figure, more_is_better in FIGURES.items():
            ratios[figure] = of(tree, figure) / max(of(base + again, figure), 1e-9)
            spreads[figure] = spread(base, again, figure)
            loss = 1 - ratios[figure] if more_is_better else ratios[figure] - 1
            if loss > ALLOWED + spreads[figure]:
                worse.append("IOPS" if more_is_better else "CPU")
        if worse:
            self.worse.append(name)
        verdict = f"WORSE: {', '.join(worse)}" if worse else "good" if max(spreads.values()) <= QUIET else "unclear"
        sides = [f"{of(rows, 'iops') / 1000:8.1f}k {of(rows, 'cpu_us_per_io'):5.1f}" for rows in (base + again, tree)]
        print(f"  {name:32s} {sides[0]:>15s} {sides[1]:>15s} {ratios['iops']:6.3f} {ratios['cpu_us_per_io']:6.3f}"
              f" {spreads['iops']:6.3f} {spreads['cpu_us_per_io']:6.3f}  {verdict}",
              flush=True)


def compare(suite, options, base, table):
    loads = options.loads
    if suite == "snapshots":
        loads = [load for load in loads if "write" not in load.kind or load == Load("randwrite", "4k", 32)]
    with contextlib.ExitStack() as stack:
        random = random_file(options.directory, options.size)
        stack.callback(random.unlink)
        servers = []
        for programs in (base, BIN, base):
            server, running = start(suite, options, programs, random)
            stack.enter_context(running)
            servers.append((server, []))
        for load in loads:
            for _, runs in servers:
                runs.clear()
            for turn in range(options.rounds):
                # Nobody is always first.
                for server, runs in servers[turn % 3 :] + servers[: turn % 3]:
                    if suite in ("onehop-local", "snapshots"):
                        os.sync()
                    runs.append(measure(server, load, options.seconds))
            table.add(f"{suite} {load}", *[list(runs) for _, runs in servers])


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="the base")
    parser.add_argument("--suite", action="append", choices=SUITES, help="only this one; more than one may be given")
    parser.add_argument("--load", action="append", help="only loads that contain this text, as in '4k qd32'")
    parser.add_argument("--seconds", type=int, default=2, help="of each run (%(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="runs of each load and set of servers (%(default)s)")
    parser.add_argument("--size", type=int, default=256, help="MiB of data in each server (%(default)s)")
    parser.add_argument("--directory", type=pathlib.Path, default=REPOSITORY / ".build" / "bench",
                        help="where the files of local pools are (.build/bench)")
    options = parser.parse_args()
    options.size *= MiB
    options.loads = [load for load in LOADS if not options.load or any(text in str(load) for text in options.load)]
    if not options.loads:
        parser.error(f"no load contains that; there are {', '.join(map(str, LOADS))}")
    return options


def main():
    options = arguments()
    options.directory.mkdir(parents=True, exist_ok=True)
    name, base = build(options.commit)
    print(f"base {name}; medians of {options.rounds} rounds of {options.seconds} s on {options.size // MiB} MiB;"
          f" load before the start {os.getloadavg()[0]:.2f}")
    table = Table()
    for suite in SUITES:
        if not options.suite or suite in options.suite:
            compare(suite, options, base, table)
    if table.worse:
        print(f"bench: worse than {name} by more than {ALLOWED:.0%} beyond its spread: {', '.join(table.worse)}")
        return WORSE
    print(f"bench: no load is worse than {name} by more than {ALLOWED:.0%} beyond its spread")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failure as failure:
        # Not the status of a comparison.
        print(f"bench: {failure}", file=sys.stderr)
        sys.exit(2)
