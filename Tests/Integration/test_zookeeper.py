"""A PureFlash cluster's conductor found through a real ZooKeeper, and qbd-store registered there."""

import contextlib
import random
import signal
import socket
import threading
import time

import nbd
import pytest
from harness import SLOWNESS, Daemon, run, wait_for
from ports import free_port
from pureflash import STORE, Store, addresses
from test_pureflash import connected, verify
from zookeeper import ZooKeeper


@pytest.fixture(scope="module")
def server():
    """One that all tests share who do no harm to it; each has a cluster of its own."""
    server = ZooKeeper().start()
    yield server
    server.finish()


@pytest.fixture
def own_server():
    server = ZooKeeper().start()
    yield server
    server.finish()


@pytest.fixture
def tree(server):
    client = server.client()
    yield client
    client.stop()
    client.close()


@pytest.fixture
def cluster():
    return f"test-{random.randrange(1 << 48):x}"


@pytest.fixture
def new_store():
    """Makes stores that register, and have not been started yet."""
    made = []

    def make(server, cluster, options=("--register",), pool_path=None, **others):
        store = Store(options=options, **others)
        store.config.write_text(
            f"[pool.disk]\ntype=local\npath={pool_path or store.pool_path}\n"
            f"[zookeeper]\nip={server.address}\ncluster_name={cluster}\n"
        )
        made.append(store)
        return store

    with contextlib.ExitStack() as stack:
        yield make
        for store in made:
            stack.callback(store.finish)


@pytest.fixture
def daemon_of(new_daemon):
    """A running daemon that knows ZooKeeper, and of conductors nothing."""

    def make(ip, cluster, data_port=49162, **client):
        keys = {"store_port": data_port, "conn_timeout": 3, "open_volume_timeout": 3, **client}
        name = f"cluster_name={cluster}\n" if cluster else ""
        daemon = new_daemon()
        daemon.config.write_text(
            f"[zookeeper]\nip={ip}\n{name}[client]\n" + "".join(f"{key}={value}\n" for key, value in keys.items())
        )
        return daemon.start()

    return make


def begun(store):
    """Starts a store and returns it when it is registered."""
    before = store.log().count("registered in ZooKeeper as")
    store.start()
    wait_for(lambda: store.log().count("registered in ZooKeeper as") > before, "the store is registered")
    return store


def path(cluster):
    return f"/pureflash/{cluster}/conductors"


def registered(tree, cluster):
    """What the nodes of conductors hold, in their order."""
    return [tree.get(f"{path(cluster)}/{name}")[0].decode() for name in sorted(tree.get_children(path(cluster)))]


def test_a_conductor_registers_as_pureflash_s_own(server, tree, cluster, new_store):
    store = begun(new_store(server, cluster, ports=(free_port(), 49180, free_port())))
    # As recorded of a real cluster.
    assert tree.get_children(path(cluster)) == ["conductor0000000000"]
    data, status = tree.get(f"{path(cluster)}/conductor0000000000")
    assert data == store.address.encode(), "an address and no port: that is the usual one"
    assert status.ephemeralOwner != 0
    for node in ("/pureflash", f"/pureflash/{cluster}", path(cluster)):
        assert tree.exists(node).ephemeralOwner == 0
    store.stop()
    assert tree.get_children(path(cluster)) == [], "a clean stop takes it away at once"
    begun(store)
    assert tree.get_children(path(cluster)) == ["conductor0000000001"]


def test_a_registration_comes_again(server, tree, cluster, new_store):
    store = begun(new_store(server, cluster))
    # Taken away by somebody.
    tree.delete(f"{path(cluster)}/conductor0000000000")
    wait_for(lambda: tree.get_children(path(cluster)) == ["conductor0000000001"], "it is registered again")
    # The session expires.
    store.process.send_signal(signal.SIGSTOP)
    try:
        wait_for(lambda: tree.get_children(path(cluster)) == [], "its session expires")
    finally:
        store.process.send_signal(signal.SIGCONT)
    wait_for(lambda: tree.get_children(path(cluster)) == ["conductor0000000002"], "it is registered again")
    assert registered(tree, cluster) == [f"{store.address}:{store.conductor_port}"]


def test_registering_needs_to_know_where(new_store, server):
    store = new_store(server, "none")
    store.config.write_text("[pool.ram]\ntype=memory\n")
    run([STORE, *store.options]).failed(22, "--register", "[zookeeper]", "ip")
    run([STORE, *store.options, "--no-conductor"]).failed(64, "--register")


def test_a_store_serves_while_it_waits_for_zookeeper(cluster, new_store, own_server):
    own_server.kill()
    store = new_store(own_server, cluster).start()
    store.create("disk", "v", 1 << 30)
    own_server.start()
    client = own_server.client()
    wait_for(lambda: client.exists(path(cluster)) and client.get_children(path(cluster)), "it is registered")
    client.stop()
    client.close()


def test_every_command_finds_its_conductor(server, cluster, new_store, daemon_of):
    store = begun(new_store(server, cluster))
    # A server of the ensemble that is down is passed over.
    daemon = daemon_of(f"127.0.0.1:{free_port()},{server.address}", cluster, store.data_port)
    daemon.qbd("create", "disk/v", "-k", "1G").succeeded()
    assert "disk/v" in daemon.qbd("volumes", "disk").succeeded().out
    uri = daemon.qbd("map", "--export", "tcp://disk/v").succeeded().out.strip()
    verify(uri, 2)
    assert daemon.json("info", "disk/v")["conductor"] == f"{store.address}:{store.conductor_port}"
    daemon.qbd("resize", "disk/v", "-k", "2G").succeeded()
    handle = connected(uri)
    assert handle.get_size() == 2 << 30
    handle.shutdown()
    daemon.qbd("map", "--export", "disk/none").failed(2, "none")
    assert f"the conductor of cluster '{cluster}' is {store.address}:{store.conductor_port}" in daemon.log()
    wait_for(lambda: daemon.qbd("unmap", "disk/v").status == 0, "unmapped")
    daemon.qbd("delete", "disk/v").succeeded()
    # One session for all of it, on one thread of ours.
    assert daemon.log().count("the conductor of cluster") == 1


def opens(store):
    return store.faults()["seen"]["opens"]


def test_the_leader_changes_while_mapped(server, tree, cluster, new_store, daemon_of):
    # Two conductors with one catalogue, and a store that both send clients to.
    hosts = addresses(3)
    ports = free_port(), free_port(), free_port()
    data = new_store(server, cluster, ("--no-conductor",), address=hosts[2], ports=ports, conductor=False).start()
    first, second = (
        new_store(server, cluster, address=host, ports=ports, stores=[hosts[2]], pool_path=data.directory / "catalogue")
        for host in hosts[:2]
    )
    begun(first)
    begun(second)
    daemon = daemon_of(server.address, cluster, data.data_port, open_volume_timeout=10)
    daemon.qbd("create", "disk/v", "-k", "1G").succeeded()
    uri = daemon.qbd("map", "--export", "disk/v").succeeded().out.strip()
    assert (opens(first), opens(second)) == (1, 0)

    failures = []
    over = threading.Event()

    def load():
        handle = connected(uri)
        try:
            while not over.is_set():
                block = random.randbytes(4096)
                offset = random.randrange(1 << 18) * 4096
                handle.pwrite(block, offset)
                assert handle.pread(4096, offset) == block
        except (AssertionError, nbd.Error) as failure:
            failures.append(failure)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        first.stop()
        wait_for(lambda: f"is {second.address}:" in daemon.log(), "the daemon knows of the new leader")
        # What stores know is newer than what the volume knows: it has to be opened again.
        second.faults(stale="disk/v")
        wait_for(lambda: opens(second) == 1, "the new leader is asked")
        daemon.qbd("create", "disk/w", "-k", "1G").succeeded()
        # And back, without a farewell: the node goes with its session.
        begun(first)
        second.kill()
        daemon.qbd("map", "--export", "disk/w").succeeded()
        assert opens(first) == 1
    finally:
        over.set()
        thread.join()
    assert not failures, failures
    assert daemon.json("info", "disk/v")["counters"]["errors"] == 0


@pytest.mark.parametrize("how", ("killed", "paused"))
def test_io_goes_on_without_zookeeper(cluster, new_store, daemon_of, own_server, how):
    store = begun(new_store(own_server, cluster))
    daemon = daemon_of(own_server.address, cluster, store.data_port)
    daemon.qbd("create", "disk/v", "-k", "1G").succeeded()
    uri = daemon.qbd("map", "--export", "disk/v").succeeded().out.strip()
    own_server.kill() if how == "killed" else own_server.pause()
    verify(uri, 3)
    # The conductor that was known is kept to.
    before = opens(store)
    store.faults(stale="disk/v")
    handle = connected(uri)
    handle.pwrite(b"x" * 4096, 0)
    assert opens(store) > before
    daemon.qbd("create", "disk/w", "-k", "1G").succeeded()
    wait_for(lambda: "the connection to ZooKeeper" in daemon.log(), "the log tells", 30)
    handle.pwrite(b"y" * 4096, 0)
    assert handle.pread(4096, 0) == b"y" * 4096
    handle.shutdown()
    assert daemon.json("info", "disk/v")["counters"]["errors"] == 0
    if how == "killed":
        own_server.start()
        daemon.qbd("create", "disk/x", "-k", "1G").succeeded()
        store.stop()
        wait_for(lambda: "has no conductor of cluster" in daemon.log(), "ZooKeeper is listened to again", 20)


@contextlib.contextmanager
def nobody():
    yield f"127.0.0.1:{free_port()}"


@contextlib.contextmanager
def silence():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@contextlib.contextmanager
def nonsense():
    yield "no-such-host.invalid:2181"


@pytest.mark.parametrize("where", (nobody, silence, nonsense))
def test_zookeeper_is_away(where, cluster, daemon_of):
    with where() as address:
        # Less than the time of one try.
        daemon = daemon_of(address, cluster, conn_timeout=2, open_volume_timeout=3)
        began = time.monotonic()
        daemon.qbd("map", "--export", "disk/v").failed(110, "ZooKeeper", address, "ip")
        assert time.monotonic() - began < 3 + 2 * SLOWNESS
        failed = daemon.qbd("create", "disk/v", "-k", "1G")
        failed.failed(113, "ZooKeeper", address, "[zookeeper] ip")


def test_one_try_is_not_longer_than_all(cluster, daemon_of):
    with silence() as address:
        daemon = daemon_of(address, cluster, conn_timeout=60, open_volume_timeout=1)
        began = time.monotonic()
        daemon.qbd("map", "--export", "disk/v").failed(110, "ZooKeeper", address)
        assert time.monotonic() - began < 1 + 3 * SLOWNESS


def test_what_zookeeper_says_is_wrong_and_is_put_right(server, tree, cluster, new_store, daemon_of):
    store = new_store(server, cluster)
    daemon = daemon_of(server.address, cluster, store.data_port, open_volume_timeout=2)
    # The name of the cluster is wrong: waiting does not help.
    began = time.monotonic()
    daemon.qbd("map", "--export", "disk/v").failed(2, f"'{cluster}'", path(cluster), "cluster_name")
    assert time.monotonic() - began < 2 * SLOWNESS
    tree.ensure_path(path(cluster))
    wait_for(lambda: "has no conductor of cluster" in daemon.log(), "the node is noticed")
    daemon.qbd("map", "--export", "disk/v").failed(110, "no conductor of cluster", cluster)
    for content in (b"", b"not an address", b"127.0.0.1:0", b"127.0.0.1:99999", b"\xff\xfe", b"1" * 5000):
        node = tree.create(f"{path(cluster)}/a", content)
        wait_for(lambda: path(cluster) in daemon.qbd("volumes", "disk").err, "it is noticed")
        daemon.qbd("volumes", "disk").failed(71, f"{path(cluster)}/a", "IP address")
        tree.delete(node)
        wait_for(lambda: path(cluster) not in daemon.qbd("volumes", "disk").err, "it is noticed")
    store.start()
    wait_for(lambda: daemon.qbd("volumes", "disk").status == 0, "the conductor is found")
    daemon.qbd("create", "disk/v", "-k", "1G").succeeded()
    daemon.qbd("map", "--export", "disk/v").succeeded()
