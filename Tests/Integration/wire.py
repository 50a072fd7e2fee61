"""The NBD protocol by hand, for what a well-behaved client library cannot be made to send.

Names and numbers are those of the NBD protocol document.
"""

import dataclasses
import fcntl
import os
import select
import socket
import struct
import sys
import termios

from harness import SLOWNESS

NBDMAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF

FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES = 1, 2

OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_PEEK_EXPORT, OPT_STARTTLS, OPT_INFO, OPT_GO, OPT_STRUCTURED_REPLY = range(1, 9)
OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT = 9, 10

REP_ACK, REP_SERVER, REP_INFO, REP_META_CONTEXT = 1, 2, 3, 4
REP_ERR = 1 << 31
REP_ERR_UNSUP, REP_ERR_POLICY, REP_ERR_INVALID = REP_ERR + 1, REP_ERR + 2, REP_ERR + 3
REP_ERR_UNKNOWN, REP_ERR_TOO_BIG = REP_ERR + 6, REP_ERR + 9

INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE = range(4)

# Transmission flags
HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA, ROTATIONAL, SEND_TRIM, SEND_WRITE_ZEROES, SEND_DF = (1 << n for n in range(8))
CAN_MULTI_CONN, SEND_RESIZE, SEND_CACHE, SEND_FAST_ZERO = (1 << n for n in range(8, 12))

CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_TRIM, CMD_CACHE, CMD_WRITE_ZEROES, CMD_BLOCK_STATUS = range(8)
CMD_FLAG_FUA, CMD_FLAG_NO_HOLE, CMD_FLAG_DF, CMD_FLAG_REQ_ONE, CMD_FLAG_FAST_ZERO = (1 << n for n in range(5))

CHUNK_DONE = 1
CHUNK_NONE, CHUNK_OFFSET_DATA, CHUNK_OFFSET_HOLE, CHUNK_BLOCK_STATUS = 0, 1, 2, 5
CHUNK_ERROR, CHUNK_ERROR_OFFSET = (1 << 15) + 1, (1 << 15) + 2

STATE_HOLE, STATE_ZERO = 1, 2

MAX_PAYLOAD = 32 << 20


class Closed(Exception):
    """The server ended the connection where more bytes were due."""


@dataclasses.dataclass
class OptionReply:
    option: int
    type: int
    data: bytes


@dataclasses.dataclass
class Export:
    size: int
    flags: int
    minimum: int = 1
    preferred: int = 4096
    maximum: int = MAX_PAYLOAD


@dataclasses.dataclass
class Answer:
    """What came back for one request, in either kind of reply."""

    cookie: int
    error: int = 0
    data: bytes = b""
    # (length, flags) of a block status
    extents: list = dataclasses.field(default_factory=list)
    # types of the chunks in their order; empty for a simple reply
    chunks: list = dataclasses.field(default_factory=list)


def name_field(name):
    name = name.encode() if isinstance(name, str) else name
    return struct.pack(">I", len(name)) + name


def info_data(name, requests=(INFO_BLOCK_SIZE,)):
    """The data of NBD_OPT_INFO and NBD_OPT_GO."""
    return name_field(name) + struct.pack(f">H{len(requests)}H", len(requests), *requests)


def meta_data(name, queries=("base:allocation",)):
    """The data of NBD_OPT_SET_META_CONTEXT and NBD_OPT_LIST_META_CONTEXT."""
    return name_field(name) + struct.pack(">I", len(queries)) + b"".join(map(name_field, queries))


class Session:
    """One connection. Every wait has a deadline, so a server that forgets an answer is a failure, not a hang."""

    def __init__(self, address, timeout=10):
        unix = isinstance(address, (str, os.PathLike))
        self.socket = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
        self.socket.settimeout(timeout * SLOWNESS)
        self.socket.connect(str(address) if unix else address)
        # Most bytes that are taken from the socket at a time.
        self.piece = 1 << 20
        self.structured = False
        self.context = None
        self.cookies = 0x1122334455000000
        # cookie: (answer, content pieces) of structured replies whose last chunk is still due
        self.partial = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.socket.close()

    # Bytes

    def send(self, *parts):
        self.socket.sendall(b"".join(parts))

    @property
    def unread(self):
        """Bytes on their way that the server has not taken in; on Unix sockets, with what the kernel adds to each piece."""
        return int.from_bytes(fcntl.ioctl(self.socket, termios.TIOCOUTQ, bytes(4)), sys.byteorder)

    def receive(self, length):
        parts = []
        while length:
            try:
                part = self.socket.recv(min(length, self.piece))
            except ConnectionResetError:
                part = b""
            if not part:
                raise Closed(f"the server closed the connection, {length} bytes were still due")
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def unpack(self, format):
        return struct.unpack(format, self.receive(struct.calcsize(format)))

    def assert_closed(self):
        """The server ends the connection without another byte."""
        try:
            rest = self.socket.recv(64)
        except ConnectionResetError:
            rest = b""
        except socket.timeout:
            raise AssertionError("the server should have closed the connection") from None
        assert rest == b"", f"the server should have closed the connection, but sent {rest.hex()}"

    def assert_silent(self):
        """Nothing has arrived so far."""
        readable, _, _ = select.select([self.socket], [], [], 0)
        if readable:
            unexpected = self.socket.recv(64)
            raise AssertionError(f"nothing was due, but the server sent {unexpected.hex() or 'an end of file'}")

    # Handshake

    def greet(self, flags=FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES):
        magic, option_magic, offered = self.unpack(">QQH")
        assert (magic, option_magic) == (NBDMAGIC, IHAVEOPT), f"bad greeting: {magic:x} {option_magic:x}"
        assert offered == FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES, f"handshake flags {offered:x}"
        self.send(struct.pack(">I", flags))
        return self

    def option(self, code, data=b"", length=None, magic=IHAVEOPT):
        self.send(struct.pack(">QII", magic, code, len(data) if length is None else length), data)

    def option_reply(self):
        magic, option, type, length = self.unpack(">QIII")
        assert magic == OPTION_REPLY_MAGIC, f"option reply with magic {magic:x}: out of step"
        assert length <= 128 << 10, f"option reply of {length} bytes"
        return OptionReply(option, type, self.receive(length))

    def option_replies(self, code):
        """All replies to an option up to the one that ends it, an ACK or an error, which is the last."""
        replies = []
        while True:
            reply = self.option_reply()
            assert reply.option == code, f"a reply to option {reply.option} where one to {code} was due"
            replies.append(reply)
            if reply.type == REP_ACK or reply.type & REP_ERR:
                return replies

    def ask(self, code, data=b"", length=None):
        """Sends an option and returns the type of the reply that ends it."""
        self.option(code, data, length)
        return self.option_replies(code)[-1].type

    def list(self):
        """The names of NBD_OPT_LIST."""
        self.option(OPT_LIST)
        replies = self.option_replies(OPT_LIST)
        assert replies[-1].type == REP_ACK, f"NBD_OPT_LIST answered {replies[-1]}"
        names = []
        for reply in replies[:-1]:
            assert reply.type == REP_SERVER, f"NBD_OPT_LIST answered {reply}"
            (length,) = struct.unpack_from(">I", reply.data)
            assert 4 + length <= len(reply.data), f"name longer than its reply: {reply}"
            names.append(reply.data[4 : 4 + length].decode())
        return names

    def ask_structured(self):
        assert self.ask(OPT_STRUCTURED_REPLY) == REP_ACK, "structured replies refused"
        self.structured = True
        return self

    def ask_meta(self, name, queries=("base:allocation",), option=OPT_SET_META_CONTEXT):
        """The (id, context) pairs the server selected or listed, or the type of its error."""
        self.option(option, meta_data(name, queries))
        replies = self.option_replies(option)
        if replies[-1].type != REP_ACK:
            return replies[-1].type
        contexts = []
        for reply in replies[:-1]:
            assert reply.type == REP_META_CONTEXT, f"meta context query answered {reply}"
            contexts.append((struct.unpack_from(">I", reply.data)[0], reply.data[4:].decode()))
        if option == OPT_SET_META_CONTEXT:
            self.context = contexts[0][0] if contexts else None
        return contexts

    def info(self, name, option=OPT_INFO, requests=(INFO_BLOCK_SIZE,)):
        """NBD_OPT_INFO or NBD_OPT_GO: the export, or the type of the error."""
        self.option(option, info_data(name, requests))
        replies = self.option_replies(option)
        if replies[-1].type != REP_ACK:
            return replies[-1].type
        export = None
        sizes = None
        for reply in replies[:-1]:
            assert reply.type == REP_INFO, f"option {option} answered {reply}"
            (kind,) = struct.unpack_from(">H", reply.data)
            if kind == INFO_EXPORT:
                export = Export(*struct.unpack(">QH", reply.data[2:]))
            elif kind == INFO_BLOCK_SIZE:
                sizes = struct.unpack(">III", reply.data[2:])
        assert export, "no NBD_INFO_EXPORT before the ACK"
        assert export.flags & HAS_FLAGS, f"NBD_FLAG_HAS_FLAGS is missing: {export.flags:x}"
        if sizes:
            export.minimum, export.preferred, export.maximum = sizes
        return export

    def go(self, name, structured=False, meta=False):
        """The whole handshake after the greeting."""
        if structured or meta:
            self.ask_structured()
        if meta:
            assert [context for _, context in self.ask_meta(name)] == ["base:allocation"]
        export = self.info(name, OPT_GO)
        assert isinstance(export, Export), f"NBD_OPT_GO for {name} answered error {export:x}"
        return export

    # Transmission

    def request(self, command, offset=0, length=0, flags=0, payload=b"", cookie=None, magic=REQUEST_MAGIC):
        """Sends a request and returns its cookie. The length is the payload's unless one is given."""
        if cookie is None:
            self.cookies += 1
            cookie = self.cookies
        length = length or len(payload)
        self.send(struct.pack(">IHHQQI", magic, flags, command, cookie, offset, length), payload)
        return cookie

    def chunk(self):
        flags, type, cookie, length = self.unpack(">HHQI")
        assert length <= MAX_PAYLOAD + 8, f"chunk of {length} bytes"
        return flags, type, cookie, self.receive(length)

    def answer(self, pending):
        """The next complete answer. `pending` maps the cookie of each request not yet answered to
        (command, offset, length). Chunks of several replies may come mixed."""
        while True:
            (magic,) = self.unpack(">I")
            if magic == SIMPLE_REPLY_MAGIC:
                error, cookie = self.unpack(">IQ")
                assert cookie in pending, f"reply with the unknown cookie {cookie:x}"
                assert cookie not in self.partial, f"a simple reply amid the chunks of {cookie:x}"
                command, _, length = pending.pop(cookie)
                assert not (self.structured and command == CMD_READ), "NBD_CMD_READ answered by a simple reply"
                data = self.receive(length) if command == CMD_READ and not error else b""
                return Answer(cookie, error, data)
            assert magic == STRUCTURED_REPLY_MAGIC, f"reply with magic {magic:x}: out of step"
            assert self.structured, "a structured reply that was never negotiated"
            flags, type, cookie, body = self.chunk()
            assert cookie in pending, f"chunk with the unknown cookie {cookie:x}"
            answer, pieces = self.partial.setdefault(cookie, (Answer(cookie), []))
            answer.chunks.append(type)
            self._take(answer, pieces, type, body)
            if not flags & CHUNK_DONE:
                continue
            del self.partial[cookie]
            command, offset, length = pending.pop(cookie)
            if command != CMD_READ:
                assert not pieces, f"content chunks in the reply to command {command}"
            elif not answer.error:
                answer.data = _assemble(pieces, offset, length)
            return answer

    def _take(self, answer, pieces, type, body):
        if type in (CHUNK_ERROR, CHUNK_ERROR_OFFSET):
            error, text = struct.unpack_from(">IH", body)
            assert error, "an error chunk without an error"
            assert text <= 4096, f"error text of {text} bytes"
            assert len(body) == 6 + text + (8 if type == CHUNK_ERROR_OFFSET else 0), "error chunk of a wrong length"
            body[6 : 6 + text].decode()
            answer.error = answer.error or error
        elif type == CHUNK_OFFSET_DATA:
            assert len(body) > 8, "a data chunk without data"
            pieces.append((struct.unpack_from(">Q", body)[0], body[8:]))
        elif type == CHUNK_OFFSET_HOLE:
            offset, length = struct.unpack(">QI", body)
            assert length, "an empty hole chunk"
            pieces.append((offset, bytes(length)))
        elif type == CHUNK_BLOCK_STATUS:
            (context,) = struct.unpack_from(">I", body)
            assert context == self.context, f"block status of context {context}, negotiated was {self.context}"
            assert len(body) > 4 and len(body) % 8 == 4, f"block status chunk of {len(body)} bytes"
            answer.extents += list(struct.iter_unpack(">II", body[4:]))
        else:
            assert type == CHUNK_NONE and not body, f"chunk of unknown type {type}"

    def call(self, command, offset=0, length=0, flags=0, payload=b""):
        """Sends one request and waits for its answer."""
        cookie = self.request(command, offset, length, flags, payload)
        return self.answer({cookie: (command, offset, length or len(payload))})

    def read(self, offset, length, flags=0):
        answer = self.call(CMD_READ, offset, length, flags)
        assert answer.error == 0, f"read {offset}+{length}: error {answer.error}"
        return answer.data

    def write(self, offset, payload, flags=0):
        answer = self.call(CMD_WRITE, offset, payload=payload, flags=flags)
        assert answer.error == 0, f"write {offset}+{len(payload)}: error {answer.error}"

    def disconnect(self):
        self.request(CMD_DISC)
        self.assert_closed()


def _assemble(pieces, offset, length):
    """The content of a read; its chunks must stay inside the request, not overlap, and cover it all."""
    data = b""
    for start, part in sorted(pieces):
        assert start >= offset + len(data), f"chunk at {start} overlaps the one before it"
        assert start == offset + len(data), f"bytes {offset + len(data)} to {start} are in no chunk"
        data += part
    assert len(data) == length, f"chunks hold {len(data)} bytes of a read of {length}"
    return data
