"""Volumes that a map.conf lists: map-all and unmap-all, `map --save` and `unmap --forget`, and hooks."""

import os
import pathlib
import re
import signal
import threading

import pytest

from harness import MiB, QBD, environment, run, wait_for

SOURCES = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def daemon(new_daemon):
    """A running daemon whose hooks and list of volumes are its own."""
    daemon = new_daemon()
    daemon.hooks = daemon.directory / "hooks"
    daemon.file = daemon.directory / "map.conf"
    command = daemon.qbd
    daemon.qbd = lambda *words, **options: command(
        *words, **{**options, "variables": {"QBD_HOOKS": daemon.hooks, **options.get("variables", {})}}
    )
    return daemon.start()


def write_hook(daemon, volume, script, path=None):
    """A hook that writes down how it was called, and then does what `script` says."""
    path = path or daemon.hooks / volume
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\necho "$QBD_VOLUME $*" >>{daemon.directory}/calls\n{script}\n')
    path.chmod(0o755)
    return path


def calls(daemon):
    file = daemon.directory / "calls"
    return file.read_text().splitlines() if file.exists() else []


def mapped(daemon):
    return [one["volume"] for one in daemon.json("list")]


# map-all and unmap-all


def test_map_all_and_unmap_all(daemon):
    for volume in ("disk/a", "ram/b", "disk/c"):
        daemon.create(volume, MiB)
    daemon.file.write_text("# head\n\ndisk/c export=1 readonly=1\ntcp://ram/b export=1 # comment\ndisk/a export=1\n")
    result = daemon.qbd("map-all", "-f", daemon.file).succeeded()
    assert result.out == "".join(f"{volume} {daemon.uri(volume)}\n" for volume in ("disk/c", "ram/b", "disk/a"))
    assert result.err == ""
    assert {one["volume"]: one["read_only"] for one in daemon.json("list")} == {
        "disk/c": True, "ram/b": False, "disk/a": False,
    }  # fmt: skip
    assert daemon.qbd("-M", "-f", daemon.file).succeeded().out == result.out, "mapping again changes nothing"
    assert [one["volume"] for one in daemon.json("--mapall", "-f", daemon.file)] == ["disk/c", "ram/b", "disk/a"]
    said = daemon.qbd("-VM", "-f", daemon.file).succeeded().err.splitlines()
    assert len(said) == 3 and all(line.startswith("mapped ") for line in said)

    daemon.qbd("unmap", "ram/b").succeeded()
    result = daemon.qbd("-U", "-f", daemon.file).succeeded()
    assert result.out == "" and result.err == "" and mapped(daemon) == []
    assert daemon.qbd("unmap-all", f"--file={daemon.file}").succeeded().err == "", "nothing is mapped, nothing fails"


def test_empty_list(daemon):
    daemon.file.write_text("# nothing\n")
    for words in (["map-all"], ["unmap-all"]):
        result = daemon.qbd(*words, "-f", daemon.file).succeeded()
        assert result.out == "" and result.err == ""
    assert daemon.json("map-all", "-f", daemon.file) == []


def test_what_fails_is_named_with_its_line_and_does_not_stop_the_rest(daemon):
    for volume in ("disk/a", "disk/b", "disk/c"):
        daemon.create(volume, MiB)
    daemon.map("disk/c")
    daemon.file.write_text(
        "disk/a export=1\nnonsense\ndisk/missing export=1\ndisk/b export=1 colour=red\n"
        "nopool/x export=1\ndisk/c export=1 readonly=1\ndisk/b export=1\ndisk/a\nrdma://disk/d export=1\n"
    )
    result = daemon.qbd("map-all", "-f", daemon.file)
    assert result.status == 22, "the first one's errno"
    assert result.out == f"disk/a {daemon.uri('disk/a')}\ndisk/b {daemon.uri('disk/b')}\n"
    said = result.err.splitlines()
    expected = [
        (2, "nonsense"), (3, "QBD_IOC_MAP_VOLUME:2", "missing"), (4, "colour"), (5, "QBD_IOC_MAP_VOLUME:2", "nopool"),
        (6, "QBD_IOC_MAP_VOLUME:17", "disk/c"), (8, "line 1 already"), (9, "QBD_IOC_MAP_VOLUME:95", "rdma"),
    ]  # fmt: skip
    assert len(said) == len(expected), result.err
    for line, (number, *words) in zip(said, expected):
        assert line.startswith(f"{daemon.file}:{number}: ") and all(word in line for word in words), line
    assert sorted(mapped(daemon)) == ["disk/a", "disk/b", "disk/c"]

    # A client keeps disk/b busy; what the list does not map is not unmapped.
    import nbd

    client = nbd.NBD()
    client.connect_uri(daemon.uri("disk/b"))
    result = daemon.qbd("unmap-all", "-f", daemon.file)
    assert result.status == 22, "the last line is the first to be done, and the first that fails is line 8"
    assert f"{daemon.file}:7: failed to ioctl /dev/qbdctl with QBD_IOC_UNMAP_VOLUME:16: " in result.err
    assert sorted(mapped(daemon)) == ["disk/b"]
    client.shutdown()
    daemon.file.write_text("disk/b export=1\n")
    daemon.qbd("unmap-all", "-f", daemon.file).succeeded()


def test_a_line_may_name_its_configuration(daemon):
    other = daemon.directory / "other.conf"
    other.write_text(f"[pool.other]\ntype=local\npath={daemon.directory}/other\n")
    daemon.create("disk/a", MiB)
    daemon.qbd("create", "other/a", "-k", "1M", "-c", other).succeeded()
    daemon.file.write_text(f"disk/a export=1\nother/a export=1 config={other}\n")
    daemon.qbd("map-all", "-f", daemon.file).succeeded()
    assert {one["volume"]: one["config"] for one in daemon.json("list")} == {
        "disk/a": str(daemon.config), "other/a": str(other),
    }  # fmt: skip
    # The volume that is mapped now is none of the list's.
    daemon.file.write_text(f"disk/a export=1 config={other}\nother/a config={other}\n")
    daemon.qbd("unmap-all", "-f", daemon.file).succeeded()
    assert mapped(daemon) == ["disk/a"]


def test_a_snapshot_is_listed_like_a_volume(daemon):
    daemon.create("disk/a", MiB)
    daemon.qbd("snapshot", "create", "disk/a@s").succeeded()
    daemon.qbd("map", "--export", "disk/a@s", "--save", "-f", daemon.file).succeeded()
    daemon.qbd("map", "--export", "disk/a", "--save", "-f", daemon.file).succeeded()
    assert [line.split()[0] for line in daemon.file.read_text().splitlines()] == ["disk/a@s", "disk/a"]
    daemon.qbd("unmap-all", "-f", daemon.file).succeeded()
    assert mapped(daemon) == []
    daemon.qbd("map-all", "-f", daemon.file).succeeded()
    assert {one["volume"]: one["read_only"] for one in daemon.json("list")} == {"disk/a@s": True, "disk/a": False}
    daemon.qbd("unmap", "disk/a@s", "--forget", "-f", daemon.file).succeeded()
    assert mapped(daemon) == ["disk/a"] and daemon.file.read_text().startswith("disk/a ")


def test_unmap_all_goes_backwards(daemon):
    for volume in ("disk/a", "disk/b", "disk/c"):
        daemon.create(volume, MiB)
        write_hook(daemon, volume, "")
    daemon.file.write_text("".join(f"disk/{name} export=1\n" for name in "cab"))
    daemon.qbd("map-all", "-f", daemon.file).succeeded()
    assert sorted(line.split()[1] for line in calls(daemon)) == ["map"] * 3
    (daemon.directory / "calls").unlink()
    daemon.qbd("unmap-all", "-f", daemon.file).succeeded()
    assert [line.split()[:2] for line in calls(daemon)] == [[f"disk/{name}", "unmap"] for name in "bac"]


def test_eight_are_mapped_at_the_same_time(daemon):
    """Eight hooks wait for each other; a ninth runs only when one has ended."""
    ready = daemon.directory / "ready"
    ready.mkdir()
    for index in range(9):
        daemon.create(f"ram/v{index}", MiB)
        write_hook(
            daemon, f"ram/v{index}",
            f"touch {ready}/{index}\nwhile [ ! -e {daemon.directory}/go ]; do sleep 0.02; done",
        )  # fmt: skip
    daemon.file.write_text("".join(f"ram/v{index} export=1\n" for index in range(9)))
    results = []
    thread = threading.Thread(target=lambda: results.append(daemon.qbd("map-all", "-f", daemon.file)))
    thread.start()
    wait_for(lambda: len(list(ready.iterdir())) == 8, "eight hooks run")
    assert sorted(mapped(daemon)) == [f"ram/v{index}" for index in range(8)]
    (daemon.directory / "go").touch()
    thread.join()
    assert results[0].succeeded().out.count("\n") == 9


def test_numbers_are_in_the_order_of_the_file(daemon):
    """Whichever is ready first, and around those that are mapped; what fails leaves its number to the next time."""
    names = [f"disk/v{index}" for index in (7, 3, 9, 0, 5, 1, 8, 2, 6, 4)] + [f"ram/w{index}" for index in range(14)]
    for volume in names[:5] + names[6:]:
        daemon.create(volume, MiB)
    for volume in ("disk/first", "disk/gone", "disk/third"):
        daemon.volume(volume, MiB)
    daemon.qbd("unmap", "disk/gone").succeeded()
    daemon.map(names[2])
    daemon.file.write_text("".join(f"{volume} export=1\n" for volume in names))
    free = iter([number for number in range(100) if number not in (0, 1, 2)])
    # names[2] took the 1 that was free.
    expected = {volume: next(free) for volume in names if volume != names[2]}
    missing = expected.pop(names[5])
    for _ in range(5):
        assert daemon.qbd("map-all", "-f", daemon.file).status == 2
        ids = {one["volume"]: one["dev_id"] for one in daemon.json("list")}
        assert {volume: ids[volume] for volume in expected} == expected
        for volume in expected:
            daemon.qbd("unmap", volume).succeeded()
    daemon.qbd("map-all", "-f", daemon.file)
    daemon.create(names[5], MiB)
    daemon.qbd("map-all", "-f", daemon.file).succeeded()
    assert daemon.json("info", names[5])["dev_id"] == missing


def test_a_hundred_volumes(daemon, pool):
    """97 are mapped, 3 are named with their lines, and it does not take long."""
    lines = [f"{pool}/v{index} export=1" for index in range(100)]
    for index in range(100):
        if index not in (11, 52, 93):
            status, _ = daemon.post(
                "QBD_IOC_CREATE_VOLUME", volume=f"{pool}/v{index}", config=str(daemon.config), size=MiB, block_size=512
            )
            assert status == 200
    lines[52] = f"{pool}/v52/x export=1"
    lines[93] = f"{pool}/v93 export=1 readonly=perhaps"
    daemon.file.write_text("# a hundred volumes\n" + "\n".join(lines) + "\n")
    result = daemon.qbd("map-all", "-f", daemon.file, timeout=60)
    assert result.status == 2
    said = result.err.splitlines()
    assert len(said) == 3
    for line, number in zip(said, (13, 54, 95)):
        assert line.startswith(f"{daemon.file}:{number}: "), line
    good = [index for index in range(100) if index not in (11, 52, 93)]
    assert result.out == "".join(f"{pool}/v{index} {daemon.uri(f'{pool}/v{index}')}\n" for index in good)
    assert sorted(mapped(daemon)) == sorted(f"{pool}/v{index}" for index in good)
    run(["nbdinfo", daemon.uri(f"{pool}/v99")]).succeeded()
    print(f"map-all of 97 volumes of {pool}, exported: {result.seconds:.2f} s")
    assert result.seconds < 20, "5 s on a quiet machine"
    unmapped = daemon.qbd("unmap-all", "-f", daemon.file, timeout=60)
    print(f"unmap-all: {unmapped.seconds:.2f} s")
    assert unmapped.status == 22 and len(unmapped.err.splitlines()) == 2 and mapped(daemon) == []


# map --save and unmap --forget


def test_save_and_forget(daemon):
    daemon.create("disk/a", MiB)
    daemon.create("ram/b", MiB)
    daemon.file.write_text("# head\ndisk/a # a comment\n\n#tail\n")
    result = daemon.qbd("map", "--export", "tcp://disk/a", "--save", "-f", daemon.file).succeeded()
    assert result.out == daemon.uri("disk/a") + "\n" and result.err == ""
    line = f"tcp://disk/a config={daemon.config} export=1 # a comment"
    assert daemon.file.read_text() == f"# head\n{line}\n\n#tail\n"
    daemon.qbd("-m", "ram/b", "--export", "--read-only", "--save", "--file", daemon.file).succeeded()
    assert daemon.file.read_text() == f"# head\n{line}\n\n#tail\nram/b config={daemon.config} export=1 readonly=1\n"
    daemon.qbd("unmap-all", "-f", daemon.file).succeeded()
    daemon.qbd("map-all", "-f", daemon.file).succeeded()
    daemon.qbd("unmap", "disk/a", "--forget", "-f", daemon.file).succeeded()
    assert daemon.file.read_text() == f"# head\n\n#tail\nram/b config={daemon.config} export=1 readonly=1\n"
    assert mapped(daemon) == ["ram/b"]
    assert sorted(path.name for path in daemon.directory.glob("*map.conf*")) == ["map.conf"]


def test_limits_of_what_is_mapped_already_stay_and_are_what_is_saved(daemon):
    """Mapping again changes nothing; that other limits were asked for is not passed over in silence."""
    daemon.create("disk/a", MiB)
    again = ["map", "--export", "disk/a", "--hook", "none"]
    daemon.qbd(*again).succeeded()
    result = daemon.qbd(*again, "--read-bps", "10M", "--burst", "50", "--save", "-f", daemon.file).succeeded()
    assert result.out == daemon.uri("disk/a") + "\n"
    assert re.fullmatch("qbd: warning: disk/a is mapped already, .*limits stay.*'qbd throttle'.*\n", result.err), result
    assert daemon.json("list")[0]["read_bps"] == 0
    line = f"disk/a config={daemon.config} export=1"
    assert daemon.file.read_text() == f"{line} read_bps=0 burst_ms=100 hook=none\n"

    daemon.qbd("throttle", "disk/a", "-t", "write_bps=5M,read_iops=7", "--burst", "250").succeeded()
    assert daemon.qbd(*again, "--write-bps", "5M", "--save", "-f", daemon.file).succeeded().err == "", "that is its limit"
    assert daemon.file.read_text() == f"{line} write_bps=5242880 read_iops=7 burst_ms=250 hook=none\n"
    daemon.qbd("unmap", "disk/a").succeeded()
    assert daemon.qbd("map-all", "-f", daemon.file).succeeded().err == ""
    limits = {key: daemon.json("list")[0][key] for key in ("read_bps", "write_bps", "read_iops", "write_iops", "burst_ms")}
    assert limits == {"read_bps": 0, "write_bps": 5 * MiB, "read_iops": 7, "write_iops": 0, "burst_ms": 250}
    daemon.file.write_text(daemon.file.read_text().replace("read_iops=7", "read_iops=8"))
    assert "disk/a is mapped already" in daemon.qbd("map-all", "-f", daemon.file).succeeded().err
    assert daemon.json("list")[0]["read_iops"] == 7


def test_nothing_is_saved_of_a_map_that_fails(daemon):
    daemon.qbd("map", "--export", "disk/missing", "--save", "-f", daemon.file).failed(2)
    assert not daemon.file.exists()


def test_forget_what_is_not_mapped_or_not_listed(daemon):
    daemon.create("disk/a", MiB)
    daemon.create("disk/b", MiB)
    daemon.file.write_text("disk/a\ndisk/b\n")
    daemon.qbd("unmap", "disk/a", "--forget", "-f", daemon.file).failed(25, "not mapped")
    assert daemon.file.read_text() == "disk/b\n", "the line is removed all the same"
    result = daemon.qbd("unmap", "disk/a", "--forget", "-f", daemon.file)
    assert result.status == 25 and "no line for disk/a" in result.err and "not mapped" in result.err
    daemon.map("disk/a")
    daemon.qbd("unmap", "disk/a", "--forget", "-f", daemon.file).failed(2, str(daemon.file), "no line for disk/a")
    daemon.map("disk/b")
    missing = daemon.directory / "missing"
    daemon.qbd("unmap", "disk/b", "--forget", "-f", missing).failed(2, str(missing))
    assert mapped(daemon) == [] and daemon.file.read_text() == "disk/b\n"


def test_a_busy_volume_is_not_forgotten(daemon):
    import nbd

    client = nbd.NBD()
    client.connect_uri(daemon.volume("disk/a", MiB))
    daemon.file.write_text("disk/a\n")
    daemon.qbd("unmap", "disk/a", "--forget", "-f", daemon.file).failed(16)
    assert daemon.file.read_text() == "disk/a\n" and mapped(daemon) == ["disk/a"]
    client.shutdown()


def test_saving_that_fails_leaves_the_volume_mapped(daemon):
    daemon.create("disk/a", MiB)
    nowhere = daemon.directory / "no" / "map.conf"
    result = daemon.qbd("map", "--export", "disk/a", "--save", "-f", nowhere)
    assert result.status == 2 and result.out == daemon.uri("disk/a") + "\n"
    assert str(nowhere) in result.err and "is mapped" in result.err and len(result.err.splitlines()) == 1


# Every option of `map` has its key in map.conf, and the other way round

# How a key is given as an option, and what `map --save` makes of it. `{other}` is a copy of the configuration.
OPTIONS = {
    "config": (["--config", "{other}"], "config={other}"),
    "export": (["--export"], "export=1"),
    "readonly": (["--read-only"], "readonly=1"),
    "device": (["--device", "/dev/nbd7"], "device=/dev/nbd7"),
    "read_bps": (["--read-bps", "1M"], "read_bps=1048576"),
    "write_bps": (["--write-bps", "0"], "write_bps=0"),
    "read_iops": (["--read-iops", "5K"], "read_iops=5000"),
    "write_iops": (["--write-iops", "7"], "write_iops=7"),
    "burst_ms": (["--burst", "250"], "burst_ms=250"),
    "hook": (["--hook", "none"], "hook=none"),
    "hook_timeout": (["--hook-timeout", "7"], "hook_timeout=7"),
}
# Of every verb; and about the list of volumes itself.
NO_KEY = {"--socket", "--timeout", "--json", "--verbose", "--help", "--save", "--file"}


def documented_keys():
    """The keys that the manual's page lists."""
    page = (SOURCES / "man" / "map.conf.5").read_text()
    return set(re.findall(r"^\.It (?:Cm|Ic) (\w+) ", page, re.MULTILINE))


def test_options_of_map_and_keys_of_map_conf_are_the_same(daemon):
    daemon.file.write_text("disk/a no_such_key=1\n")
    said = daemon.qbd("map-all", "-f", daemon.file)
    assert said.status == 22
    keys = set(re.findall(r"\w+", re.search(r"the keys are (.*)", said.err)[1])) - {"or"}
    options = set(re.findall(r"^ +(?:-\w, )?(--[\w-]+)", run([QBD, "help", "map"]).succeeded().out, re.MULTILINE))
    assert NO_KEY <= options
    assert options - NO_KEY == {words[0] for words, _ in OPTIONS.values()}
    assert keys == set(OPTIONS)
    assert documented_keys() == keys


@pytest.mark.parametrize("key", OPTIONS)
def test_what_an_option_says_is_what_its_key_says(daemon, key):
    """`map --option --save` writes the key, and a list with that line maps in the same way."""
    if key == "device":
        # Without a driver the map fails; the key arrives all the same.
        daemon.create("disk/a", MiB)
        by_option = daemon.qbd("map", "disk/a", "--device", "/dev/nbdx")
        daemon.file.write_text("disk/a device=/dev/nbdx\n")
        by_key = daemon.qbd("map-all", "-f", daemon.file)
        assert by_option.status == by_key.status != 0
        assert by_key.err == f"{daemon.file}:1: {by_option.err}"
        return
    other = daemon.directory / "other.conf"
    other.write_text(daemon.config.read_text())
    daemon.create("disk/a", MiB)
    words, line = OPTIONS[key]
    words = [word.format(other=other) for word in words]
    extra = [] if key == "export" else ["--export"]
    first = daemon.qbd("map", "disk/a", *words, *extra, "--json", "--save", "-f", daemon.file).succeeded().out
    written = daemon.file.read_text().split()
    assert line.format(other=other) in written, written
    daemon.qbd("unmap", "disk/a").succeeded()
    second = daemon.qbd("map-all", "-f", daemon.file, "--json").succeeded().out
    fields = [re.sub(r'"(dev_id|\w*since)" : \d+', "", text) for text in (first, second)]
    assert fields[1].split() == ["[", *fields[0].split(), "]"]


# Hooks


def test_hook_runs_after_mapping_and_before_unmapping(daemon):
    daemon.create("disk/a", MiB)
    write_hook(daemon, "disk/a", f'"{QBD}" list | grep -c disk/a >>{daemon.directory}/seen; echo told')
    mapped_ = daemon.qbd("map", "--export", "disk/a").succeeded()
    assert mapped_.out == daemon.uri("disk/a") + "\n" and mapped_.err == "told\n", "a hook's output is no answer of qbd"
    assert calls(daemon) == [f"disk/a map {daemon.uri('disk/a')}"]
    daemon.qbd("map", "--export", "disk/a").succeeded()
    assert len(calls(daemon)) == 1, "it was mapped already"
    daemon.qbd("unmap", "disk/a").succeeded()
    assert calls(daemon)[1:] == [f"disk/a unmap {daemon.uri('disk/a')}"]
    daemon.qbd("unmap", "disk/a").failed(25)
    assert len(calls(daemon)) == 2, "it was not mapped"
    assert (daemon.directory / "seen").read_text().split() == ["1", "1"]


def test_no_hook_runs_for_an_unmap_that_is_refused_for_its_configuration(daemon):
    """What the hook of a mapped volume undoes, as a mount, is still needed."""
    other = daemon.directory / "other.conf"
    other.write_text(daemon.config.read_text())
    daemon.create("disk/a", MiB)
    write_hook(daemon, "disk/a", "")
    daemon.map("disk/a")
    (daemon.directory / "calls").unlink()
    daemon.qbd("unmap", "disk/a", "-c", other).failed(25, f"not mapped with {other}")
    daemon.qbd("unmap", "disk/a", "--force", "-c", other).failed(25)
    daemon.file.write_text(f"disk/a export=1 config={other}\n")
    daemon.qbd("unmap-all", "-f", daemon.file).succeeded()
    assert mapped(daemon) == ["disk/a"] and calls(daemon) == []
    daemon.qbd("unmap", "disk/a", "-c", daemon.config).succeeded()
    assert calls(daemon) == [f"disk/a unmap {daemon.uri('disk/a')}"]


def test_what_a_hook_finds_around_itself(daemon):
    daemon.create("disk/a", MiB)
    report = daemon.directory / "report"
    write_hook(
        daemon, "disk/a",
        f"exec >{report}; pwd; umask; cat; env | sort; ls /proc/self/fd | wc -l; ps -o pgid= -p $$ | tr -d ' '; echo $$",
    )  # fmt: skip
    run(
        [QBD, "map", "--export", "disk/a"], cwd=daemon.directory, umask=0o077,
        env=environment(**daemon.variables, QBD_HOOKS=daemon.hooks, SECRET=1),
    ).succeeded()  # fmt: skip
    lines = report.read_text().splitlines()
    assert lines[:2] == ["/", "0022"]
    variables = {line.split("=")[0] for line in lines[2:-3]}
    assert variables == {"PATH", "PWD", "QBD_SOCKET", "QBD_VOLUME"}, lines
    assert int(lines[-3]) == 4, "three descriptors, and that of ls"
    assert lines[-2] == lines[-1], "a process group of its own"


@pytest.mark.parametrize(
    "script, words",
    [
        ("exit 3", ["exit status 3"]),
        ("kill -9 $$", ["signal 9"]),
        ("while :; do sleep 0.1; done", ["1.0 seconds", "was ended"]),
        ("trap '' TERM; while :; do sleep 0.1; done", ["1.0 seconds", "was ended"]),
    ],
    ids=["fails", "dies", "hangs", "hangs and does not listen"],
)
def test_a_hook_that_fails_is_reported_and_undoes_nothing(daemon, script, words):
    daemon.create("disk/a", MiB)
    hook = write_hook(daemon, "disk/a", f"echo $$ >>{daemon.directory}/pids; {script}")
    result = daemon.qbd("map", "--export", "--hook-timeout", "1", "disk/a")
    assert result.status == 10 and result.out == daemon.uri("disk/a") + "\n"
    for word in [*words, f"{hook} map {daemon.uri('disk/a')}", "disk/a stays mapped"]:
        assert word in result.err, result.err
    assert mapped(daemon) == ["disk/a"]
    result = daemon.qbd("unmap", "disk/a", "--hook-timeout", "1").failed(10, f"{hook} unmap", *words)
    assert mapped(daemon) == []
    for pid in (daemon.directory / "pids").read_text().split():
        assert not os.path.exists(f"/proc/{pid}")


def test_a_hook_that_fails_is_noticed_whatever_signals_qbd_was_started_with(daemon):
    daemon.create("disk/a", MiB)
    write_hook(daemon, "disk/a", "exit 3")
    ignore = lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # noqa: E731
    result = daemon.qbd("map", "--export", "disk/a", preexec_fn=ignore)
    assert result.status == 10 and "exit status 3" in result.err, result


def test_nothing_that_a_hook_started_outlives_its_time(daemon):
    daemon.create("disk/a", MiB)
    write_hook(
        daemon, "disk/a",
        f"(trap '' TERM; echo $(exec sh -c 'echo $PPID') >{daemon.directory}/child; while :; do sleep 0.1; done) & wait",
    )  # fmt: skip
    assert daemon.qbd("map", "--export", "--hook-timeout", "1", "disk/a").status == 10
    child = (daemon.directory / "child").read_text().strip()

    def gone():
        try:
            return pathlib.Path(f"/proc/{child}/stat").read_text().split(")")[-1].split()[0] == "Z"
        except FileNotFoundError:
            return True

    wait_for(gone, "the hook's child is gone")


def test_hook_that_cannot_be_run(daemon):
    daemon.create("disk/a", MiB)
    hook = write_hook(daemon, "disk/a", "")
    hook.chmod(0o644)
    result = daemon.qbd("map", "--export", "disk/a")
    assert result.status == 10 and "cannot be run: Permission denied" in result.err and result.out
    daemon.qbd("unmap", "disk/a", "--hook", "none").succeeded()
    missing = daemon.directory / "missing hook"
    result = daemon.qbd("map", "--export", "disk/a", "--hook", missing)
    assert result.status == 10 and "No such file" in result.err and str(missing) in result.err
    assert mapped(daemon) == ["disk/a"]


def test_another_hook_and_none(daemon):
    daemon.create("disk/a", MiB)
    write_hook(daemon, "disk/a", "echo the folder")
    other = write_hook(daemon, None, "echo another", path=daemon.directory / "an other")
    daemon.file.write_text(f'disk/a export=1 hook="{other}"\n')
    assert daemon.qbd("map-all", "-f", daemon.file).succeeded().err == "another\n"
    assert daemon.qbd("unmap-all", "-f", daemon.file).succeeded().err == "another\n"
    assert daemon.qbd("map", "--export", "disk/a", "--hook", "none").succeeded().err == ""
    assert daemon.qbd("unmap", "disk/a").succeeded().err == "the folder\n"


def test_hooks_of_a_list(daemon):
    """One that fails is named with its line, and neither stops the rest nor undoes anything."""
    for name in "abc":
        daemon.create(f"disk/{name}", MiB)
    write_hook(daemon, "disk/b", "exit 1")
    daemon.file.write_text("disk/a export=1\ndisk/b export=1\ndisk/c export=1\n")
    result = daemon.qbd("map-all", "-f", daemon.file)
    assert result.status == 10 and result.err.startswith(f"{daemon.file}:2: the hook ") and result.out.count("\n") == 3
    assert sorted(mapped(daemon)) == ["disk/a", "disk/b", "disk/c"]
    assert daemon.qbd("map-all", "-f", daemon.file).succeeded().err == "", "what is mapped needs no hook"
    result = daemon.qbd("unmap-all", "-f", daemon.file)
    assert result.status == 10 and result.err.startswith(f"{daemon.file}:2: the hook ")
    assert mapped(daemon) == []
