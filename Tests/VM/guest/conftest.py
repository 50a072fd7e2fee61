"""Fixtures: daemons that leave nothing behind, the kernel's log, and lines for the end of the report."""

import os
import subprocess

import pytest

from daemon import Daemon, force_clean
from harness import BIN, QBD, QBDD
from machine import SPLAT, Deadline, KernelLog, connected_devices, names

# Daemons that live now, and the log of the test that runs now: for the reports.
live = []
kernel_logs = []
report_lines = []


def pytest_report_header():
    return f"qbd: {BIN}; Linux {os.uname().release}"


def pytest_sessionstart(session):
    for program in (QBD, QBDD):
        if not os.access(program, os.X_OK):
            raise pytest.UsageError(f"{program} is missing")
    if os.uname().nodename != "qbd-vm":
        raise pytest.UsageError("these tests are for the VM: Tests/VM/run")


def pytest_collection_modifyitems(config, items):
    """Leaves out what belongs to another boot of this disk."""
    number = int(os.environ.get("QBD_VM_BOOT", "0"))
    other = [item for item in items if getattr(item.get_closest_marker("boot"), "args", (0,))[0] != number]
    config.hook.pytest_deselected(items=other)
    items[:] = [item for item in items if item not in other]


def pytest_terminal_summary(terminalreporter):
    for line in report_lines:
        terminalreporter.write_line(line)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        item.stash[FAILED] = True
        for daemon in live:
            report.sections.append((f"log of qbdd {daemon.directory}", daemon.log()[-4000:]))
        for log in kernel_logs:
            report.sections.append(("log of the kernel", "\n".join(log.lines()[-60:])))


FAILED = pytest.StashKey()


@pytest.fixture
def kernel_log():
    """What the kernel logs during the test."""
    log = KernelLog()
    kernel_logs.append(log)
    yield log
    kernel_logs.remove(log)
    splats = log.matching(SPLAT)
    log.close()
    assert not splats, "the kernel's log has\n" + "\n".join(splats)


@pytest.fixture(autouse=True)
def deadline(request, kernel_log):
    """Kills the daemons of a test that ran out of its time."""

    def expired():
        for daemon in live:
            if daemon.alive:
                daemon.kill()

    marker = request.node.get_closest_marker("deadline")
    with Deadline(marker.args[0] if marker else 120, expired) as deadline:
        yield deadline


@pytest.fixture
def new_daemon(request, deadline):
    """Makes daemons that have not been started yet. At the end all is unmapped, and nothing may be left."""
    made = []

    def make(**options):
        daemon = Daemon(**options)
        made.append(daemon)
        live.append(daemon)
        return daemon

    yield make
    failures = []
    if request.node.stash.get(FAILED, False):
        force_clean()
    for daemon in made:
        try:
            daemon.clean_up()
        except (AssertionError, OSError, subprocess.SubprocessError) as failure:
            failures.append(str(failure))
        live.remove(daemon)
    if failures:
        force_clean()
    left = [*sorted(names()), *connected_devices()]
    if left and not failures:
        failures.append(f"left behind: {left}")
    assert not failures, "\n".join(failures)


@pytest.fixture
def daemon(new_daemon):
    """A running daemon of the test's own."""
    return new_daemon().start()


@pytest.fixture
def report():
    """A function that puts a line at the end of the report."""
    return report_lines.append


@pytest.fixture
def processes():
    """Starts processes that are gone after the test."""
    started = []

    def start(*command, **options):
        process = subprocess.Popen([str(word) for word in command], **options)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()
