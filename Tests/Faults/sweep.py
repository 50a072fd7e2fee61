"""Fails each system call of the daemon that touches a file in turn, and kills it at each that changes one.

    sweep.py --all                    everything
    sweep.py --budget 120 --seed 7    a part of it, spread over all scenarios; which, the seed says
    sweep.py --only create            a scenario
    sweep.py --only create --case 'EIO kill openat pool/~lock 1'

Needs root or the right to trace, the built programs (QBD_BIN_DIR) and the built tracer (`make .build/faults`).
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zlib

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "Integration")]

import tracer  # noqa: E402
from scenarios import SCENARIOS, Case, Run, Template, Wrong  # noqa: E402

# Seconds after which a case hangs.
LIMIT = 120

# What can happen to a call, the usual first.
ERRORS = {
    "open": ["EIO", "ENOMEM", "EINTR"],
    "openat": ["EIO", "ENOMEM", "EINTR"],
    "openat:folder": ["EIO", "ENOMEM"],
    "openat:create": ["EIO", "ENOSPC", "EINTR"],
    "openat:new": ["EIO", "ENOSPC"],
    "getdents64": ["EIO", "ENOMEM"],
    "fstatat": ["EIO", "ENOMEM"],
    "faccessat": ["EIO", "ENOMEM"],
    "access": ["EIO", "ENOMEM"],
    "read": ["EIO", "EINTR", "short"],
    "pread64": ["EIO", "EINTR", "short"],
    "preadv2:nowait": ["EIO", "EAGAIN", "short"],
    "write": ["ENOSPC", "EIO", "EINTR", "short"],
    "writev": ["EIO", "EINTR", "short"],
    "pwrite64": ["EIO", "ENOSPC", "EINTR", "short"],
    "pwritev2": ["EIO", "ENOSPC", "EINTR", "short"],
    "ftruncate": ["EIO", "ENOSPC", "EINTR"],
    "fallocate": ["EIO", "ENOSPC", "EINTR"],
    "copy_file_range": ["EIO", "ENOSPC", "EINTR", "short"],
    "sendfile": ["EIO", "short"],
    "splice": ["EIO", "short"],
    "fsync": ["EIO", "ENOSPC"],
    "fdatasync": ["EIO", "ENOSPC"],
    "renameat": ["EIO", "ENOSPC"],
    "renameat2": ["EIO", "ENOSPC"],
    "linkat": ["EIO", "ENOSPC"],
    "unlinkat": ["EIO", "ENOSPC"],
    "mkdir": ["EIO", "ENOSPC"],
    "flock": ["ENOLCK", "EINTR"],
    "mmap": ["ENOMEM"],
    "io_uring_setup": ["ENOMEM", "EMFILE"],
    "io_uring_enter": ["EAGAIN", "ENOMEM", "EINTR", "EBUSY"],
    "ring-read": ["EIO", "EINTR", "EAGAIN", "short"],
    "ring-write": ["EIO", "ENOSPC", "EINTR", "short"],
    "ring-fsync": ["EIO", "ENOSPC", "EINTR"],
    "ring-fallocate": ["EIO", "ENOSPC", "EINTR"],
}
# Calls of which each kind is made to fail once: they look at what the kernel has in memory. 3 and 4 are F_GETFL and F_SETFL.
UNLIKELY = ("fstat", "fcntl:3", "fcntl:4")
CHANGES = (
    "openat:create", "openat:new", "write", "pwrite", "ftruncate", "fallocate", "copy_file_range", "rename", "link",
    "unlink", "fsync", "fdatasync", "io_uring_enter", "mkdirat",
)  # fmt: skip


def chosen(text, *of):
    """One of some, always the same one for a text."""
    return of[zlib.crc32(text.encode()) % len(of)]


def cases_of(keys):
    """All that can happen to calls with these keys."""
    for key in keys:
        call = key.split()[0]
        errors = ERRORS.get(call) or ERRORS.get(call.split(":")[0]) or ["EIO"]
        # What is looked at again and again, as a pool's files are, is made to fail in one way from the second time on.
        often = not call.startswith(CHANGES) and not call.startswith("ring") and int(key.split()[-1]) > 1
        if often and call in UNLIKELY:
            continue
        for index, error in enumerate(errors[:1] if often else errors):
            ends = ["kill"] if index == 0 else [chosen(f"{error} {key}", "retry", "term", "kill")]
            if often:
                ends = [chosen(key, "kill", "kill", "retry", "term")]
            elif index == 0 and error == "EIO":
                ends.append(chosen(key, "retry", "term"))
            for end in ends:
                yield Case(error, end, key)
        if call.startswith(CHANGES):
            yield Case("kill-before", "-", key)
            if call.startswith(("rename", "unlink")):
                yield Case("kill-after", "-", key)


@dataclasses.dataclass
class Failure:
    scenario: object
    case: Case
    text: str
    # Of two tries.
    times: int = 1


@dataclasses.dataclass
class Running:
    scenario: object
    case: Case
    missed: int
    failure: Failure
    reader: int
    folder: str
    started: float


class Sweep:
    def __init__(self, root, jobs):
        self.root = root
        self.jobs = jobs
        self.templates = {}
        self.running = {}
        self.counts = collections.defaultdict(collections.Counter)
        self.failures = []
        self.deadline = None
        # Whether the kernel lets operations of a ring fail.
        self.rings_fail = True

    def template(self, scenario):
        make = scenario.make
        if make not in self.templates:
            self.templates[make] = Template(self.root, make)
        return self.templates[make]

    def keys(self, scenario):
        """The keys of all calls that the scenario makes, in their order; of two runs, since they differ a little."""
        keys = {}
        for _ in range(2):
            run = Run(scenario, self.template(scenario), Recording(), self.root)
            try:
                run.faulty()
                self.rings_fail = bool(run.control.ring)
                for key in run.control.log():
                    keys.setdefault(key)
            finally:
                run.client.handles = {}
                run.daemon.kill()
                shutil.rmtree(run.daemon.directory, ignore_errors=True)
        return list(keys)

    # Cases run as processes of their own: what hangs, or dies in a library, is that case's.

    def start(self, scenario, case, missed=0, failure=None):
        """Runs a case; `missed` times it did not meet its fault, or `failure` is how it failed."""
        template = self.template(scenario)
        reader, writer = os.pipe()
        folder = tempfile.mkdtemp(prefix="c-", dir=self.root)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.setsid()
            os.close(reader)
            try:
                status, text = perform(scenario, template, case, folder)
            except BaseException:
                status, text = "failed", traceback.format_exc()
            with os.fdopen(writer, "w") as pipe:
                # What a pipe takes, since nobody reads it before the end.
                json.dump([status, text[:16384]], pipe)
            os._exit(0)
        os.close(writer)
        self.running[pid] = Running(scenario, case, missed, failure, reader, folder, time.monotonic())

    def wait(self):
        """Waits until one has ended, and takes what it says."""
        while True:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            if pid in self.running:
                return self.ended(self.running.pop(pid))
            for pid, running in self.running.items():
                if time.monotonic() - running.started > LIMIT:
                    text = hung(running.folder)
                    os.killpg(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    return self.ended(self.running.pop(pid), text)
            time.sleep(0.003)

    def ended(self, running, hang=None):
        scenario, case = running.scenario, running.case
        with os.fdopen(running.reader) as pipe:
            said = "" if hang else pipe.read()
        status, text = json.loads(said) if said else ("failed", hang or "the test itself died")
        if status == "failed" and text.count(" ptrace_stop ") >= 2:
            # Threads of the daemon wait for the tracer, which a busy machine has kept from them: nothing is known then.
            print(f"{scenario.name} {case}: the tracer stood still", flush=True)
            status = "missed"
        shutil.rmtree(running.folder, ignore_errors=True)
        counts = self.counts[scenario.name]
        counts["seconds"] += time.monotonic() - running.started
        if running.failure:
            if status == "failed":
                running.failure.times += 1
        elif status == "failed":
            counts["failed"] += 1
            failure = Failure(scenario, case, text)
            self.failures.append(failure)
            # One that comes each time is another thing than one that comes now and then.
            self.start(scenario, case, failure=failure)
        elif status == "missed" and running.missed < 2:
            # Some calls are made at another moment each time.
            self.start(scenario, case, missed=running.missed + 1)
        else:
            counts[status] += 1

    def stop(self):
        """Ends what is running, with the daemons."""
        for pid in self.running:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def perform(self, cases):
        """All of them, some at a time, until the deadline."""
        for scenario, case in cases:
            if self.deadline and time.monotonic() > self.deadline:
                self.counts[scenario.name]["left"] += 1
                continue
            self.start(scenario, case)
            while len(self.running) >= self.jobs:
                self.wait()
        while self.running:
            self.wait()


class Recording:
    """In the place of a case: nothing happens, and calls are written down."""

    end = "kill"
    key = action = "-"
    kills = is_harmless = False

    def arm(self, control):
        control.arm("record")


def perform(scenario, template, case, folder):
    """What came of a case, `ok`, `missed` or `failed`, and the text."""
    run = Run(scenario, template, case, folder)
    try:
        return ("ok" if run.execute() else "missed"), ""
    except Wrong as wrong:
        return "failed", "\n      ".join([str(wrong), *run.story[-8:]])


def hung(folder):
    """Where the daemon of a case is that hangs."""
    text = f"it hangs, {LIMIT} s"
    for path in pathlib.Path(folder).glob("*/control"):
        control = tracer.Control(path)
        text += f"; the daemon's threads:\n{tracer.threads(control.pid)}"
        if control.pid:
            try:
                os.kill(control.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
    return text


def spread(groups, chance):
    """A case of each scenario, then another one of each, and so on."""
    groups = [(scenario, chance.sample(cases, len(cases))) for scenario, cases in groups]
    chance.shuffle(groups)
    for index in range(max((len(cases) for _, cases in groups), default=0)):
        for scenario, cases in groups:
            if index < len(cases):
                yield scenario, cases[index]


def default_seed():
    try:
        counted = subprocess.run(["git", "rev-list", "--count", "HEAD"], cwd=HERE, capture_output=True, check=True)
        return int(counted.stdout)
    except (OSError, ValueError, subprocess.CalledProcessError):
        return int(time.time() // 86400)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every case of every scenario")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="a part, for so long")
    parser.add_argument("--seed", type=int, help="which part; the number of commits if not given")
    parser.add_argument("--only", action="append", metavar="SCENARIO", choices=list(SCENARIOS))
    parser.add_argument("--case", action="append", metavar="CASE", help="as failures name them")
    parser.add_argument("--match", action="append", metavar="WORD", help="cases that have this in their name")
    parser.add_argument("--list", action="store_true", help="print the cases and do nothing")
    parser.add_argument("--jobs", type=int, default=3, help="cases at a time; each of them waits a third of its time")
    parser.add_argument("--root", default="/tmp", help="a folder of the file system to try; a short path")
    arguments = parser.parse_args()
    if not (arguments.all or arguments.budget or arguments.only or arguments.list):
        parser.error("say what: --all, --budget or --only")
    tried = subprocess.run([tracer.TRACER, "/dev/null"], capture_output=True, text=True)
    if tried.returncode == 77:
        print(tried.stderr.strip())
        return 0
    started = time.monotonic()
    root = tempfile.mkdtemp(prefix="qf-", dir=arguments.root)
    runner = Sweep(root, arguments.jobs)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return sweep(arguments, runner, started)
    finally:
        runner.stop()
        shutil.rmtree(root, ignore_errors=True)


def sweep(arguments, runner, started):
    if arguments.budget:
        runner.deadline = started + arguments.budget
        seed = default_seed() if arguments.seed is None else arguments.seed
        print(f"a part of the fault sweep, {arguments.budget:.0f} s, seed {seed}")
    wanted = [SCENARIOS[name] for name in arguments.only or SCENARIOS]
    for scenario in wanted:
        runner.template(scenario)
    if not arguments.case:
        with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
            keys = list(pool.map(runner.keys, wanted))
    groups = []
    for index, scenario in enumerate(wanted):
        if arguments.case:
            cases = [Case.parse(text) for text in arguments.case]
        else:
            cases = list(cases_of(keys[index]))
        if not runner.rings_fail:
            cases = [case for case in cases if not case.key.startswith("ring") or case.action == "short"]
        if arguments.match:
            cases = [case for case in cases if any(word in str(case) for word in arguments.match)]
        groups.append((scenario, cases))
    print(f"{sum(len(cases) for _, cases in groups)} cases in {len(groups)} scenarios,"
          f" recorded in {time.monotonic() - started:.0f} s", flush=True)  # fmt: skip
    if not runner.rings_fail:
        print("operations of rings are made to fail from Linux 6.10 on, and not here")
    if arguments.list:
        for scenario, cases in groups:
            for case in cases:
                print(f"{scenario.name}: {case}")
        return 0
    if arguments.budget:
        runner.perform(spread(groups, random.Random(seed)))
    else:
        for scenario, cases in groups:
            runner.perform([(scenario, case) for case in cases])
            report(runner, scenario.name)
    if arguments.budget:
        for name in SCENARIOS:
            report(runner, name)
    counts = sum((counter for counter in runner.counts.values()), collections.Counter())
    total = counts["ok"] + counts["failed"]
    print(f"\nfaults: {total} cases, {counts['failed']} failed, {counts['missed']} not met,"
          f" {counts['left']} left out, {time.monotonic() - started:.0f} s")  # fmt: skip
    if total == 0:
        print("faults: nothing was tried")
        return 1
    return 1 if runner.failures else 0


def report(runner, name):
    """A line for a scenario, and its failures."""
    counts = runner.counts.get(name)
    if not counts:
        return
    print(f"{name:28} {counts['ok']:5} ok {counts['failed']:4} failed {counts['missed']:4} not met"
          f" {counts['left']:5} left out {counts['seconds']:6.0f} s", flush=True)  # fmt: skip
    for failure in runner.failures:
        if failure.scenario.name == name:
            print(f"  {failure.case}: {failure.text}")
            if failure.times == 1:
                print("      (not the second time)")
            print(f"      again: Tests/Faults/sweep.py --only {name} --case '{failure.case}'", flush=True)


if __name__ == "__main__":
    sys.exit(main())
