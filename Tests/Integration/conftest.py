"""Fixtures: a fresh daemon, one that a file's tests share, and the log of both in a failure's report."""

import os
import pathlib
import signal
import tempfile

import pytest

from harness import BIN, Daemon, QBD, QBDD, Watchdog

# Daemons that live now, for the reports.
live = []


def pytest_report_header():
    return f"qbd: {BIN}"


def pytest_sessionstart(session):
    for program in (QBD, QBDD):
        if not os.access(program, os.X_OK):
            raise pytest.UsageError(f"{program} is missing: build it, or say where with QBD_BIN_DIR")
    # Whoever stops the run stops the daemons too: as with Ctrl-C, fixtures are finished.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        for daemon in live:
            report.sections.append((f"log of qbdd {daemon.directory}", daemon.log()[-6000:]))


@pytest.fixture(scope="session")
def session_watchdog():
    watchdog = Watchdog()
    yield watchdog
    watchdog.close()


@pytest.fixture(autouse=True)
def watchdog(request, session_watchdog):
    marker = request.node.get_closest_marker("deadline")
    with session_watchdog.limit(marker.args[0] if marker else 60):
        yield


@pytest.fixture
def new_daemon(watchdog):
    """Makes daemons that have not been started yet."""
    made = []

    def make(**options):
        daemon = Daemon(**options)
        made.append(daemon)
        live.append(daemon)
        return daemon

    yield make
    failures = []
    for daemon in made:
        try:
            daemon.finish()
        except AssertionError as failure:
            failures.append(str(failure))
        live.remove(daemon)
    assert not failures, "\n".join(failures)


@pytest.fixture
def daemon(new_daemon):
    """A running daemon of the test's own."""
    return new_daemon().start()


@pytest.fixture(params=Daemon.POOLS)
def pool(request):
    """Each kind of pool."""
    return request.param


@pytest.fixture
def scratch():
    """A directory that is gone after the test: the images are big, so pytest's own, which it keeps, will not do."""
    with tempfile.TemporaryDirectory(prefix="qbd-", dir="/tmp") as path:
        yield pathlib.Path(path)
