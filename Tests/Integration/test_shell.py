"""What a shell and a terminal get: completion, help that fits, and what `make install` puts where."""

import os
import pty
import re
import select
import subprocess
import time

import pytest

from harness import BIN, MiB, QBD, REPOSITORY, SLOWNESS, environment, run

VERBS = [
    "map", "unmap", "remap", "list", "map-all", "unmap-all", "throttle", "suspend", "resume", "info", "resize",
    "create", "delete", "volumes", "snapshot", "clone", "version", "help",
]  # fmt: skip


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Where `make install` has put everything: a directory with `usr` and `etc`."""
    root = tmp_path_factory.mktemp("installed")
    run(
        ["make", "-s", "-C", REPOSITORY, "install", f"BIN={BIN}", f"PREFIX={root}/usr", f"SYSCONFDIR={root}/etc"],
        timeout=120, env=environment(MAKEFLAGS=""),
    ).succeeded()  # fmt: skip
    return root


def test_what_make_install_installs(installed):
    files = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    assert files >= {
        "usr/bin/qbd", "usr/sbin/qbdd", "usr/sbin/qbd-store", "usr/share/man/man8/qbd-store.8", "usr/share/bash-completion/completions/qbd",
        "usr/share/zsh/site-functions/_qbd", "usr/share/man/man8/qbd.8", "usr/share/man/man8/qbdd.8",
        "usr/share/man/man5/qbd.conf.5", "usr/share/man/man5/map.conf.5", "usr/share/man/man7/qbd-boot.7",
        "usr/share/man/man7/qbd-device.7", "etc/neonsan/qbd.conf", "etc/neonsan/map.conf",
        "etc/systemd/system/qbdd.service", "etc/systemd/system/qbd-map.service", "etc/udev/rules.d/60-qbd.rules",
        "usr/lib/qbd/unmap-at-shutdown",
    }  # fmt: skip
    assert all("/usr/local" not in unit.read_text() for unit in (installed / "etc/systemd/system").iterdir())


def test_installing_again_keeps_what_was_configured(installed):
    for name in ("qbd.conf", "map.conf"):
        (installed / "etc/neonsan" / name).write_text("# mine\n")
    run(
        ["make", "-s", "-C", REPOSITORY, "install", f"BIN={BIN}", f"PREFIX={installed}/usr", f"SYSCONFDIR={installed}/etc"],
        timeout=120, env=environment(MAKEFLAGS=""),
    ).succeeded()  # fmt: skip
    for name in ("qbd.conf", "map.conf"):
        assert (installed / "etc/neonsan" / name).read_text() == "# mine\n"


def test_systemd_finds_no_fault_with_the_units(installed):
    units = installed / "etc/systemd/system"
    result = run(
        ["systemd-analyze", "verify", "--man=no", units / "qbdd.service", units / "qbd-map.service"],
        env=environment(SYSTEMD_UNIT_PATH=f"{units}:/usr/local/lib/systemd/system:/lib/systemd/system"),
    )
    ours = [line for line in result.err.splitlines() if "qbd" in line]
    assert result.status == 0 and not ours, result


def test_systemd_never_gives_the_daemon_up(installed):
    """I/O of mounted disks waits for it. By default five failures within ten seconds would be the last."""
    sections = (installed / "etc/systemd/system/qbdd.service").read_text().split("[Service]")
    assert "\nStartLimitIntervalSec=0\n" in sections[0] and "\nRestart=always\n" in sections[1]


# Help


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_a_terminal_of_80_columns(verb):
    for words in (["help", verb], [verb, "--help"]):
        text = run([QBD, *words]).succeeded().out
        long = [line for line in text.splitlines() if len(line) > 80]
        assert not long, "\n".join(long)
        assert f"USAGE: qbd {verb}" in text and "OVERVIEW: " in text
        assert not [line for line in text.splitlines() if line != line.rstrip()]


def test_overview_fits_and_names_every_verb():
    text = run([QBD, "help"]).succeeded().out
    assert all(len(line) <= 80 for line in text.splitlines())
    assert all(re.search(rf"\b{verb}\b", text) for verb in VERBS), text


# Completion


@pytest.fixture
def volumes(daemon):
    """A daemon with three volumes, of which disk/one and ram/three are mapped."""
    daemon.volume("disk/one", MiB)
    daemon.create("disk/two", MiB)
    daemon.volume("ram/three", MiB)
    return daemon


def variables(daemon, installed):
    return environment(**daemon.variables, PATH=f"{installed}/usr/bin:{os.environ['PATH']}", TERM="dumb")


COMPLETIONS = [
    ("qbd unm", {"unmap", "unmap-all"}),
    ("qbd map-", {"map-all"}),
    ("qbd v", {"volumes", "version"}),
    ("qbd map --ex", {"--export"}),
    ("qbd map --hoo", {"--hook", "--hook-timeout"}),
    ("qbd unmap --fo", {"--force", "--forget"}),
    ("qbd map-all --f", {"--file"}),
    ("qbd unmap ", {"disk/one", "ram/three"}),
    ("qbd unmap disk/", {"disk/one"}),
    ("qbd info --json r", {"ram/three"}),
    ("qbd map d", {"disk/one", "disk/two"}),
    ("qbd delete disk/t", {"disk/two"}),
    ("qbd volumes ", {"disk", "ram"}),
    ("qbd resume disk/one -t ", {"normal", "error", "discard"}),
]

BASH = r"""
source "$1"
COMP_LINE=$2 COMP_POINT=${#2}
read -r -a COMP_WORDS <<<"$2"
[[ $2 == *' ' ]] && COMP_WORDS+=('')
COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMP_TYPE=9 COMP_KEY=9
handler=$(complete -p qbd | sed 's/.*-F \([^ ]*\) .*/\1/')
"$handler" qbd "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize("line, expected", COMPLETIONS, ids=[line for line, _ in COMPLETIONS])
def test_bash_completes(volumes, installed, line, expected):
    script = installed / "usr/share/bash-completion/completions/qbd"
    result = run(["bash", "-c", BASH, "bash", script, line], env=variables(volumes, installed)).succeeded()
    assert result.err == ""
    # Where a name can stand an option can, too.
    offered = {word.strip() for word in result.out.split("\n") if word.strip()}
    if not line.endswith("-t "):
        offered = {word for word in offered if not word.startswith("-") or line.split()[-1].startswith("-")}
    assert offered == expected


# What zsh reads at its start: completion that tells its matches instead of showing them, and then ends the shell.
ZSHRC = r"""
PS1='' RPS1='' LISTMAX=10000
fpath=("$FUNCTIONS" $fpath)
autoload -U compinit
compinit -u -D
bindkey '^I' complete-word
compadd() {
    # What only fills arrays offers nothing yet.
    if [[ ${@[1,(i)(-|--)]} == *-(O|A|D)* ]]; then
        builtin compadd "$@"
        return
    fi
    local -a matches
    builtin compadd -A matches "$@"
    print -rl -- match:$^matches
    builtin compadd "$@"
}
leave() { print -r -- completed; exit }
comppostfuncs=(leave)
print -r -- started
"""


def talk_to_zsh(line, directory, env):
    """All that an interactive zsh writes when the line, and then a tab, is typed."""
    (directory / ".zshrc").write_text(ZSHRC)
    master, slave = pty.openpty()
    zsh = subprocess.Popen(
        ["zsh", "-i"], stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env={**env, "ZDOTDIR": str(directory)}
    )  # fmt: skip
    os.close(slave)
    text = ""
    try:
        deadline = time.monotonic() + 30 * SLOWNESS
        for typed, answer in (("", "started"), (line + "\t", "completed")):
            os.write(master, typed.encode())
            while answer not in text:
                left = deadline - time.monotonic()
                assert left > 0, f"zsh did not get to {answer!r}: {text!r}"
                if select.select([master], [], [], left)[0]:
                    text += os.read(master, 65536).decode(errors="replace")
        return text
    finally:
        zsh.kill()
        zsh.wait()
        os.close(master)


@pytest.mark.parametrize("line, expected", COMPLETIONS, ids=[line for line, _ in COMPLETIONS])
def test_zsh_completes(volumes, installed, scratch, line, expected):
    env = {**variables(volumes, installed), "FUNCTIONS": str(installed / "usr/share/zsh/site-functions")}
    text = talk_to_zsh(line, scratch, env)
    offered = set(re.findall(r"match:(\S+)", text))
    assert {word for word in offered if not word.startswith("-") or line.split()[-1].startswith("-")} == expected, text
