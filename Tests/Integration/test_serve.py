"""qbdd --serve: one volume on an inherited socket (systemd socket activation), for clients that spawn their server."""

import json
import os
import signal
import socket

import nbd
import pytest

from harness import KiB, MiB, QBDD, run, wait_for


@pytest.fixture
def stopped(daemon):
    """A pool with a volume in it, and no daemon."""
    daemon.create("disk/foo", "16M")
    daemon.create("disk/coarse", "16M", block_size=4096)
    daemon.stop()
    return daemon


def serve(daemon, volume="disk/foo"):
    return [QBDD, "--serve", volume, "--config", str(daemon.config)]


def listening(path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


def activate(daemon, listener, words=None, log=None):
    """Starts the server as systemd does, with the listening socket as descriptor 3."""

    def inherit():
        os.dup2(listener.fileno(), 3)
        os.environ["LISTEN_PID"] = str(os.getpid())
        os.environ["LISTEN_FDS"] = "1"
        os.execv(QBDD, words or serve(daemon))

    pid = os.fork()
    if pid == 0:
        try:
            with open(log or daemon.log_path, "ab") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            inherit()
        finally:
            os._exit(127)
    return pid


def ended(pid, seconds=10):
    """The exit status of a child that must end by itself."""

    def status():
        done, value = os.waitpid(pid, os.WNOHANG)
        return done and (os.waitstatus_to_exitcode(value),)

    try:
        return wait_for(status, "the server ends", seconds)[0]
    except AssertionError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def test_libnbd_spawns_it(stopped):
    handle = nbd.NBD()
    handle.connect_systemd_socket_activation(serve(stopped))
    assert handle.get_size() == 16 * MiB
    handle.pwrite(b"\x5a" * 64 * KiB, 64 * KiB)
    handle.flush()
    assert handle.pread(64 * KiB, 64 * KiB) == b"\x5a" * 64 * KiB
    handle.shutdown()
    again = nbd.NBD()
    again.connect_systemd_socket_activation(serve(stopped))
    assert again.pread(64 * KiB, 64 * KiB) == b"\x5a" * 64 * KiB
    again.shutdown()


@pytest.mark.parametrize("name", ["", "disk/foo"])
def test_export_name_is_the_volumes_or_empty(stopped, name):
    handle = nbd.NBD()
    handle.set_export_name(name)
    handle.connect_systemd_socket_activation(serve(stopped))
    assert handle.get_size() == 16 * MiB
    handle.shutdown()


def test_other_export_names_are_unknown(stopped):
    handle = nbd.NBD()
    handle.set_export_name("disk/coarse")
    with pytest.raises(nbd.Error):
        handle.connect_systemd_socket_activation(serve(stopped))


def test_tools_spawn_it(stopped, scratch):
    image = scratch / "image"
    image.write_bytes(os.urandom(16 * MiB))
    run(["nbdcopy", "--", image, "[", *serve(stopped), "]"]).succeeded()
    run(["nbdcopy", "--", "[", *serve(stopped), "]", scratch / "back"]).succeeded()
    assert (scratch / "back").read_bytes() == image.read_bytes()
    described = json.loads(run(["nbdinfo", "--json", "--", "[", *serve(stopped, "disk/coarse"), "]"]).succeeded().out)
    assert described["exports"][0]["export-size"] == 16 * MiB
    assert described["exports"][0]["block_size_minimum"] == 4096


def test_ends_when_the_last_client_is_gone(stopped, scratch):
    with listening(scratch / "socket") as listener:
        pid = activate(stopped, listener)
    uri = f"nbd+unix:///?socket={scratch / 'socket'}"
    first, second = nbd.NBD(), nbd.NBD()
    first.connect_uri(uri)
    second.connect_uri(uri)
    first.shutdown()
    assert second.pread(512, 0) == bytes(512)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0), "it ended while a client was connected"
    second.shutdown()
    assert ended(pid) == 0


def test_ends_when_the_last_client_vanishes(stopped, scratch):
    with listening(scratch / "socket") as listener:
        pid = activate(stopped, listener)
    handle = nbd.NBD()
    handle.connect_uri(f"nbd+unix:///?socket={scratch / 'socket'}")
    del handle
    assert ended(pid) == 0


def test_client_that_only_lists_ends_it_too(stopped, scratch):
    with listening(scratch / "socket") as listener:
        pid = activate(stopped, listener)
    listed = json.loads(run(["nbdinfo", "--list", "--json", f"nbd+unix:///?socket={scratch / 'socket'}"]).succeeded().out)
    assert len(listed["exports"]) == 1
    assert ended(pid) == 0


def test_sigterm_ends_it(stopped, scratch):
    with listening(scratch / "socket") as listener:
        pid = activate(stopped, listener)
    handle = nbd.NBD()
    handle.connect_uri(f"nbd+unix:///?socket={scratch / 'socket'}")
    handle.pwrite(b"\x11" * 4096, 0)
    os.kill(pid, signal.SIGTERM)
    assert ended(pid) == 0


def test_without_an_inherited_socket(stopped):
    result = run(serve(stopped))
    assert 0 < result.status < 126 and result.err.strip(), f"{result}"


@pytest.mark.parametrize("volume", ["disk/nothing", "nopool/foo", "../x", "foo", "disk/"])
def test_volume_that_cannot_be_served(stopped, scratch, volume):
    log = scratch / "log"
    with listening(scratch / "socket") as listener:
        pid = activate(stopped, listener, serve(stopped, volume), log)
        status = ended(pid)
    assert status in (2, 22), f"status {status}: {log.read_text()}"
    assert log.read_text().strip(), "it does not say why"


def test_volume_in_use_is_not_served(stopped, scratch):
    stopped.start()
    stopped.map("disk/foo")
    log = scratch / "log"
    with listening(scratch / "socket") as listener:
        status = ended(activate(stopped, listener, log=log))
    assert status == 16 and "disk/foo" in log.read_text()


def test_memory_volume_cannot_be_served_to_nobody(stopped):
    """A memory pool is empty in a new process: the text says that there is no such volume."""
    handle = nbd.NBD()
    with pytest.raises(nbd.Error):
        handle.connect_systemd_socket_activation(serve(stopped, "ram/foo"))
