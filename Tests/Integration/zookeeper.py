"""Debian's ZooKeeper server as a process of the test's own."""

import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile

from harness import wait_for
from ports import free_port
from kazoo.client import KazooClient

JAR = "/usr/share/java/zookeeper.jar"

CONFIGURATION = """\
# Sessions of two seconds at most: what a killed program has left goes soon.
tickTime=500
maxSessionTimeout=2000
dataDir={directory}/data
clientPort={port}
clientPortAddress=127.0.0.1
admin.enableServer=false
4lw.commands.whitelist=srvr
"""

LOGGING = """\
log4j.rootLogger=WARN, CONSOLE
log4j.appender.CONSOLE=org.apache.log4j.ConsoleAppender
log4j.appender.CONSOLE.layout=org.apache.log4j.PatternLayout
log4j.appender.CONSOLE.layout.ConversionPattern=%d %p %m%n
"""


class ZooKeeper:
    """A server with an empty tree, which survives its restarts."""

    def __init__(self):
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="qbd-zookeeper-", dir="/tmp"))
        (self.directory / "zoo.cfg").write_text(CONFIGURATION.format(directory=self.directory, port=self.port))
        (self.directory / "log4j.properties").write_text(LOGGING)
        self.process = None

    def start(self):
        with open(self.directory / "log", "ab") as log:
            self.process = subprocess.Popen(
                ["java", "-Xmx96m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", f"{self.directory}:{JAR}",
                 "org.apache.zookeeper.server.quorum.QuorumPeerMain", str(self.directory / "zoo.cfg")],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)  # fmt: skip
        wait_for(lambda: self.serves() or self.process.poll() is not None, "ZooKeeper serves", 30, pause=0.05)
        assert self.process.poll() is None, (self.directory / "log").read_text()
        return self

    def serves(self):
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as client:
                client.sendall(b"srvr")
                return b"Mode: standalone" in client.recv(4096)
        except OSError:
            return False

    def kill(self):
        self.process.kill()
        self.process.wait()

    def pause(self):
        self.process.send_signal(signal.SIGSTOP)

    def finish(self):
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def client(self):
        """A connected client of another kind than qbd's; to be stopped."""
        client = KazooClient(hosts=self.address, timeout=2)
        client.start(timeout=20)
        return client
