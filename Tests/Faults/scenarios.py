"""What the daemon is asked to do while one of its system calls fails, and what must be true whatever came of it.

A scenario begins with a pool and a state folder that an earlier daemon left (a template, made once and copied for each
case). A daemon is started on a copy, prepared, and then asked; one call of it fails, or kills it. What the client was told
becomes a set of states that may be, one of which a fresh daemon must show, to the last block.
"""

import contextlib
import dataclasses
import errno
import os
import random
import re
import shutil
import signal
import subprocess
import time
import zlib

import nbd

from model import BLOCK, Disk, State, Volume, files_of, leftovers
from tracer import TracedDaemon, threads

from harness import QBD, Daemon, KiB, MiB, environment, run, wait_for

CLUSTER = 64 * KiB
# No whole cluster, so that all of their ends are met.
SIZE = 10 * CLUSTER + 5 * BLOCK
# Volumes that no scenario touches.
NEIGHBOURS = ("n1", "n2", "nc")
# Seconds a command or a request may take.
PATIENCE = 30


# As in the harness, where no text speaks of crashes.
DISASTER = re.compile(r"fatal|crashed|sanitizer|runtime error|stack dump", re.IGNORECASE)


class Wrong(Exception):
    """Something that must never be."""


# Templates


class Template:
    """A pool and a state folder as a daemon left them, and what is in them."""

    def __init__(self, root, make):
        chance = random.Random(make.__name__)
        daemon = Daemon(root=root)
        self.directory = daemon.directory
        self.pool, self.state_folder = daemon.pool_path, daemon.state
        daemon.start()
        self.state = State()
        maker = Client(daemon, [self.state], chance)
        try:
            maker.create("n1", MiB)
            maker.fill("n1")
            maker.create("n2", MiB)
            maker.fill("n2")
            maker.snapshot("n2", "s1")
            maker.fill("n2", 3, 7)
            maker.snapshot("n2", "s2")
            maker.fill("n2", 5, 9)
            maker.clone("n2", "s1", "nc")
            maker.fill("nc", 2, 4)
            maker.settle()
            make(maker)
            maker.close()
            if getattr(make, "dies", False):
                daemon.kill()
            else:
                daemon.stop()
        except BaseException:
            daemon.kill()
            raise
        self.neighbours = files_of(self.pool, NEIGHBOURS)

    def copy(self, daemon):
        """Lays it where a daemon will look."""
        daemon.pool_path.rmdir()
        daemon.state.rmdir()
        # Holes as they are: after a crash they may mean something.
        copied = subprocess.run(["cp", "-a", "--sparse=auto", "--reflink=auto", self.pool, daemon.pool_path])
        assert copied.returncode == 0
        shutil.copytree(self.state_folder, daemon.state)
        for document in daemon.state.glob("*.mapping"):
            text = document.read_text()
            document.write_text(text.replace(str(self.directory), str(daemon.directory)))


class Client:
    """A client of a daemon without faults, for what has to be there: every call must succeed."""

    def __init__(self, daemon, states, chance):
        self.daemon = daemon
        self.states = states
        self.chance = chance
        self.handles = {}

    def settle(self):
        """Layers of deleted snapshots are merged in the background."""
        wait_for(lambda: not leftovers(self.daemon.pool_path), f"it is tidy: {leftovers(self.daemon.pool_path)}")

    def qbd(self, *words):
        return self.daemon.qbd(*words, timeout=PATIENCE).succeeded()

    def create(self, name, size=SIZE):
        self.qbd("create", f"disk/{name}", "-k", str(size))
        for state in self.states:
            state.volumes[name] = Volume(Disk(size))

    def snapshot(self, name, snapshot):
        self.qbd("snapshot", "create", f"disk/{name}@{snapshot}")
        for state in self.states:
            add_snapshot(state, name, snapshot)

    def clone(self, name, snapshot, new):
        self.qbd("clone", f"disk/{name}@{snapshot}", f"disk/{new}")
        for state in self.states:
            add_clone(state, name, snapshot, new)

    def map(self, name):
        self.qbd("map", "--export", f"disk/{name}")
        for state in self.states:
            state.mapped.add(name)

    def unmap(self, name):
        self.close()
        self.qbd("unmap", f"disk/{name}")
        for state in self.states:
            state.mapped.discard(name)

    def fill(self, name, first=0, last=None):
        """Random bytes from a cluster to another; mapped for that if it is not."""
        mapped = name in self.states[0].mapped
        if not mapped:
            self.map(name)
        size = self.states[0].disk(name).size
        start, end = first * CLUSTER, size if last is None else last * CLUSTER
        self.write(name, start, self.chance.randbytes(end - start))
        if not mapped:
            self.unmap(name)

    def write(self, name, offset, data):
        self.handle(name).pwrite(data, offset)
        for state in self.states:
            state.disk(name).write(offset, data)

    def zero(self, name, offset, length):
        self.handle(name).zero(length, offset)
        for state in self.states:
            state.disk(name).write(offset, bytes(length))

    def handle(self, name):
        if name not in self.handles:
            handle = nbd.NBD()
            handle.add_meta_context("base:allocation")
            # Requests are sent as they are asked for, wrong ones too.
            handle.set_strict_mode(0)
            handle.connect_uri(self.daemon.uri(f"disk/{name}"))
            self.handles[name] = handle
        return self.handles[name]

    def close(self):
        for handle in self.handles.values():
            with contextlib.suppress(nbd.Error):
                handle.shutdown()
        self.handles = {}


def add_snapshot(state, name, snapshot):
    volume = state.volumes[name]
    volume.snapshots[snapshot] = Disk(0)
    volume.snapshots[snapshot].data = bytearray(volume.disk.data)
    volume.snapshots[snapshot].unsure = {block: set(values) for block, values in volume.disk.unsure.items()}


def add_clone(state, name, snapshot, new):
    disk = state.volumes[name].snapshots[snapshot]
    state.volumes[new] = Volume(Disk(0))
    state.volumes[new].disk.data = bytearray(disk.data)


def plain(client):
    """A volume without snapshots, of which some was never written."""
    client.create("v")
    client.fill("v", 0, 7)


def plain_mapped(client):
    plain(client)
    client.map("v")


def layered(client):
    """A volume with two snapshots, each layer with some of everything."""
    client.create("v")
    client.fill("v", 0, 8)
    client.snapshot("v", "s1")
    client.fill("v", 1, 4)
    client.map("v")
    client.zero("v", 5 * CLUSTER, CLUSTER)
    client.unmap("v")
    client.snapshot("v", "s2")
    client.fill("v", 2, 3)
    client.fill("v", 9)


def layered_mapped(client):
    layered(client)
    client.map("v")


def layered_all_mapped(client):
    layered(client)
    client.map("v")
    client.map("v@s2")


def one_snapshot(client):
    client.create("v")
    client.fill("v", 0, 8)
    client.snapshot("v", "s1")
    client.fill("v", 1, 4)


def one_snapshot_mapped(client):
    one_snapshot(client)
    client.map("v")


def snapshot_mapped(client):
    """Only the snapshot is mapped, the volume is not."""
    layered(client)
    client.map("v@s1")


def everything_mapped(client):
    layered(client)
    client.create("p")
    client.fill("p", 0, 5)
    for name in ("v", "v@s1", "p"):
        client.map(name)


def died_while_writing(client):
    """A daemon that was killed with writes in its head that were never flushed."""
    everything_mapped(client)
    write_about(client, random.Random(7))
    client.write("p", CLUSTER, client.chance.randbytes(3 * BLOCK))


died_while_writing.dies = True


def write_about(client, chance):
    """Writes to what the head has, and what it has not, whole clusters and parts."""
    client.write("v", 2 * CLUSTER + BLOCK, chance.randbytes(3 * BLOCK))
    client.write("v", 4 * CLUSTER + 7 * BLOCK, chance.randbytes(BLOCK))
    client.write("v", 6 * CLUSTER, chance.randbytes(CLUSTER))
    client.write("v", 7 * CLUSTER + 60 * KiB, chance.randbytes(8 * KiB))
    client.zero("v", CLUSTER, CLUSTER)


# Cases


@dataclasses.dataclass(frozen=True)
class Case:
    """One fault. What happens: an errno's name, `short`, `kill-before` or `kill-after`; then how the daemon ends: `kill`,
    `term`, or `retry`, which is asking again, and `kill`."""

    action: str
    end: str
    key: str

    def __str__(self):
        return f"{self.action} {self.end} {self.key}"

    @classmethod
    def parse(cls, text):
        return cls(*text.split(" ", 2))

    @property
    def kills(self):
        return self.action.startswith("kill")

    @property
    def is_harmless(self):
        """What no client may notice."""
        return self.action in ("EINTR", "short")

    @property
    def is_thorough(self):
        """Whether the pool is used after it. What only looks leaves it as it was, and a part of those is enough."""
        looks = self.key.startswith(("open", "read", "pread", "f", "access", "lseek", "getdents", "mmap", "mkdir", "proc"))
        changes = self.key.startswith(("openat:create", "openat:new", "fsync", "fdatasync", "ftruncate", "fallocate"))
        return changes or not looks or zlib.crc32(str(self).encode()) % 3 == 0

    def arm(self, control):
        if self.kills or self.action == "short":
            control.arm(self.action, 0, self.key)
        else:
            control.arm("fail", getattr(errno, self.action), self.key)


class Run:
    """One case: a daemon under the tracer, then a fresh one, and the states that may be."""

    def __init__(self, scenario, template, case, root):
        self.scenario = scenario
        self.template = template
        self.case = case
        self.daemon = TracedDaemon(root)
        self.client = Client(self.daemon, [], random.Random(f"{scenario.name} {case}"))
        self.client.states = self.states = [template.state.copy()]
        self.control = self.daemon.control
        # What the operation was answered.
        self.story = []
        # The last change that was asked for.
        self.last = None
        # What `info` may say of the volume, by its keys.
        self.facts = {}
        # What was unmapped with a warning: the next daemon may have it again.
        self.returning = None
        # What the last command that succeeded warned of.
        self.warning = ""
        # Volumes of which a flush failed, twice.
        self.lost_flush = set()
        template.copy(self.daemon)

    def note(self, text):
        self.story.append(text)

    @property
    def chance(self):
        return self.client.chance

    def keep(self, states, what):
        """Only these states may be from now on."""
        if not states:
            raise Wrong(what)
        self.states[:] = states

    # Asking

    def died(self):
        """Whether the daemon is dead, as it should be when it is killed."""
        if self.daemon.alive:
            return False
        end = self.daemon.end()
        if end is None:
            wait_for(lambda: self.daemon.end() is not None, "the tracer tells the daemon's end")
            end = self.daemon.end()
        if self.scenario.stops and end == 0:
            return True
        if not self.case.kills or end != -signal.SIGKILL:
            raise Wrong(f"the daemon ended by itself, {end}; its log ends with {self.log_end()}")
        return True

    def log_end(self):
        # Not what it lacks in many a container.
        said = [line for line in self.daemon.log().splitlines() if "CAP_SYS_RESOURCE" not in line]
        return "\n      ".join(said[-4:])

    def qbd(self, *words):
        """`ok`, `failed` or `died`, and the text."""
        try:
            result = run([QBD, *words], PATIENCE, env=environment(**self.daemon.variables))
        except subprocess.TimeoutExpired:
            raise Wrong(f"qbd {' '.join(words)} hangs; the daemon's threads:\n{threads(self.daemon.pid)}") from None
        if result.status == 0:
            self.warning = result.err.strip()
            self.note(f"qbd {' '.join(words)}: ok {self.warning}")
            return "ok", result.out
        if self.control.hit and self.case.kills:
            # It may take a moment until it is gone.
            with contextlib.suppress(AssertionError):
                wait_for(lambda: not self.daemon.alive, "dies", 2)
        died = self.died()
        self.note(f"qbd {' '.join(words)}: {'the daemon died' if died else result.err.strip()}")
        return ("died" if died else "failed"), result.err

    def change(self, words, *changes):
        """Asks for a change that is wholly there when it succeeds, and there or not when it does not."""
        if words[0] in ("unmap", "delete", "resize"):
            # Clients see a new size when they connect next.
            self.client.close()
        outcome, text = self.qbd(*words)
        after = [state.copy() for state in self.states]
        for state in after:
            for change in changes:
                change(state)
        if outcome == "ok":
            self.states[:] = after
            if words[0] == "unmap" and self.warning:
                self.returning = words[1].partition("/")[2]
        else:
            self.states += after
            if outcome == "failed" and self.case.is_harmless and self.control.hit:
                raise Wrong(f"{self.case.action} is not to be noticed, and was: {text}")
        self.last = (words, after, outcome)

    def set(self, key, old, new, *words):
        """Asks for something that `info` tells, and a daemon's successor knows unless it warns that it may not."""
        outcome, text = self.qbd(*words)
        before = self.facts.get(key, {old})
        self.facts[key] = {new} if outcome == "ok" and not self.warning else {new} | before
        if outcome == "failed" and self.case.is_harmless and self.control.hit:
            raise Wrong(f"{self.case.action} is not to be noticed, and was: {text}")
        return outcome

    def check_facts(self, daemon, who):
        if not self.facts:
            return
        info = self.post(daemon, "VOLUME_INFO", volume="disk/v")
        for key, allowed in self.facts.items():
            if info[key] not in allowed:
                raise Wrong(f"{who}: {key} is {info[key]}, and should be {' or '.join(map(str, allowed))}")
            # A daemon that could not write it down may say so with success.
            if not self.warning:
                self.facts[key] = {info[key]}

    def retry(self):
        """What failed may be asked for again, and works then, unless it was done the first time."""
        words, after, outcome = self.last
        if outcome != "failed":
            return
        outcome, text = self.qbd(*words)
        if outcome == "failed":
            # What was lost once stays uncertain until the volume is mapped anew.
            if "sync" in self.case.key:
                return
            self.states[:] = after
            self.look(self.daemon, f"asked again, it is refused with '{text.strip()}'")
        elif outcome == "ok":
            self.states[:] = after

    # Data

    def _failed(self, name, what, error):
        self.note(f"{what}: {error.string if hasattr(error, 'string') else error}")
        handle = self.client.handles.get(name)
        if handle and (handle.aio_is_dead() or handle.aio_is_closed()):
            del self.client.handles[name]
        if self.died():
            return
        if self.case.is_harmless:
            raise Wrong(f"{self.case.action} is not to be noticed, and was: {what}: {error}")

    def _do(self, name, what, action):
        """Whether a request of an NBD client succeeded."""
        try:
            action(self.client.handle(name))
            return True
        except nbd.Error as error:
            if self.control.hit and self.case.kills:
                # It may take a moment until it is gone.
                with contextlib.suppress(AssertionError):
                    wait_for(lambda: not self.daemon.alive, "it is dead", 2)
            self._failed(name, what, error)
            return False

    def write(self, name, offset, data, fua=False):
        if not self.daemon.alive:
            return False
        flags = nbd.CMD_FLAG_FUA if fua else 0
        done = self._do(name, f"write {len(data)} at {offset}", lambda handle: handle.pwrite(data, offset, flags))
        self._wrote(name, offset, data, done)
        return done

    def zero(self, name, offset, length, flags=0):
        if not self.daemon.alive:
            return False
        done = self._do(name, f"zero {length} at {offset}", lambda handle: handle.zero(length, offset, flags))
        self._wrote(name, offset, bytes(length), done)
        return done

    def trim(self, name, offset, length):
        if not self.daemon.alive:
            return False
        done = self._do(name, f"trim {length} at {offset}", lambda handle: handle.trim(length, offset))
        # It may keep what it has.
        self._wrote(name, offset, bytes(length), False)
        return done

    def _wrote(self, name, offset, data, done):
        for state in self.states:
            disk = state.disk(name)
            disk.write(offset, data) if done else disk.may_write(offset, data)
        if self.daemon.alive:
            self.read(name, offset, len(data))

    def flush(self, name):
        if not self.daemon.alive:
            return False
        done = self._do(name, "flush", lambda handle: handle.flush())
        if not done and self.daemon.alive:
            # A disk that lost something says so for good; what ran out of something does not.
            again = self._do(name, "flush again", lambda handle: handle.flush())
            if not again:
                self.lost_flush.add(name)
            elif "sync" in self.case.key and not self.case.is_harmless:
                raise Wrong("a flush fails, and the next one says that all is well")
        return done

    def read(self, name, offset, length):
        """What a daemon says once is what stays."""
        if not self.daemon.alive:
            return
        found = None

        def action(handle):
            nonlocal found
            found = handle.pread(length, offset)

        if not self._do(name, f"read {length} at {offset}", action):
            return
        self.settle_on(name, offset, found, "the same daemon reads")

    def settle_on(self, name, offset, found, who):
        wrong = [(state, state.disk(name).difference(found, offset)) for state in self.states]
        self.keep(
            [state for state, difference in wrong if difference is None],
            f"{who} {name} wrongly: {wrong[0][1]}",
        )
        for state in self.states:
            state.disk(name).settle(found, offset)

    # Looking

    def post(self, daemon, command, **fields):
        status, answer = daemon.post(f"QBD_IOC_{command}", **fields)
        if status != 200:
            raise Wrong(f"{command} {fields.get('volume', '')} fails: {answer}")
        return answer

    def look(self, daemon, when):
        """Volumes, snapshots and mappings must be those of one of the states, which stays."""
        answer = self.post(daemon, "LIST_POOL", pool="disk", config=str(daemon.config))
        if answer.get("problems"):
            raise Wrong(f"{when}: the pool's list has problems: {answer['problems']}")
        if answer.get("damaged"):
            raise Wrong(f"{when}: {answer['damaged']}")
        volumes = {}
        for one in answer["volumes"]:
            name = one["volume"].partition("/")[2]
            listed = self.post(daemon, "LIST_SNAPSHOT", volume=one["volume"], config=str(daemon.config))
            volumes[name] = one["size"], tuple(
                (snapshot["snapshot"].partition("@")[2], snapshot["size"]) for snapshot in listed["snapshots"]
            )
        mapped = {one["volume"].partition("/")[2] for one in self.post(daemon, "LIST_VOLUME")["mappings"]}
        self.seen = (volumes, mapped)
        self.keep(
            [state for state in self.states if state.shape() == self.seen],
            f"{when}: {describe(self.seen)}; it should be {' or '.join(describe(s.shape()) for s in self.states)}",
        )

    def check_neighbours(self, when):
        now = files_of(self.daemon.pool_path, NEIGHBOURS)
        for file, contents in self.template.neighbours.items():
            if now.get(file) != contents:
                gone = not (self.daemon.pool_path / file).exists()
                raise Wrong(f"{when}: {file} of a neighbour {'is gone' if gone else 'has changed'}")

    # The case

    def execute(self):
        """Returns whether the fault was met."""
        try:
            self.faulty()
            self.daemon.kill()
            if self.control.hit:
                self.check_neighbours("after the fault")
                self.fresh()
            return bool(self.control.hit)
        finally:
            self.client.handles = {}
            self.daemon.kill()

    def faulty(self):
        scenario, daemon = self.scenario, self.daemon
        if scenario.without_ring:
            self.control.set("without_ring", 1)
        if scenario.starts:
            self.case.arm(self.control)
        try:
            daemon.start()
        except AssertionError as error:
            end = daemon.end()
            if scenario.starts and self.control.hit and end is not None and (end > 0 or self.case.kills):
                self.note(f"it does not start: {self.log_end()}")
                return
            raise Wrong(f"the daemon does not start: {error}") from None
        if not scenario.starts:
            scenario.prepare(self)
            self.control.settle(0.02)
            self.case.arm(self.control)
        scenario.operate(self)
        self.control.settle()
        self.control.disarm()
        if not self.control.hit:
            return
        if self.case.kills:
            wait_for(lambda: not daemon.alive, "it is dead", 5)
        if daemon.alive:
            if self.case.end == "retry" and self.last:
                self.retry()
                self.control.settle()
            self.afterwards()
        self.died()
        self.client.close()
        if self.case.end == "term" and daemon.alive:
            status = daemon.terminate()
            if status is None:
                raise Wrong(f"SIGTERM does not end it; its threads:\n{threads(daemon.pid)}")
            if status != 0:
                raise Wrong(f"it ended with {daemon.end()} after SIGTERM: {self.log_end()}")

    def afterwards(self):
        """What the same daemon says after the fault, and that it goes on to take writes, of which it loses none."""
        if not self.scenario.starts:
            self.look(self.daemon, "the same daemon, after the fault")
            self.check_facts(self.daemon, "the same daemon, after the fault")
        mapped = {name for state in self.states for name in state.mapped}
        for name in sorted(mapped - set(NEIGHBOURS)):
            if any(name not in state.mapped for state in self.states):
                continue
            size = self.states[0].disk(name).size
            if self.scenario.suspends and self.suspended(name):
                continue
            self.read(name, 0, size)
            if "@" in name or self.scenario.starts:
                continue
            for cluster in (2, 3, 8):
                self.write(name, cluster * CLUSTER + 3 * BLOCK, self.chance.randbytes(2 * BLOCK))

    def suspended(self, name):
        return self.post(self.daemon, "VOLUME_INFO", volume=f"disk/{name}")["state"] == "suspended"

    def fresh(self):
        """A daemon without faults shows one of the states, and works."""
        options = self.daemon.options
        fresh = self.fresh_daemon = Fresh(self.daemon)
        fresh.start(options)
        try:
            if self.returning:
                again = [state.copy() for state in self.states]
                for state in again:
                    state.mapped.add(self.returning)
                self.states += again
            self.look(fresh, "a fresh daemon")
            self.check_facts(fresh, "a fresh daemon")
            self.client.daemon = fresh
            self.read_all(fresh)
            if self.case.is_thorough:
                self.use(fresh)
            self.check_neighbours("after a fresh daemon's work")
            self.tidy(fresh)
        except nbd.Error as error:
            raise Wrong(f"with a fresh daemon: {error}") from None
        except subprocess.TimeoutExpired as error:
            raise Wrong(f"a fresh daemon hangs: {error}; its threads:\n{threads(fresh.pid)}") from None
        except AssertionError as error:
            raise Wrong(f"with a fresh daemon: {error}") from None
        finally:
            self.client.close()
            alive = fresh.alive
            fresh.kill()
        if not alive:
            raise Wrong(f"the fresh daemon died: {self.log_end()}")
        bad = [line for line in self.daemon.log().splitlines() if DISASTER.search(line)]
        if bad:
            raise Wrong("\n".join(["the log has", *bad]))

    def read_all(self, daemon):
        """Every block of every volume and snapshot but the neighbours', whose files were compared."""
        names = [name for name in self.states[0].names() if name.partition("@")[0] not in NEIGHBOURS]
        for name in names:
            mapped = name in self.states[0].mapped
            if mapped:
                info = self.post(daemon, "VOLUME_INFO", volume=f"disk/{name}")
                if info["state"] == "suspended":
                    self.post(daemon, "RESUME_VOLUME", volume=f"disk/{name}", mode="normal")
            else:
                self.post(daemon, "MAP_VOLUME", volume=f"disk/{name}", config=str(daemon.config), export=True)
            handle = self.client.handle(name)
            self.settle_on(name, 0, handle.pread(handle.get_size(), 0), "a fresh daemon reads")
            if mapped and name in self.lost_flush:
                try:
                    handle.flush()
                    raise Wrong(f"a flush of {name} failed for good, and a fresh daemon says that all is well")
                except nbd.Error:
                    pass
            elif "@" not in name:
                # It takes writes.
                data = bytes(handle.pread(BLOCK, 4 * CLUSTER))
                handle.pwrite(data, 4 * CLUSTER)
                handle.flush()
            if not mapped:
                self.client.close()
                self.post(daemon, "UNMAP_VOLUME", volume=f"disk/{name}")

    def use(self, daemon):
        """Volumes can be created, snapshotted and deleted as before."""
        client = Client(daemon, [State()], self.chance)
        client.create("x", 3 * CLUSTER)
        client.map("x")
        client.fill("x")
        client.snapshot("x", "s")
        client.fill("x", 0, 2)
        found = client.handle("x").pread(3 * CLUSTER, 0)
        wrong = client.states[0].disk("x").difference(found)
        if wrong:
            raise Wrong(f"a new volume reads wrongly: {wrong}")
        client.qbd("snapshot", "delete", "disk/x@s")
        client.unmap("x")
        client.qbd("delete", "disk/x", "--snapshots")

    def tidy(self, daemon):
        """Nothing is left of what was begun."""
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not leftovers(daemon.pool_path), "it is tidy", 5)
        left = leftovers(daemon.pool_path)
        if left:
            raise Wrong(f"left over in the pool: {', '.join(left)}")


class Fresh(Daemon):
    """A daemon without a tracer, in the folder of one that had one."""

    def __init__(self, traced):
        for name, value in vars(traced).items():
            if name not in ("executable", "process", "control"):
                setattr(self, name, value)
        from harness import QBDD

        self.executable = QBDD
        self.process = None


def describe(shape):
    volumes, mapped = shape
    text = ", ".join(
        f"{name} ({size}{''.join(f' @{snap}' for snap, _ in snapshots)})"
        for name, (size, snapshots) in sorted(volumes.items())
        if name not in NEIGHBOURS
    )
    lost = [name for name in NEIGHBOURS if name not in volumes]
    return f"[{text}; mapped {sorted(mapped)}{'; neighbours gone: ' + ' '.join(lost) if lost else ''}]"


# Scenarios


@dataclasses.dataclass
class Scenario:
    name: str
    make: object
    operate: object
    prepare: object = lambda run: None
    # Armed from the daemon's first call on.
    starts: bool = False
    without_ring: bool = False
    suspends: bool = False
    # The daemon is asked to end.
    stops: bool = False


def fresh_writes(run):
    """Writes that nobody has flushed, to a volume that is mapped."""
    chance = random.Random(3)
    run.client.write("v", 2 * CLUSTER + BLOCK, chance.randbytes(3 * BLOCK))
    run.client.write("v", 4 * CLUSTER + 7 * BLOCK, chance.randbytes(BLOCK))
    run.client.write("v", 6 * CLUSTER, chance.randbytes(CLUSTER))
    run.client.zero("v", CLUSTER, CLUSTER)


def asks(*words, then=()):
    """An operation that is one command."""
    return lambda run: run.change(list(words), *then)


def created(name, size):
    return lambda state: state.volumes.__setitem__(name, Volume(Disk(size)))


def deleted(name):
    return lambda state: state.volumes.pop(name)


def snapshotted(name, snapshot):
    return lambda state: add_snapshot(state, name, snapshot)


def unsnapshotted(name, snapshot):
    return lambda state: state.volumes[name].snapshots.pop(snapshot)


def rolled_back(name, snapshot):
    def change(state):
        volume = state.volumes[name]
        volume.disk = Disk(0)
        volume.disk.data = bytearray(volume.snapshots[snapshot].data)

    return change


def cloned(name, snapshot, new):
    return lambda state: add_clone(state, name, snapshot, new)


def resized(name, size):
    return lambda state: state.disk(name).grow(size)


def mapped(name):
    return lambda state: state.mapped.add(name)


def unmapped(name):
    return lambda state: state.mapped.discard(name)


def start(run):
    """The start itself is the operation: what is mapped is what was, or will be with the next daemon."""
    run.control.settle(0.1)


def write_layered(run):
    """Copy-up of every kind, and what is not one."""
    chance = random.Random(5)
    run.write("v", 4 * CLUSTER + 7 * BLOCK, chance.randbytes(BLOCK))
    run.write("v", 4 * CLUSTER + 20 * BLOCK, chance.randbytes(BLOCK))
    run.flush("v")
    run.write("v", 6 * CLUSTER, chance.randbytes(CLUSTER))
    run.write("v", 7 * CLUSTER + 60 * KiB, chance.randbytes(8 * KiB), fua=True)
    run.write("v", 2 * CLUSTER, chance.randbytes(BLOCK), fua=True)
    run.zero("v", 3 * CLUSTER, CLUSTER)
    run.zero("v", 2 * CLUSTER + 3 * BLOCK, 4 * BLOCK)
    run.zero("v", 0, CLUSTER + 9 * BLOCK)
    run.zero("v", 5 * CLUSTER, 4 * BLOCK, nbd.CMD_FLAG_NO_HOLE)
    run.zero("v", 2 * CLUSTER, CLUSTER, nbd.CMD_FLAG_NO_HOLE)
    run.trim("v", 6 * CLUSTER, 2 * CLUSTER)
    run.flush("v")
    run.read("v", 0, SIZE)


def write_plain(run):
    chance = random.Random(5)
    run.write("v", 4 * CLUSTER + 7 * BLOCK, chance.randbytes(BLOCK))
    run.write("v", 8 * CLUSTER, chance.randbytes(CLUSTER), fua=True)
    run.flush("v")
    run.zero("v", 3 * CLUSTER, CLUSTER + 3 * BLOCK)
    run.zero("v", 2 * CLUSTER, CLUSTER, nbd.CMD_FLAG_NO_HOLE)
    run.trim("v", 6 * CLUSTER, CLUSTER)
    run.flush("v")
    run.read("v", 0, SIZE)


def drop_caches(run):
    """Files of the pool leave the page cache, so that reads of them go to the ring."""
    for path in run.daemon.pool_path.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def reads(run):
    """One at a time, and some at a time."""
    name = "v"
    run.read(name, 0, BLOCK)
    run.read(name, CLUSTER, 2 * CLUSTER)
    drop_caches(run)
    with contextlib.suppress(nbd.Error):
        handle = run.client.handle(name)
        buffers = [(cluster * CLUSTER, nbd.Buffer(CLUSTER)) for cluster in range(8)]
        cookies = [handle.aio_pread(buffer, offset) for offset, buffer in buffers]
        deadline = time.monotonic() + PATIENCE
        for cookie, (offset, buffer) in zip(cookies, buffers):
            try:
                while not handle.aio_command_completed(cookie):
                    handle.poll(1000)
                    if time.monotonic() > deadline:
                        raise Wrong(f"a read hangs; the daemon's threads:\n{threads(run.daemon.pid)}")
            except nbd.Error as error:
                run._failed(name, f"read at {offset}", error)
                continue
            run.settle_on(name, offset, buffer.to_bytearray(), "the same daemon reads")
    run.read(name, 0, SIZE)
    run._do(name, "block status", lambda handle: handle.block_status(SIZE, 0, lambda *_: 0))


def lists(run):
    for words in (["volumes", "disk"], ["list"], ["snapshot", "list", "disk/v"], ["info", "disk/v"]):
        outcome, _ = run.qbd(*words, "--json")
        if outcome == "failed" and run.case.is_harmless:
            raise Wrong(f"{run.case.action} is not to be noticed")


def suspend_and_resume(run):
    run.set("state", "normal", "suspended", "suspend", "disk/v")
    outcome = run.set("state", "normal", "normal", "resume", "disk/v", "-t", "normal")
    if run.daemon.alive and (outcome != "ok" or run.suspended("v")):
        raise Wrong("resume leaves the volume suspended")


def suspend(run):
    run.set("state", "normal", "suspended", "suspend", "disk/v")


def throttle(run):
    run.set("read_iops", 0, 100000, "throttle", "disk/v", "-t", "read_iops=100000")


def refuses(*words):
    """What is wrong to ask for is refused, whatever fails, and changes nothing."""

    def operate(run):
        outcome, _ = run.qbd(*words)
        if outcome == "ok":
            raise Wrong(f"qbd {' '.join(words)} succeeds")

    return operate


def stop(run):
    """SIGTERM while there is something to be finished."""
    run.client.close()
    status = run.daemon.terminate()
    if status is None:
        raise Wrong(f"SIGTERM does not end it; its threads:\n{threads(run.daemon.pid)}")
    if not run.case.kills and run.daemon.end() != 0:
        raise Wrong(f"it ended with {run.daemon.end()} after SIGTERM: {run.log_end()}")


GROWN = SIZE + 2 * CLUSTER + 3 * BLOCK


def scenarios():
    yield Scenario("start", everything_mapped, start, starts=True)
    yield Scenario("start-after-kill", died_while_writing, start, starts=True)
    yield Scenario("start-without-ring", everything_mapped, start, starts=True, without_ring=True)
    yield Scenario("stop", layered_mapped, stop, fresh_writes, stops=True)
    yield Scenario("create", plain, asks("create", "disk/w", "-k", str(SIZE), then=[created("w", SIZE)]))
    yield Scenario("create-existing", plain, refuses("create", "disk/v", "-k", str(SIZE)))
    yield Scenario("create-existing-layered", layered, refuses("create", "disk/v", "-k", str(SIZE)))
    yield Scenario("clone-existing", layered, refuses("clone", "disk/v@s1", "disk/n1"))
    yield Scenario("clone-existing-layered", layered, refuses("clone", "disk/v@s1", "disk/n2"))
    yield Scenario("snapshot-existing", layered, refuses("snapshot", "create", "disk/v@s1"))
    yield Scenario("delete-mapped", layered_mapped, refuses("delete", "disk/v", "--snapshots"), fresh_writes)
    yield Scenario("delete-snapshot-mapped", snapshot_mapped, refuses("snapshot", "delete", "disk/v@s1"))
    yield Scenario("rollback-mapped", layered_mapped, refuses("snapshot", "rollback", "disk/v@s1"), fresh_writes)
    yield Scenario("delete-plain", plain, asks("delete", "disk/v", then=[deleted("v")]))
    yield Scenario("delete-layered", layered, asks("delete", "disk/v", "--snapshots", then=[deleted("v")]))
    take = asks("snapshot", "create", "disk/v@new", then=[snapshotted("v", "new")])
    yield Scenario("snapshot-plain", plain, take)
    yield Scenario("snapshot-plain-mapped", plain_mapped, take, fresh_writes)
    yield Scenario("snapshot-layered", layered, take)
    yield Scenario("snapshot-layered-mapped", layered_mapped, take, fresh_writes)
    first = asks("snapshot", "delete", "disk/v@s1", then=[unsnapshotted("v", "s1")])
    second = asks("snapshot", "delete", "disk/v@s2", then=[unsnapshotted("v", "s2")])
    yield Scenario("merge", layered, first)
    yield Scenario("merge-mapped", layered_mapped, first, fresh_writes)
    yield Scenario("merge-snapshot-mapped", layered_all_mapped, first, fresh_writes)
    yield Scenario("merge-head", layered, second)
    yield Scenario("merge-head-mapped", layered_mapped, second, fresh_writes)
    yield Scenario("merge-last", one_snapshot, first)
    yield Scenario("merge-last-mapped", one_snapshot_mapped, first, fresh_writes)
    yield Scenario("merge-other-mapped", snapshot_mapped, second)
    back = asks("snapshot", "rollback", "disk/v@s1", then=[rolled_back("v", "s1")])
    yield Scenario("rollback", layered, back)
    yield Scenario("clone", layered, asks("clone", "disk/v@s1", "disk/w", then=[cloned("v", "s1", "w")]))
    grow = asks("resize", "disk/v", "-k", str(GROWN), then=[resized("v", GROWN)])
    yield Scenario("resize-plain", plain, grow)
    yield Scenario("resize-plain-mapped", plain_mapped, grow, fresh_writes)
    yield Scenario("resize-layered", layered, grow)
    yield Scenario("resize-layered-mapped", layered_mapped, grow, fresh_writes)
    map_ = asks("map", "--export", "disk/v", then=[mapped("v")])
    yield Scenario("map-plain", plain, map_)
    yield Scenario("map-layered", layered, map_)
    yield Scenario("map-snapshot", layered, asks("map", "--export", "disk/v@s1", then=[mapped("v@s1")]))
    unmap = asks("unmap", "disk/v", then=[unmapped("v")])
    yield Scenario("unmap-plain", plain_mapped, unmap, fresh_writes)
    yield Scenario("unmap-layered", layered_mapped, unmap, fresh_writes)
    yield Scenario("unmap-snapshot", snapshot_mapped, asks("unmap", "disk/v@s1", then=[unmapped("v@s1")]))
    yield Scenario("suspend", layered_mapped, suspend, fresh_writes, suspends=True)
    yield Scenario("suspend-resume", layered_mapped, suspend_and_resume, fresh_writes, suspends=True)
    yield Scenario("throttle", layered_mapped, throttle)
    yield Scenario("writes-plain", plain_mapped, write_plain)
    yield Scenario("writes-layered", layered_mapped, write_layered)
    yield Scenario("writes-plain-without-ring", plain_mapped, write_plain, without_ring=True)
    yield Scenario("writes-layered-without-ring", layered_mapped, write_layered, without_ring=True)
    yield Scenario("reads-plain", plain_mapped, reads, drop_caches)
    yield Scenario("reads-layered", layered_mapped, reads, drop_caches)
    yield Scenario("reads-without-ring", layered_mapped, reads, drop_caches, without_ring=True)
    yield Scenario("lists", layered_mapped, lists)


SCENARIOS = {scenario.name: scenario for scenario in scenarios()}
