#!/usr/bin/env python3
"""Writes the seeds of the fuzz targets of protocols into Fuzz/corpus: one file for each thing a client can do."""

import pathlib
import struct

CORPUS = pathlib.Path(__file__).resolve().parent / "corpus"


def write(target, seeds):
    folder = CORPUS / target
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in seeds.items():
        (folder / name).write_bytes(data)


def option(number, data=b"", length=None):
    return b"IHAVEOPT" + struct.pack(">II", number, len(data) if length is None else length) + data


def name(text):
    return struct.pack(">I", len(text)) + text


def go(text, *information):
    return name(text) + struct.pack(">H", len(information)) + b"".join(struct.pack(">H", i) for i in information)


def meta(text, *queries):
    return name(text) + struct.pack(">I", len(queries)) + b"".join(map(name, queries))


EXPORT_NAME, ABORT, LIST, INFO, GO, STRUCTURED, LIST_META, SET_META = 1, 2, 3, 6, 7, 8, 9, 10
FLAGS = struct.pack(">I", 3)

# The first byte says how the rest is cut; 0x80 in it adds 66,000 zeros.
write("FuzzHandshake", {
    "abort": b"\x07" + FLAGS + option(ABORT),
    "export-name": b"\x00" + struct.pack(">I", 1) + option(EXPORT_NAME, b"p/v"),
    "export-name-no-zeroes": b"\x03" + FLAGS + option(EXPORT_NAME, b"p/ro") + b"behind",
    "go": b"\x10" + FLAGS + option(GO, go(b"p/v", 1, 2, 3)) + b"%`\x95\x13",
    "info-unknown": b"\x05" + FLAGS + option(INFO, go(b"p/none")) + option(INFO, go(b"p/busy")),
    "list": b"\x04" + FLAGS + option(LIST) + option(LIST, b"x"),
    "structured": b"\x09" + FLAGS + option(STRUCTURED) + option(LIST_META, meta(b"", b"base:"))
    + option(SET_META, meta(b"p/v", b"base:allocation", b"qemu:dirty-bitmap:x")) + option(GO, go(b"p/v", 0)),
    "meta-too-early": b"\x02" + FLAGS + option(SET_META, meta(b"p/v", b"base:allocation")),
    "meta-lengths": b"\x01" + FLAGS + option(STRUCTURED) + option(SET_META, name(b"p/v") + b"\0\0\0\x09"),
    "unknown": b"\x06" + FLAGS + option(77, b"what") + option(5) + option(ABORT, b"late"),
    "too-big": b"\x9f" + FLAGS + option(STRUCTURED) + option(LIST, b"", 66000),
    "bad-magic": b"\x08" + FLAGS + b"IHAVEOPX" + b"\0" * 8,
})  # fmt: skip


def start(export, negotiation, ending, pieces=0):
    return bytes([export | negotiation << 2 | ending << 5 | pieces << 7])


def request(command, flags, offset, length, offset_unit=0, length_unit=0):
    """Units: 0 blocks of 512 bytes, 1 bytes, 2 blocks of 4096; 3 the far end (offset), 64 KiB and more (length)."""
    return struct.pack(">BBHH", command | offset_unit << 4 | length_unit << 6, flags, offset, length)


READ, WRITE, DISCONNECT, FLUSH, TRIM, CACHE, ZEROES, STATUS, RAW = 0, 1, 2, 3, 4, 5, 6, 7, 14
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = 1, 2, 4, 8, 16
EXPORT_NAME_ZEROES, EXPORT_NAME_ONLY, GO_SIMPLE, GO_STRUCTURED, GO_CONTEXT, EXPORT_NAME_CONTEXT = range(6)

# As Fuzz/FuzzTransmission/Script.swift decodes it.
every = (
    request(WRITE, 0, 8, 16) + request(READ, 0, 0, 64) + request(WRITE, FUA, 100, 100) + request(FLUSH, 0, 0, 0)
    + request(TRIM, 0, 104, 8) + request(ZEROES, NO_HOLE, 16, 8) + request(ZEROES, FAST_ZERO | FUA, 24, 8)
    + request(CACHE, 0, 0, 64) + request(READ, 0, 0, 512) + request(STATUS, 0, 0, 2048)
    + request(STATUS, REQ_ONE, 0, 2048)
)  # fmt: skip
write("FuzzTransmission", {
    "memory-simple": start(0, GO_SIMPLE, 0) + every,
    "memory-structured": start(0, GO_STRUCTURED, 1, 1) + every + request(READ, DF, 0, 2048),
    "memory-context": start(0, GO_CONTEXT, 0) + every,
    "memory-4096": start(1, EXPORT_NAME_CONTEXT, 0) + request(WRITE, 0, 1, 2, 2, 2) + request(READ, 0, 0, 4, 2, 2)
    + request(READ, 0, 1, 1),
    "shuffled-simple": start(2, EXPORT_NAME_ZEROES, 0) + every,
    "shuffled-context": start(2, GO_CONTEXT, 1, 1) + every + request(WRITE, 0, 40, 60, 2, 2)
    + request(READ, DF, 30, 80, 2, 2) + request(READ, 0, 174, 2, 2, 2),
    "readonly": start(3, EXPORT_NAME_ONLY, 0) + every,
    "cut-off": start(2, GO_STRUCTURED, 2) + every,
    "bounds": start(0, GO_STRUCTURED, 1) + request(READ, 0, 0, 1, 3) + request(WRITE, 0, 2, 3, 3)
    + request(READ, 0, 1, 512, 3, 1) + request(WRITE, 0, 3, 3, 0, 1) + request(READ, 0, 5, 0) + request(WRITE, 0, 5, 0)
    + request(READ, 0, 0, 600, 0, 3) + request(TRIM, 0, 0, 100, 3, 2),
    "flags": start(0, GO_SIMPLE, 0) + request(READ, DF, 0, 1) + request(WRITE, NO_HOLE, 0, 1) + request(9, 0, 0, 0)
    + request(STATUS, 0, 0, 1) + request(DISCONNECT, 0x80, 0, 0) + request(FLUSH, REQ_ONE, 0, 0),
    "large": start(2, GO_SIMPLE, 0) + request(WRITE, 0, 0, 256, 2, 2) + request(READ, 0, 0, 256, 2, 2)
    + request(WRITE, 0, 0, 256, 2, 2),
    "zeroes": start(0, GO_CONTEXT, 0) + request(WRITE, 0, 0, 2000) + request(ZEROES, 0, 100, 300)
    + request(ZEROES, 0, 500, 20) + request(ZEROES, NO_HOLE, 600, 300) + request(READ, 0, 0, 2048)
    + request(STATUS, 0, 0, 2048) + request(TRIM, 0, 1000, 600) + request(READ, 0, 0, 2048)
    + request(STATUS, 0, 0, 2048) + request(WRITE, FUA, 1500, 548) + request(READ, 0, 0, 2048),
    "payload-missing": start(0, GO_SIMPLE, 1) + every + request(WRITE, 0, 0, 9000),
    "raw": start(0, GO_SIMPLE, 1) + every + request(RAW, 0, 0, 0) + struct.pack(">IHHQQI", 0x25609513, 0, 1, 7, 0, 99),
})  # fmt: skip


# The store's protocol, little-endian.

RECORDED = """{
  "status": "OK",
  "volume_name": "test_v1",
  "volume_size": 2147483648,
  "volume_id": 1107296256,
  "shard_count": 1,
  "rep_count": 1,
  "meta_ver": 0,
  "snap_seq": -1,
  "shards": [
    {
      "index": 0,
      "store_ips": "127.0.0.1",
      "status": "OK",
      "is_shareddisk": 0
    }
  ],
  "shard_lba_cnt_order": 36,
  "op": "open_volume_reply",
  "ret_code": 0
}"""
write("FuzzConductor", {
    "recorded": RECORDED.encode(),
    "three-shards": b'{"volume_size":140000000000,"volume_id":1107296256,"shard_count":3,"meta_ver":7,"snap_seq":2,'
    b'"shards":[{"index":2,"store_ips":""},{"index":0,"store_ips":"10.0.0.1, 10.0.0.2"},'
    b'{"index":1,"store_ips":"fe80::1"}],"ret_code":0}',
    "refusal": b'{"op":"open_volume_reply","reason":"no volume v","ret_code":2}',
    "large": b'{"volume_size":9223372036854775296,"volume_id":18446744073692774400,"shard_count":1,"meta_ver":70000,'
    b'"snap_seq":4294967295,"shards":[{"index":0,"store_ips":"::ffff:1.2.3.4"}],"ret_code":0}',
    "stores": b'{"store_nodes":[{"id":1,"status":"OK","mngt_ip":"127.0.0.1"},{"id":2,"status":"OFFLINE",'
    b'"mngt_ip":"127.0.0.2"}],"op":"list_store_reply","ret_code":0}',
    "escapes": b'{"ret_code":0,"reason":"\\u00e4\\ud83d\\ude00\\n","shards":[[{}]]}',
})  # fmt: skip


def shake(mode, *rest, cut=0):
    return bytes([mode | cut << 3, *rest])


# Requests of three bytes behind their number, the handshake's mode, then what the store does.
RIGHT = 5
requests = bytes([7]) + bytes([0, 0, 7, 1, 4, 0, 2, 120, 15, 3, 0, 255, 0, 8, 255, 1, 64, 3, 0, 64, 3, 1, 9, 9])
# As recorded: the answers of the reference client's store.
hello = struct.pack("<hhhhQihHQ", 0, 8, 0, 0, 0x42000000, 0, 0, 0, 0)
write("FuzzStoreClient", {
    "right": requests + shake(RIGHT) + bytes([0] * 8),
    "out-of-order": requests + shake(RIGHT, cut=7) + bytes([0x50, 0x30, 14, 0x20, 14, 0x10, 0, 0, 0, 0]),
    "reopen": requests + shake(RIGHT) + b"".join(bytes([3, 0]) for _ in range(8)) + bytes([0] * 8),
    "moved": requests + shake(RIGHT) + bytes([3, 1, 3, 2, 0x13, 3, 4, 4, 0, 0, 3, 5, 0xC4, 0, 5, 0xC1, 0]),
    "twice": requests + shake(RIGHT) + bytes([0, 0x16]),
    "other-id": requests + shake(RIGHT) + bytes([0, 7, 1]),
    "other-sequence": requests + shake(RIGHT) + bytes([8, 0]),
    "no-zeros": requests + shake(RIGHT) + bytes([0, 0x29, 5, 1]),
    "half": requests + shake(RIGHT) + bytes([0, 10, 16, 0]),
    "half-data": requests + shake(RIGHT) + bytes([10, 0, 9]),
    "noise": requests + shake(RIGHT) + bytes([11, 63]) + bytes(range(64)),
    "zeros": requests + shake(RIGHT) + bytes([12, 0, 255, 255]),
    "fields": requests + shake(RIGHT) + bytes([13, 0, 1, 13, 5, 9, 0]),
    "handshake": requests + shake(0, 32) + hello + bytes([0] * 8),
    "handshake-long": requests + shake(0, 40, cut=9) + hello + bytes(8),
    "handshake-depth": requests + shake(1, 2, 0) + bytes([0] * 8),
    "handshake-deep": requests + shake(1, 255, 255),
    "handshake-refused": requests + shake(2, 22, 0),
    "handshake-byte": requests + shake(3, 9, 77),
    "handshake-half": requests + shake(4, 31),
})  # fmt: skip


def store_command(kind, flags=0, number=0, offset=0, length=8, sequence=0, *rest):
    """kind: 1 for a write, 0x60 an opcode of its own, 0x80 fields of their own, behind the others, as flags say."""
    return struct.pack("<BBBHHBH", 0, kind, flags, number, offset, length, sequence) + bytes(rest)


some = store_command(1, offset=16) + store_command(0, number=1, offset=16) + store_command(0, number=2, length=255)
write("FuzzStoreServer", {
    "right": shake(7) + b"\0" + some,
    "in-pieces": shake(7, cut=11) + b"\x01" + some + store_command(1, length=255, sequence=7) + some,
    "cut-off": shake(7) + b"\x85" + some + store_command(1, length=200),
    "opcode": shake(7) + b"\0" + store_command(0x60, 0, 3, 0, 8, 0, 13) + store_command(0x61, 0, 4, 0, 8, 0, 4) + some,
    "edges": shake(7) + b"\0" + store_command(1, 1, 5, 120, 16) + store_command(0, 1, 6, 120, 8)
    + store_command(0, 2, 7, 16383, 2) + store_command(1, 2, 8, 16383, 1) + store_command(0, 3, 9),
    "stale": shake(7) + b"\0" + store_command(0x80, 4, 1, 0, 8, 0, 1, 0) + store_command(0x81, 8, 2, 0, 8, 0, 16, 0) + some,
    "snapshot": shake(7) + b"\0" + store_command(0x80, 16, 1, 0, 8, 0, 1, 0) + store_command(0x81, 16, 2, 0, 8, 0, 1, 0),
    "odd": shake(7) + b"\0" + store_command(0x80, 32, 1, 0, 8, 0, 1) + store_command(0x81, 64, 2, 0, 8, 0, 1, 0, 0) + some,
    "far": shake(7) + b"\0" + store_command(0x80, 64, 1, 0, 8, 0, 255, 255, 48) + store_command(0x80, 64, 2, 0, 8, 0, 1, 0, 36),
    "too-long": shake(7) + b"\0" + some + store_command(0x80, 128, 3, 0, 8, 0, 2, 0) + store_command(0x81, 128, 4, 0, 8, 0, 2, 0),
    "noise": shake(7) + b"\0" + some + b"\x1f\xff" + bytes(range(256)),
    "handshake": shake(0) + struct.pack("<hhhhQihHQ", 0, 120, 0, 0, 1 << 24, 0, 1, 0, 0) + b"\0" + some,
    "handshake-depth": shake(1, 0, 1),
    "handshake-one": shake(1, 1, 0) + b"\0" + some,
    "handshake-byte": shake(2, 20, 2),
    "handshake-half": shake(3, 31),
})  # fmt: skip
