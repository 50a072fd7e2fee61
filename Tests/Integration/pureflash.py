"""PureFlash's data protocol and its conductor by hand, and qbd-store as a process.

Names and numbers are those of the engine; everything is little-endian.
"""

import json
import os
import socket
import struct
import urllib.parse
import urllib.request

from harness import BIN, SLOWNESS, Server
from ports import free_port

STORE = str((BIN / "qbd-store").resolve())

WRITE, READ = 1, 2
HEAD = 0xFFFFFFFF
MAXIMUM = 131072
OBJECT = 64 << 20
SHARD = 64 << 30

SUCCESS, INVALID_OPCODE, INVALID_FIELD, INVALID_STATE = 0, 1, 2, 9
LBA_RANGE, NOT_PRIMARY, READONLY = 0x80, 0xC0, 0xC2
DEGRADE, REOPEN = 0x2000, 0x4000

HANDSHAKE = struct.Struct("<hhhhQihHQ")
COMMAND = struct.Struct("<BBHIQQIHHQII16x")
REPLY = struct.Struct("<HHHHII16x")
assert (HANDSHAKE.size, COMMAND.size, REPLY.size) == (32, 64, 32)


def command(opcode, volume_id, offset, length, command_id=0, snapshot=HEAD, meta_version=0, sequence=0):
    return COMMAND.pack(
        opcode, 0, command_id, snapshot, volume_id, 0, 0, meta_version, 0, offset, length, sequence
    )


class Connection:
    """One data connection. `depth` and `result` are what the handshake was answered with."""

    def __init__(self, address, port, volume_id, depth=64, version=1, handshake=True):
        self.volume_id = volume_id
        self.socket = socket.create_connection((address, port), timeout=20 * SLOWNESS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if handshake:
            self.socket.sendall(HANDSHAKE.pack(0, depth, 0, 0, volume_id, 0, version, 0, 0))
            answer = HANDSHAKE.unpack(self.receive(HANDSHAKE.size))
            self.depth, self.result = answer[1], answer[6]
            assert answer[4] == volume_id, "the answer to a handshake names another volume"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.socket.close()

    def send(self, data):
        self.socket.sendall(data)

    def receive(self, count):
        data = bytearray()
        while len(data) < count:
            part = self.socket.recv(count - len(data))
            assert part, f"the store closed after {len(data)} of {count} bytes"
            data += part
        return bytes(data)

    def reply(self):
        """(status, meta_ver, command_id, sequence)"""
        status, meta_version, command_id, _, sequence, _ = REPLY.unpack(self.receive(REPLY.size))
        return status, meta_version, command_id, sequence

    def is_closed(self):
        """Waits for the end of the stream; fails when something else comes."""
        try:
            data = self.socket.recv(1)
        except ConnectionResetError:
            return True
        assert data == b"", f"instead of closing the store sent {data!r}"
        return True

    def ask(self, opcode, offset, length, payload=b"", **fields):
        self.send(command(opcode, fields.pop("volume_id", self.volume_id), offset, length, **fields) + payload)

    def write(self, offset, data, **fields):
        """The status."""
        self.ask(WRITE, offset, len(data), data, **fields)
        return self.reply()[0]

    def read(self, offset, length, **fields):
        """The data; fails on any status but success."""
        self.ask(READ, offset, length, **fields)
        status = self.reply()[0]
        assert status == SUCCESS, f"READ of {length} at {offset}: status {status:#x}"
        return self.receive(length)

    def status(self, opcode, offset, length, payload=b"", **fields):
        """The reply to a command that carries no data back."""
        self.ask(opcode, offset, length, payload, **fields)
        return self.reply()[0]


_next_host = 0


def addresses(count):
    """Loopback addresses that no other store of this process has."""
    global _next_host
    base = os.getpid() % 200 + 10
    first = _next_host
    _next_host += count
    return [f"127.{base}.{number // 250}.{number % 250 + 1}" for number in range(first, first + count)]


class Store(Server):
    """One qbd-store with two pools, `disk` (type=local) and `ram` (type=memory)."""

    def __init__(self, address=None, ports=None, stores=None, conductor=True, faults=True, options=()):
        super().__init__(STORE)
        self.address = address or addresses(1)[0]
        # The ports are the same at all stores of a cluster, which differ by their addresses.
        self.data_port, self.conductor_port, self.store_port = ports or (free_port(), free_port(), free_port())
        self.pool_path = self.directory / "pool"
        self.config = self.directory / "qbd.conf"
        self.config.write_text(f"[pool.disk]\ntype=local\npath={self.pool_path}\n\n[pool.ram]\ntype=memory\n")
        self.options = [
            "--config", str(self.config), "--listen", self.address, "--data-port", str(self.data_port),
            "--conductor-port", str(self.conductor_port), "--store-port", str(self.store_port), "--log-level", "debug",
            *(["--stores", ",".join(stores)] if stores else []), *([] if conductor else ["--no-conductor"]),
            *(["--allow-faults"] if faults else []), *options,
        ]  # fmt: skip
        self.control_port = self.conductor_port if conductor else self.store_port

    @property
    def ports(self):
        return self.data_port, self.conductor_port, self.store_port

    def start(self, **variables):
        return self.launch(self.options, variables)

    def accepts(self):
        with socket.socket() as probe:
            return probe.connect_ex((self.address, self.control_port)) == 0

    # The conductor

    def get(self, path):
        with urllib.request.urlopen(
            f"http://{self.address}:{self.control_port}{path}", timeout=30 * SLOWNESS
        ) as response:
            assert response.status == 200, "a conductor's errors are HTTP 200"
            return json.loads(response.read())

    def ask(self, op, **parameters):
        return self.get("/s5c/?" + urllib.parse.urlencode({"op": op, **parameters}))

    def ok(self, op, **parameters):
        answer = self.ask(op, **parameters)
        assert answer["ret_code"] == 0, f"{op} {parameters}: {answer}"
        return answer

    def refused(self, op, code, *words, **parameters):
        answer = self.ask(op, **parameters)
        assert answer["ret_code"] == code, f"{op} {parameters} should be refused with {code}: {answer}"
        for word in words:
            assert word.lower() in answer["reason"].lower(), f"the reason should say {word!r}: {answer}"

    def create(self, pool, volume, size):
        return self.ok("create_volume", tenant_name=pool, volume_name=volume, size=size, rep_cnt=1)

    def open(self, pool, volume):
        return self.ok("open_volume", tenant_name=pool, volume_name=volume, snapshot_name="")

    def connect(self, volume_id, **options):
        return Connection(self.address, self.data_port, volume_id, **options)

    def opened(self, pool="disk", volume="a", size=1 << 30):
        """A connection to a new volume."""
        self.create(pool, volume, size)
        return self.connect(self.open(pool, volume)["volume_id"])

    def faults(self, **switches):
        answer = self.get("/faults?" + urllib.parse.urlencode(switches))
        assert answer["ret_code"] == 0, f"{switches}: {answer}"
        return answer
