"""The command as people and scripts use it: what it prints, and how it fails."""

import concurrent.futures
import contextlib
import ctypes
import errno
import os
import pathlib
import re
import socket
import subprocess
import threading
import time

import nbd
import pytest

from harness import KiB, MiB, QBD, environment, run, wait_for

HEADER = "dev_id vol_id device volume config read_bps write_bps read_iops write_iops".split()


def tree(path):
    """Every file below a directory."""
    return sorted(str(file) for file in pathlib.Path(path).rglob("*"))


def table(result):
    """The lines of an output in columns, each split on blanks as scripts do it."""
    lines = [line.split() for line in result.succeeded().out.splitlines()]
    assert lines and all(len(line) == len(lines[0]) for line in lines), f"not every line has every field: {result}"
    return lines[0], lines[1:]


def listed(daemon):
    """The rows of `qbd list`, by volume."""
    header, rows = table(daemon.qbd("list"))
    assert header == HEADER
    return {row[3]: row for row in rows}


# What works


def test_a_volume_from_create_to_delete(daemon, pool):
    volume = f"{pool}/foo1"
    created = daemon.qbd("create", volume, "-k", "64M").succeeded()
    assert created.out == "" and created.err == ""
    mapped = daemon.qbd("map", "--export", volume).succeeded()
    assert mapped.out == f"nbd+unix:///{volume}?socket={daemon.nbd_socket}\n" and mapped.err == ""
    assert set(listed(daemon)) == {volume}
    info = daemon.qbd("info", volume).succeeded()
    assert volume in info.out and info.err == ""
    unmapped = daemon.qbd("unmap", volume).succeeded()
    assert unmapped.out == "" and unmapped.err == ""
    assert listed(daemon) == {}
    deleted = daemon.qbd("delete", volume).succeeded()
    assert deleted.out == "" and deleted.err == ""
    assert table(daemon.qbd("volumes"))[1] == []


def test_list_has_exactly_the_documented_columns(daemon):
    assert daemon.qbd("list").succeeded().out.split() == HEADER, "with nothing mapped there is the header only"
    volumes = ["disk/foo1", "ram/bar.2", "disk/A_b-c"]
    for volume in volumes:
        daemon.volume(volume, MiB)
    header, rows = table(daemon.qbd("list"))
    assert header == HEADER
    assert [row[3] for row in rows] == volumes, "in the order of mapping"
    ids = [row[0] for row in rows]
    assert all(re.fullmatch("[0-9]+", one) for one in ids) and len(set(ids)) == 3
    assert all(re.fullmatch("0x[0-9a-f]+", row[1]) for row in rows) and len({row[1] for row in rows}) == 3
    assert all(row[2] == "-" for row in rows), "there is no kernel device"
    assert all(row[4] == str(daemon.config) for row in rows)
    assert all(row[5:] == ["0", "0", "0", "0"] for row in rows), "unlimited"


def test_list_json(daemon):
    assert daemon.json("list") == []
    uri = daemon.volume("disk/foo1", MiB, read_only=False)
    daemon.volume("ram/foo2", 2 * MiB, block_size=4096, read_only=True)
    one, two = daemon.json("list")
    row = listed(daemon)["disk/foo1"]
    for key, field in zip(HEADER, row):
        assert str(one[key]) == field, f"{key} differs between the list and its JSON"
    assert one["uri"] == uri and one["state"] == "normal"
    assert (one["size"], one["block_size"], one["read_only"], one["protocol"]) == (MiB, 512, False, "local")
    assert (two["size"], two["block_size"], two["read_only"], two["protocol"]) == (2 * MiB, 4096, True, "memory")


def test_volumes(daemon):
    daemon.create("disk/b", "1M")
    daemon.create("disk/a", "2G", block_size=4096)
    daemon.create("ram/c", "512K")
    header, rows = table(daemon.qbd("volumes"))
    assert header == ["vol_id", "volume", "size", "block_size", "created"]
    by_name = {row[1]: row for row in rows}
    assert by_name["disk/a"][2:4] == [str(2 << 30), "4096"]
    assert by_name["disk/b"][2:4] == [str(MiB), "512"]
    assert by_name["ram/c"][2:4] == [str(512 * KiB), "512"]
    assert len({row[0] for row in rows}) == 3
    assert {row[1] for row in table(daemon.qbd("volumes", "disk"))[1]} == {"disk/a", "disk/b"}
    described = {one["volume"]: one for one in daemon.json("volumes")}
    assert set(described) == set(by_name)
    assert described["disk/a"]["size"] == 2 << 30 and described["disk/a"]["vol_id"] == by_name["disk/a"][0]
    assert abs(described["disk/a"]["created"] - time.time()) < 100


def test_volume_keeps_its_id(daemon):
    daemon.create("disk/foo", MiB)
    (created,) = daemon.json("volumes", "disk")
    for _ in range(2):
        daemon.map("disk/foo")
        assert listed(daemon)["disk/foo"][1] == created["vol_id"]
        daemon.qbd("unmap", "disk/foo").succeeded()
    daemon.stop()
    daemon.start()
    assert daemon.json("volumes", "disk") == [created]


def test_info(daemon, pool):
    uri = daemon.volume(f"{pool}/foo", "64M", block_size=4096)
    text = daemon.qbd("info", f"{pool}/foo").succeeded().out
    for word in (f"{pool}/foo", uri, str(64 * MiB), "4096", "normal", str(daemon.config)):
        assert word in text, f"info does not tell {word}:\n{text}"
    run(["qemu-io", "-f", "raw", "-c", "write 0 1M", "-c", "read 0 64k", "-c", "flush", uri]).succeeded()
    info = daemon.json("info", f"{pool}/foo")
    assert info["volume"] == f"{pool}/foo" and info["device"] == "-" and info["size"] == 64 * MiB
    counters = info["counters"]
    assert counters["written_bytes"] == MiB and counters["writes"] >= 1
    assert counters["read_bytes"] >= 64 * KiB and counters["reads"] >= 1
    assert counters["flushes"] >= 1 and counters["errors"] == 0 and counters["in_flight"] == 0
    assert info["latency"]["writes"]["count"] == counters["writes"]
    assert info["latency"]["writes"]["max_us"] > 0
    assert listed(daemon)[f"{pool}/foo"][1] == info["vol_id"]


def test_info_counts_connections(daemon):
    uri = daemon.volume("disk/foo")
    handles = [nbd.NBD() for _ in range(3)]
    for handle in handles:
        handle.connect_uri(uri)
        handle.pread(512, 0)
    assert daemon.json("info", "disk/foo")["connections"] == 3
    for handle in handles:
        handle.shutdown()


def test_json_of_everything_that_prints(daemon):
    for words in (
        ["create", "disk/foo", "-k", "1M"], ["volumes"], ["map", "--export", "disk/foo"], ["list"],
        ["info", "disk/foo"], ["unmap", "disk/foo"], ["delete", "disk/foo"], ["version"],
    ):  # fmt: skip
        daemon.json(*words)


def test_both_spellings(daemon):
    """Letters and words run the same code; the order of letters is free, and options may be joined to their values."""
    daemon.create("disk/foo", MiB)
    uri = daemon.uri("disk/foo")
    config = str(daemon.config)
    spellings = {
        "map": [
            ["map", "--export", "disk/foo"],
            ["map", "disk/foo", "--export"],
            ["map", "tcp://disk/foo", "--export", "-c", config],
            ["-m", "disk/foo", "--export"],
            ["--export", "-m", "disk/foo"],
            ["-mdisk/foo", "--export"],
            ["--map", "disk/foo", "--export"],
            ["--map=disk/foo", "--export", f"--config={config}"],
            ["-c", config, "-m", "tcp://disk/foo", "--export"],
        ],
        "list": [["list"], ["-l"], ["--list"], ["-l", "-c", config], ["-c", config, "-l"], ["list", "-c", config]],
        "info": [["info", "disk/foo"], ["-i", "disk/foo"], ["--info", "disk/foo"], ["-i", "tcp://disk/foo"]],
        "unmap": [
            ["unmap", "disk/foo"],
            ["-u", "disk/foo"],
            ["--unmap", "disk/foo"],
            ["-u", "tcp://disk/foo", "-c", config],
            ["-c", config, "-udisk/foo"],
        ],
    }
    for words in spellings["map"]:
        assert daemon.qbd(*words).succeeded().out == uri + "\n"
    outputs = {daemon.qbd(*words).succeeded().out for words in spellings["list"]}
    assert len(outputs) == 1 and "disk/foo" in outputs.pop()
    for words in spellings["info"]:
        assert "disk/foo" in daemon.qbd(*words).succeeded().out
    for words in spellings["unmap"]:
        daemon.map("disk/foo")
        daemon.qbd(*words).succeeded()
        assert listed(daemon) == {}


def test_verbose_says_more_on_stderr_only(daemon):
    daemon.create("disk/foo", MiB)
    mapped = daemon.qbd("map", "--export", "disk/foo", "-V").succeeded()
    assert mapped.out == daemon.uri("disk/foo") + "\n" and "disk/foo" in mapped.err
    unmapped = daemon.qbd("-V", "-u", "disk/foo").succeeded()
    assert unmapped.out == "" and "disk/foo" in unmapped.err


def test_version(daemon):
    said = [daemon.qbd(word).succeeded().out for word in ("version", "-v", "--version")]
    assert len(set(said)) == 1 and re.search(r"\d+\.\d+", said[0])
    version = daemon.json("version")
    assert version["qbd"] in said[0] and version["qbdd"] == version["qbd"] and version["pid"] == daemon.pid


def test_version_without_a_daemon(new_daemon):
    daemon = new_daemon()
    assert re.search(r"\d+\.\d+", daemon.qbd("--version").succeeded().out)


VERBS = [
    "map", "unmap", "remap", "list", "map-all", "unmap-all", "throttle", "suspend", "resume", "info", "resize",
    "create", "delete", "volumes", "version", "help",
]  # fmt: skip


def test_help():
    """Needs no daemon, goes to stdout, and names every verb."""
    said = [run([QBD, word]).succeeded() for word in ("help", "-h", "--help")]
    assert len({result.out for result in said}) == 1 and all(result.err == "" for result in said)
    snapshots = run([QBD, "help", "snapshot", "list"]).succeeded().out
    assert "oldest first" in snapshots and snapshots == run([QBD, "snapshot", "list", "--help"]).succeeded().out
    assert run([QBD, "help", "snapshot"]).succeeded().out.endswith("for detailed help.\n")
    for verb in VERBS:
        assert verb in said[0].out
        for words in ([verb, "--help"], ["help", verb]):
            result = run([QBD, *words]).succeeded()
            assert verb in result.out and result.err == ""


def test_every_option_that_takes_a_value_is_given_once_and_not_empty():
    """Also in front of the verb."""
    for words in [[verb] for verb in VERBS] + [["snapshot", "create"], ["snapshot", "list"], ["clone"]]:
        text = run([QBD, *words, "--help"]).succeeded().out
        options = re.findall(r"^ +(?:-\w, )?(--[\w-]+) <", text, re.MULTILINE)
        assert {"--socket", "--timeout"} <= set(options)
        for option in options:
            for line in ([*words, option, ""], [*words, f"{option}="], [option, "", *words]):
                run([QBD, *line]).failed(64, f"{option} needs a value")
            run([QBD, *words, option, "1", option, "1"]).failed(64, f"{option} is given twice")


def test_sizes(daemon):
    for text, size in (("1048576", MiB), ("1024K", MiB), ("1m", MiB), ("1G", 1 << 30), ("2t", 2 << 40), ("1MiB", MiB)):
        daemon.create("disk/sized", text)
        assert daemon.json("volumes", "disk")[0]["size"] == size
        daemon.qbd("delete", "disk/sized").succeeded()


def test_mapping_twice_is_a_success_that_changes_nothing(daemon, pool):
    daemon.volume(f"{pool}/foo")
    before = daemon.json("list")
    daemon.map(f"{pool}/foo")
    assert daemon.json("list") == before


def test_mapping_twice_in_another_way_is_refused(daemon, pool):
    daemon.volume(f"{pool}/foo")
    before = daemon.json("list")
    result = daemon.qbd("map", "--export", "--read-only", f"{pool}/foo")
    assert result.status not in (0, 64)
    result.failed(result.status, f"{pool}/foo", "mapped", "writable")
    other = daemon.directory / "other.conf"
    other.write_text(daemon.config.read_text())
    result = daemon.qbd("map", "--export", f"{pool}/foo", "-c", other)
    assert result.status not in (0, 64)
    result.failed(result.status, f"{pool}/foo", "mapped")
    assert daemon.json("list") == before
    # And it still serves.
    run(["qemu-io", "-f", "raw", "-c", "write 0 4k", daemon.uri(f"{pool}/foo")]).succeeded()


def test_paths_come_from_options_too(daemon):
    bare = environment()
    options = ["--socket", daemon.socket, "-c", daemon.config]
    run([QBD, "create", "disk/foo", "-k", "1M", *options], env=bare).succeeded()
    result = run([QBD, "map", "--export", "disk/foo", *options], env=bare).succeeded()
    assert result.out == daemon.uri("disk/foo") + "\n"
    assert "disk/foo" in run([QBD, "--socket", daemon.socket, "-l"], env=bare).succeeded().out


def test_config_may_be_relative(daemon):
    daemon.create("disk/foo", MiB)
    daemon.qbd("map", "--export", "disk/foo", "-c", "qbd.conf", cwd=daemon.directory).succeeded()
    assert listed(daemon)["disk/foo"][4] == str(daemon.config)


def test_a_configuration_is_the_same_however_its_path_is_spelled(daemon):
    """But for `..` behind a symbolic link, which leads to where the link does."""
    daemon.create("disk/foo", MiB)
    folder, name = daemon.directory, daemon.directory.name
    spellings = ["./qbd.conf", "qbd.conf", f"{folder}//qbd.conf", f"/.{folder}/./qbd.conf", f"../{name}/qbd.conf", "state/../qbd.conf"]
    for config in spellings:
        daemon.qbd("map", "--export", "disk/foo", "-c", config, cwd=folder).succeeded()
        daemon.qbd("map", "--export", "disk/foo", cwd=folder).succeeded()
        daemon.qbd("map", "--export", "disk/foo", cwd=folder, variables={"QBD_CONFIG": f"/{folder}/./qbd.conf"}).succeeded()
        assert listed(daemon)["disk/foo"][4] == str(daemon.config)
        daemon.qbd("unmap", "disk/foo", "-c", spellings[-1], cwd=folder).succeeded()
    file = folder / "map.conf"
    file.write_text(f"disk/foo export=1 config={folder}//state/../qbd.conf\n")
    daemon.qbd("map-all", "-f", file).succeeded()
    assert listed(daemon)["disk/foo"][4] == str(daemon.config)
    daemon.qbd("unmap-all", "-f", file).succeeded()
    assert listed(daemon) == {}

    other = folder / "elsewhere" / "state"
    other.mkdir(parents=True)
    (folder / "elsewhere" / "qbd.conf").write_text(daemon.config.read_text())
    (folder / "link").symlink_to(other)
    daemon.qbd("map", "--export", "disk/foo", "-c", "link/../qbd.conf", cwd=folder).succeeded()
    assert listed(daemon)["disk/foo"][4] == f"{folder}/link/../qbd.conf"


def test_many_commands_at_once(daemon):
    """Every volume is created, mapped, unmapped and deleted by a command of its own, all at the same time."""
    failures = []

    def life(index):
        volume = f"{'disk' if index % 2 else 'ram'}/v{index}"
        try:
            for words in (
                ["create", volume, "-k", "1M"], ["map", "--export", volume], ["info", volume], ["unmap", volume],
                ["delete", volume],
            ):  # fmt: skip
                daemon.qbd(*words).succeeded()
        except AssertionError as failure:
            failures.append(str(failure))

    threads = [threading.Thread(target=life, args=(index,)) for index in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    assert daemon.json("list") == [] and daemon.json("volumes") == []


def test_same_volume_created_by_many_at_once_is_created_once(daemon, pool):
    statuses = []
    threads = [
        threading.Thread(target=lambda: statuses.append(daemon.qbd("create", f"{pool}/foo", "-k", "1M").status))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [0] + [17] * 7


# What fails, and how

IOCTL = "failed to ioctl /dev/qbdctl with QBD_IOC_{}:{}"


def test_unknown_volume(daemon, pool):
    for words, ioctl in (
        (["map", "--export", f"{pool}/nothing"], "MAP_VOLUME"),
        (["delete", f"{pool}/nothing"], "DELETE_VOLUME"),
    ):
        daemon.qbd(*words).failed(2, f"{pool}", "nothing", IOCTL.format(ioctl, 2))


def test_unknown_pool(daemon):
    for words in (
        ["create", "nopool/foo", "-k", "1M"],
        ["map", "--export", "nopool/foo"],
        ["delete", "nopool/foo"],
        ["volumes", "nopool"],
    ):
        daemon.qbd(*words).failed(2, "nopool")


def test_volume_exists(daemon, pool):
    daemon.create(f"{pool}/foo", MiB)
    before = daemon.json("volumes")
    daemon.qbd("create", f"{pool}/foo", "-k", "2M").failed(17, f"{pool}/foo", "exists")
    assert daemon.json("volumes") == before


def test_not_mapped(daemon, pool):
    daemon.create(f"{pool}/foo", MiB)
    for volume in (f"{pool}/foo", f"{pool}/nothing"):
        daemon.qbd("unmap", volume).failed(25, volume, "not mapped", IOCTL.format("UNMAP_VOLUME", 25))
        daemon.qbd("-u", volume).failed(25, volume, "not mapped")
        daemon.qbd("info", volume).failed(25, volume, "not mapped", IOCTL.format("VOLUME_INFO", 25))


def test_remap(daemon, pool):
    """What is not mapped is an error as for unmap; an export has no kernel device that could need fresh connections."""
    uri = daemon.volume(f"{pool}/foo")
    with_client = nbd.NBD()
    with_client.connect_uri(uri)
    before = daemon.json("list")[0]["volume"]
    for words in (["remap", f"{pool}/foo"], ["-r", f"{pool}/foo"], ["--remap", f"tcp://{pool}/foo"]):
        assert daemon.qbd(*words).succeeded().out == ""
    assert with_client.pread(512, 0) == bytes(512) and daemon.json("list")[0]["volume"] == before
    with_client.shutdown()
    for volume in (f"{pool}/bar", "nopool/foo"):
        daemon.qbd("remap", volume).failed(25, volume, "not mapped", IOCTL.format("REMAP_VOLUME", 25))


def test_delete_while_mapped(daemon, pool):
    uri = daemon.volume(f"{pool}/foo")
    run(["qemu-io", "-f", "raw", "-c", "write -P 1 0 4k", uri]).succeeded()
    daemon.qbd("delete", f"{pool}/foo").failed(16, f"{pool}/foo", "unmap")
    run(["qemu-io", "-f", "raw", "-c", "read -P 1 0 4k", uri]).succeeded()
    daemon.qbd("unmap", f"{pool}/foo").succeeded()
    daemon.qbd("delete", f"{pool}/foo").succeeded()
    daemon.qbd("map", "--export", f"{pool}/foo").failed(2, f"{pool}", "foo")


def test_unmapped_volume_is_no_longer_served(daemon, pool):
    uri = daemon.volume(f"{pool}/foo")
    run(["nbdinfo", uri]).succeeded()
    daemon.qbd("unmap", f"{pool}/foo").succeeded()
    assert run(["nbdinfo", uri]).status != 0
    assert daemon.map(f"{pool}/foo") == uri
    run(["nbdinfo", uri]).succeeded()


def test_deleted_volume_leaves_no_data_behind(daemon, pool):
    """A volume of the same name starts with zeros."""
    uri = daemon.volume(f"{pool}/foo", "4M")
    run(["qemu-io", "-f", "raw", "-c", "write -P 1 0 4M", uri]).succeeded()
    daemon.qbd("unmap", f"{pool}/foo").succeeded()
    daemon.qbd("delete", f"{pool}/foo").succeeded()
    assert [path for path in tree(daemon.pool_path) if "foo" in path] == []
    daemon.volume(f"{pool}/foo", "4M")
    run(["qemu-io", "-f", "raw", "-c", "read -P 0 0 4M", uri]).succeeded()


def test_daemon_not_running(new_daemon):
    daemon = new_daemon()
    for words in (
        ["list"], ["-l"], ["map", "--export", "disk/foo"], ["unmap", "disk/foo"], ["create", "disk/foo", "-k", "1M"],
        ["delete", "disk/foo"], ["volumes"], ["info", "disk/foo"],
    ):  # fmt: skip
        daemon.qbd(*words).failed(111, "not running", str(daemon.socket))


def test_daemon_killed(daemon):
    """Its socket is still there, and nobody listens."""
    daemon.kill()
    assert daemon.socket.exists()
    daemon.qbd("list").failed(111, "not running", str(daemon.socket))


@pytest.mark.parametrize("manner", ["closes", "says nonsense", "is another HTTP server", "is an NBD server"])
def test_socket_of_something_else(daemon, manner):
    if manner == "is an NBD server":
        result = daemon.qbd("list", "--socket", daemon.nbd_socket)
        result.failed(result.status, str(daemon.nbd_socket), "not")
        assert result.status not in (0, 64, 111)
        return
    path = str(daemon.directory / "other.sock")
    answers = {
        "closes": b"",
        "says nonsense": b"\0\1\2 220 hello\r\n" * 10,
        "is another HTTP server": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
    }
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def serve():
            client, _ = listener.accept()
            with client:
                client.recv(4096)
                client.sendall(answers[manner])

        server = threading.Thread(target=serve, daemon=True)
        server.start()
        result = daemon.qbd("list", "--socket", path)
        server.join()
    assert result.status not in (0, 64, 111), "that is not: the daemon is not running"
    result.failed(result.status, path, "not")


def test_silent_socket_times_out(daemon):
    path = str(daemon.directory / "silent.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        result = daemon.qbd("list", "--socket", path, "--timeout", "1")
        result.failed(110, path)
        assert result.seconds < 5


def test_socket_path_that_is_a_file(daemon):
    result = daemon.qbd("list", "--socket", daemon.config)
    assert result.status not in (0, 64)
    result.failed(result.status, str(daemon.config), "not a socket")


def test_socket_path_too_long(daemon):
    result = daemon.qbd("list", "--socket", f"/tmp/{'s' * 200}.sock")
    assert result.status not in (0, 64)
    result.failed(result.status, "socket")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_no_permission(daemon):
    daemon.directory.chmod(0o755)
    for words in (["list"], ["create", "disk/foo", "-k", "1M"], ["map", "--export", "disk/foo"]):
        daemon.qbd(*words, user=65534, group=65534, extra_groups=[]).failed(1, "permission", str(daemon.socket))
    assert daemon.json("volumes") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_nobody_learns_what_a_file_says_that_he_may_not_read(daemon):
    """Who may use the control socket still reads configurations by his own rights."""
    daemon.directory.chmod(0o755)
    os.chown(daemon.socket, 0, 65534)
    somebody = {"user": 65534, "group": 65534, "extra_groups": [1234]}
    path = daemon.directory / "named.conf"
    good = "[pool.other]\ntype=memory\n"
    # Mode, owner, group, and whether he may read it. A group's right goes before everybody's, as for open(2).
    for mode, user, group, may in [
        (0o600, 0, 0, False), (0o640, 0, 0, False), (0o604, 0, 0, True), (0o600, 65534, 0, True),
        (0o640, 0, 65534, True), (0o640, 0, 1234, True), (0o604, 0, 1234, False),
    ]:  # fmt: skip
        for text in ("s3cr3t-token\n", good):
            path.write_text(text)
            os.chown(path, user, group)
            path.chmod(mode)
            # That root has asked before helps nobody.
            assert daemon.qbd("volumes", "other", "-c", path).status == (0 if text == good else 22)
            for words in (["volumes", "other"], ["volumes"], ["map", "--export", "other/a"], ["delete", "other/a"]):
                result = daemon.qbd(*words, "-c", path, **somebody)
                if not may:
                    result.failed(1, str(path), "no permission")
                    assert "s3cr3t" not in result.err and f"{path}:1" not in result.err, result
                elif text != good:
                    result.failed(22, f"{path}:1", "s3cr3t")
                else:
                    assert result.status == (0 if "volumes" in words else 2), result
    daemon.qbd("volumes", "-c", "/etc/shadow", **somebody).failed(1, "/etc/shadow", "no permission")
    for place in (daemon.directory, "/dev/null"):
        daemon.qbd("volumes", "-c", place, **somebody).failed(21 if place != "/dev/null" else 22, "not a regular file")


@pytest.fixture
def dead_mount(tmp_path):
    """A FUSE file system whose server never answers, and what ends the server: then who waits for it fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        server = os.open("/dev/fuse", os.O_RDWR)
    except OSError as error:
        pytest.skip(f"no FUSE here: {error}")
    options = b"fd=%d,rootmode=40000,user_id=0,group_id=0" % server
    if libc.mount(b"dead", os.fsencode(tmp_path), b"fuse", 0, options) != 0:
        os.close(server)
        pytest.skip(f"FUSE cannot be mounted here: {os.strerror(ctypes.get_errno())}")
    with contextlib.ExitStack() as end:
        end.callback(os.close, server)
        yield tmp_path, end.close
    assert libc.umount2(os.fsencode(tmp_path), 2) == 0, os.strerror(ctypes.get_errno())


def test_configuration_on_a_dead_mount(daemon, dead_mount):
    """Commands that name it wait, all by one thread, and the others go on."""
    folder, end = dead_mount
    path = folder / "qbd.conf"
    daemon.volume("ram/a", MiB)
    before = daemon.threads()
    with concurrent.futures.ThreadPoolExecutor(8) as executor:
        try:
            stuck = [executor.submit(daemon.qbd, "volumes", "x", "-c", path, timeout=120) for _ in range(8)]
            wait_for(lambda: daemon.threads() > before, "a thread waits for the mount")
            for words in (["list"], ["volumes"], ["volumes", "ram"], ["info", "ram/a"], ["unmap", "ram/a"]):
                daemon.qbd(*words).succeeded()
            daemon.volume("disk/b", MiB)
            assert not any(each.done() for each in stuck)
            threads = daemon.threads()
        finally:
            end()
        for each in stuck:
            each.result().failed(107, str(path), "cannot read the configuration")
    assert threads < before + 8, "each command took a thread"


BAD_NAMES = {
    "climbs": "../x",
    "climbs from a pool": "disk/../x",
    "is dot dot": "disk/..",
    "is dot": "disk/.",
    "has three parts": "a/b/c",
    "ends in a slash": "disk/foo/",
    "starts with a slash": "/disk/foo",
    "has two slashes": "disk//foo",
    "has no pool": "foo",
    "has an empty pool": "/foo",
    "has an empty volume": "disk/",
    "is empty": "",
    "is a slash": "/",
    "has a blank": "disk/a b",
    "has a tab": "disk/a\tb",
    "has a newline": "disk/a\nb",
    "has an escape": "disk/a\x1b[31mb",
    "has an encoded slash": "disk/a%2Fb",
    "has an encoded nul": "disk/a%00b",
    "has a backslash": "disk/a\\b",
    "has a colon": "disk/a:b",
    "is not ASCII": "disk/ä",
    "has a star": "disk/*",
    "has a volume of 129 bytes": "disk/" + "v" * 129,
    "has a pool of 129 bytes": "p" * 129 + "/foo",
    "is 100,000 bytes long": "disk/" + "v" * 100000,
    "has a scheme only": "tcp://",
    "has an unknown scheme": "http://disk/foo",
}


@pytest.mark.parametrize("fault", BAD_NAMES)
def test_bad_name(daemon, fault):
    """Refused by the command, and by the daemon when it is asked without the command; no path is touched."""
    name = BAD_NAMES[fault]
    # The lock of the pool, which is looked through at the start, is there then.
    daemon.json("volumes")
    before = tree(daemon.directory)
    for words in (
        ["create", name, "-k", "1M"], ["delete", name], ["map", "--export", name], ["unmap", name], ["info", name]
    ):  # fmt: skip
        daemon.qbd(*words).failed(22)
    config = str(daemon.config)
    for command, fields in (
        ("CREATE_VOLUME", {"config": config, "size": MiB, "block_size": 512}),
        ("DELETE_VOLUME", {"config": config}),
        ("MAP_VOLUME", {"config": config, "read_only": False, "export": True}),
        ("UNMAP_VOLUME", {}),
        ("VOLUME_INFO", {}),
    ):
        status, answer = daemon.post(f"QBD_IOC_{command}", volume=name, **fields)
        assert status == 400 and answer["error"]["code"] == 22, f"{command}: {status} {answer}"
    assert daemon.json("volumes") == [] and daemon.json("list") == []
    assert tree(daemon.directory) == before


def test_bad_name_with_nul(daemon):
    """Only the daemon can be asked that."""
    for name in ("disk/foo\0", "disk/\0", "disk\0/foo", "\0", "disk/foo\0/../x"):
        status, answer = daemon.post(
            "QBD_IOC_CREATE_VOLUME", volume=name, config=str(daemon.config), size=MiB, block_size=512
        )
        assert status == 400 and answer["error"]["code"] == 22
    assert daemon.json("volumes") == []


def test_longest_and_oddest_names_work(daemon, pool):
    names = ["v" * 128, "...", "-", "-x", "a.volume", "a.raw", ".hidden", "a.new", ".a.raw.new", "A", "a", "0", "_"]
    for name in names:
        daemon.qbd("create", "-k", "1M", "--", f"{pool}/{name}").succeeded()
    assert {one["volume"] for one in daemon.json("volumes", pool)} == {f"{pool}/{name}" for name in names}
    for name in names:
        uri = daemon.qbd("map", "--export", "--", f"{pool}/{name}").succeeded().out.strip()
        run(["qemu-io", "-f", "raw", "-c", "write -P 5 0 4k", "-c", "read -P 5 0 4k", uri]).succeeded()
    for name in names:
        daemon.qbd("unmap", "--", f"{pool}/{name}").succeeded()
        daemon.qbd("delete", "--", f"{pool}/{name}").succeeded()
    assert daemon.json("volumes") == []
    if pool == "disk":
        assert [path for path in tree(daemon.pool_path) if any(f"/{name}." in path for name in names)] == []


@pytest.mark.parametrize("size", ["0", "-1", "abc", "", "1.5G", "1000", "10X", "99999999999999999999", "9P999", "8E", "1 M M"])
def test_bad_size(daemon, size):
    result = daemon.qbd("create", "disk/foo", f"--size={size}")
    assert result.status in (22, 64)
    result.failed(result.status)
    assert daemon.json("volumes") == []


def test_bad_size_asked_of_the_daemon(daemon, pool):
    config = str(daemon.config)
    for size, block_size in ((0, 512), (1000, 512), (512, 4096), (MiB, 0), (MiB, 1), (MiB, 513), (MiB, 8192), (2**63, 512)):
        status, answer = daemon.post(
            "QBD_IOC_CREATE_VOLUME", volume=f"{pool}/foo", config=config, size=size, block_size=block_size
        )
        assert status == 400 and answer["error"]["code"] == 22, f"{size} {block_size}: {status} {answer}"
    assert daemon.json("volumes") == []


def test_volume_larger_than_there_is_address_space(daemon):
    result = daemon.qbd("create", "ram/foo", "-k", "4096P")
    assert result.status not in (0, 64)
    result.failed(result.status)
    assert daemon.json("volumes") == []
    daemon.volume("ram/foo", MiB)


def test_bad_block_size(daemon):
    for size in ("0", "511", "8192", "x"):
        result = daemon.qbd("create", "disk/foo", "-k", "1M", "--block-size", size)
        assert result.status in (22, 64)
        result.failed(result.status)


def test_bad_config(daemon):
    daemon.create("disk/foo", MiB)
    missing = daemon.directory / "missing.conf"
    daemon.qbd("map", "--export", "disk/foo", "-c", missing).failed(2, str(missing))
    broken = daemon.directory / "broken.conf"
    broken.write_text("[pool.disk]\ntype=floppy\n")
    result = daemon.qbd("map", "--export", "disk/foo", "-c", broken)
    result.failed(22, f"{broken}:2")
    other = daemon.directory / "other.conf"
    other.write_text(f"[pool.other]\ntype=local\npath={daemon.pool_path}\n")
    daemon.qbd("map", "--export", "disk/foo", "-c", other).failed(2, "disk")


def test_pool_directory_is_missing(new_daemon):
    """Its last component is made; what is above is the administrator's."""
    daemon = new_daemon()
    daemon.config.write_text(daemon.config.read_text().replace(str(daemon.pool_path), f"{daemon.pool_path}/a/b"))
    daemon.start()
    words = ("pool disk:", f"{daemon.pool_path}/a/b", "directory above it", "[pool.disk]")
    daemon.qbd("create", "disk/foo", "-k", "1M").failed(2, *words)
    daemon.qbd("volumes", "disk").failed(2, *words)
    # The other pool does not suffer, and the pool works once there is a place for its directory.
    daemon.volume("ram/foo", MiB)
    (daemon.pool_path / "a").mkdir()
    daemon.volume("disk/foo", MiB)
    assert list((daemon.pool_path / "a" / "b").iterdir())


def test_pool_directory_is_a_file(new_daemon):
    daemon = new_daemon(configuration="[pool.bad]\ntype=local\npath=/etc/passwd\n").start()
    daemon.qbd("volumes", "bad").failed(20, "pool bad:", "/etc/passwd", "path in [pool.bad]")


USAGE_ERRORS = [
    [],
    ["frobnicate"],
    ["map"],
    ["-m"],
    ["map", "a/b", "c/d", "--export"],
    ["map", "a/b", "--frob"],
    ["--frob"],
    ["-x"],
    ["-m", "a/b", "-u", "a/b"],
    ["-l", "-v"],
    ["create", "a/b"],
    ["create", "-k", "1M"],
    ["create", "a/b", "-k"],
    ["list", "a/b"],
    ["info"],
    ["resize", "a/b"],
    ["resize", "a/b", "-k", "1G", "--to-store-size"],
    ["resize", "a/b", "-k", "0"],
    ["resize", "a/b", "-k", "-1"],
    ["resize", "a/b", "-k", "1X"],
    ["resize", "a/b", "-k", "99999999P"],
    ["-z", "a/b", "-k", "-1"],
    ["--resize", "a/b", "--size", "1X"],
    ["resize", "a/b", "-k", "1G", "-k", "1G"],
    ["-z", "a/b", "-k", ""],
    ["resume", "a/b"],
    ["throttle", "a/b"],
    ["delete"],
    ["volumes", "a", "b"],
    ["map", "a/b", "--export", "--device", "/dev/nbd0"],
    ["remap"],
    ["help", "frobnicate"],
]


@pytest.mark.parametrize("words", USAGE_ERRORS, ids=" ".join)
def test_usage_error(words):
    """Needs no daemon; says what was wrong and what is right."""
    result = run([QBD, *words], env=environment(QBD_SOCKET="/nonexistent"))
    result.failed(64, "usage:")
    if words and words[0] in VERBS and words[0] != "help":
        assert f"qbd {words[0]}" in result.err, f"the right usage is missing: {result}"


LATER = [
    ["map", "--export", "rdma://disk/foo"],
]


@pytest.mark.parametrize("words", LATER, ids=" ".join)
def test_what_a_later_version_brings_says_so(daemon, words):
    daemon.volume("disk/foo")
    before = daemon.json("list")
    daemon.qbd(*words).failed(95, "later version")
    assert daemon.json("list") == before


NBD_DRIVER = os.path.exists("/sys/module/nbd") or os.path.exists("/dev/nbd0")


@pytest.mark.skipif(NBD_DRIVER, reason="this kernel has an nbd driver")
def test_map_without_export_on_a_kernel_without_nbd(daemon):
    daemon.create("disk/foo", MiB)
    for words in (["map", "disk/foo"], ["-m", "disk/foo"], ["map", "disk/foo", "--device", "/dev/nbd3"]):
        result = daemon.qbd(*words)
        result.failed(errno.ENODEV, "nbd", "--export", "disk/foo")
        assert result.seconds < 2
    assert daemon.json("list") == []


def test_log_tells_what_happened_to_a_volume(daemon):
    daemon.volume("disk/logged", MiB)
    daemon.qbd("unmap", "disk/logged").succeeded()
    daemon.qbd("delete", "disk/logged").succeeded()
    lines = [line for line in daemon.log().splitlines() if "disk/logged" in line]
    for event in ("creat", "map", "unmap", "delet"):
        assert any(event in line for line in lines), f"no line about '{event}' in the log:\n{daemon.log()}"


def test_stdout_that_cannot_be_written(daemon):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [QBD, "list"], stdout=full, stderr=subprocess.PIPE, env=environment(**daemon.variables), timeout=30
        )
    assert done.returncode != 0 and done.stderr
