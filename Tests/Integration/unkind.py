"""A cluster that behaves as PureFlash's was seen to: its conductor is another process than its stores, believes in a store
for some seconds after its death, writes off for good what it could not reach, and ends when a store comes back."""

import contextlib
import threading

from harness import wait_for
from pureflash import Store, addresses
from test_pureflash import started

# Milliseconds.
BELIEF = 5000
UNKIND = {"belief": BELIEF, "exit_on_return": 1, "damaging_resize": 1}


class Supervised:
    """A conductor that is started again when it ends, as an administrator's supervisor does."""

    def __init__(self, conductor):
        self.conductor = conductor
        self.starts = 0
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        while not self.over.wait(0.05):
            if self.conductor.process.poll() is not None:
                self.conductor.start()
                self.starts += 1
                self.conductor.faults(**UNKIND)

    def end(self):
        self.over.set()
        self.thread.join()


@contextlib.contextmanager
def unkind(count=1, supervised=True, **client):
    """A daemon, a conductor that has no data, and the stores."""
    host, *hosts = addresses(count + 1)
    conductor = Store(address=host, stores=hosts)
    stores = [UnkindStore(conductor, address=each, ports=conductor.ports, conductor=False) for each in hosts]
    daemon = supervisor = None
    try:
        for store in (*stores, conductor):
            store.start()
        conductor.faults(**{**UNKIND, "exit_on_return": 1 if supervised else 0})
        supervisor = Supervised(conductor) if supervised else None
        daemon = started([conductor], **client)
        yield daemon, conductor, stores
    finally:
        if supervisor:
            supervisor.end()
            # It may end by itself at any time.
            conductor.expected_to_run = False
        if daemon:
            daemon.finish()
        for store in (conductor, *stores):
            store.finish()


class UnkindStore(Store):
    """A store whose conductor is another process: switches are turned at both, and each does what it can."""

    def __init__(self, master, **options):
        super().__init__(**options)
        self.conductor = master

    def faults(self, **switches):
        # It may just be starting again.
        wait_for(self.conductor.accepts, "the conductor answers", 20)
        theirs = self.conductor.faults(**switches)
        if "clear" in switches:
            self.conductor.faults(**UNKIND)
        # It has no catalogue of volumes.
        switches.pop("stale", None)
        ours = super().faults(**switches)
        ours["seen"]["opens"] = theirs["seen"]["opens"]
        return ours
