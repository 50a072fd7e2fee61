"""Many volumes, and volumes of many shards: connections are made on demand, one for each store."""

import time

import pytest
from harness import SANITIZER, wait_for
from pureflash import SHARD
from test_pureflash import cluster, connected

GiB = 1 << 30


def connections(store):
    """Established connections of clients to the data ports of the store's cluster."""
    count = 0
    with open("/proc/net/tcp") as file:
        for line in list(file)[1:]:
            fields = line.split()
            count += fields[3] == "01" and int(fields[2].split(":")[1], 16) == store.data_port
    return count


@pytest.mark.skipif(SANITIZER == "thread", reason="ThreadSanitizer takes nearly all of the address space")
@pytest.mark.deadline(180)
def test_300_volumes_over_three_stores():
    count, size = 300, 130 * GiB
    with cluster(3) as (daemon, stores):
        began = time.monotonic()
        names = [f"ram/v{number}" for number in range(count)]
        for name in names:
            stores[0].create("ram", name.split("/")[1], size)
        for name in names:
            status, answer = daemon.post("QBD_IOC_MAP_VOLUME", volume=name, config=str(daemon.config), export=True)
            assert status == 200, f"{name}: {answer}"
        assert connections(stores[0]) == 0, "nobody has asked for data yet"
        for index, name in enumerate(names):
            handle = connected(daemon.uri(name))
            assert handle.pread(4096, 0) == bytes(4096)
            handle.shutdown()
            if index % 100 == 99:
                assert connections(stores[0]) == index + 1, "one for each volume that was read from"
        for index, name in enumerate(names):
            handle = connected(daemon.uri(name))
            handle.pwrite(name.encode().ljust(512, b"."), SHARD + 512)
            for shard in range(3):
                handle.pread(512, shard * SHARD)
            assert handle.pread(512, SHARD + 512) == name.encode().ljust(512, b".")
            handle.shutdown()
        assert connections(stores[0]) == count * 3, "one for each volume and store"
        assert daemon.threads() < count + 20
        print(f"{count} volumes: {time.monotonic() - began:.1f} s, {daemon.resident() >> 20} MiB")
        for name in names[::10]:
            daemon.post("QBD_IOC_UNMAP_VOLUME", volume=name)
        left = count - len(names[::10])
        wait_for(lambda: connections(stores[0]) == left * 3, "unmapped volumes give their connections up")


def test_a_hundred_shards_on_three_stores():
    shards = 100
    with cluster(3) as (daemon, stores):
        stores[0].create("disk", "v", shards * 64 * GiB)
        uri = daemon.qbd("map", "--export", "disk/v").succeeded().out.strip()
        handle = connected(uri)
        assert handle.get_size() == shards * SHARD
        assert connections(stores[0]) == 0
        for shard in range(shards):
            handle.pwrite(bytes([shard]) * 4096, shard * SHARD)
            assert connections(stores[0]) == min(shard + 1, 3)
        for shard in range(shards):
            assert handle.pread(4096, shard * SHARD) == bytes([shard]) * 4096
        assert handle.pread(4096, shards * SHARD - 4096) == bytes(4096)
        assert connections(stores[0]) == 3
        handle.shutdown()
