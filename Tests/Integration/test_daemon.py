"""The daemon as a process: its sockets, its start and its end, and whoever misuses its control socket."""

import contextlib
import os
import signal
import socket
import stat
import subprocess

import nbd
import pytest

from bystander import Bystander
from harness import MiB, QBDD, SLOWNESS, environment, run, wait_for
from wire import CMD_WRITE, Session


def start_fails(daemon, *words, options=None):
    """Starts a daemon that must refuse to start, and returns its one line of reason."""
    before = daemon.log()
    with open(daemon.log_path, "ab") as log:
        process = subprocess.Popen(
            [QBDD] + (daemon.options if options is None else options),
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment(),
        )  # fmt: skip
        try:
            status = process.wait(10 * SLOWNESS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError("qbdd should have refused to start") from None
    said = daemon.log()[len(before) :]
    assert 0 < status < 126, f"qbdd ended with {status}:\n{said}"
    for word in words:
        assert str(word) in said, f"qbdd does not say {word!r}:\n{said}"
    return status


def test_rights_of_the_sockets(daemon):
    control, nbd_socket = daemon.socket.stat(), daemon.nbd_socket.stat()
    assert stat.S_ISSOCK(control.st_mode) and stat.S_IMODE(control.st_mode) == 0o660
    assert stat.S_ISSOCK(nbd_socket.st_mode) and stat.S_IMODE(nbd_socket.st_mode) == 0o600
    assert control.st_uid == os.geteuid()


def test_sockets_are_gone_after_the_end(daemon):
    daemon.stop()
    assert not daemon.socket.exists() and not daemon.nbd_socket.exists()


def test_paths_from_the_environment(new_daemon):
    daemon = new_daemon()
    daemon.start(options=[], variables=daemon.variables)
    daemon.volume("disk/foo", MiB)
    run(["nbdinfo", daemon.uri("disk/foo")]).succeeded()


def test_tells_systemd_when_it_is_ready(new_daemon):
    daemon = new_daemon()
    path = str(daemon.directory / "notify.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(path)
        notify.settimeout(10 * SLOWNESS)
        daemon.start(variables={"NOTIFY_SOCKET": path})
        assert b"READY=1" in notify.recv(4096).split(b"\n")
        daemon.create("disk/foo", MiB)
        daemon.stop()


def test_second_daemon_is_refused(daemon):
    """On the same control socket, NBD socket or state; the first one goes on."""
    daemon.volume("disk/foo", MiB)
    elsewhere = {"--socket": "other.sock", "--nbd-socket": "other-nbd.sock", "--state": "other-state"}
    for shared, path in (("--socket", daemon.socket), ("--nbd-socket", daemon.nbd_socket), ("--state", daemon.state)):
        options = list(daemon.options)
        for option, name in elsewhere.items():
            if option != shared:
                options[options.index(option) + 1] = str(daemon.directory / name)
        start_fails(daemon, path, options=options)
    assert daemon.alive and daemon.json("list")
    run(["nbdinfo", daemon.uri("disk/foo")]).succeeded()


def test_sockets_of_a_killed_daemon_are_replaced(daemon):
    daemon.volume("disk/foo", MiB)
    daemon.kill()
    assert daemon.socket.exists() and daemon.nbd_socket.exists()
    daemon.start()
    daemon.map("disk/foo")
    run(["nbdinfo", daemon.uri("disk/foo")]).succeeded()


def test_files_in_the_way_are_not_removed(new_daemon):
    daemon = new_daemon()
    for path in (daemon.socket, daemon.nbd_socket):
        path.write_text("precious")
        start_fails(daemon, path)
        assert path.read_text() == "precious"
        path.unlink()


@pytest.mark.parametrize(
    "text, line",
    [
        ("[pool.disk]\ntype=floppy\n", 2),
        ("[pool.disk]\ntype=local\n", 1),
        ("[pool.../etc]\ntype=memory\n", 1),
        ("[nbd]\nlisten=nowhere\n", 2),
        ("[nbd]\nlisten=127.0.0.1:99999\n", 2),
        ("[pool.disk\ntype=memory\n", 1),
        ("key without a section = 1\nnonsense\n", 2),
    ],
)
def test_bad_configuration_names_file_and_line(new_daemon, text, line):
    daemon = new_daemon()
    daemon.config.write_text(text)
    start_fails(daemon, f"{daemon.config}:{line}")


def test_unknown_key_is_a_warning_with_file_and_line(new_daemon):
    daemon = new_daemon(configuration="\n[client]\nfrobnication=1\n")
    daemon.start()
    lines = daemon.config.read_text().splitlines()
    number = lines.index("frobnication=1") + 1
    assert f"{daemon.config}:{number}" in daemon.log() and "frobnication" in daemon.log()
    daemon.volume("disk/foo", MiB)


def test_missing_configuration(new_daemon):
    daemon = new_daemon()
    daemon.config.unlink()
    start_fails(daemon, daemon.config)


def test_tcp_port_taken(new_daemon):
    daemon = new_daemon(tcp=True)
    with socket.socket() as other:
        other.bind(("127.0.0.1", daemon.port))
        other.listen()
        start_fails(daemon, f"{daemon.config}: [nbd] listen = 127.0.0.1:{daemon.port}", "port that is free")


def test_tcp_port_taken_does_not_end_what_is_mapped(new_daemon):
    daemon = new_daemon(tcp=True).start()
    uri = daemon.volume("disk/foo", MiB)
    daemon.kill()
    with socket.socket() as other:
        other.bind(("127.0.0.1", daemon.port))
        other.listen()
        daemon.start()
        run(["nbdinfo", uri]).succeeded()
        assert "port that is free; trying again every 2 s" in daemon.log()
    tcp = f"nbd://127.0.0.1:{daemon.port}/disk/foo"
    wait_for(lambda: run(["nbdinfo", tcp]).status == 0, "it listens when it can", pause=0.2)


@pytest.mark.parametrize("host, word", [("192.0.2.77", "assign"), ("nosuchhost.invalid", "name")])
def test_tcp_address_of_another_host(new_daemon, host, word):
    daemon = new_daemon(configuration=f"[nbd]\nlisten={host}:10809\n")
    assert start_fails(daemon, f"{daemon.config}: [nbd] listen = {host}:10809: ", word, "address of this host") == 99
    assert host == "192.0.2.77" or "assign" not in daemon.log()


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_tcp_port_that_the_kernel_chooses(new_daemon, host):
    daemon = new_daemon(configuration=f"[nbd]\nlisten={host}:0\n").start()
    daemon.volume("ram/foo", MiB)
    port = daemon.log().split(f"NBD clients are served at {host}:")[1].split(",")[0]
    run(["nbdinfo", f"nbd://{host}:{port}/ram/foo"]).succeeded()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("option", ["--socket", "--nbd-socket", "--state"])
def test_user_who_is_not_root(new_daemon, option):
    daemon = new_daemon()
    for path in (daemon.directory, daemon.state, daemon.pool_path):
        path.chmod(0o777)
    secret = daemon.directory / "secret"
    secret.mkdir(mode=0o700)
    options = [str(secret / "x") if before == option else word for before, word in zip(["", *daemon.options], daemon.options)]
    result = run([QBDD, *options], user=65534, group=65534, extra_groups=[])
    assert result.status == 1 and f"be root, or name another path with {option}" in result.err, str(result)


def test_two_sockets_at_one_path(new_daemon):
    daemon = new_daemon()
    daemon.nbd_socket = daemon.socket
    assert start_fails(daemon, f"--socket and --nbd-socket are both {daemon.socket}") == 64


@pytest.mark.parametrize("option", ["--socket", "--nbd-socket", "--state"])
def test_paths_that_serve_does_not_use(new_daemon, option):
    assert start_fails(new_daemon(), option, options=["--serve", "disk/foo", option, "/tmp/x"]) == 64


def test_unknown_option(new_daemon):
    assert start_fails(new_daemon(), "--frob", options=["--frob"]) == 64


def test_help_and_version():
    assert "--nbd-socket" in run([QBDD, "--help"]).succeeded().out
    assert run([QBDD, "--version"]).succeeded().out.strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ends_with_clients_connected(daemon, number):
    """Idle clients, clients in their handshake, and one in the middle of a request do not keep it."""
    uri = daemon.volume("disk/foo")
    idle = nbd.NBD()
    idle.connect_uri(uri)
    sessions = [Session(daemon.nbd_socket) for _ in range(3)]
    sessions[1].greet()
    sessions[2].greet().go("disk/foo")
    sessions[2].request(CMD_WRITE, 0, MiB, payload=b"half")
    control = socket.socket(socket.AF_UNIX)
    control.connect(str(daemon.socket))
    control.sendall(b"POST /v1/QBD")
    daemon.process.send_signal(number)
    daemon.wait_exit(10)
    for session in sessions:
        session.close()
    control.close()


def test_signals_that_do_not_end_it(daemon):
    """A broken pipe never does; SIGHUP is what a logger or a terminal sends."""
    uri = daemon.volume("disk/foo")
    daemon.process.send_signal(signal.SIGPIPE)
    daemon.process.send_signal(signal.SIGURG)
    daemon.process.send_signal(signal.SIGCHLD)
    run(["nbdinfo", uri]).succeeded()


def test_volumes_survive_a_restart(daemon):
    uri = daemon.volume("disk/foo", "16M", block_size=4096)
    daemon.create("ram/gone", MiB)
    run(["qemu-io", "-f", "raw", "-c", "write -P 7 0 16M", uri]).succeeded()
    daemon.stop()
    daemon.start()
    assert [one["volume"] for one in daemon.json("volumes")] == ["disk/foo"]
    run(["qemu-io", "-f", "raw", "-c", "read -P 7 0 16M", uri]).succeeded()
    assert daemon.json("info", "disk/foo")["block_size"] == 4096


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
def test_mappings_come_back(daemon, how):
    """With their ids, in their order, read-only if they were; what was unmapped does not."""
    daemon.volume("disk/forgotten", MiB)
    daemon.volume("disk/b", MiB)
    daemon.volume("disk/a", MiB, block_size=4096, read_only=True)
    daemon.volume("ram/gone", MiB)
    daemon.qbd("unmap", "disk/forgotten").succeeded()
    kept = ("dev_id", "vol_id", "device", "volume", "config", "size", "block_size", "read_only", "uri")
    before = [{key: one[key] for key in kept} for one in daemon.json("list") if one["volume"] != "ram/gone"]
    assert [one["volume"] for one in before] == ["disk/b", "disk/a"]
    for _ in range(3):
        if how == "SIGTERM":
            daemon.stop()
        else:
            daemon.kill()
        daemon.start()
        after = wait_for(lambda: len(daemon.json("list")) == 2 and daemon.json("list"), "two mappings are back")
        assert [{key: one[key] for key in kept} for one in after] == before
        handle = nbd.NBD()
        handle.connect_uri(daemon.uri("disk/a"))
        assert handle.is_read_only() and handle.pread(4096, 0) == bytes(4096)
        handle.shutdown()
        run(["qemu-io", "-f", "raw", "-c", "write 0 4k", daemon.uri("disk/b")]).succeeded()
        assert "ram/gone" in daemon.log(), "the log does not say what was not taken over"
    daemon.create("ram/gone", MiB)
    daemon.map("ram/gone")


def test_half_written_state_of_a_killed_daemon_is_removed(new_daemon):
    daemon = new_daemon()
    (daemon.state / "~disk@a.mapping").write_text('{"volume": "di')
    daemon.start()
    assert [path.name for path in daemon.state.glob("*.mapping")] == []


def test_damaged_state_does_not_keep_the_daemon_from_starting(daemon):
    """It says which file; the other mappings come back, and the volume can be mapped again."""
    daemon.volume("disk/a", MiB)
    daemon.volume("disk/b", MiB)
    daemon.stop()
    documents = [path for path in daemon.state.rglob("*") if path.is_file() and "disk" in path.name and "a" in path.stem]
    victims = [path for path in documents if "disk/b" not in path.read_text()]
    assert len(victims) == 1, f"one document for each mapping: {list(daemon.state.rglob('*'))}"
    victims[0].write_text('{"volume": "di')
    daemon.start()
    assert [one["volume"] for one in daemon.json("list")] == ["disk/b"]
    assert victims[0].name in daemon.log() and "the mapping of disk/a is not taken over; map it again" in daemon.log()
    assert "DecodingError" not in daemon.log()
    daemon.map("disk/a")


def test_unmap_with_a_client_connected(daemon, pool):
    """Refused as in use, and the client goes on; with --force it is done, and the client is disconnected."""
    uri = daemon.volume(f"{pool}/foo")
    handle = nbd.NBD()
    handle.connect_uri(uri)
    handle.pwrite(b"x" * 4096, 0)
    daemon.qbd("unmap", f"{pool}/foo").failed(16, f"{pool}/foo", "client")
    assert handle.pread(4096, 0) == b"x" * 4096
    handle.shutdown()
    wait_for(lambda: daemon.qbd("unmap", f"{pool}/foo").status == 0, "unmap succeeds when the client is gone")
    daemon.map(f"{pool}/foo")
    handle = nbd.NBD()
    handle.connect_uri(uri)
    handle.pread(4096, 0)
    forced = daemon.qbd("unmap", "--force", f"{pool}/foo").succeeded()
    assert forced.seconds < 2 * SLOWNESS, "an idle client delays it"
    assert daemon.json("list") == []
    with pytest.raises(nbd.Error):
        handle.pread(4096, 0)


def test_unmap_by_force_in_the_middle_of_a_load(daemon, pool):
    """Over and over: nothing hangs, nothing crashes, other volumes go on."""
    other = Bystander(daemon.volume(f"{pool}/other"), (0, 16 * MiB))
    uri = daemon.volume(f"{pool}/foo")
    for _ in range(20):
        handle = nbd.NBD()
        handle.connect_uri(uri)
        for index in range(64):
            handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(65536)), index * 65536)
        with contextlib.suppress(nbd.Error):
            handle.poll(0)
        daemon.qbd("unmap", "--force", f"{pool}/foo").succeeded()
        del handle
        daemon.map(f"{pool}/foo")
    other.assert_unharmed()
    other.stop()


# The control socket


def http(daemon, data, half_close=False):
    """Everything the control socket answers to some bytes."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20 * SLOWNESS)
        client.connect(str(daemon.socket))
        try:
            client.sendall(data)
            if half_close:
                client.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass
        answer = b""
        while True:
            try:
                part = client.recv(65536)
            except ConnectionResetError:
                part = b""
            if not part:
                return answer
            answer += part


def post(path, body):
    return f"POST {path} HTTP/1.1\r\nHost: qbd\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.mark.parametrize(
    "data",
    [
        b"\0" * 100,
        b"hello\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: qbd\r\n\r\n",
        b"GET /v1/QBD_IOC_LIST_VOLUME HTTP/1.1\r\nHost: qbd\r\n\r\n",
        post("/v1/QBD_IOC_NOTHING", b"{}"),
        post("/v1/QBD_IOC_MAP_VOLUME", b""),
        post("/v1/QBD_IOC_MAP_VOLUME", b"{"),
        post("/v1/QBD_IOC_MAP_VOLUME", b"[]"),
        post("/v1/QBD_IOC_MAP_VOLUME", b'{"volume": 1}'),
        post("/v1/QBD_IOC_CREATE_VOLUME", b'{"volume":"disk/x","config":"/x","size":-1,"block_size":512}'),
        post("/v1/QBD_IOC_CREATE_VOLUME", b'{"volume":"disk/x","config":"/x","size":1e30,"block_size":512}'),
        post("/v1/QBD_IOC_MAP_VOLUME", b"[" * 100000),
        post("/v1/QBD_IOC_MAP_VOLUME", b'{"volume":"\xff\xfe"}'),
        b"POST /v1/QBD_IOC_LIST_VOLUME HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"POST /v1/QBD_IOC_LIST_VOLUME HTTP/1.1\r\nContent-Length: 4000000000\r\n\r\n{}",
        b"POST /v1/QBD_IOC_LIST_VOLUME HTTP/1.1\r\nX: " + b"x" * 200000 + b"\r\n\r\n",
        b"POST /" + b"x" * 200000 + b" HTTP/1.1\r\n\r\n",
    ],
    ids=lambda data: repr(data[:60]),
)
def test_nonsense_on_the_control_socket(daemon, data):
    answer = http(daemon, data, half_close=True)
    assert answer == b"" or b" 200 " not in answer.split(b"\r\n")[0], f"{answer[:200]}"
    assert daemon.json("list") == []


def test_half_requests_on_the_control_socket(daemon):
    """A hundred of them, silent: the next command is answered at once."""
    clients = []
    for index in range(100):
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(daemon.socket))
        client.sendall(b"POST /v1/QBD_IOC_LIST_VOLUME HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}"[: index % 64])
        clients.append(client)
    result = daemon.qbd("list").succeeded()
    assert result.seconds < 2 * SLOWNESS
    for client in clients:
        client.close()


def test_two_users_of_one_volume_are_refused(daemon, new_daemon):
    """Another daemon on the same directory: a volume that one has mapped for writing, the other does not get."""
    daemon.volume("disk/foo")
    other = new_daemon()
    other.config.write_text(f"[pool.disk]\ntype=local\npath={daemon.pool_path}\n")
    other.start()
    other.qbd("map", "--export", "disk/foo").failed(16, "disk/foo")
    other.qbd("delete", "disk/foo").failed(16, "disk/foo")
    daemon.qbd("unmap", "disk/foo").succeeded()
    other.map("disk/foo")
    other.qbd("unmap", "disk/foo").succeeded()
