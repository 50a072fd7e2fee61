"""What the volumes of a pool should hold, told by what a client was answered, and how that is compared with what they do."""

import copy
import dataclasses
import pathlib

BLOCK = 512


class Disk:
    """The bytes of a volume or a snapshot. A block may be unsure: one of some contents, until it was read."""

    def __init__(self, size):
        self.data = bytearray(size)
        self.unsure = {}

    @property
    def size(self):
        return len(self.data)

    def grow(self, size):
        self.data += bytes(size - len(self.data))

    def write(self, offset, data):
        """It was acknowledged."""
        self.data[offset : offset + len(data)] = data
        for block in range(offset // BLOCK, (offset + len(data)) // BLOCK):
            self.unsure.pop(block, None)

    def may_write(self, offset, data):
        """It failed: each block is as before or as it should have become."""
        for index in range(len(data) // BLOCK):
            self.unsure.setdefault(offset // BLOCK + index, set()).add(data[index * BLOCK : (index + 1) * BLOCK])

    def difference(self, found, offset=0):
        """What is wrong with bytes that were read, in words; None where nothing is."""
        if offset + len(found) > self.size:
            return f"{len(found)} bytes at {offset}, of {self.size} that should be there"
        expected = self.data[offset : offset + len(found)]
        if found == expected:
            return None
        wrong = []
        for at in range(0, len(found), BLOCK):
            block = (offset + at) // BLOCK
            now = found[at : at + BLOCK]
            if now != expected[at : at + BLOCK] and bytes(now) not in self.unsure.get(block, ()):
                wrong.append(block)
        if not wrong:
            return None
        zeros = sum(1 for block in wrong if not any(found[block * BLOCK - offset : (block + 1) * BLOCK - offset]))
        return (
            f"{len(wrong)} of {len(found) // BLOCK} blocks, from block {wrong[0]} to {wrong[-1]} of 512 bytes"
            f" (clusters {sorted({block // 128 for block in wrong})}), {zeros} of them zeros"
        )

    def settle(self, found, offset=0):
        """What was read is what it holds from now on."""
        self.data[offset : offset + len(found)] = found
        for block in range(offset // BLOCK, (offset + len(found)) // BLOCK):
            self.unsure.pop(block, None)


@dataclasses.dataclass
class Volume:
    disk: Disk
    # By name, in their order.
    snapshots: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class State:
    """Volumes by name, and which of them and of their snapshots are mapped."""

    volumes: dict = dataclasses.field(default_factory=dict)
    mapped: set = dataclasses.field(default_factory=set)

    def copy(self):
        return copy.deepcopy(self)

    def disk(self, name):
        volume, _, snapshot = name.partition("@")
        volume = self.volumes[volume]
        return volume.snapshots[snapshot] if snapshot else volume.disk

    def names(self):
        """Of all volumes and snapshots."""
        for name, volume in self.volumes.items():
            yield name
            for snapshot in volume.snapshots:
                yield f"{name}@{snapshot}"

    def shape(self):
        """All but contents, as `Seen` has it."""
        volumes = {
            name: (volume.disk.size, tuple((snap, disk.size) for snap, disk in volume.snapshots.items()))
            for name, volume in self.volumes.items()
        }
        return volumes, self.mapped


# Files of a pool

def numbers(text, key):
    return [int(line.split("=", 1)[1].split()[0], 0) for line in text.splitlines() if line.startswith(key + " =")]


def layers_of(pool, description):
    """Files of the layers that a volume's description leads to."""
    text = description.read_text(errors="replace")
    heads = numbers(text, "head")
    for line in text.splitlines():
        if line.startswith("snapshot ="):
            heads.append(int(line.split("=", 1)[1].split()[2], 0))
    files = set()
    while heads:
        layer = heads.pop()
        file = f"@{layer:016x}.map"
        if not layer or file in files:
            continue
        files.add(file)
        path = pool / file
        if path.exists():
            header = path.read_bytes()[:512].decode(errors="replace")
            files.update(f"@{data:016x}.raw" for data in numbers(header, "data"))
            heads += numbers(header, "parent")
    return files


def files_of(pool, volumes):
    """The files of these volumes, and what is in them."""
    names = set()
    for volume in volumes:
        description = pathlib.Path(pool) / f"{volume}.volume"
        names.add(description.name)
        if (pool / f"{volume}.raw").exists():
            names.add(f"{volume}.raw")
        if description.exists():
            names |= layers_of(pool, description)
    return {name: (pool / name).read_bytes() if (pool / name).exists() else None for name in names}


def leftovers(pool):
    """Files of a pool that belong to no volume, and have not been moved aside either, to go a while later."""
    needed = {"~lock", "~spare"}
    for description in pool.glob("*.volume"):
        if description.name.startswith("~"):
            continue
        name = description.name.removesuffix(".volume")
        needed |= {description.name, f"{name}.raw"} | layers_of(pool, description)
    names = (path.name for path in pool.iterdir())
    return sorted(name for name in names if name not in needed and not name.startswith("~aside-"))
