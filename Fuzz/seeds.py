#!/usr/bin/env python3
"""Writes the seeds of the NBD fuzz targets into Fuzz/corpus: one file for each thing a client can do."""

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
