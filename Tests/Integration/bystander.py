"""A client that minds its own business: it verifies all the time, while others misbehave."""

import random
import threading
import time

import nbd

from harness import KiB, MiB, SLOWNESS, wait_for


class Bystander(threading.Thread):
    """Writes, flushes and reads back in `region` (offset and length, whole MiB) of one volume until stopped, on one
    session that must never break."""

    def __init__(self, uri, region, block=32 * KiB, pause=0.001):
        super().__init__(daemon=True)
        self.name = f"bystander {uri}"
        self.start_offset, self.length = region
        self.block = block
        self.pause = pause
        self.rounds = 0
        self.slowest = 0.0
        self.failure = None
        self.stopping = threading.Event()
        self.handle = nbd.NBD()
        self.handle.connect_uri(uri)
        # All of it once, so that what the volume takes does not grow while somebody measures.
        for offset in range(self.start_offset, self.start_offset + self.length, MiB):
            self.handle.pwrite(bytes([0xB5]) * MiB, offset)
        self.start()

    def run(self):
        chance = random.Random(1)
        written = {}
        try:
            while not self.stopping.wait(self.pause):
                offset = self.start_offset + chance.randrange(self.length // self.block) * self.block
                content = chance.randbytes(self.block)
                started = time.monotonic()
                self.handle.pwrite(content, offset)
                if self.rounds % 8 == 0:
                    self.handle.flush()
                written[offset] = content
                back = chance.choice(list(written))
                assert self.handle.pread(self.block, back) == written[back], f"wrong bytes at {back}"
                self.slowest = max(self.slowest, time.monotonic() - started)
                self.rounds += 1
            self.handle.shutdown()
        except Exception as failure:  # any: it is reported by the thread that asks
            self.failure = failure

    def assert_unharmed(self, rounds=2, seconds=10):
        """It is still connected, finds what it wrote, and gets on by `rounds` within `seconds`."""
        goal = self.rounds + rounds
        wait_for(lambda: self.failure or self.rounds >= goal, f"{self.name} gets on", seconds)
        assert self.failure is None, f"{self.name} was harmed: {self.failure}"

    def forget(self):
        """Starts measuring the slowest round anew."""
        self.slowest = 0.0

    def stop(self):
        self.stopping.set()
        self.join(10 * SLOWNESS)
        assert not self.is_alive(), f"{self.name} hangs"
        assert self.failure is None, f"{self.name} was harmed: {self.failure}"
