"""qbd-store, by a client written by hand: everything the real engine leaves unchecked, its conductor, its faults."""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import struct
import threading
import time
import urllib.error
import urllib.request

import pytest
from harness import SANITIZER, KiB, MiB, connections, keepalive, run, wait_for
from pureflash import (
    COMMAND, HANDSHAKE, HEAD, INVALID_FIELD, INVALID_OPCODE, INVALID_STATE, LBA_RANGE, MAXIMUM, NOT_PRIMARY, OBJECT,
    READ, READONLY, REOPEN, REPLY, SHARD, STORE, SUCCESS, WRITE, Connection, Store, addresses, command,
)  # fmt: skip


@pytest.fixture
def new_store():
    """Makes stores that have not been started yet."""
    made = []

    def make(**options):
        made.append(Store(**options))
        return made[-1]

    yield make
    failures = []
    for store in made:
        try:
            store.finish()
        except AssertionError as failure:
            failures.append(str(failure))
    assert not failures, "\n".join(failures)


@pytest.fixture
def store(new_store):
    return new_store().start()


@pytest.fixture(params=("disk", "ram"))
def pool(request):
    return request.param


# The data


def test_what_is_written_is_read(store, pool):
    with store.opened(pool) as client:
        assert (client.depth, client.result) == (64, 0)
        data = os.urandom(MAXIMUM)
        for offset, length in ((0, 512), (4096, 4096), (1 * MiB, 33 * KiB), (OBJECT - MAXIMUM, MAXIMUM), (3 * MiB, 0)):
            assert client.write(offset, data[:length]) == SUCCESS
            assert client.read(offset, length) == data[:length]
        assert client.read(8 * MiB, 4096) == bytes(4096), "what was not written is zeros"


def test_many_commands_at_once_are_answered_by_their_ids(store, pool):
    with store.opened(pool) as client:
        blocks = [os.urandom(random.choice((512, 4096, 65536, MAXIMUM))) for _ in range(200)]
        client.send(
            b"".join(
                command(WRITE, client.volume_id, index * MAXIMUM, len(block), command_id=index, sequence=index * 7) + block
                for index, block in enumerate(blocks)
            )
        )
        replies = sorted((client.reply() for _ in blocks), key=lambda reply: reply[2])
        assert replies == [(SUCCESS, 0, index, index * 7) for index in range(len(blocks))]
        client.send(
            b"".join(
                command(READ, client.volume_id, index * MAXIMUM, len(block), command_id=index)
                for index, block in enumerate(blocks)
            )
        )
        seen = set()
        for _ in blocks:
            status, _, index, _ = client.reply()
            assert status == SUCCESS
            assert client.receive(len(blocks[index])) == blocks[index]
            seen.add(index)
        assert len(seen) == len(blocks)


def test_data_survives_kill_and_restart(store):
    with store.opened() as client:
        data = os.urandom(MAXIMUM)
        assert client.write(5 * MiB, data) == SUCCESS
    before = store.open("disk", "a")
    store.kill()
    store.start()
    with store.connect(before["volume_id"]) as early:
        assert early.result == 22, "a volume that was not opened since the start is refused"
    assert store.open("disk", "a") == before
    with store.connect(before["volume_id"]) as client:
        assert client.read(5 * MiB, MAXIMUM) == data


def test_synchronous_store(new_store):
    store = new_store(options=["--sync"]).start()
    with store.opened() as client:
        assert client.write(0, b"x" * 4096) == SUCCESS
        assert client.read(0, 4096) == b"x" * 4096


# The checks


@pytest.mark.parametrize("opcode", (0, 3, 4, 5, 13, 14, 255))
def test_unknown_opcodes_are_answered(store, opcode):
    with store.opened() as client:
        assert client.status(opcode, 0, 0, command_id=9) == INVALID_OPCODE
        assert client.read(0, 512) == bytes(512), "the connection goes on"


@pytest.mark.parametrize(
    "offset, length, status",
    (
        (0, 511, INVALID_FIELD),
        (0, 513, INVALID_FIELD),
        (1, 512, INVALID_FIELD),
        (256, 512, INVALID_FIELD),
        (OBJECT - 512, 1024, INVALID_FIELD),
        (OBJECT - 4096, MAXIMUM, INVALID_FIELD),
        (1 << 30, 512, LBA_RANGE),
        (2 << 30, 4096, LBA_RANGE),
        (SHARD, 512, LBA_RANGE),
        (1 << 63, 512, LBA_RANGE),
        ((1 << 64) - 512, 512, LBA_RANGE),
        ((1 << 64) - 512, 1024, INVALID_FIELD),
    ),
)
def test_ranges_are_checked(store, pool, offset, length, status):
    with store.opened(pool) as client:
        assert client.status(READ, offset, length) == status
        # The payload is taken even so: what follows is understood.
        assert client.status(WRITE, offset, length, os.urandom(length)) == status
        assert client.read(0, 512) == bytes(512)


def test_the_last_sector_and_nothing_past_it(store, pool):
    size = 3 * MiB + 512
    with store.opened(pool, size=size) as client:
        assert client.write(size - 512, b"z" * 512) == SUCCESS
        assert client.read(size - 512, 512) == b"z" * 512
        assert client.status(WRITE, size - 512, 1024, bytes(1024)) == LBA_RANGE
        assert client.status(READ, size, 512) == LBA_RANGE


def test_reads_that_are_too_long_are_refused(store):
    with store.opened() as client:
        for length in (MAXIMUM + 512, 1 << 31, (1 << 32) - 1):
            assert client.status(READ, 0, length) == INVALID_FIELD
        assert client.read(0, MAXIMUM) == bytes(MAXIMUM)


@pytest.mark.parametrize("length", (MAXIMUM + 1, MAXIMUM + 512, 1 << 31, (1 << 32) - 1))
def test_a_write_that_is_too_long_ends_the_connection(store, length):
    with store.opened() as client:
        client.ask(WRITE, 0, length, bytes(256 * KiB), command_id=77)
        assert client.reply() == (INVALID_FIELD, 0, 77, 0), "answered first"
        assert client.is_closed()
        with store.connect(client.volume_id) as other:
            assert other.read(0, 4096) == bytes(4096), "and nothing was written"


def test_a_stale_view_is_told_to_open_again(store, pool):
    with store.opened(pool) as client:
        store.faults(stale=f"{pool}/a")
        assert store.open(pool, "a")["meta_ver"] == 1
        for version in (0, 2, 65535):
            client.ask(READ, 0, 4096, meta_version=version)
            assert client.reply()[:2] == (REOPEN, 1)
            client.ask(WRITE, 0, 65536, b"s" * 65536, meta_version=version)
            assert client.reply()[:2] == (REOPEN, 1)
        assert client.read(0, 4096, meta_version=1) == bytes(4096), "nothing stale was written"


def test_another_volume_in_a_command(store):
    with store.opened() as client:
        client.ask(READ, 0, 512, volume_id=client.volume_id + (1 << 24))
        assert client.reply()[:2] == (REOPEN | INVALID_STATE, 65535)


def test_snapshot_numbers(store):
    with store.opened() as client:
        assert client.status(WRITE, 0, 512, bytes(512), snapshot=1) == READONLY
        assert client.status(READ, 0, 512, snapshot=7) == REOPEN | INVALID_STATE
        assert client.read(0, 512, snapshot=HEAD) == bytes(512)


def test_io_of_every_size_on_a_volume_with_snapshots(store):
    # Layers have clusters of 64 KiB, which commands need not know of.
    size = 2 * MiB
    with store.opened(size=size) as client:
        model = bytearray(size)
        states = {}
        for name in ("one", "two", "three"):
            for _ in range(50):
                length = random.choice((512, 4 * KiB, 64 * KiB, 65 * KiB, 100 * KiB, MAXIMUM))
                offset = random.randrange(0, size - length + 1, 512)
                data = os.urandom(length)
                assert client.write(offset, data) == SUCCESS
                model[offset : offset + length] = data
                offset = random.randrange(0, size - length + 1, 512)
                assert client.read(offset, length) == model[offset : offset + length]
            store.ok("create_snapshot", tenant_name="disk", volume_name="a", snapshot_name=name)
            states[name] = bytes(model)
        for name, state in states.items():
            opened = store.ok("open_volume", tenant_name="disk", volume_name="a", snapshot_name=name)
            for offset in range(0, size, MAXIMUM):
                assert client.read(offset, MAXIMUM, snapshot=opened["snap_seq"]) == state[offset : offset + MAXIMUM]
            assert client.read(512, MAXIMUM, snapshot=opened["snap_seq"]) == state[512 : 512 + MAXIMUM]
        for offset in range(0, size, MAXIMUM):
            assert client.read(offset, MAXIMUM) == model[offset : offset + MAXIMUM]


# The handshake


@pytest.mark.parametrize("depth", (1, 2, 64, 254, 255))
def test_depths_that_are_granted(store, depth):
    store.create("disk", "a", MiB)
    with store.connect(store.open("disk", "a")["volume_id"], depth=depth) as client:
        assert (client.depth, client.result) == (depth, 0)
        assert client.read(0, 512) == bytes(512)


@pytest.mark.parametrize("depth", (0, -1, 256, 32767, -32768))
def test_depths_that_are_refused(store, depth):
    store.create("disk", "a", MiB)
    with store.connect(store.open("disk", "a")["volume_id"], depth=depth) as client:
        assert (client.depth, client.result) == (255, 22)
        assert client.is_closed()


def test_volumes_that_were_not_opened_are_refused(store):
    created = store.create("disk", "a", MiB)
    for volume_id in (created["id"], 0, 1, (1 << 64) - 1):
        with store.connect(volume_id) as client:
            assert client.result == 22
            assert client.is_closed()


def test_one_connection_too_many(store):
    store.create("disk", "a", MiB)
    volume_id = store.open("disk", "a")["volume_id"]
    clients = [store.connect(volume_id) for _ in range(64)]
    with store.connect(volume_id) as late:
        assert late.result == 0 and late.is_closed(), "a good handshake, and then closed"
    clients.pop().close()

    def admitted():
        with store.connect(volume_id) as client:
            client.ask(READ, 0, 512)
            return client.socket.recv(1, socket.MSG_PEEK) != b""

    wait_for(admitted, "there is room for one again")
    for client in clients:
        client.close()


# The conductor


def test_open_volume_answers_as_recorded(store):
    store.create("disk", "test_v1", 2 << 30)
    answer = store.open("disk", "test_v1")
    volume_id = answer.pop("volume_id")
    assert volume_id % (1 << 24) == 0 and volume_id > 0
    assert answer == {
        "status": "OK", "volume_name": "test_v1", "volume_size": 2 << 30, "shard_count": 1, "rep_count": 1,
        "meta_ver": 0, "snap_seq": -1, "shard_lba_cnt_order": 36, "adds_shards": 1, "op": "open_volume_reply",
        "ret_code": 0,
        "shards": [{"index": 0, "store_ips": store.address, "status": "OK", "is_shareddisk": 0}],
    }  # fmt: skip


def test_create_list_delete(store, pool):
    answer = store.create(pool, "a", 2 << 30)
    assert {key: answer[key] for key in ("name", "size", "status", "rep_count", "op")} == {
        "name": "a", "size": 2 << 30, "status": "OK", "rep_count": 1, "op": "create_volume_reply"
    }  # fmt: skip
    store.create(pool, "b", 100 << 30)
    volumes = store.ok("list_volume", tenant_name=pool)["volumes"]
    assert [(volume["name"], volume["size"]) for volume in volumes] == [("a", 2 << 30), ("b", 100 << 30)]
    assert volumes[0]["id"] == answer["id"]
    assert len(store.ok("list_volume", tenant_name=pool, limit=1)["volumes"]) == 1
    assert store.ok("list_volume", tenant_name=pool, name="b")["volumes"] == volumes[1:]
    store.ok("delete_volume", tenant_name=pool, volume_name="a")
    assert [volume["name"] for volume in store.ok("list_volume", tenant_name=pool)["volumes"]] == ["b"]
    store.refused("open_volume", 2, "no volume a", tenant_name=pool, volume_name="a")
    assert len(store.open(pool, "b")["shards"]) == 2
    assert not list(store.pool_path.glob("a.*"))


def test_a_volume_in_use_is_not_deleted(store, pool):
    with store.opened(pool) as client:
        store.refused("delete_volume", 7, "in use", tenant_name=pool, volume_name="a")
        assert client.read(0, 512) == bytes(512)

    def deleted():
        return store.ask("delete_volume", tenant_name=pool, volume_name="a")["ret_code"] == 0

    wait_for(deleted, "it can be deleted when its client is gone")
    with store.connect(client.volume_id) as late:
        assert late.result == 22


def test_a_new_volume_of_a_name_has_nothing_of_the_old(store, pool):
    with store.opened(pool) as client:
        assert client.write(0, b"old." * 128) == SUCCESS
    wait_for(
        lambda: store.ask("delete_volume", tenant_name=pool, volume_name="a")["ret_code"] == 0, "the volume is deleted"
    )
    with store.opened(pool) as new:
        assert new.volume_id != client.volume_id
        assert new.read(0, 512) == bytes(512)


def test_resize(store, pool):
    with store.opened(pool, size=64 * MiB) as client:
        assert client.status(READ, 64 * MiB, 512) == LBA_RANGE
        store.ok("update_volume", tenant_name=pool, volume_name="a", size=65 << 10)
        assert store.open(pool, "a")["volume_size"] == 65 << 30
        assert client.write((65 << 30) - 512, b"e" * 512) == SUCCESS
        store.refused("update_volume", 2, "only grow", tenant_name=pool, volume_name="a", size=10)
        store.refused("update_volume", 2, "no number", tenant_name=pool, volume_name="a", size="ten")
        store.ok("update_volume", tenant_name=pool, volume_name="a", size=65 << 10)
        assert client.read((65 << 30) - 512, 512) == b"e" * 512


def test_what_the_conductor_refuses(store):
    store.create("disk", "a", MiB)
    store.refused("open_volume", 2, "no volume b", tenant_name="disk", volume_name="b")
    store.refused("open_volume", 2, "no tenant 'tenant_default'", volume_name="a")
    store.refused("open_volume", 2, "no tenant", tenant_name="other", volume_name="a")
    store.refused("create_volume", 6, "exists", tenant_name="disk", volume_name="a", size=MiB, rep_cnt=1)
    for size in ("", "0", "511", "-512", "1e6", str(1 << 63)):
        store.refused("create_volume", 2, "size", tenant_name="disk", volume_name="b", size=size, rep_cnt=1)
    store.refused("create_volume", 2, "one copy", tenant_name="disk", volume_name="b", size=MiB, rep_cnt=3)
    for name in ("", "..", "a/b", "a b", "x" * 129, "ä", "a%00b"):
        store.refused("create_volume", 2, "volume_name", tenant_name="disk", volume_name=name, size=MiB, rep_cnt=1)
    store.refused("delete_volume", 2, "no volume", tenant_name="disk", volume_name="b")
    store.refused("destroy_all", 1, "no operation 'destroy_all'")
    store.refused("create_tenant", 7, "configuration", tenant_name="new")
    store.refused("create_tenant", 6, "exists", tenant_name="disk")
    store.refused("delete_tenant", 7, "configuration", tenant_name="disk")


def test_the_rest_of_the_conductor(store):
    created = store.create("disk", "a", MiB)
    assert [tenant["name"] for tenant in store.ok("list_tenant")["tenants"]] == ["disk", "ram"]
    assert [each["mngt_ip"] for each in store.ok("list_store")["store_nodes"]] == [store.address]
    (disk,) = store.ok("list_disk")["disks"]
    assert disk["device"] == str(store.pool_path) and 0 < disk["free_size"] <= disk["total_capacity"]
    answer = store.ok("handle_error", rep_id=created["id"], sc=196)
    assert (answer["meta_ver"], answer["action_code"]) == (0, 16384)
    store.refused("handle_error", 2, "replica", rep_id=1 << 24, sc=196)


def test_a_volume_of_the_local_pool_is_served_too(new_store):
    store = new_store().start()
    store.create("disk", "a", MiB)
    (store.pool_path / "a.pureflash").unlink()
    assert store.open("disk", "a")["shards"][0]["store_ips"] == store.address


def test_what_is_damaged_hides_no_other_and_is_not_taken_for_missing(store):
    for name in "abc":
        store.create("disk", name, MiB)
    (store.pool_path / "a.pureflash").write_text("")
    (store.pool_path / "b.volume").write_text("")
    assert [volume["name"] for volume in store.ok("list_volume", tenant_name="disk")["volumes"]] == ["c"]
    wait_for(lambda: "a.pureflash is damaged" in store.log(), "the log says what is not listed")
    for name in "ab":
        for op in ("open_volume", "delete_volume", "list_volume"):
            if (name, op) == ("b", "list_volume"):
                continue
            answer = store.ask(op, tenant_name="disk", volume_name=name, name=name, snapshot_name="")
            assert answer["ret_code"] != 0 and "damaged" in answer["reason"], answer
    assert (store.pool_path / "b.volume").exists() and (store.pool_path / "a.volume").exists()


@pytest.fixture
def copied(new_store):
    """A store with a copy of the pool `disk` and its volume `a` as the pool `copy`."""
    store = new_store()
    store.copy_path = store.directory / "copy"
    store.config.write_text(store.config.read_text() + f"\n[pool.copy]\ntype=local\npath={store.copy_path}\n")
    store.start()
    store.create("disk", "a", MiB)
    store.stop()
    shutil.copytree(store.pool_path, store.copy_path)
    return store.start()


def test_a_copy_with_the_same_id_is_not_its_original(copied):
    with copied.connect(copied.open("disk", "a")["volume_id"]) as client:
        assert client.write(0, b"A" * 512) == SUCCESS
        copied.refused(
            "open_volume", 6, "id", "of disk/a, which is served", str(copied.copy_path / "a.volume"),
            tenant_name="copy", volume_name="a", snapshot_name="",
        )  # fmt: skip
        copied.ok("create_snapshot", tenant_name="copy", volume_name="a", snapshot_name="s")
        copied.refused("open_volume", 2, "no snapshot", tenant_name="disk", volume_name="a", snapshot_name="s")
        copied.ok("update_volume", tenant_name="copy", volume_name="a", size=2)
        assert client.status(READ, MiB, 512) == LBA_RANGE, "the original did not grow"
        exposed = [copied.ok("list_volume", tenant_name=tenant)["volumes"][0]["exposed"] for tenant in ("disk", "copy")]
        assert exposed == [1, 0]
        copied.ok("delete_volume", tenant_name="copy", volume_name="a")
        assert client.read(0, 512) == b"A" * 512
    assert copied.open("disk", "a")["volume_size"] == MiB


def test_a_copy_with_an_id_of_its_own(copied):
    description = copied.copy_path / "a.volume"
    text = description.read_text()
    description.write_text(re.sub(r"(?m)^id = .*", "id = 0x42000000", text))
    ids = [copied.open(tenant, "a")["volume_id"] for tenant in ("disk", "copy")]
    assert ids[1] == 0x42000000 != ids[0]
    with copied.connect(ids[0]) as original, copied.connect(ids[1]) as copy:
        assert original.write(0, b"A" * 512) == copy.write(0, b"B" * 512) == SUCCESS
        assert original.read(0, 512) == b"A" * 512 and copy.read(0, 512) == b"B" * 512


def test_another_address(new_store):
    old, new = addresses(2)
    store = new_store(address=old).start()
    with store.opened() as client:
        assert client.write(0, b"a" * 512) == SUCCESS
    store.stop()
    store.options[store.options.index(old)] = store.address = new
    store.start()
    answer = store.open("disk", "a")
    assert answer["shards"][0]["store_ips"] == new
    with store.connect(answer["volume_id"]) as client:
        assert client.read(0, 512) == b"a" * 512
    entry = store.pool_path / "a.pureflash"
    entry.write_text(re.sub(r"(?m)^stores = .*", f"stores = {old}", entry.read_text()))
    assert store.open("disk", "a")["shards"][0]["store_ips"] == ""
    wait_for(lambda: f"'stores' in {entry}" in store.log(), "the log tells where the address is from")
    store.refused("delete_volume", 5, old, f"'stores' in {entry}", tenant_name="disk", volume_name="a")


# Snapshots


def test_snapshots(store):
    with store.opened() as client:
        assert client.write(0, b"1" * 65536) == SUCCESS
        store.ok("create_snapshot", tenant_name="disk", volume_name="a", snapshot_name="first")
        assert client.write(0, b"2" * 4096) == SUCCESS
        store.ok("create_snapshot", tenant_name="disk", volume_name="a", snapshot_name="second")
        store.ok("update_volume", tenant_name="disk", volume_name="a", size=2 << 10)
        assert client.write(0, b"3" * 512) == SUCCESS
        first, second = (
            store.ok("open_volume", tenant_name="disk", volume_name="a", snapshot_name=name)
            for name in ("first", "second")
        )
        assert (first["snap_seq"], second["snap_seq"]) == (1, 2)
        assert (first["volume_id"], first["volume_size"]) == (client.volume_id, 1 << 30)
        assert store.open("disk", "a")["snap_seq"] == -1
        for data, snapshot in ((b"1" * 65536, 1), (b"2" * 4096 + b"1" * 61440, 2)):
            assert client.read(0, 65536, snapshot=snapshot) == data
            assert client.status(WRITE, 0, 512, bytes(512), snapshot=snapshot) == READONLY
            assert client.status(READ, 1 << 30, 512, snapshot=snapshot) == LBA_RANGE
        assert client.read(0, 65536) == b"3" * 512 + b"2" * 3584 + b"1" * 61440
        assert client.status(READ, 0, 512, snapshot=3) == REOPEN | INVALID_STATE
    store.stop()
    store.start()
    store.ok("open_volume", tenant_name="disk", volume_name="a", snapshot_name="second")
    with store.connect(client.volume_id) as client:
        assert client.read(0, 4096, snapshot=2) == b"2" * 4096
        assert client.status(READ, 0, 512, snapshot=1) == REOPEN | INVALID_STATE, "only what was opened is there"


def test_a_snapshot_under_writes_is_of_one_moment(store):
    """Block 1 is written after block 0 was acknowledged: a snapshot never has the second without the first."""
    with store.opened() as client:
        stop = threading.Event()
        failures = []

        def write():
            with store.connect(client.volume_id) as writer:
                number = 0
                while not stop.is_set():
                    number += 1
                    for block in range(2):
                        if writer.write(block * 65536, struct.pack("<Q", number) * 512) != SUCCESS:
                            failures.append(number)

        thread = threading.Thread(target=write)
        thread.start()
        try:
            for number in range(1, 6):
                store.ok("create_snapshot", tenant_name="disk", volume_name="a", snapshot_name=f"s{number}")
                store.ok("open_volume", tenant_name="disk", volume_name="a", snapshot_name=f"s{number}")
        finally:
            stop.set()
            thread.join()
        assert not failures
        for number in range(1, 6):
            first, second = (
                struct.unpack("<512Q", client.read(block * 65536, 4096, snapshot=number)) for block in range(2)
            )
            assert len(set(first)) == len(set(second)) == 1, "a write is whole or not there"
            assert first[0] - 1 <= second[0] <= first[0]


def test_snapshots_that_are_refused(store):
    store.create("disk", "a", MiB)
    store.create("ram", "a", MiB)
    store.ok("create_snapshot", tenant_name="disk", volume_name="a", snapshot_name="s")
    store.refused("create_snapshot", 6, "exists", tenant_name="disk", volume_name="a", snapshot_name="s")
    store.refused("create_snapshot", 2, "no volume", tenant_name="disk", volume_name="b", snapshot_name="s")
    store.refused("create_snapshot", 2, "snapshot_name", tenant_name="disk", volume_name="a", snapshot_name="x/y")
    store.refused("create_snapshot", 1, "type local", tenant_name="ram", volume_name="a", snapshot_name="s")
    store.refused("open_volume", 2, "no snapshot 't'", tenant_name="disk", volume_name="a", snapshot_name="t")
    store.ok("delete_volume", tenant_name="disk", volume_name="a")
    store.create("disk", "a", MiB)
    store.refused("open_volume", 2, "no snapshot 's'", tenant_name="disk", volume_name="a", snapshot_name="s")


def test_snapshots_that_nobody_reads_are_closed(store):
    count = 8
    client = store.opened(size=1 << 30)
    for number in range(count):
        assert client.write(number * 65536, bytes([number + 1]) * 512) == SUCCESS
        store.ok("create_snapshot", tenant_name="disk", volume_name="a", snapshot_name=f"s{number}")
    store.open("disk", "a")
    before = store.descriptors()

    def opened(number):
        return store.ok("open_volume", tenant_name="disk", volume_name="a", snapshot_name=f"s{number}")["snap_seq"]

    for number in range(count):
        assert client.read(number * 65536, 512, snapshot=opened(number)) == bytes([number + 1]) * 512
    # One for each layer, and some for each that is served.
    assert store.descriptors() >= before + count * (count + 1) // 2
    assert client.read(0, 512, snapshot=count) == b"\x01" * 512, "they stay while a client is there and reads"
    client.close()
    wait_for(lambda: store.descriptors() <= before, "their files are closed", 30)
    with store.connect(client.volume_id) as client:
        client.ask(READ, 0, 512, snapshot=count)
        assert client.reply()[:2] == (REOPEN | INVALID_STATE, 0)
        assert client.read(0, 512, snapshot=opened(count - 1)) == b"\x01" * 512
    wait_for(
        lambda: store.ask("delete_volume", tenant_name="disk", volume_name="a")["ret_code"] == 0, "it can be deleted"
    )


SLOW_DISK = r"""
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>
int fdatasync(int file) {
    if (access(getenv("SLOW_DISK"), F_OK) == 0) {
        int seen = open(getenv("SLOW_DISK_SEEN"), O_WRONLY | O_CREAT | O_APPEND, 0600);
        if (write(seen, ".", 1) != 1) abort();
        close(seen);
        while (access(getenv("SLOW_DISK"), F_OK) == 0) usleep(10000);
    }
    return syscall(SYS_fdatasync, file);
}
"""


@pytest.mark.skipif(SANITIZER is not None, reason="its library has to be the first")
def test_slow_disks_hold_up_only_their_own_volumes(new_store, tmp_path):
    """As many volumes as could keep all threads of the tasks busy make snapshots on a disk that does not answer."""
    (tmp_path / "slow.c").write_text(SLOW_DISK)
    run(["cc", "-shared", "-fPIC", "-o", tmp_path / "slow.so", tmp_path / "slow.c"]).succeeded()
    slow, seen = tmp_path / "slow", tmp_path / "seen"
    store = new_store().start(LD_PRELOAD=tmp_path / "slow.so", SLOW_DISK=slow, SLOW_DISK_SEEN=seen)
    count = os.cpu_count() + 1
    for number in range(count):
        store.create("disk", f"v{number}", MiB)
        store.open("disk", f"v{number}")
    store.create("ram", "a", MiB)
    slow.touch()
    results = []

    def make(number):
        results.append(store.ask("create_snapshot", tenant_name="disk", volume_name=f"v{number}", snapshot_name="s"))

    threads = [threading.Thread(target=make, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: seen.exists() and seen.stat().st_size >= min(2, os.cpu_count()), "the disk is waited for")
        assert len(store.ok("list_tenant")["tenants"]) == 2
        with store.connect(store.open("ram", "a")["volume_id"]) as client:
            assert client.read(0, 512) == bytes(512)
        store.refused("delete_volume", 2, "no volume none", tenant_name="ram", volume_name="none")
        assert not results
    finally:
        slow.unlink()
        for thread in threads:
            thread.join()
    assert [result["ret_code"] for result in results] == [0] * count


def test_a_snapshot_that_cannot_be_noted_is_not_made(store):
    with store.opened() as client:
        snapshot = dict(tenant_name="disk", volume_name="a", snapshot_name="s")
        draft = store.pool_path / "a.pureflash.new"
        draft.mkdir()
        store.refused("create_snapshot", 1, str(draft), **snapshot)
        draft.rmdir()
        assert client.write(0, b"n" * 512) == SUCCESS
        store.ok("create_snapshot", **snapshot)
        number = store.ok("open_volume", **snapshot)["snap_seq"]
        assert client.read(0, 512, snapshot=number) == b"n" * 512


def test_a_snapshot_that_was_not_noted_is_made_anew(new_store):
    """The conductor dies while its store makes a snapshot: the name can be used, and means the moment of the second time."""
    names = addresses(2)
    conductor = new_store(address=names[0], stores=names[1:]).start()
    holder = new_store(address=names[1], ports=conductor.ports, conductor=False).start()
    conductor.create("disk", "a", MiB)
    with holder.connect(conductor.open("disk", "a")["volume_id"]) as client:
        assert client.write(0, b"1" * 512) == SUCCESS
        snapshot = dict(tenant_name="disk", volume_name="a", snapshot_name="s")
        holder.process.send_signal(signal.SIGSTOP)

        def ask():
            with contextlib.suppress(OSError):
                conductor.ask("create_snapshot", **snapshot)

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            wait_for(
                lambda: "begun = s" in (conductor.pool_path / "a.pureflash").read_text(), "the snapshot is begun"
            )
            wait_for(
                lambda: any(int(row[4].split(":")[1], 16) for row in connections(holder.address, holder.store_port)),
                "the order is at the store",
            )
            conductor.kill()
        finally:
            holder.process.send_signal(signal.SIGCONT)
            asking.join()
        wait_for(lambda: "snapshot = s " in (holder.pool_path / "a.volume").read_text(), "the store made it")
        assert client.write(0, b"2" * 512) == SUCCESS
        conductor.start()
        conductor.open("disk", "a")
        conductor.ok("create_snapshot", **snapshot)
        assert client.write(0, b"3" * 512) == SUCCESS
        number = conductor.ok("open_volume", **snapshot)["snap_seq"]
        assert client.read(0, 512, snapshot=number) == b"2" * 512
        assert client.read(0, 512) == b"3" * 512
        conductor.refused("create_snapshot", 6, "exists", **snapshot)


def test_a_snapshot_of_somebody_else_is_not_replaced(new_store):
    store = new_store().start()
    with store.opened() as client:
        volume_id = client.volume_id
        assert client.write(0, b"1" * 512) == SUCCESS
    order = {
        "op": "create_snapshot", "status": "OK", "tenant_name": "disk", "volume_name": "a", "volume_size": 1 << 30,
        "volume_id": volume_id, "shard_count": 1, "rep_count": 1, "meta_ver": 0, "snap_seq": 1, "shards": [],
        "features": 0, "primary_rep_index": 0, "snapshot_name": "s",
    }  # fmt: skip
    request = urllib.request.Request(
        f"http://{store.address}:{store.store_port}/api?op=create_snapshot", json.dumps(order).encode()
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        assert json.loads(response.read())["ret_code"] == 0
    made = (store.pool_path / "a.volume").read_text()
    for _ in range(2):
        store.refused("create_snapshot", 6, "exists", tenant_name="disk", volume_name="a", snapshot_name="s")
    assert (store.pool_path / "a.volume").read_text() == made


# Several stores


@pytest.fixture
def cluster(new_store):
    names = addresses(3)
    first = new_store(address=names[0], stores=names)
    others = [new_store(address=name, ports=first.ports, conductor=False) for name in names[1:]]
    for each in [*others, first]:
        each.start()
    return [first, *others]


def test_three_shards_on_three_stores(cluster):
    conductor = cluster[0]
    size = 140 << 30
    conductor.create("disk", "big", size)
    answer = conductor.open("disk", "big")
    assert [shard["store_ips"] for shard in answer["shards"]] == [store.address for store in cluster]
    clients = [store.connect(answer["volume_id"]) for store in cluster]
    assert [client.result for client in clients] == [0, 0, 0]
    for index, client in enumerate(clients):
        start, end = index * SHARD, min((index + 1) * SHARD, size)
        for offset in (start, start + OBJECT - 4096, end - 4096):
            data = os.urandom(4096)
            assert client.write(offset, data) == SUCCESS
            assert client.read(offset, 4096) == data
        for other in range(3):
            if other != index:
                assert client.status(READ, other * SHARD, 512) == REOPEN | NOT_PRIMARY
        assert client.status(READ, size, 512) == LBA_RANGE
        assert client.status(WRITE, SHARD - 512, 1024, bytes(1024)) == INVALID_FIELD
    for client in clients:
        client.close()
    assert sum(path.stat().st_blocks for path in cluster[2].pool_path.glob("*.raw")) * 512 < MiB, "stores are sparse"

    def deleted():
        return conductor.ask("delete_volume", tenant_name="disk", volume_name="big")["ret_code"] == 0

    wait_for(deleted, "the volume is deleted")
    for store in cluster:
        assert not list(store.pool_path.glob("big.*"))


def test_a_store_that_is_away_has_no_address(cluster):
    conductor, second, _ = cluster
    conductor.create("disk", "big", 140 << 30)
    volume_id = conductor.open("disk", "big")["volume_id"]
    with second.connect(volume_id) as client:
        assert client.write(SHARD, b"2" * 512) == SUCCESS
    second.kill()
    shards = conductor.open("disk", "big")["shards"]
    assert [shard["store_ips"] != "" for shard in shards] == [True, False, True]
    conductor.refused("create_volume", 5, second.address, tenant_name="disk", volume_name="b", size=140 << 30)
    conductor.refused("delete_volume", 5, second.address, tenant_name="disk", volume_name="big")
    assert [volume["name"] for volume in conductor.ok("list_volume", tenant_name="disk")["volumes"]] == ["big"]
    second.start()
    shards = conductor.open("disk", "big")["shards"]
    assert [shard["store_ips"] for shard in shards] == [store.address for store in cluster]
    with second.connect(volume_id) as client:
        assert client.read(SHARD, 512) == b"2" * 512


@pytest.mark.parametrize("pool", ("disk", "ram"))
@pytest.mark.parametrize("way", ("create", "delete"))
def test_a_volume_that_a_store_made_late_is_not_in_the_way(new_store, pool, way):
    names = addresses(2)
    conductor = new_store(address=names[0], stores=names).start()
    late = new_store(address=names[1], ports=conductor.ports, conductor=False).start()
    volume = dict(tenant_name=pool, volume_name="v", size=1 << 30, rep_cnt=1)
    late.process.send_signal(signal.SIGSTOP)
    try:
        conductor.refused("create_volume", 5, late.address, "no answer", **volume)
    finally:
        late.process.send_signal(signal.SIGCONT)
    assert conductor.ok("list_volume", tenant_name=pool)["volumes"] == []
    wait_for(lambda: f"created {pool}/v" in late.log(), "the store has made it by now")
    if way == "delete":
        conductor.ok("delete_volume", tenant_name=pool, volume_name="v")
        assert not list(late.pool_path.glob("v.*")) and not list(conductor.pool_path.glob("v.*"))
        conductor.refused("delete_volume", 2, "no volume v", tenant_name=pool, volume_name="v")
    conductor.ok("create_volume", **volume)
    assert [shard["store_ips"] for shard in conductor.open(pool, "v")["shards"]] == [conductor.address]
    conductor.ok("delete_volume", tenant_name=pool, volume_name="v")
    assert not list(late.pool_path.glob("v.*")) and not list(conductor.pool_path.glob("v.*"))


def test_a_volume_of_the_stores_own_stays(cluster):
    """What another conductor, or qbd, made at a store is not taken for something left over."""
    conductor, second, _ = cluster
    conductor.create("disk", "other", 1 << 30)
    description = (second.pool_path / "other.volume").read_text()
    (second.pool_path / "v.volume").write_text(re.sub(r"(?m)^id = .*", "id = 0x42000000", description))
    with open(second.pool_path / "v.raw", "wb") as file:
        file.truncate(1 << 30)
    for _ in range(2):
        conductor.refused("create_volume", 5, second.address, "exists", tenant_name="disk", volume_name="v", size=MiB)
        assert (second.pool_path / "v.raw").exists()


def test_a_store_that_lost_its_volume_does_not_begin_anew(cluster):
    conductor, second, _ = cluster
    conductor.create("disk", "big", 140 << 30)
    second.kill()
    for path in second.pool_path.glob("big.*"):
        path.unlink()
    second.start()
    conductor.refused("open_volume", 2, second.address, "no volume big", tenant_name="disk", volume_name="big")


def test_growing_over_several_stores(cluster):
    conductor, second, _ = cluster
    conductor.create("disk", "a", MiB)
    conductor.open("disk", "a")
    conductor.ok("update_volume", tenant_name="disk", volume_name="a", size=65 << 10)
    answer = conductor.open("disk", "a")
    assert [shard["store_ips"] for shard in answer["shards"]] == [conductor.address, second.address]
    with second.connect(answer["volume_id"]) as client:
        assert client.write(SHARD, b"g" * 512) == SUCCESS
    conductor.refused("create_snapshot", 7, "2 stores", tenant_name="disk", volume_name="a", snapshot_name="s")


# Faults


def test_without_the_option_there_are_no_switches(new_store):
    store = new_store(faults=False).start()
    assert store.get("/faults?refuse=1")["ret_code"] != 0
    with store.opened() as client:
        assert client.result == 0


def test_switches_that_are_wrong(store):
    for query in ("explode=1", "delay=-1", "delay=x", "stale=a"):
        assert store.get(f"/faults?{query}")["ret_code"] != 0


def test_refuse(store):
    with store.opened() as client:
        store.faults(refuse=1)
        with store.connect(client.volume_id) as late:
            assert late.result == 22 and late.is_closed()
        store.faults(clear=1)
        with store.connect(client.volume_id) as late:
            assert late.result == 0


def test_delay(store, pool):
    with store.opened(pool) as client:
        store.faults(delay=300)
        began = time.monotonic()
        assert client.write(0, b"d" * 65536) == SUCCESS
        assert time.monotonic() - began >= 0.3
        store.faults(delay=0)
        assert client.read(0, 65536) == b"d" * 65536


def test_a_closed_connection_leaves_nothing_that_lands_later(store, pool):
    with store.opened(pool) as client:
        store.faults(delay=500)
        client.ask(WRITE, 0, 65536, b"o" * 65536)
        wait_for(lambda: store.faults()["seen"]["commands"] >= 1, "the write has come")
        client.close()
        store.faults(delay=0)
        with store.connect(client.volume_id) as new:
            assert new.write(0, b"n" * 65536) == SUCCESS
            store.faults(delay=700)
            assert new.read(0, 65536) == b"n" * 65536, "the old write landed after the newer one"


def test_unread_writes_of_a_closed_connection_are_dropped(store, pool):
    """More than a connection may have in hand waits in its socket when it is closed."""
    with store.opened(pool) as client:
        store.faults(stop=1)
        flood = b"".join(command(WRITE, client.volume_id, 0, 512, command_id=n) + b"o" * 512 for n in range(1000))
        client.send(flood)
        wait_for(lambda: store.faults()["seen"]["commands"] >= 256, "the connection has its hands full")
        # A reset, as the end of the stream would wait behind what is still to be sent.
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        with store.connect(client.volume_id) as new:
            store.faults(stop=0)
            assert new.write(0, b"n" * 512) == SUCCESS
            for _ in range(20):
                assert new.read(0, 512) == b"n" * 512
        assert store.faults()["seen"]["commands"] < 1000


def test_drop(store):
    with store.opened() as client:
        store.faults(drop=3)
        assert client.read(0, 512) == client.read(512, 512) == bytes(512)
        client.ask(READ, 0, 512)
        assert client.is_closed()
        store.faults(drop=0)
        with store.connect(client.volume_id) as new:
            for _ in range(5):
                assert new.read(0, 512) == bytes(512)


def test_reopen(store):
    with store.opened() as client:
        store.faults(reopen=2)
        assert client.status(READ, 0, 512) == REOPEN
        assert client.write(0, b"r" * 512) == REOPEN
        assert client.read(0, 512) == bytes(512)
        before = store.faults()["seen"]["opens"]
        store.open("disk", "a")
        assert store.faults()["seen"]["opens"] == before + 1


def test_stop_answering(store):
    with store.opened() as client:
        store.faults(stop=1)
        client.ask(READ, 0, 512)
        client.socket.settimeout(0.3)
        with pytest.raises(socket.timeout):
            client.socket.recv(1)
        client.socket.settimeout(20)
        store.faults(stop=0)
        assert client.reply()[0] == SUCCESS
        assert client.receive(512) == bytes(512)


def test_answer_twice(store, pool):
    with store.opened(pool) as client:
        assert client.write(0, b"t" * 65536) == SUCCESS
        store.faults(twice=1)
        client.ask(READ, 0, 65536, command_id=5)
        for _ in range(2):
            assert client.reply() == (SUCCESS, 0, 5, 0)
            assert client.receive(65536) == b"t" * 65536
        assert client.read(0, 512) == b"t" * 512


def test_wrong_id(store):
    with store.opened() as client:
        store.faults(wrong_id=1)
        client.ask(WRITE, 0, 512, bytes(512), command_id=5)
        assert client.reply()[2] == 0x8005
        client.ask(WRITE, 0, 512, bytes(512), command_id=5)
        assert client.reply()[2] == 5


def test_half_a_reply(store):
    with store.opened() as client:
        store.faults(half=1)
        client.ask(READ, 0, 512)
        assert len(client.receive(REPLY.size // 2)) == 16
        assert client.is_closed()


def test_no_store_named(store):
    store.create("disk", "a", MiB)
    store.faults(empty_stores=1)
    assert [shard["store_ips"] for shard in store.open("disk", "a")["shards"]] == [""]
    store.faults(clear=1)
    assert [shard["store_ips"] for shard in store.open("disk", "a")["shards"]] == [store.address]


def test_a_conductor_that_says_nothing(store):
    store.faults(silent_conductor=1)
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        store.ask("list_tenant")
    store.faults(clear=1)
    store.ok("list_tenant")


# Clients that vanish


def test_a_silent_client_is_asked_for_a_sign(store):
    with store.opened() as client:
        wait_for(lambda: keepalive(*client.socket.getpeername()), "its connection has a keep-alive timer")
        assert keepalive(*client.socket.getpeername())[0] <= 5


# Hostile clients


def test_noise(store):
    with store.opened() as client:
        noise = random.Random(1)
        for length in (1, 31, 32, 33, 64, 1000, 100_000):
            with Connection(store.address, store.data_port, 0, handshake=False) as other:
                other.send(noise.randbytes(length))
            for _ in range(5):
                with store.connect(client.volume_id) as other:
                    try:
                        other.send(noise.randbytes(length))
                    except OSError:
                        pass
        assert client.read(0, 4096) == bytes(4096)


def test_frames_that_end_early(store, pool):
    with store.opened(pool) as client:
        whole = command(WRITE, client.volume_id, 0, 65536) + b"x" * 65536
        for cut in (1, 63, 64, 65, 40_000, len(whole) - 1):
            with store.connect(client.volume_id) as other:
                other.send(whole[:cut])
        assert client.read(MiB, 4096) == bytes(4096)
        wait_for(lambda: "within a command" in store.log(), "the log tells of it")


def test_one_byte_at_a_time(store):
    store.create("disk", "a", MiB)
    volume_id = store.open("disk", "a")["volume_id"]
    with Connection(store.address, store.data_port, volume_id, handshake=False) as slow:
        stream = HANDSHAKE.pack(0, 8, 0, 0, volume_id, 0, 1, 0, 0)
        stream += command(WRITE, volume_id, 0, 512) + b"b" * 512
        for byte in stream:
            slow.send(bytes([byte]))
        assert HANDSHAKE.unpack(slow.receive(HANDSHAKE.size))[6] == 0
        assert slow.reply()[0] == SUCCESS
        for byte in command(READ, volume_id, 0, 512):
            slow.send(bytes([byte]))
        assert slow.reply()[0] == SUCCESS
        assert slow.receive(512) == b"b" * 512


def test_thousands_of_connections_without_a_handshake(store):
    with store.opened() as client:
        idle = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
        try:
            for _ in range(2000):
                idle.append(socket.create_connection((store.address, store.data_port)))
            with store.connect(client.volume_id) as new:
                assert new.read(0, 512) == bytes(512), "others are served meanwhile"
            assert store.descriptors() < 700, "the longest waiting ones are closed"
        finally:
            for each in idle:
                each.close()
        wait_for(lambda: store.descriptors() < 100, "their descriptors come back")


def test_a_client_that_does_not_read_its_replies(store, pool):
    with store.opened(pool) as client:
        with store.connect(client.volume_id) as greedy:
            reads = b"".join(command(READ, greedy.volume_id, n * MAXIMUM, MAXIMUM, command_id=n) for n in range(2000))
            done = threading.Event()

            def send():
                try:
                    greedy.socket.sendall(reads)
                except OSError:
                    pass
                done.set()

            threading.Thread(target=send, daemon=True).start()
            for _ in range(200):
                assert client.read(0, 4096) == bytes(4096), "others are served meanwhile"
            assert store.resident() < 200 * MiB, "what a client costs is bounded"
            for _ in range(2000):
                assert greedy.reply()[0] == SUCCESS
                greedy.receive(MAXIMUM)
            assert done.wait(20)


@pytest.mark.parametrize(
    "request_text",
    (
        b"\x00" * 100,
        b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 10_000,
        b"GET /" + b"a" * 100_000,
        b"POST /s5c/?op=open_volume HTTP/1.1\r\ncontent-length: 99999999999\r\n\r\n" + b"x" * 100_000,
        b"DELETE /s5c/ HTTP/1.1\r\n\r\n",
    ),
)
def test_hostile_http(store, request_text):
    for port in (store.conductor_port, store.store_port):
        with socket.create_connection((store.address, port), timeout=20) as client:
            try:
                client.sendall(request_text)
                while client.recv(65536):
                    pass
            except ConnectionError:
                pass
    store.ok("list_tenant")


@pytest.mark.parametrize("body", (b"", b"{", b"[]", b"{}", b'{"volume_id": "x"}', b"null", b"[" * 100_000))
def test_hostile_orders(store, body):
    with socket.create_connection((store.address, store.store_port), timeout=20) as client:
        head = f"POST /api?op=prepare_volume HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        answer = b""
        while part := client.recv(65536):
            answer += part
    assert b'"ret_code" : 2' in answer
    store.ok("list_tenant")


@pytest.mark.parametrize(
    "change, word",
    (
        ({"volume_name": "../a"}, "volume_name"),
        ({"volume_name": ""}, "volume_name"),
        ({"snapshot_name": "../../etc"}, "snapshot_name"),
        ({"volume_size": 0}, "volume_size"),
        ({"volume_size": 511}, "volume_size"),
        ({"volume_size": 1 << 60}, "volume_size"),
        ({"volume_size": 2 << 30}, "resize"),
        ({"tenant_name": "other"}, "tenant"),
        ({"volume_name": "b"}, "no volume b"),
    ),
)
def test_orders_that_are_refused(store, pool, change, word):
    with store.opened(pool) as client:
        order = {
            "op": "prepare_volume", "status": "OK", "tenant_name": pool, "volume_name": "a", "volume_size": 1 << 30,
            "volume_id": client.volume_id, "shard_count": 1, "rep_count": 1, "meta_ver": 0, "snap_seq": 1, "shards": [],
            "features": 0, **change,
        }  # fmt: skip
        if change.get("volume_name"):
            order["volume_id"] += 1 << 24
        request = urllib.request.Request(
            f"http://{store.address}:{store.store_port}/api?op=prepare_volume", json.dumps(order).encode(), method="POST"
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            answer = json.loads(response.read())
        assert answer["ret_code"] != 0 and word in answer["reason"], answer
        assert client.read((1 << 30) - 512, 512) == bytes(512), "the volume is what it was"


def test_orders_of_pureflash_s_own_conductor(new_store):
    """It names no tenant, and asks for a version without a body."""
    store = new_store()
    store.config.write_text(store.config.read_text() + "[pool.tenant_default]\ntype=memory\n")
    store.start()
    store.create("tenant_default", "test_v1", 2 << 30)
    number = store.ok("list_volume", tenant_name="tenant_default")["volumes"][0]["id"]
    # As recorded, but for the volume's id.
    order = """{"op": "prepare_volume", "status": "OK", "volume_name": "test_v1", "volume_size": 2147483648,
        "volume_id": %d, "shard_count": 1, "rep_count": 1, "meta_ver": 0, "snap_seq": 1, "shards": [{"index": 0,
        "replicas": [{"id": %d, "index": 0, "store_id": 1, "tray_uuid": "c33357a5-da7e-481d-a8d8-4aeec7629efb",
        "status": "OK", "rep_ports": "%s"}], "primary_rep_index": 0, "status": "OK"}], "features": 0}"""
    api = f"http://{store.address}:{store.store_port}/api?op="
    order = (order % (number, number, store.address)).encode()
    with urllib.request.urlopen(api + "prepare_volume&name=test_v1", order, timeout=30) as response:
        assert json.loads(response.read())["ret_code"] == 0
    with store.connect(number) as client:
        assert client.write(0, b"a" * 512) == SUCCESS
        with urllib.request.urlopen(f"{api}set_meta_ver&volume_id={number}&meta_ver=3", timeout=30) as response:
            assert json.loads(response.read())["ret_code"] == 0
        client.ask(READ, 0, 512)
        assert client.reply()[:2] == (REOPEN, 3)
        assert client.read(0, 512, meta_version=3) == b"a" * 512
    with urllib.request.urlopen(f"{api}set_meta_ver&volume_id=x", timeout=30) as response:
        assert json.loads(response.read())["ret_code"] == 2


# The command line


@pytest.mark.parametrize(
    "options, word",
    (
        (["--listen", "nowhere"], "IPv4"),
        (["--listen", "0.0.0.0"], "clients"),
        (["--stores", "127.0.0.1,0.0.0.0"], "clients"),
        (["--stores", "127.0.0.1,127.0.0.1"], "twice"),
        (["--stores", ""], "names no store"),
        (["--no-conductor", "--stores", "127.0.0.1"], "conductor"),
        (["--data-port", "0"], "port"),
        (["--data-port", "49180"], "different"),
        (["--log-level", "loud"], "log level"),
        (["--config", ""], "empty"),
    ),
)
def test_wrong_usage(options, word):
    result = run([STORE, *options])
    assert result.status == 64 and word in result.err and not result.out, str(result)


def test_what_keeps_it_from_starting(new_store, scratch):
    result = run([STORE, "--config", scratch / "none"])
    assert result.status == 2 and str(scratch / "none") in result.err, str(result)
    store = new_store().start()
    result = run([STORE, *store.options])
    assert result.status == 98 and str(store.data_port) in result.err, str(result)
    # An address for documentation: no host has it.
    result = run([STORE, "--config", store.config, "--listen", "192.0.2.77"])
    assert result.status == 99 and "--listen" in result.err and "192.0.2.77" in result.err, str(result)


def test_what_it_says_at_its_start(new_store):
    store = new_store()
    store.config.write_text("")
    # Without --config.
    store.options = store.options[2:]
    store.start(QBD_CONFIG=store.config)
    # It says so once it accepts.
    wait_for(lambda: all(f" port {port}" in store.log() for port in store.ports), "it names its ports")
    assert f"{store.config} has no pools" in store.log()
