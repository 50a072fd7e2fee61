"""What the blocks of a volume may hold, whatever happened to its daemon or its disk; and a client that writes them."""

import contextlib
import struct
import time

import nbd

from harness import KiB

BLOCK = 512
CLUSTER = 64 * KiB
DEPTH = 8


def content(number, block):
    """What write `number` puts into a block; write 0 is zeros."""
    return struct.pack("<QQ", number, block) * (BLOCK // 16) if number else bytes(BLOCK)


def number_of(data, block):
    """Which write a block's data is of, or a text."""
    number, where = struct.unpack_from("<QQ", data)
    if data == content(number, block):
        return number
    return f"garbage: write {number} of block {where}, {data[:64].hex()}..."


class Blocks:
    """By block: the writes one of which it must hold; those of zeros have negative numbers.

    `now` is for whoever reads while the machine runs, also after a kill: the write that was acknowledged last, and those
    after it that may have happened. `kept` is for after a power cut: the write that was flushed last, and all after it.
    """

    def __init__(self, size):
        self.now = [(0,)] * (size // BLOCK)
        self.kept = [(0,)] * (size // BLOCK)
        # What they hold, those apart that may hold more than one thing.
        self.image = bytearray(size)
        self.uncertain = set()

    def snapshot(self):
        """All of it lasts as soon as it is there."""
        other = Blocks(0)
        other.now, other.image, other.uncertain = list(self.now), self.image[:], set(self.uncertain)
        other.kept = other.now
        return other

    def may_hold(self, number, blocks):
        """Write `number` was asked for."""
        for block in blocks:
            self.now[block] += (number,)
            if self.kept is not self.now:
                self.kept[block] += (number,)
        self.uncertain.update(blocks)

    def hold(self, number, blocks, data):
        """It was acknowledged."""
        for block in blocks:
            self.now[block] = (number,)
        self.uncertain.difference_update(blocks)
        self.image[blocks.start * BLOCK : blocks.stop * BLOCK] = data

    def keep(self, number, block):
        """It was flushed, or one after it was."""
        kept = self.kept[block]
        if number in kept:
            self.kept[block] = kept[kept.index(number) :]

    def acknowledged(self):
        """(block, the last write that was acknowledged) where one was not known to last."""
        return [(block, self.now[block][0]) for block, kept in enumerate(self.kept) if len(kept) > 1]

    def check(self, data, after_power_cut=False):
        """Fails unless every block of the volume's data may be there; from then on it is what was found."""
        assert len(data) == len(self.image), f"its size is {len(data)}, not {len(self.image)}"
        allowed = self.kept if after_power_cut else self.now
        for block in sorted(self.uncertain.union(self._differing(data))):
            found = number_of(data[block * BLOCK : (block + 1) * BLOCK], block)
            number = next((one for one in reversed(allowed[block]) if max(0, one) == found), None)
            assert number is not None, (
                f"block {block} (cluster {block * BLOCK // CLUSTER}) holds {found or 'zeros'}, "
                f"allowed are {allowed[block]} (now {self.now[block]}, kept {self.kept[block]})"
            )
            self.now[block] = (number,)
            if number in self.kept[block]:
                # Those after it never happened.
                self.kept[block] = self.kept[block][: self.kept[block].index(number) + 1]
        if after_power_cut and self.kept is not self.now:
            self.kept = list(self.now)
        self.image = bytearray(data)
        self.uncertain.clear()

    def _differing(self, data):
        """The blocks that are not as in the image."""
        for start in range(0, len(data), CLUSTER):
            if data[start : start + CLUSTER] != self.image[start : start + CLUSTER]:
                for offset in range(start, start + CLUSTER, BLOCK):
                    if data[offset : offset + BLOCK] != self.image[offset : offset + BLOCK]:
                        yield offset // BLOCK


class Client:
    """Writes here and there, several at a time, never two to the same block; flushes, and writes zeros, too."""

    def __init__(self, uri, blocks, choose, numbers):
        self.blocks = blocks
        self.choose = choose
        self.numbers = numbers
        # A snapshot that is being made holds what it holds.
        self.watching = []
        self.errors = []
        self.in_flight = {}
        self.is_flushing = False
        self.acknowledged = 0
        self.handle = nbd.NBD()
        self.handle.connect_uri(uri)
        self.size = self.handle.get_size()

    def read(self):
        """All of it."""
        return b"".join(self.handle.pread(1024 * KiB, offset) for offset in range(0, self.size, 1024 * KiB))

    def fill(self, length):
        """Writes the first `length` bytes."""
        for offset in range(0, length, 1024 * KiB):
            self._write(offset, min(1024 * KiB, length - offset), False, 0)
            self.settle()
        self._flush()
        self.settle()

    def run(self, seconds, until=lambda: False):
        """Goes on for some time, or until something holds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not until():
            while len(self.in_flight) < DEPTH:
                self._start()
            self.handle.poll(20)
            assert self.errors == [], f"no request should fail: {self.errors}"

    def settle(self):
        """Waits for the answers."""
        while self.in_flight or self.is_flushing:
            self.handle.poll(1000)
        assert self.errors == [], f"no request should fail: {self.errors}"

    def lost(self):
        """After the end of the daemon: takes the answers that it gave before."""
        with contextlib.suppress(nbd.Error):
            while self.handle.aio_in_flight():
                self.handle.poll(1000)
        self.in_flight.clear()

    def close(self):
        self.handle.shutdown()

    def _start(self):
        choose = self.choose
        if not self.is_flushing and choose.random() < 0.04:
            return self._flush()
        aligned = choose.random() < 0.2
        unit = CLUSTER if aligned else choose.choice((BLOCK, 8 * BLOCK))
        length = unit * (1 if aligned else choose.randrange(1, 9))
        offset = choose.randrange(0, self.size - length + 1, unit)
        self._write(offset, length, choose.random() < 0.1, nbd.CMD_FLAG_FUA if choose.random() < 0.05 else 0)

    def _write(self, offset, length, zero, flags):
        part = range(offset // BLOCK, (offset + length) // BLOCK)
        if any(part.start < other.stop and other.start < part.stop for other in self.in_flight.values()):
            return
        key = next(self.numbers)
        number = -key if zero else key
        for blocks in (self.blocks, *self.watching):
            blocks.may_hold(number, part)
        self.in_flight[key] = part
        data = bytes(length) if zero else b"".join(content(number, block) for block in part)

        def done(error):
            del self.in_flight[key]
            if error.value:
                self.errors.append(f"write {key}: {error.value}")
                return 1
            self.acknowledged += 1
            self.blocks.hold(number, part, data)
            if flags & nbd.CMD_FLAG_FUA:
                for block in part:
                    self.blocks.keep(number, block)
            return 1

        if zero:
            hole = self.choose.choice((0, nbd.CMD_FLAG_NO_HOLE))
            self.handle.aio_zero(length, offset, completion=done, flags=flags | hole)
        else:
            buffer = nbd.Buffer.from_bytearray(bytearray(data))
            self.handle.aio_pwrite(buffer, offset, completion=done, flags=flags)

    def _flush(self):
        self.is_flushing = True
        before = self.blocks.acknowledged()

        def done(error):
            self.is_flushing = False
            if error.value:
                self.errors.append(f"flush: {error.value}")
            else:
                for block, number in before:
                    self.blocks.keep(number, block)
            return 1

        self.handle.aio_flush(completion=done)
