"""A PureFlash cluster that means harm: a conductor and a store in this process, whose every answer a test chooses.

Each volume has a behaviour of its own, on its data connections and at the conductor, so that many kinds of harm are
done to one daemon at the same time.
"""

import asyncio
import contextlib
import json
import mmap
import os
import socket
import struct
import threading
import time
import urllib.parse

from harness import KiB, MiB
from ports import free_port
from pureflash import COMMAND, DEGRADE, HANDSHAKE, INVALID_STATE, NOT_PRIMARY, READ, REOPEN, REPLY, SUCCESS, WRITE, addresses

SIZE = 64 * MiB
TCP_ESTABLISHED = b"\x01"


class Volume:
    """What a test turns: `store` and `conductor`, and what it may ask: how often it was connected to, and opened."""

    def __init__(self, number, name):
        self.id = number << 24
        self.name = name
        self.store = good
        self.conductor = None
        # Takes no memory where nothing was written.
        self.data = mmap.mmap(-1, SIZE)
        self.size = SIZE
        self.shards = 1
        self.connected = 0
        self.opened = 0
        # Sizes that update_volume asked for, and what it does with them.
        self.updates = []
        self.update = lambda size: setattr(self, "size", size)
        self.writers = set()
        # Connections that came while another one of this volume and address was open: a request may have been sent
        # again while the store could still execute it.
        self.overlaps = 0

    def layout(self, address):
        return {
            "status": "OK", "volume_name": self.name, "volume_size": self.size, "volume_id": self.id,
            "shard_count": self.shards,
            "rep_count": 1, "meta_ver": 0, "snap_seq": -1, "shard_lba_cnt_order": 36, "op": "open_volume_reply",
            "ret_code": 0,
            "shards": [
                {"index": index, "store_ips": address, "status": "OK", "is_shareddisk": 0} for index in range(self.shards)
            ],
        }  # fmt: skip


class Cluster:
    """Listens from its creation to `close`, on a thread of its own."""

    def __init__(self, stores=1):
        self.addresses = addresses(stores)
        self.data_port, self.conductor_port = free_port(), free_port()
        self.volumes = {}
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.call(self._listen())

    def close(self):
        self.call(self._end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def volume(self, name):
        self.volumes[name] = Volume(len(self.volumes) + 1, name)
        return self.volumes[name]

    def configuration(self, **client):
        keys = {"store_port": self.data_port, "io_timeout": 1, "conn_timeout": 1, "open_volume_timeout": 2, **client}
        return f"[conductor]\nendpoints={self.addresses[0]}:{self.conductor_port}\n[client]\n" + "".join(
            f"{key}={value}\n" for key, value in keys.items()
        )

    def disconnect(self, volume):
        """Resets the volume's data connections."""

        async def reset():
            for writer in list(volume.writers):
                abort(writer)

        self.call(reset())

    def call(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    async def _listen(self):
        self.servers = [await asyncio.start_server(self._conduct, self.addresses[0], self.conductor_port)]
        for address in self.addresses:
            self.servers.append(await asyncio.start_server(self._serve, address, self.data_port))

    async def _end(self):
        for server in self.servers:
            server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader, writer):
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            hello = await reader.readexactly(HANDSHAKE.size)
            number = HANDSHAKE.unpack(hello)[4]
            volume = next(each for each in self.volumes.values() if each.id == number)
            # Which of the addresses it is, for those that behave differently at each.
            address = writer.get_extra_info("sockname")[0]
            volume.connected += 1
            volume.overlaps += sum(
                is_open(other) and other.get_extra_info("sockname")[0] == address for other in volume.writers
            )
            volume.writers.add(writer)
            try:
                await volume.store(volume, hello, reader, writer, address)
            finally:
                volume.writers.discard(writer)
        writer.close()

    async def _conduct(self, reader, writer):
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            head = await reader.readuntil(b"\r\n\r\n")
            query = urllib.parse.parse_qs(urllib.parse.urlsplit(head.split()[1].decode()).query)
            if query["op"][0] == "list_volume":
                volumes = [{"id": each.id, "name": each.name, "size": each.size} for each in self.volumes.values()]
                writer.write(http(json.dumps({"ret_code": 0, "volumes": volumes})))
            elif query["op"][0] == "update_volume":
                volume = self.volumes[query["volume_name"][0]]
                volume.updates.append(int(query["size"][0]) * MiB)
                volume.update(volume.updates[-1])
                writer.write(http(json.dumps({"ret_code": 0})))
            else:
                volume = self.volumes[query["volume_name"][0]]
                volume.opened += 1
                answer = volume.layout(",".join(self.addresses))
                if volume.conductor:
                    await volume.conductor(answer, writer)
                else:
                    writer.write(http(json.dumps(answer)))
            await writer.drain()
        writer.close()


def abort(writer):
    """Closes with a reset."""
    raw = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def is_open(writer):
    """Whether the client keeps the connection, as this machine's kernel knows at once."""
    raw = writer.get_extra_info("socket")
    try:
        return raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == TCP_ESTABLISHED
    except OSError:
        return False


# What a store does with a connection whose handshake has come


def welcome(hello, **changes):
    fields = dict(zip(("timeout", "depth", "a", "b", "id", "c", "result", "d", "e"), HANDSHAKE.unpack(hello)))
    return HANDSHAKE.pack(*{**fields, "result": 0, **changes}.values())


async def receive(reader):
    """(opcode, command id, offset, length, sequence, payload)"""
    opcode, _, number, _, _, _, _, _, _, offset, length, sequence = COMMAND.unpack(await reader.readexactly(COMMAND.size))
    payload = await reader.readexactly(length) if opcode == WRITE else b""
    return opcode, number, offset, length, sequence, payload


def reply(number, sequence, status=SUCCESS):
    return REPLY.pack(status, 0, number, 0, sequence, 0)


def do(volume, opcode, offset, length, payload):
    """Reads or writes, and returns what follows the reply."""
    if opcode == WRITE:
        volume.data[offset : offset + length] = payload
    return volume.data[offset : offset + length] if opcode == READ else b""


async def good(volume, hello, reader, writer, address):
    writer.write(welcome(hello))
    while True:
        opcode, number, offset, length, sequence, payload = await receive(reader)
        writer.write(reply(number, sequence) + do(volume, opcode, offset, length, payload))
        await writer.drain()


async def lying(volume, hello, reader, writer, address):
    """One read of ten has a bit turned."""
    writer.write(welcome(hello))
    reads = 0
    while True:
        opcode, number, offset, length, sequence, payload = await receive(reader)
        data = bytearray(do(volume, opcode, offset, length, payload))
        if opcode == READ:
            reads += 1
            data[length // 2] ^= reads % 10 == 0
        writer.write(reply(number, sequence) + data)
        await writer.drain()


def answering(bad):
    """A store that is well until it has a command, and then writes what `bad` makes of it."""

    async def serve(volume, hello, reader, writer, address):
        writer.write(welcome(hello))
        while True:
            writer.write(bad(*await receive(reader)))
            await writer.drain()

    return serve


def until_good(bad, times=1):
    """A store that treats that many connections badly, and those after them well."""
    left = times

    async def serve(volume, hello, reader, writer, address):
        nonlocal left
        left -= 1
        await (bad if left >= 0 else good)(volume, hello, reader, writer, address)

    return serve


def at(bad, address):
    """A store that is bad at one address."""

    async def serve(volume, hello, reader, writer, where):
        await (bad if where == address else good)(volume, hello, reader, writer, where)

    return serve


def refusing_once(*statuses, opcodes=(READ, WRITE)):
    """A store that answers each such command with these at first, without data, and then does it."""
    seen = {}

    async def serve(volume, hello, reader, writer, address):
        writer.write(welcome(hello))
        while True:
            opcode, number, offset, length, sequence, payload = await receive(reader)
            times = seen.setdefault((opcode, offset), 0)
            seen[opcode, offset] += 1
            if opcode in opcodes and times < len(statuses):
                writer.write(reply(number, sequence, statuses[times]))
                continue
            writer.write(reply(number, sequence) + do(volume, opcode, offset, length, payload))

    return serve


async def degraded(volume, hello, reader, writer, address):
    """All is done, and every write is told to have lost a replica."""
    writer.write(welcome(hello))
    while True:
        opcode, number, offset, length, sequence, payload = await receive(reader)
        status = DEGRADE if opcode == WRITE else SUCCESS
        writer.write(reply(number, sequence, status) + do(volume, opcode, offset, length, payload))


async def untidy(volume, hello, reader, writer, address):
    """Grants more than it is asked for, and leaves anything in the bytes of replies that have no meaning."""
    writer.write(welcome(hello, depth=255))
    while True:
        opcode, number, offset, length, sequence, payload = await receive(reader)
        answer = bytearray(reply(number, sequence))
        answer[6:8], answer[12:] = os.urandom(2), os.urandom(20)
        writer.write(answer + do(volume, opcode, offset, length, payload))


async def swallowing_reads(volume, hello, reader, writer, address):
    """What a store does whose replica is out of order: writes are told to open the volume again, reads nothing."""
    writer.write(welcome(hello))
    while True:
        opcode, number, _, _, sequence, _ = await receive(reader)
        if opcode == WRITE:
            writer.write(reply(number, sequence, REOPEN))


def with_room_for(count):
    async def serve(volume, hello, reader, writer, address):
        await (good if len(volume.writers) <= count else STORES["full"][0])(volume, hello, reader, writer, address)

    return serve


def greeting(bad, stay=True):
    """A store that answers the handshake with what `bad` makes of it, and then waits, or goes."""

    async def serve(volume, hello, reader, writer, address):
        writer.write(bad(hello))
        await writer.drain()
        while stay and await reader.read(MiB):
            pass

    return serve


async def drip(writer, data):
    for byte in data:
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(1)


async def dripping_handshake(volume, hello, reader, writer, address):
    await drip(writer, welcome(hello))


async def dripping_reply(volume, hello, reader, writer, address):
    writer.write(welcome(hello))
    _, number, _, length, sequence, _ = await receive(reader)
    await drip(writer, reply(number, sequence) + bytes(length))


async def flooding(volume, hello, reader, writer, address):
    """As much as the client takes, of replies that nobody asked for."""
    writer.write(welcome(hello))
    while True:
        writer.write(b"".join(reply(number, number << 9) for number in range(2048)))
        await writer.drain()


async def resetting(volume, hello, reader, writer, address):
    abort(writer)


STORES = {
    # name: (behaviour, what the log says of it)
    "noise": (answering(lambda *_: os.urandom(64 * KiB)), "nothing that was asked"),
    "zeros": (answering(lambda *_: bytes(64 * KiB)), "nothing that was asked"),
    "ones": (answering(lambda *_: b"\xff" * 64 * KiB), "nothing that was asked"),
    "otherid": (answering(lambda _, number, __, length, sequence, ___: reply(number ^ 1, sequence)), "nothing that was asked"),
    "bigid": (answering(lambda _, number, __, ___, sequence, ____: reply(0xFFFF, sequence)), "nothing that was asked"),
    "otherseq": (answering(lambda _, number, __, ___, sequence, ____: reply(number, sequence ^ 1)), "nothing that was asked"),
    "flood": (flooding, "nothing that was asked"),
    "drip": (dripping_reply, "does not answer|no answer"),
    "silent": (greeting(welcome), "does not answer|no answer"),
    "halfdata": (answering(lambda opcode, number, _, length, sequence, __: (
        reply(number, sequence) + bytes(length // 8) if opcode == READ else b"")), "does not answer|no answer"),
    "full": (greeting(welcome, stay=False), "no room for another connection"),
    "reset": (resetting, "[Cc]onnection reset|closed the connection"),
    "mute": (greeting(lambda _: b""), "no handshake within"),
    "dripshake": (dripping_handshake, "no handshake within"),
    "refuse": (greeting(lambda hello: welcome(hello, result=22), stay=False), "refused the volume"),
    "noshake": (greeting(lambda hello: b"\x5a" * 4096), "handshake for another volume"),
    "vol": (greeting(lambda hello: welcome(hello, id=1 << 40)), "handshake for another volume"),
    "deep": (greeting(lambda hello: welcome(hello, depth=32767)), "a depth of 32767"),
    "shallow": (greeting(lambda hello: welcome(hello, depth=0)), "a depth of 0"),
    "negative": (greeting(lambda hello: welcome(hello, depth=-1)), "a depth of -1"),
    "unasked": (greeting(lambda hello: welcome(hello) + reply(0, 0) * 3), "nothing that was asked"),
    "longshake": (greeting(lambda hello: welcome(hello) + os.urandom(MiB)), "nothing that was asked"),
    "reopen": (
        answering(lambda _, number, __, ___, sequence, ____: reply(number, sequence, REOPEN)), "answered REOPEN",
    ),
    "stale": (
        answering(lambda _, number, __, ___, sequence, ____: reply(number, sequence, REOPEN | INVALID_STATE)),
        "answered INVALID_STATE, REOPEN",
    ),
    "primary": (
        answering(lambda _, number, __, ___, sequence, ____: reply(number, sequence, NOT_PRIMARY)), "answered NOT_PRIMARY",
    ),
}  # fmt: skip


# What a conductor answers


def http(body, status="200 OK", headers=""):
    body = body.encode() if isinstance(body, str) else body
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


def saying(*raw):
    async def conduct(answer, writer):
        for part in raw:
            writer.write(part)

    return conduct


def changed(**changes):
    """The right answer with something wrong in it; None takes the field out."""

    async def conduct(answer, writer):
        answer = {key: value for key, value in {**answer, **changes}.items() if value is not None}
        writer.write(http(json.dumps(answer)))

    return conduct


def with_shards(*shards, **changes):
    return changed(
        shards=[{"index": index, "store_ips": address} for index, address in shards],
        **{"shard_count": len(shards), **changes},
    )


def endless(start, piece, pause=0.0):
    """As much as is taken."""

    async def conduct(answer, writer):
        writer.write(start)
        while True:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause)

    return conduct


async def hang(answer, writer):
    await asyncio.sleep(60)


async def hang_up(answer, writer):
    abort(writer)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
CONDUCTORS = {
    "empty": saying(http("")),
    "nojson": saying(http("what?")),
    "binary": saying(http(os.urandom(4096))),
    "noise": saying(os.urandom(4096)),
    "nohttp": saying(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "redirect": saying(http("", "302 Found", "Location: http://127.0.0.1:1/\r\n")),
    "broken": saying(http("{}", "500 Internal Server Error")),
    "missing": saying(http("{}", "404 Not Found")),
    "array": saying(http("[]")),
    "object": saying(http("{}")),
    "null": saying(http("null")),
    "nested": saying(http("[" * 100_000)),
    "nested2": saying(http('{"ret_code":' * 100_000)),
    "codetext": changed(ret_code="0"),
    "codebig": changed(ret_code=1 << 80),
    "codefloat": changed(ret_code=0.5),
    "nocode": changed(ret_code=None),
    "refusal": changed(ret_code=7, reason="first line\nsecond line\x1b[31m\x07 end"),
    "longrefuse": changed(ret_code=7, reason="x" * MiB),
    "reasonlist": changed(ret_code=7, reason=["a"]),
    "nosize": changed(volume_size=None),
    "sizetext": changed(volume_size="big"),
    "sizezero": changed(volume_size=0),
    "sizeodd": changed(volume_size=SIZE + 1),
    "sizeminus": changed(volume_size=-512),
    "sizehuge": changed(volume_size=1 << 62),
    "sizefloat": changed(volume_size=1e300),
    "idzero": changed(volume_id=0),
    "idodd": changed(volume_id=(1 << 24) + 1),
    "idminus": changed(volume_id=-(1 << 24)),
    "snap": changed(snap_seq=5),
    "snapzero": changed(snap_seq=0),
    "snaphuge": changed(snap_seq=1 << 40),
    "snapminus": changed(snap_seq=-2),
    "metahuge": changed(meta_ver=1 << 70),
    "order": changed(shard_lba_cnt_order=12),
    "ordertext": changed(shard_lba_cnt_order="36"),
    "noshards": with_shards(),
    "shardsnull": changed(shards=None),
    "shardsnum": changed(shards=7),
    "shardcount": with_shards((0, "127.0.0.1"), shard_count=2),
    "shardtwice": with_shards((0, "127.0.0.1"), (0, "127.0.0.1"), volume_size=65 << 30),
    "shardgap": with_shards((0, "127.0.0.1"), (2, "127.0.0.1"), volume_size=65 << 30),
    "shardhuge": with_shards((1 << 62, "127.0.0.1")),
    "shardminus": with_shards((-1, "127.0.0.1")),
    "shard100k": with_shards(*((index // 2, "127.0.0.1") for index in range(100_000))),
    "hostname": with_shards((0, "store.example.org")),
    "withport": with_shards((0, "127.0.0.1:49162")),
    "longip": with_shards((0, "1" * MiB)),
    "storenull": changed(shards=[{"index": 0, "store_ips": None}]),
    "storelist": changed(shards=[{"index": 0, "store_ips": ["127.0.0.1"]}]),
    "short": saying(b"HTTP/1.1 200 OK\r\nContent-Length: 4096\r\n\r\n{}"),
    "lengths": saying(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 9\r\n\r\n{}"),
    "lengthneg": saying(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n{}"),
    "lengthbig": saying(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n{}"),
    "longhead": saying(b"HTTP/1.1 200 OK\r\nX: " + b"x" * MiB),
    "reset": hang_up,
}  # fmt: skip
# Those that take all the time they are given.
SLOW_CONDUCTORS = {
    "hang": hang,
    "drip": endless(b"", b"H", 0.3),
    "dripbody": endless(b"HTTP/1.1 200 OK\r\nContent-Length: 4096\r\n\r\n", b" ", 0.3),
    "endless": endless(CHUNKED, b"10000\r\n" + b" " * 65536 + b"\r\n"),
    "heads": endless(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 1000),
    "continue": endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
}


class Spent:
    """Processor time of a daemon's volumes, by their names, from here on."""

    def __init__(self, daemon):
        self.pid = daemon.pid
        self.before = self._all()
        self.began = time.monotonic()

    def _all(self):
        times = {}
        for task in os.listdir(f"/proc/{self.pid}/task"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                with open(f"/proc/{self.pid}/task/{task}/stat") as file:
                    name, fields = file.read().split("(", 1)[1].rsplit(")", 1)
                spent = sum(map(int, fields.split()[11:13])) / os.sysconf("SC_CLK_TCK")
                times[name, task] = spent
        return times

    def seconds(self):
        """By the names of threads."""
        result = {}
        for (name, task), spent in self._all().items():
            result[name] = result.get(name, 0) + spent - self.before.get((name, task), 0)
        return result
