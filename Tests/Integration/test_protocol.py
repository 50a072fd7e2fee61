"""Requests no well-behaved client sends, and the exact answers the NBD protocol gives to them.

One daemon serves all tests of this file; two bystanders verify on it all the time, one of them on the volume that
is being abused. After each test the daemon must be alive and both bystanders must get on.
"""

import contextlib
import errno
import fcntl
import random
import socket
import struct
import termios
import time

import nbd
import pytest

from bystander import Bystander
from conftest import live
from harness import Daemon, KiB, MiB, SANITIZER, SLOWNESS, wait_for
from wire import *  # the names of the protocol

SIZE = 96 * MiB
# The bystander's half of the abused volume.
RESERVED = (64 * MiB, 32 * MiB)


class Server:
    """The daemon of this file, started again when a test has killed it, so that each failure stands alone."""

    def __init__(self):
        self.daemon = None
        self.bystanders = []

    def ensure(self):
        if self.daemon is None or not self.daemon.alive:
            self.close()
            self.daemon = Daemon()
            live.append(self.daemon)
            self.daemon.start()
            for pool in Daemon.POOLS:
                self.daemon.volume(f"{pool}/victim", SIZE)
                self.daemon.volume(f"{pool}/coarse", SIZE, block_size=4096)
                self.daemon.volume(f"{pool}/other", 16 * MiB)
                self.daemon.volume(f"{pool}/sealed", 16 * MiB, read_only=True)
                self.daemon.create(f"{pool}/hidden", 16 * MiB)
        if any(one.failure for one in self.bystanders) or not self.bystanders:
            self.bystanders = [
                Bystander(self.daemon.uri("disk/victim"), RESERVED, pause=0.005),
                Bystander(self.daemon.uri("ram/victim"), RESERVED, pause=0.005),
                Bystander(self.daemon.uri("disk/other"), (0, 16 * MiB), pause=0.005),
            ]
        return self

    def assert_unharmed(self):
        assert self.daemon.alive, f"qbdd died, status {self.daemon.process.returncode}"
        for one in self.bystanders:
            one.assert_unharmed()

    def close(self):
        bystanders, self.bystanders = self.bystanders, []
        daemon, self.daemon = self.daemon, None
        if daemon is None:
            return
        try:
            if daemon.alive:
                for one in bystanders:
                    one.stop()
            daemon.finish()
        finally:
            live.remove(daemon)

    def connect(self):
        """A connection on which nothing has been said yet."""
        return Session(self.daemon.nbd_socket)

    def greet(self, **options):
        """A connection in the option phase."""
        return self.connect().greet(**options)

    def session(self, volume="disk/victim", **options):
        """A connection in the transmission phase, with the export that was told in its `export`."""
        session = self.greet()
        session.export = session.go(volume, **options)
        return session


@pytest.fixture(scope="module")
def shared_server():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def server(shared_server):
    yield shared_server.ensure()
    shared_server.assert_unharmed()


@pytest.fixture(params=["simple", "structured"])
def structured(request):
    """Both kinds of reply."""
    return request.param == "structured"


@pytest.fixture
def session(server, pool, structured):
    """In the transmission phase, on each pool and with each kind of reply."""
    with server.session(f"{pool}/victim", structured=structured) as session:
        yield session
        assert_in_step(session)


def assert_in_step(session):
    """The session still answers requests as it should."""
    pattern = random.randbytes(4096)
    session.write(8192, pattern)
    assert session.read(8192, 4096) == pattern, "the session reads something else than it wrote"


def assert_negotiates(session, volume="disk/victim"):
    """The handshake is still in step and can be completed."""
    assert volume in session.list()
    export = session.go(volume)
    assert export.size == SIZE
    assert_in_step(session)


# The handshake


def test_greeting_is_fixed_newstyle(server):
    with server.greet() as session:
        assert_negotiates(session)


def test_unknown_client_flags_end_the_connection(server):
    with server.connect() as session:
        session.greet(flags=FLAG_FIXED_NEWSTYLE | 1 << 7)
        session.assert_closed()


def test_wrong_option_magic_ends_the_connection(server):
    with server.greet() as session:
        session.option(OPT_LIST, magic=0x0123456789ABCDEF)
        session.assert_closed()


def test_transmission_flags_promise_what_works(server, pool, structured):
    with server.session(f"{pool}/victim", structured=structured) as session:
        flags = session.export.flags
        for flag in (HAS_FLAGS, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES, SEND_CACHE, CAN_MULTI_CONN):
            assert flags & flag, f"flag {flag:#x} is missing in {flags:#x}"
        assert bool(flags & SEND_DF) == structured, "DF is for structured replies, and only for them"
        assert not flags & (READ_ONLY | ROTATIONAL | SEND_RESIZE), f"flags {flags:#x}"
        assert not flags >> 12, f"unknown flags in {flags:#x}"


def test_read_only_export_promises_no_writes(server, pool):
    with server.session(f"{pool}/sealed") as session:
        assert session.export.flags & READ_ONLY
        assert not session.export.flags & (SEND_TRIM | SEND_WRITE_ZEROES | SEND_FAST_ZERO)


@pytest.mark.parametrize("volume, minimum", [("victim", 512), ("coarse", 4096)])
@pytest.mark.parametrize("option", [OPT_INFO, OPT_GO])
def test_block_sizes_are_told(server, pool, volume, minimum, option):
    with server.greet() as session:
        export = session.info(f"{pool}/{volume}", option)
        assert export.minimum == minimum
        assert export.preferred >= 4096 and export.preferred & export.preferred - 1 == 0
        assert export.maximum == MAX_PAYLOAD, f"largest payload is {export.maximum}"
        assert export.size == SIZE


def test_info_leaves_the_session_in_the_option_phase(server):
    with server.greet() as session:
        for volume in ("disk/victim", "disk/nothing", "ram/other", "disk/sealed"):
            session.info(volume)
        assert_negotiates(session)


def test_info_requests_unknown_ones_are_ignored(server):
    with server.greet() as session:
        export = session.info("disk/victim", OPT_INFO, [INFO_NAME, 0x7777, INFO_BLOCK_SIZE, 0xFFFF, INFO_DESCRIPTION])
        assert export.size == SIZE
        export = session.info("disk/victim", OPT_INFO, [INFO_BLOCK_SIZE] * 1000)
        assert export.size == SIZE
        assert_negotiates(session)


def test_list_names_what_is_exported(server):
    exported = {f"{pool}/{name}" for pool in Daemon.POOLS for name in ("victim", "coarse", "other", "sealed")}
    with server.greet() as session:
        names = session.list()
        assert len(names) == len(set(names)) and set(names) == exported
        assert_negotiates(session)


@pytest.mark.parametrize(
    "name",
    [
        "disk/nothing", "disk/hidden", "nothing/victim", "disk", "disk/", "/victim", "", "disk/victim/", "disk/victim ",
        "disk//victim", "../pool/victim", "disk/../disk/victim", "disk/.", "DISK/VICTIM", "x" * 4096, "é" * 2048,
        "disk/" + "v" * 4091,
    ],
    ids=lambda name: repr(name[:20]),
)  # fmt: skip
@pytest.mark.parametrize("option", [OPT_INFO, OPT_GO])
def test_name_that_cannot_be_served_is_unknown(server, name, option):
    with server.greet() as session:
        assert session.info(name, option) == REP_ERR_UNKNOWN
        assert_negotiates(session)


@pytest.mark.parametrize("option", [OPT_INFO, OPT_GO])
@pytest.mark.parametrize("name", [b"disk/\xff\xfe\x80", b"\xc0\xaf", b"disk/victim\0", b"\0"])
def test_name_that_is_no_text(server, option, name):
    """Not UTF-8, or with a NUL, which the protocol's strings never hold."""
    with server.greet() as session:
        assert session.info(name, option) in (REP_ERR_INVALID, REP_ERR_UNKNOWN)
        assert_negotiates(session)


@pytest.mark.parametrize("option", [OPT_INFO, OPT_GO])
@pytest.mark.parametrize("length", [4097, 8192, 60000])
def test_name_longer_than_the_protocol_allows(server, option, length):
    with server.greet() as session:
        assert session.info("x" * length, option) in (REP_ERR_INVALID, REP_ERR_TOO_BIG, REP_ERR_UNKNOWN)
        assert_negotiates(session)


@pytest.mark.parametrize("no_zeroes", [False, True])
def test_export_name_pads_with_zeros_unless_agreed(server, pool, no_zeroes):
    with server.greet(flags=FLAG_FIXED_NEWSTYLE | (FLAG_NO_ZEROES if no_zeroes else 0)) as session:
        session.option(OPT_EXPORT_NAME, f"{pool}/victim".encode())
        size, flags = session.unpack(">QH")
        assert size == SIZE and flags & HAS_FLAGS
        if not no_zeroes:
            assert session.receive(124) == bytes(124)
        session.assert_silent()
        assert_in_step(session)


def test_export_name_after_other_options(server):
    with server.greet() as session:
        session.list()
        session.ask_structured()
        session.ask_meta("disk/victim")
        session.option(OPT_EXPORT_NAME, b"disk/victim")
        size, flags = session.unpack(">QH")
        assert size == SIZE and flags & SEND_DF
        assert_in_step(session)
        assert session.call(CMD_BLOCK_STATUS, 0, 4096).extents


@pytest.mark.parametrize(
    "name", [b"disk/nothing", b"", b"disk/hidden", b"\xff\xff", b"x" * 4096, b"x" * 4097, b"../x", b"x" * 100000]
)
def test_export_name_that_cannot_be_served_ends_the_session(server, name):
    with server.greet() as session:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            session.option(OPT_EXPORT_NAME, name)
        session.assert_closed()


def test_abort_is_acknowledged_and_ends_the_session(server):
    with server.greet() as session:
        assert session.ask(OPT_ABORT) == REP_ACK
        session.assert_closed()


@pytest.mark.parametrize("option", [OPT_PEEK_EXPORT, OPT_STARTTLS, 11, 12, 0, 255, 0x7FFFFFFF, 0xFFFFFFFF])
@pytest.mark.parametrize("length", [0, 1, 1000, 65536])
def test_unknown_option_is_unsupported_and_in_step(server, option, length):
    with server.greet() as session:
        allowed = (REP_ERR_UNSUP, REP_ERR_INVALID, REP_ERR_POLICY) if option == OPT_STARTTLS else (REP_ERR_UNSUP,)
        assert session.ask(option, b"x" * length) in allowed
        assert_negotiates(session)


def test_hundred_options_in_a_row(server):
    with server.greet() as session:
        for _ in range(100):
            session.option(OPT_INFO, info_data("disk/victim"))
            session.option(OPT_LIST)
            session.option(77, b"what")
        for _ in range(100):
            assert session.option_replies(OPT_INFO)[-1].type == REP_ACK
            assert session.option_replies(OPT_LIST)[-1].type == REP_ACK
            assert session.option_replies(77)[-1].type == REP_ERR_UNSUP
        session.assert_silent()
        assert_negotiates(session)


def test_options_in_one_piece_that_have_long_answers(new_daemon):
    """The client reads nothing until the server has to wait for it; then all is answered."""
    daemon = new_daemon().start()
    names = sorted(f"ram/{letter * 128}" for letter in "abcd")
    for name in names:
        daemon.volume(name, "1M")
    count = 1000
    with Session(daemon.nbd_socket) as session:
        session.receive(18)
        session.send(
            struct.pack(">I", FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES),
            struct.pack(">QII", IHAVEOPT, OPT_LIST, 0) * count,
        )
        seen = []

        def is_stuck():
            waiting = struct.unpack("i", fcntl.ioctl(session.socket, termios.FIONREAD, bytes(4)))[0]
            seen.append(waiting)
            return waiting > 64 << 10 and len(seen) > 50 and len(set(seen[-50:])) == 1

        wait_for(is_stuck, "the server has no room for more answers")
        for _ in range(count):
            replies = session.option_replies(OPT_LIST)
            assert sorted(reply.data[4:].decode() for reply in replies[:-1]) == names
        session.assert_silent()


def test_handshake_in_one_piece(server):
    """A client may send its whole handshake and its first requests before it reads anything."""
    with server.connect() as session:
        session.send(
            struct.pack(">I", FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES),
            *(struct.pack(">QII", IHAVEOPT, code, len(data)) + data for code, data in (
                (OPT_STRUCTURED_REPLY, b""),
                (OPT_SET_META_CONTEXT, meta_data("disk/victim")),
                (OPT_GO, info_data("disk/victim")),
            )),
            struct.pack(">IHHQQI", REQUEST_MAGIC, 0, CMD_WRITE, 1, 0, 512), b"\x77" * 512,
            struct.pack(">IHHQQI", REQUEST_MAGIC, 0, CMD_DISC, 2, 0, 0),
        )  # fmt: skip
        session.receive(18)
        for code in (OPT_STRUCTURED_REPLY, OPT_SET_META_CONTEXT, OPT_GO):
            assert session.option_replies(code)[-1].type == REP_ACK
        session.structured = True
        assert session.answer({1: (CMD_WRITE, 0, 512)}).error == 0
        session.assert_closed()
    with server.session() as session:
        assert session.read(0, 512) == b"\x77" * 512


def test_handshake_byte_by_byte(server):
    with server.connect() as session:
        stream = struct.pack(">I", 3) + struct.pack(">QII", IHAVEOPT, OPT_GO, len(info_data("disk/victim")))
        stream += info_data("disk/victim") + struct.pack(">IHHQQI", REQUEST_MAGIC, 0, CMD_READ, 9, 0, 512)
        for byte in stream:
            session.send(bytes([byte]))
        session.receive(18)
        assert session.option_replies(OPT_GO)[-1].type == REP_ACK
        assert len(session.answer({9: (CMD_READ, 0, 512)}).data) == 512


NAME = b"disk/victim"
GO_DATA = info_data(NAME)
META_DATA = meta_data(NAME)

BAD_OPTIONS = {
    "LIST with data": (OPT_LIST, b"x"),
    "LIST with a name": (OPT_LIST, name_field(NAME)),
    "LIST of 64 KiB": (OPT_LIST, bytes(65536)),
    "STRUCTURED_REPLY with data": (OPT_STRUCTURED_REPLY, b"\0"),
    **{
        f"{title} {fault}": (code, data)
        for title, code in (("INFO", OPT_INFO), ("GO", OPT_GO))
        for fault, data in {
            "empty": b"",
            "half a length": b"\0\0\0",
            "length only": name_field(NAME)[:4],
            "name cut short": name_field(NAME)[:-1],
            "no request count": name_field(NAME),
            "half a request count": GO_DATA[:-3],
            "request missing": GO_DATA[:-2],
            "half a request": GO_DATA[:-1],
            "one byte too long": GO_DATA + b"\0",
            "one request too many": GO_DATA + b"\0\3",
            "name longer than the option": struct.pack(">I", 5000) + NAME + b"\0\0",
            "name of 4 GiB": b"\xff\xff\xff\xff" + NAME + b"\0\0",
            "name length that wraps": b"\xff\xff\xff\xfa" + NAME + b"\0\0",
            "65535 requests promised": name_field(NAME) + b"\xff\xff" + b"\0\3",
        }.items()
    },
    **{
        f"{title} {fault}": (code, data)
        for title, code in (("SET_META_CONTEXT", OPT_SET_META_CONTEXT), ("LIST_META_CONTEXT", OPT_LIST_META_CONTEXT))
        for fault, data in {
            "empty": b"",
            "half a length": b"\0\0",
            "name cut short": name_field(NAME)[:-1],
            "no query count": name_field(NAME),
            "half a query count": name_field(NAME) + b"\0\0\0",
            "query missing": name_field(NAME) + struct.pack(">I", 1),
            "half a query": META_DATA[:-1],
            "query of 4 GiB": name_field(NAME) + struct.pack(">I", 1) + b"\xff\xff\xff\xffbase:",
            "4 Gi queries": name_field(NAME) + b"\xff\xff\xff\xff" + name_field("base:allocation"),
            "one query too few": name_field(NAME) + struct.pack(">I", 2) + name_field("base:allocation"),
            "one byte too long": META_DATA + b"\0",
            "name of 4 GiB": b"\xff\xff\xff\xff" + META_DATA[4:],
        }.items()
    },
}


@pytest.mark.parametrize("fault", BAD_OPTIONS)
def test_option_of_a_wrong_length_is_invalid(server, fault):
    code, data = BAD_OPTIONS[fault]
    with server.greet() as session:
        if code in (OPT_SET_META_CONTEXT, OPT_LIST_META_CONTEXT):
            session.ask_structured()
        assert session.ask(code, data) == REP_ERR_INVALID
        assert_negotiates(session)


def test_abort_with_data_is_answered(server):
    with server.greet() as session:
        assert session.ask(OPT_ABORT, b"bye") in (REP_ACK, REP_ERR_INVALID)


@pytest.mark.parametrize("length", [64 * KiB + 1, 100 * KiB, 5 * MiB])
@pytest.mark.parametrize(
    "option",
    [OPT_LIST, OPT_INFO, OPT_GO, OPT_STRUCTURED_REPLY, OPT_SET_META_CONTEXT, OPT_LIST_META_CONTEXT, 99],
)
def test_option_too_big_is_drained(server, option, length):
    with server.greet() as session:
        session.ask_structured()
        assert session.ask(option, b"z" * length) == REP_ERR_TOO_BIG
        assert_negotiates(session)


def test_option_of_4_gib_costs_no_memory(server):
    before = server.daemon.resident()
    sessions = []
    for option in (OPT_LIST, OPT_GO, OPT_SET_META_CONTEXT, 99, OPT_EXPORT_NAME) * 4:
        session = server.greet()
        sessions.append(session)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            session.option(option, b"z" * MiB, length=0xFFFFFFFF)
    server.assert_unharmed()
    grown = server.daemon.resident() - before
    for session in sessions:
        session.close()
    # AddressSanitizer keeps freed memory for a while.
    limit = (96 if SANITIZER else 8) * MiB
    assert grown < limit, f"20 huge options cost {grown // KiB} KiB"


# Metadata contexts


def test_set_meta_context_before_structured_replies_is_invalid(server):
    with server.greet() as session:
        assert session.ask_meta("disk/victim") == REP_ERR_INVALID
        assert_negotiates(session)


def test_structured_reply_may_be_asked_twice(server):
    with server.greet() as session:
        session.ask_structured()
        assert session.ask(OPT_STRUCTURED_REPLY) in (REP_ACK, REP_ERR_INVALID)
        assert_negotiates(session)


@pytest.mark.parametrize("option", [OPT_SET_META_CONTEXT, OPT_LIST_META_CONTEXT])
def test_meta_context_of_an_unknown_export(server, option):
    with server.greet() as session:
        session.ask_structured()
        for name in ("disk/nothing", "disk/hidden", "", "x" * 4096):
            assert session.ask_meta(name, option=option) == REP_ERR_UNKNOWN
        assert_negotiates(session)


@pytest.mark.parametrize(
    "queries, listed, selected",
    [
        ([], True, False),
        (["base:allocation"], True, True),
        (["base:"], True, False),
        (["unknown:thing"], False, False),
        (["unknown:"], False, False),
        (["base:unknown"], False, False),
        (["base"], False, False),
        ([""], False, False),
        (["base:allocation\0"], False, False),
        ([b"\xff\xfe:\x80"], False, False),
        (["unknown:a", "base:allocation", "other:b"], True, True),
        (["base:allocation"] * 3, True, True),
        (["x" * 4096, "base:allocation"], True, True),
        ([f"qemu:dirty-bitmap:{n}" for n in range(1000)] + ["base:allocation"], True, True),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, list) else str(value),
)
def test_meta_context_queries(server, queries, listed, selected):
    """Unknown namespaces are ignored; zero queries list all and select none; a namespace alone lists, never selects."""
    with server.greet() as session:
        session.ask_structured()
        contexts = session.ask_meta("disk/victim", queries, OPT_LIST_META_CONTEXT)
        assert [name for _, name in contexts] == ["base:allocation"] * listed
        contexts = session.ask_meta("disk/victim", queries, OPT_SET_META_CONTEXT)
        assert [name for _, name in contexts] == ["base:allocation"] * selected
        session.go("disk/victim")
        answer = session.call(CMD_BLOCK_STATUS, 0, 64 * KiB)
        assert answer.error == (0 if selected else errno.EINVAL)
        assert bool(answer.extents) == selected
        assert_in_step(session)


def test_listing_meta_contexts_selects_none(server):
    with server.greet() as session:
        session.ask_structured()
        assert session.ask_meta("disk/victim", option=OPT_LIST_META_CONTEXT)
        session.go("disk/victim")
        assert session.call(CMD_BLOCK_STATUS, 0, 4096).error == errno.EINVAL


def test_last_selection_of_meta_contexts_counts(server):
    with server.greet() as session:
        session.ask_structured()
        assert session.ask_meta("disk/victim") != []
        assert session.ask_meta("disk/victim", ["unknown:x"]) == []
        session.go("disk/victim")
        assert session.call(CMD_BLOCK_STATUS, 0, 4096).error == errno.EINVAL


def test_meta_contexts_belong_to_the_export_they_were_selected_for(server):
    with server.greet() as session:
        session.ask_structured()
        assert session.ask_meta("disk/other") != []
        session.go("disk/victim")
        assert session.call(CMD_BLOCK_STATUS, 0, 4096).error == errno.EINVAL
        assert_in_step(session)


def test_block_status_without_structured_replies(server, pool):
    with server.session(f"{pool}/victim") as session:
        assert session.call(CMD_BLOCK_STATUS, 0, 4096).error == errno.EINVAL
        assert_in_step(session)


# Transmission: requests that are refused


def test_wrong_request_magic_ends_the_connection(server, pool, structured):
    for magic in (0, 0x25609514, 0x13956025, IHAVEOPT >> 32):
        with server.session(f"{pool}/victim", structured=structured) as session:
            session.request(CMD_READ, 0, 512, magic=magic)
            session.assert_closed()


@pytest.mark.parametrize("command", [8, 9, 100, 0x7FFF, 0xFFFF])
def test_unknown_command(session, command):
    # Only a write carries a payload: the length of an unknown command is not followed by anything.
    assert session.call(command, 0, 4096).error == errno.EINVAL
    assert session.call(command, 1 << 60, 0xFFFFFFFF).error == errno.EINVAL


COMMANDS = {
    "read": CMD_READ,
    "write": CMD_WRITE,
    "trim": CMD_TRIM,
    "cache": CMD_CACHE,
    "zero": CMD_WRITE_ZEROES,
    "status": CMD_BLOCK_STATUS,
}
# The flags each command knows.
KNOWN_FLAGS = {
    CMD_READ: CMD_FLAG_FUA | CMD_FLAG_DF,
    CMD_WRITE: CMD_FLAG_FUA,
    CMD_FLUSH: CMD_FLAG_FUA,
    CMD_TRIM: CMD_FLAG_FUA,
    CMD_CACHE: CMD_FLAG_FUA,
    CMD_WRITE_ZEROES: CMD_FLAG_FUA | CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO,
    CMD_BLOCK_STATUS: CMD_FLAG_FUA | CMD_FLAG_REQ_ONE,
}


def perform(session, command, offset=0, length=4096, flags=0):
    """The error a request is answered with; a write carries a payload of its length."""
    payload = b"\xee" * length if command == CMD_WRITE else b""
    return session.call(command, offset, length, flags, payload).error


@pytest.mark.parametrize("title", [*COMMANDS, "flush"])
def test_unknown_flag(server, pool, title):
    command = COMMANDS.get(title, CMD_FLUSH)
    with server.session(f"{pool}/victim", meta=True) as session:
        before = session.read(0, 4096)
        for bit in range(16):
            flag = 1 << bit
            if not flag & KNOWN_FLAGS[command]:
                length = 0 if command == CMD_FLUSH else 4096
                assert perform(session, command, 0, length, flag) == errno.EINVAL, f"flag {flag:#x} was accepted"
        assert session.read(0, 4096) == before, "a refused request changed the data"
        assert_in_step(session)


@pytest.mark.parametrize("volume", ["victim", "coarse"])
@pytest.mark.parametrize("title", COMMANDS)
def test_out_of_range(server, pool, structured, volume, title):
    command = COMMANDS[title]
    expected = errno.ENOSPC if command in (CMD_WRITE, CMD_WRITE_ZEROES) else errno.EINVAL
    if command == CMD_BLOCK_STATUS and not structured:
        pytest.skip("block status needs structured replies")
    with server.session(f"{pool}/{volume}", structured=structured, meta=structured) as session:
        unit = session.export.minimum
        last = session.read(SIZE - unit, unit)
        for offset, length in (
            (SIZE, unit), (SIZE - unit, 2 * unit), (SIZE + unit, unit), (1 << 32 | SIZE, 4096), (1 << 62, 4096),
            ((1 << 63) - 4096, 8192), ((1 << 64) - 4096, 4096), ((1 << 64) - 4096, 8192), (SIZE - 4096, MiB),
        ):  # fmt: skip
            assert perform(session, command, offset, length) == expected, f"{title} {offset}+{length}"
        assert session.read(SIZE - unit, unit) == last, "a refused request changed the data"
        assert_in_step(session)


@pytest.mark.parametrize("volume", ["victim", "coarse"])
@pytest.mark.parametrize("title", COMMANDS)
def test_unaligned_to_the_minimum(server, pool, structured, volume, title):
    command = COMMANDS[title]
    if command == CMD_BLOCK_STATUS and not structured:
        pytest.skip("block status needs structured replies")
    with server.session(f"{pool}/{volume}", structured=structured, meta=structured) as session:
        unit = session.export.minimum
        for offset, length in ((1, unit), (unit - 1, unit), (0, 1), (unit // 2, unit), (0, unit + 1), (3, 5)):
            assert perform(session, command, offset, length) == errno.EINVAL, f"{title} {offset}+{length}"
        assert perform(session, command, unit, unit) == 0
        assert_in_step(session)


@pytest.mark.parametrize("title", COMMANDS)
def test_zero_length_does_not_disconnect(server, pool, structured, title):
    command = COMMANDS[title]
    with server.session(f"{pool}/victim", structured=structured, meta=structured) as session:
        for offset in (0, 512, SIZE, 1 << 63):
            assert perform(session, command, offset, 0) in (0, errno.EINVAL, errno.ENOSPC)
        assert_in_step(session)


@pytest.mark.parametrize("title", ["write", "trim", "zero"])
def test_read_only_export_refuses_changes(server, pool, structured, title):
    with server.session(f"{pool}/sealed", structured=structured) as session:
        for length in (512, 4096, MiB):
            assert perform(session, COMMANDS[title], 0, length) == errno.EPERM
            assert perform(session, COMMANDS[title], 0, length, CMD_FLAG_FUA) == errno.EPERM
        assert session.call(CMD_FLUSH).error == 0
        assert session.call(CMD_CACHE, 0, 4096).error == 0
        assert session.read(0, MiB) == bytes(MiB)


def test_refused_writes_payload_is_consumed_in_a_pipeline(session):
    """Good and bad requests sent in one go are all answered, each with its own error."""
    expected = {}
    pending = {}

    def add(error, command, offset, length, flags=0):
        payload = b"\x25\x60\x95\x13" * (length // 4) if command == CMD_WRITE else b""
        cookie = session.request(command, offset, length, flags, payload)
        pending[cookie] = (command, offset, length)
        expected[cookie] = error

    for _ in range(20):
        add(0, CMD_WRITE, 0, 4096)
        add(errno.ENOSPC, CMD_WRITE, SIZE, 8192)
        add(errno.EINVAL, CMD_WRITE, 4, 512)
        add(errno.EINVAL, CMD_WRITE, 0, 4096, 1 << 15)
        add(errno.EINVAL, 99, 0, 4096)
        add(errno.EINVAL, CMD_READ, SIZE, 512)
        add(0, CMD_FLUSH, 0, 0)
        add(0, CMD_READ, 4096, 4096)
    while pending:
        answer = session.answer(pending)
        assert answer.error == expected[answer.cookie], f"{answer}"


def test_cookie_is_opaque(session):
    for cookie in (0, 1, 0xFFFFFFFFFFFFFFFF, 0x2560951325609513, 0x6744669867446698):
        pending = {session.request(CMD_READ, 0, 512, cookie=cookie): (CMD_READ, 0, 512)}
        assert session.answer(pending).cookie == cookie


def test_cookies_in_flight_may_be_equal(session):
    """Whether they may is the client's concern: the server echoes, and never looks."""
    for _ in range(10):
        session.request(CMD_READ, 0, 512, cookie=7)
    for _ in range(10):
        assert len(session.answer({7: (CMD_READ, 0, 512)}).data) == 512


# Transmission: sizes


def test_payload_of_32_mib_is_legitimate(session):
    payload = random.Random(5).randbytes(MAX_PAYLOAD)
    session.write(0, payload)
    assert session.read(0, MAX_PAYLOAD) == payload


@pytest.mark.parametrize("excess", [512, MiB, 16 * MiB])
def test_write_over_32_mib_is_drained_and_refused_or_disconnected(server, pool, structured, excess):
    with server.session(f"{pool}/victim", structured=structured) as session:
        try:
            answer = session.call(CMD_WRITE, 0, payload=bytes(MAX_PAYLOAD + excess))
            assert answer.error == errno.EINVAL
            assert_in_step(session)
        except (Closed, BrokenPipeError, ConnectionResetError):
            pass


@pytest.mark.parametrize("length", [MAX_PAYLOAD + 512, 48 * MiB])
def test_read_over_32_mib_is_refused_or_disconnected(server, pool, structured, length):
    with server.session(f"{pool}/victim", structured=structured) as session:
        try:
            assert session.call(CMD_READ, 0, length).error == errno.EINVAL
            assert_in_step(session)
        except Closed:
            pass


@pytest.mark.parametrize("title", ["trim", "zero", "cache"])
def test_commands_without_payload_may_cover_more_than_32_mib(server, pool, title):
    with server.session(f"{pool}/coarse") as session:
        session.write(0, b"\x11" * MiB)
        session.write(SIZE - MiB, b"\x11" * MiB)
        assert perform(session, COMMANDS[title], 0, SIZE) == 0
        if title != "cache":
            assert session.read(0, MiB) == bytes(MiB)
            assert session.read(SIZE - MiB, MiB) == bytes(MiB)
        assert_in_step(session)


def test_header_of_a_huge_write_costs_no_memory(server):
    before = server.daemon.resident()
    with contextlib.ExitStack() as stack:
        for length in (0xFFFFFFFF, 0xFFFFFE00, 0x80000000, MAX_PAYLOAD + 512) * 5:
            session = stack.enter_context(server.session("disk/victim"))
            session.request(CMD_WRITE, 0, length)
        server.assert_unharmed()
        grown = server.daemon.resident() - before
    assert grown < 16 * MiB, f"20 headers cost {grown // KiB} KiB"


# Transmission: what the flags ask for


@pytest.mark.parametrize("title", [*COMMANDS, "flush"])
def test_fua_is_accepted_on_every_command(server, pool, structured, title):
    if title == "status" and not structured:
        pytest.skip("block status needs structured replies")
    with server.session(f"{pool}/victim", structured=structured, meta=structured) as session:
        if title == "flush":
            assert session.call(CMD_FLUSH, flags=CMD_FLAG_FUA).error == 0
        else:
            for length in (512, 4096, MiB):
                assert perform(session, COMMANDS[title], MiB, length, CMD_FLAG_FUA) == 0
        assert_in_step(session)


def test_durable_zeroes_and_trims_alone(server, pool):
    """Each is two operations on a file, one after the other; nothing else comes that would wake the loop for the second."""
    with server.session(f"{pool}/coarse") as session:
        slow = 0
        for turn in range(60):
            offset = turn % 16 * MiB
            session.write(offset, b"\x29" * 64 * KiB)
            command = (CMD_WRITE_ZEROES, CMD_TRIM)[turn % 2]
            flags = CMD_FLAG_NO_HOLE if turn % 4 == 2 else 0
            started = time.monotonic()
            assert perform(session, command, offset, MiB, CMD_FLAG_FUA | flags) == 0
            slow += time.monotonic() - started > 0.8 * SLOWNESS
            assert session.read(offset, 64 * KiB) == bytes(64 * KiB)
        # A busy disk may need that long now and then.
        assert slow <= 2, f"{slow} of 60 took longer than 0.8 s: each waited for something else to happen"


def test_fua_on_disconnect(server):
    with server.session() as session:
        session.request(CMD_DISC, flags=CMD_FLAG_FUA)
        session.assert_closed()


def allocated(session, offset, length):
    """The block status flags of a range that must be all alike."""
    found = set()
    end = offset + length
    while offset < end:
        answer = session.call(CMD_BLOCK_STATUS, offset, end - offset)
        assert answer.error == 0 and answer.extents
        for extent, flags in answer.extents:
            found.add(flags)
            offset += extent
    assert len(found) == 1, f"mixed block status: {found}"
    return found.pop()


def test_zeroing_and_trimming_make_holes(server, pool):
    with server.session(f"{pool}/victim", meta=True) as session:
        for command in (CMD_TRIM, CMD_WRITE_ZEROES):
            session.write(MiB, b"\x55" * MiB)
            assert allocated(session, MiB, MiB) == 0
            assert perform(session, command, MiB, MiB) == 0
            assert session.read(MiB, MiB) == bytes(MiB)
            assert allocated(session, MiB, MiB) == STATE_HOLE | STATE_ZERO


def test_no_hole_keeps_the_space(server, pool):
    """Where there was data, and where nothing had been written yet."""
    with server.session(f"{pool}/coarse", meta=True) as session:
        assert perform(session, CMD_TRIM, 0, SIZE) == 0
        session.write(MiB, b"\x55" * MiB)
        assert session.call(CMD_FLUSH).error == 0
        used = server.daemon.used()
        for offset in (MiB, 4 * MiB):
            assert perform(session, CMD_WRITE_ZEROES, offset, MiB, CMD_FLAG_NO_HOLE) == 0
            assert session.read(offset, MiB) == bytes(MiB)
        if pool == "disk":
            # A file system tells reserved space that holds nothing as a hole, so its usage is what counts.
            assert server.daemon.used() - used > MiB // 2
        else:
            assert not allocated(session, MiB, MiB) & STATE_HOLE
            assert not allocated(session, 4 * MiB, MiB) & STATE_HOLE
        assert perform(session, CMD_TRIM, 0, SIZE) == 0


def test_fast_zero_is_done_or_refused_without_a_change(server, pool):
    with server.session(f"{pool}/victim") as session:
        if not session.export.flags & SEND_FAST_ZERO:
            assert perform(session, CMD_WRITE_ZEROES, 0, 4096, CMD_FLAG_FAST_ZERO) == errno.EINVAL
            return
        for flags in (0, CMD_FLAG_NO_HOLE, CMD_FLAG_FUA):
            session.write(MiB, b"\x55" * MiB)
            error = perform(session, CMD_WRITE_ZEROES, MiB, MiB, CMD_FLAG_FAST_ZERO | flags)
            assert error in (0, errno.ENOTSUP)
            assert session.read(MiB, MiB) == (b"\x55" * MiB if error else bytes(MiB))


def test_zeroing_part_of_a_block_spares_its_neighbours(session):
    """Below the file system's block size a hole cannot be punched, zeros must be written."""
    for command in (CMD_WRITE_ZEROES, CMD_TRIM):
        for offset, length in ((512, 512), (3584, 1024), (1024, 8192), (512, 64 * KiB)):
            session.write(0, b"\x66" * 128 * KiB)
            assert perform(session, command, offset, length) == 0
            data = session.read(0, 128 * KiB)
            assert data[:offset] == b"\x66" * offset
            assert data[offset + length :] == b"\x66" * (128 * KiB - offset - length)
            if command == CMD_WRITE_ZEROES:
                assert data[offset : offset + length] == bytes(length)


# Structured replies


def patchwork(session):
    """Data, hole, zeros and data in the first MiB, and what it reads as."""
    content = bytearray(MiB)
    assert perform(session, CMD_TRIM, 0, MiB) == 0
    for index in (0, 3, 4, 9, 15):
        content[index * 64 * KiB : (index + 1) * 64 * KiB] = bytes([index + 1]) * 64 * KiB
        session.write(index * 64 * KiB, bytes([index + 1]) * 64 * KiB)
    assert perform(session, CMD_WRITE_ZEROES, 4 * 64 * KiB, 64 * KiB, CMD_FLAG_NO_HOLE) == 0
    content[4 * 64 * KiB : 5 * 64 * KiB] = bytes(64 * KiB)
    return bytes(content)


def test_structured_reads_cover_the_request(server, pool):
    with server.session(f"{pool}/victim", structured=True) as session:
        content = patchwork(session)
        chance = random.Random(2)
        assert session.read(0, MiB) == content
        for _ in range(100):
            start, end = sorted(512 * chance.randrange(2049) for _ in range(2))
            if end > start:
                assert session.read(start, end - start) == content[start:end]


@pytest.mark.parametrize("length", [512, 64 * KiB])
def test_df_is_answered_by_one_content_chunk(server, pool, length):
    with server.session(f"{pool}/victim", structured=True) as session:
        content = patchwork(session)
        for offset in range(0, MiB - length, 32 * KiB):
            answer = session.call(CMD_READ, offset, length, CMD_FLAG_DF)
            assert answer.error == 0 and answer.data == content[offset : offset + length]
            contents = [kind for kind in answer.chunks if kind in (CHUNK_OFFSET_DATA, CHUNK_OFFSET_HOLE)]
            assert len(contents) == 1, f"DF of {length} bytes was answered by chunks {answer.chunks}"


def test_df_beyond_64_kib_is_one_chunk_or_refused(server, pool):
    with server.session(f"{pool}/victim", structured=True) as session:
        content = patchwork(session)
        answer = session.call(CMD_READ, 0, MiB, CMD_FLAG_DF)
        if answer.error:
            assert answer.error == errno.EOVERFLOW
        else:
            assert answer.data == content
            assert sum(kind in (CHUNK_OFFSET_DATA, CHUNK_OFFSET_HOLE) for kind in answer.chunks) == 1
        assert_in_step(session)


def test_df_without_structured_replies_is_refused(server, pool):
    with server.session(f"{pool}/victim") as session:
        assert perform(session, CMD_READ, 0, 4096, CMD_FLAG_DF) == errno.EINVAL
        assert_in_step(session)


def test_simple_replies_carry_errors_and_the_session_goes_on(server, pool):
    """A client without structured replies: no payload follows an error."""
    with server.session(f"{pool}/victim") as session:
        for _ in range(50):
            assert perform(session, CMD_READ, SIZE, 4096) == errno.EINVAL
            assert perform(session, CMD_READ, SIZE - 512, MiB) == errno.EINVAL
            assert len(session.read(0, 4096)) == 4096


def test_block_status_tells_holes_and_data(server, pool):
    with server.session(f"{pool}/victim", meta=True) as session:
        patchwork(session)
        offset = 0
        states = []
        while offset < MiB:
            answer = session.call(CMD_BLOCK_STATUS, offset, MiB - offset)
            assert answer.error == 0 and len(answer.extents) >= 1 and answer.chunks == [CHUNK_BLOCK_STATUS]
            for length, flags in answer.extents:
                assert length and length % 512 == 0 and flags <= 3
                states += [flags] * (min(length, MiB - offset) // (64 * KiB))
                offset += length
        written = {0, 3, 9, 15}
        for index, flags in enumerate(states):
            # Reserved space that holds nothing may be told as either.
            if index != 4:
                expected = 0 if index in written else STATE_HOLE | STATE_ZERO
                assert flags == expected, f"block status {flags} at {index * 64} KiB: {states}"


def test_block_status_with_req_one(server, pool):
    with server.session(f"{pool}/victim", meta=True) as session:
        patchwork(session)
        for offset in range(0, MiB, 32 * KiB):
            for length in (512, 64 * KiB, MiB):
                answer = session.call(CMD_BLOCK_STATUS, offset, length, CMD_FLAG_REQ_ONE)
                assert answer.error == 0 and len(answer.extents) == 1
                assert 0 < answer.extents[0][0] <= length


def test_block_status_of_a_shattered_volume_is_bounded(server, pool):
    """Ten thousand extents: the reply is long, or stops early, but it makes progress and fits."""
    with server.session(f"{pool}/coarse", meta=True) as session:
        assert perform(session, CMD_TRIM, 0, SIZE) == 0
        pending = {}
        for index in range(10000):
            offset = index * 8192
            pending[session.request(CMD_WRITE, offset, payload=b"\x99" * 4096)] = (CMD_WRITE, offset, 4096)
            if len(pending) >= 64:
                assert session.answer(pending).error == 0
        while pending:
            assert session.answer(pending).error == 0
        offset = 0
        holes = 0
        while offset < SIZE:
            answer = session.call(CMD_BLOCK_STATUS, offset, SIZE - offset)
            assert answer.error == 0 and answer.extents
            for length, flags in answer.extents:
                holes += flags & STATE_HOLE
                offset += length
        assert offset == SIZE
        if pool == "disk":
            assert holes == 10000
        assert perform(session, CMD_TRIM, 0, SIZE) == 0


# The end of a session


def test_disconnect_finishes_what_is_outstanding(server, pool, structured):
    with server.session(f"{pool}/victim", structured=structured) as session:
        pending = {}
        contents = {}
        for index in range(64):
            contents[index] = random.randbytes(64 * KiB)
            offset = index * 64 * KiB
            cookie = session.request(CMD_WRITE, offset, payload=contents[index])
            pending[cookie] = (CMD_WRITE, offset, 64 * KiB)
        cookie = session.request(CMD_FLUSH)
        pending[cookie] = (CMD_FLUSH, 0, 0)
        for index in range(16):
            cookie = session.request(CMD_READ, 8 * MiB + index * 64 * KiB, 64 * KiB)
            pending[cookie] = (CMD_READ, 8 * MiB + index * 64 * KiB, 64 * KiB)
        session.request(CMD_DISC)
        while pending:
            assert session.answer(pending).error == 0
        session.assert_closed()
    with server.session(f"{pool}/victim") as session:
        for index, content in contents.items():
            assert session.read(index * 64 * KiB, 64 * KiB) == content


def test_requests_after_disconnect_are_not_served(server):
    with server.session() as session:
        before = session.read(0, 4096)
        session.send(
            struct.pack(">IHHQQI", REQUEST_MAGIC, 0, CMD_DISC, 1, 0, 0),
            struct.pack(">IHHQQI", REQUEST_MAGIC, 0, CMD_WRITE, 2, 0, 4096),
            bytes(byte ^ 0xFF for byte in before),
        )
        session.assert_closed()
    with server.session() as session:
        assert session.read(0, 4096) == before


def test_vanishing_with_requests_outstanding(server, pool):
    """No DISC and no reading of replies: close at once, with the replies on their way."""
    for _ in range(20):
        with server.session(f"{pool}/victim", structured=True) as session:
            for index in range(64):
                session.request(CMD_READ, index * 64 * KiB, 64 * KiB)
                session.request(CMD_WRITE, MiB, payload=bytes(4096))
    with server.session(f"{pool}/victim") as session:
        assert_in_step(session)


def test_end_of_file_amid_requests_ends_the_session(server, pool):
    """shutdown(SHUT_WR) without DISC: whatever is still answered is in step, then the connection ends."""
    with server.session(f"{pool}/victim") as session:
        pending = {session.request(CMD_READ, n * MiB, MiB): (CMD_READ, n * MiB, MiB) for n in range(8)}
        session.socket.shutdown(socket.SHUT_WR)
        with contextlib.suppress(Closed):
            while pending:
                assert session.answer(pending).error in (0, errno.ESHUTDOWN)
        session.assert_closed()


OPENING = b"".join(
    [
        struct.pack(">I", FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES),
        struct.pack(">QII", IHAVEOPT, OPT_STRUCTURED_REPLY, 0),
        struct.pack(">QII", IHAVEOPT, OPT_SET_META_CONTEXT, len(META_DATA)) + META_DATA,
        struct.pack(">QII", IHAVEOPT, OPT_GO, len(GO_DATA)) + GO_DATA,
    ]
)
HANDSHAKE = len(OPENING)
CONVERSATION = b"".join(
    [
        OPENING,
        struct.pack(">IHHQQI", REQUEST_MAGIC, 0, CMD_READ, 1, 0, 4096),
        struct.pack(">IHHQQI", REQUEST_MAGIC, CMD_FLAG_FUA, CMD_WRITE, 2, 0, 64) + b"half a payload",
    ]
)


def test_every_beginning_of_a_conversation_then_close(server):
    descriptors = server.daemon.descriptors()
    for length in range(len(CONVERSATION) + 1):
        with server.connect() as session:
            session.send(CONVERSATION[:length])
    wait_for(lambda: server.daemon.descriptors() <= descriptors, "the connections' descriptors are closed")


def test_every_beginning_of_a_conversation_then_silence(server):
    with contextlib.ExitStack() as stack:
        # Every fourth of those that are in the transmission phase: a volume takes 64 clients.
        for length in [*range(HANDSHAKE), *range(HANDSHAKE, len(CONVERSATION) + 1, 4)]:
            session = stack.enter_context(server.connect())
            session.send(CONVERSATION[:length])
        server.assert_unharmed()
        with server.greet() as session:
            assert_negotiates(session)


def test_half_a_write_then_silence(server, pool):
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            session = stack.enter_context(server.session(f"{pool}/victim"))
            session.request(CMD_WRITE, 0, MiB, payload=bytes(MiB // 2))
        server.assert_unharmed()
        with server.session(f"{pool}/victim") as session:
            assert_in_step(session)


def test_random_bytes_in_every_phase(server):
    chance = random.Random(20)
    for turn in range(150):
        session = (server.connect, server.greet, server.session)[turn % 3]()
        with session, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            session.send(chance.randbytes(chance.randrange(1, 5000)))


def test_random_requests(server, pool):
    """Well-formed headers with random fields: each is answered, and the stream stays in step."""
    chance = random.Random(21)
    with server.session(f"{pool}/victim", meta=True) as session:
        for _ in range(500):
            command = chance.choice([0, 0, 1, 1, 3, 4, 5, 6, 7, 8, 255])
            offset = chance.choice([0, 512, 1000, 63 * MiB, SIZE, 1 << 40, (1 << 64) - 512])
            length = chance.choice([0, 1, 511, 512, 4096, 65536, MiB])
            if command in (1, 4, 6) and offset == 63 * MiB:
                length = min(length, MiB)
            flags = chance.choice([0, 0, 1, 2, 4, 8, 16, 31, 1 << chance.randrange(16)])
            payload = chance.randbytes(length) if command == CMD_WRITE else b""
            session.call(command, offset, length, flags, payload)
        assert_in_step(session)


# The same through libnbd with its own checks off


@pytest.fixture
def handle(server, pool, structured):
    handle = nbd.NBD()
    handle.set_strict_mode(0)
    handle.set_request_structured_replies(structured)
    if structured:
        handle.add_meta_context("base:allocation")
    handle.connect_uri(server.daemon.uri(f"{pool}/victim"))
    yield handle
    handle.pwrite(b"\x42" * 512, 0)
    assert handle.pread(512, 0) == b"\x42" * 512, "the session is out of step"
    handle.shutdown()


def refused(call, *arguments, **options):
    """The errno of a libnbd call that must fail."""
    with pytest.raises(nbd.Error) as failure:
        call(*arguments, **options)
    return failure.value.errnum


def test_libnbd_out_of_range(handle):
    assert refused(handle.pread, 512, SIZE) == errno.EINVAL
    assert refused(handle.trim, 512, SIZE) == errno.EINVAL
    assert refused(handle.pwrite, bytes(512), SIZE) == errno.ENOSPC
    assert refused(handle.zero, 512, SIZE) == errno.ENOSPC
    assert refused(handle.cache, 512, SIZE) == errno.EINVAL


def test_libnbd_unaligned(handle):
    assert refused(handle.pread, 1, 0) == errno.EINVAL
    assert refused(handle.pwrite, b"x", 1) == errno.EINVAL
    assert refused(handle.trim, 100, 0) == errno.EINVAL
    assert refused(handle.zero, 512, 5) == errno.EINVAL


def test_libnbd_unknown_flags(handle):
    for flags in (1 << 5, 1 << 15):
        assert refused(handle.pread, 512, 0, flags=flags) == errno.EINVAL
        assert refused(handle.pwrite, bytes(512), 0, flags=flags) == errno.EINVAL
        assert refused(handle.flush, flags=flags) == errno.EINVAL
        assert refused(handle.trim, 512, 0, flags=flags) == errno.EINVAL
        assert refused(handle.zero, 512, 0, flags=flags) == errno.EINVAL


def test_libnbd_zero_length(handle):
    for call in (
        lambda: handle.pread(0, 0), lambda: handle.pwrite(b"", 0), lambda: handle.trim(0, 0), lambda: handle.zero(0, 0)
    ):  # fmt: skip
        with contextlib.suppress(nbd.Error):
            call()


def test_libnbd_block_status_without_context(server, pool):
    handle = nbd.NBD()
    handle.set_strict_mode(0)
    handle.connect_uri(server.daemon.uri(f"{pool}/victim"))
    assert refused(handle.block_status, 4096, 0, lambda *_: None) == errno.EINVAL
    assert len(handle.pread(512, 0)) == 512
    handle.shutdown()


def test_libnbd_read_only(server, pool):
    handle = nbd.NBD()
    handle.set_strict_mode(0)
    handle.connect_uri(server.daemon.uri(f"{pool}/sealed"))
    assert handle.is_read_only()
    assert refused(handle.pwrite, bytes(512), 0) == errno.EPERM
    assert refused(handle.trim, 512, 0) == errno.EPERM
    assert refused(handle.zero, 512, 0) == errno.EPERM
    assert handle.pread(512, 0) == bytes(512)
    handle.shutdown()


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_large_replies_in_pieces_of_any_size(new_daemon, tcp):
    """The client takes what it has asked for in pieces of its own, and sends on meanwhile."""
    daemon = new_daemon(tcp=True).start()
    size = 16 * MiB
    daemon.volume("disk/foo", size)
    chance = random.Random(1)
    data = chance.randbytes(size)
    with Session(("127.0.0.1", daemon.port) if tcp else daemon.nbd_socket) as session:
        session.greet().go("disk/foo", structured=True)
        for offset in range(0, size, 4 * MiB):
            assert session.call(CMD_WRITE, offset, payload=data[offset : offset + 4 * MiB]).error == 0
        session.piece = 7001
        pending, order = {}, {}
        for _ in range(200):
            while len(pending) < 8:
                length = chance.choice([512, 4096, 32 * KiB, 33 * KiB, 128 * KiB, 1 * MiB])
                offset = chance.randrange(0, (size - length) // 512 + 1) * 512
                cookie = session.request(CMD_READ, offset, length)
                pending[cookie] = order[cookie] = (CMD_READ, offset, length)
            answer = session.answer(pending)
            _, offset, length = order[answer.cookie]
            assert answer.error == 0 and answer.data == data[offset : offset + length], f"{length} bytes at {offset}"
