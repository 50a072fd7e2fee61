"""Whatever is wrong, the exit status and the text say what, and nothing is changed: the table in wrong_input.py."""

import os
import shlex
import shutil

import pytest

import wrong_input
from harness import MiB, Daemon


@pytest.fixture(scope="module")
def shared():
    """A running daemon as the table wants it."""
    daemon = Daemon().start()
    daemon.create("disk/a", MiB)
    daemon.volume("disk/m", MiB)
    daemon.directory.chmod(0o755)
    # Somebody else runs it, too, who may not look where it was built.
    (daemon.directory / "files").mkdir(mode=0o755)
    daemon.before = (daemon.json("list"), daemon.json("volumes"))
    yield daemon
    daemon.finish()


@pytest.fixture(scope="module")
def absent():
    """A daemon that does not run."""
    daemon = Daemon()
    (daemon.directory / "files").mkdir()
    yield daemon
    shutil.rmtree(daemon.directory)


def ask(daemon, case, **options):
    """Runs the case's command line; its status, stderr, and the paths it names."""
    directory = daemon.directory / "files"
    paths = {
        "missing": directory / "missing", "directory": directory, "socket": daemon.socket,
        "nbd_socket": daemon.nbd_socket,
    }  # fmt: skip
    for name, text in case.files.items():
        paths[name] = directory / name
        paths[name].write_text(text)
        paths[name].chmod(0o600 if name == "secret" else 0o644)
    fill = lambda text: text.format(**paths)  # noqa: E731
    result = daemon.qbd(*shlex.split(fill(case.line)), **options)
    assert result.status == case.status, result
    assert result.out == "", f"stdout is for answers: {result}"
    for word in case.says:
        assert fill(word) in result.err, f"stderr should say {fill(word)!r}: {result}"
    lines = result.err.splitlines()
    if case.status == 64:
        assert any(line.startswith("usage: qbd") for line in lines), f"the right usage is missing: {result}"
        assert all(len(line) <= 80 for line in lines[1:]), result
    else:
        assert len(lines) == 1, f"an error is one line: {result}"


def test_the_table_is_long_enough():
    assert len(wrong_input.WITH_A_DAEMON + wrong_input.WITHOUT_A_DAEMON + wrong_input.NOT_ALLOWED) >= 60


@pytest.mark.parametrize("case", wrong_input.WITH_A_DAEMON, ids=str)
def test_wrong_input(shared, case):
    ask(shared, case)
    assert (shared.json("list"), shared.json("volumes")) == shared.before, "nothing may change"


@pytest.mark.parametrize("case", wrong_input.WITHOUT_A_DAEMON, ids=str)
def test_without_a_daemon(absent, case):
    ask(absent, case)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("case", wrong_input.NOT_ALLOWED, ids=str)
def test_without_permission(shared, case):
    ask(shared, case, user=65534, group=65534, extra_groups=[])
    assert (shared.json("list"), shared.json("volumes")) == shared.before, "nothing may change"
