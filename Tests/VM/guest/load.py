"""A load of fio that verifies what it wrote, and goes on until it is told to stop."""

import json
import pathlib
import subprocess
import tempfile
import time

from harness import SLOWNESS, wait_for


class Load:
    """Rounds of random reads and writes, 32 deep, past the page cache; each round reads back all it wrote.

    Every round has its own seed, which is in the header of every block it writes: a block of an earlier round shows.
    """

    def __init__(self, device, mebibytes=8, depth=32, options=()):
        self.device = device
        self.mebibytes = mebibytes
        self.depth = depth
        self.options = options
        self.rounds = 0
        self.directory = tempfile.TemporaryDirectory(prefix="fio-", dir="/tmp")
        self.process = None
        self._start()

    def _start(self):
        self.rounds += 1
        self.output = pathlib.Path(self.directory.name) / f"{self.rounds}.json"
        self.process = subprocess.Popen(
            ["fio", "--name=load", f"--filename={self.device}", "--ioengine=libaio", "--direct=1", "--rw=randrw",
             "--rwmixread=30", "--bsrange=4k-64k", f"--iodepth={self.depth}", f"--size={self.mebibytes}M",
             "--verify=crc32c", "--verify_fatal=1", f"--randseed={self.rounds}",
             "--output-format=json", f"--output={self.output}", *self.options],
            cwd=self.directory.name, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
        self.started = time.monotonic()

    def _check(self):
        out = self.process.communicate()[0]
        text = self.output.read_text() if self.output.exists() else ""
        assert self.process.returncode == 0, f"round {self.rounds} of fio should have no error:\n{out}{text[:2000]}"
        job = json.loads(text[text.index("{") :])["jobs"][0]
        assert job["error"] == 0, f"round {self.rounds} of fio had errors:\n{out}"

    def keep_running(self):
        """Starts the next round when one has ended; fails at once when one had an error."""
        if self.process.poll() is not None:
            self._check()
            self._start()

    def run_for(self, seconds):
        """Lets it run."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.keep_running()
            time.sleep(0.02)

    def finish(self, seconds=60):
        """Ends it with the round that runs, which must complete."""
        wait_for(lambda: self.process.poll() is not None, f"fio on {self.device} ends its round", seconds / SLOWNESS)
        self._check()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.directory.cleanup()
