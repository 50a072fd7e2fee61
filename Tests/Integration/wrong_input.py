"""Wrong command lines and files, and what qbd answers: data for test_wrong_input.py.

A case is a command line as a shell reads it, the exit status, and words that stderr has. `{name}` stands for a path that
the test knows, or for a file with the text that the case gives under that name. The daemon has the pools `disk` and
`ram`, the volume disk/a, which is not mapped, and disk/m, which is exported.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Case:
    line: str
    status: int
    says: tuple
    files: dict

    def __str__(self):
        return self.line or "(nothing)"


def case(line, status, *says, **files):
    return Case(line, status, says, files)


def map_conf(text, status, *says):
    """A list of volumes with one line that is wrong, its second."""
    return Case("map-all -f {map}", status, ("{map}:2: ", *says), {"map": f"# list\n{text}\n"})


def qbd_conf(text, *says):
    """A configuration that cannot be used."""
    return Case("map --export disk/a -c {conf}", 22, ("{conf}:", *says), {"conf": text})


OF_THE_COMMAND = [
    case("", 64, "a verb is missing"),
    case("frobnicate", 64, "there is no verb 'frobnicate'"),
    case("Map disk/a", 64, "there is no verb 'Map'"),
    case("disk/a", 64, "there is no verb 'disk/a'"),
    case("--frob", 64, "unknown option '--frob'"),
    case("-x", 64, "unknown option '-x'"),
    case("-Vx", 64, "unknown option '-x'"),
    case("--json", 64, "a verb is missing beside the options"),
    case("-l -v", 64, "-l and -v are both verbs"),
    case("-m disk/a -u disk/a", 64, "-m and -u are both verbs"),
    case("--list=all", 64, "--list takes no value"),
    case("-l disk/a", 64, "unexpected argument 'disk/a' beside -l"),
    case("-m", 64, "-m needs a volume's name"),
    case("--map", 64, "--map needs a volume's name"),
    case("-l -c", 64, "-c needs a value"),
    case("-M -f", 64, "-f needs a value"),
    case("help frobnicate", 64, "there is no verb 'frobnicate'"),
    case("list --socket", 64, "--socket"),
    case("-l -k 5", 64, "Unknown option '-k'"),
    case("list --size 5", 64, "Unknown option '--size'"),
    case("list -c ''", 64, "-c needs a value", "usage: qbd list"),
    case("-c '' volumes disk", 64, "-c needs a value"),
    case("volumes --socket '' disk", 64, "--socket needs a value"),
    case("-u disk/m -c ''", 64, "-c needs a value", "usage: qbd unmap"),
    case("unmap disk/m -c --force", 64, "-c needs a value"),
    case("-u -V disk/m", 64, "-u needs a volume's name right behind it, not '-V'"),
    case("help snapshot ls", 64, "there is no 'snapshot ls'", "usage: qbd snapshot"),
    case("help map disk", 64, "there is no 'map disk'"),
]

TIMEOUTS = [
    case(line, 22, "'--timeout' is '" + line.split()[-1] + "'", "seconds from 1 to 86400")
    for line in (
        "list --timeout soon", "list --timeout -1", "list --timeout 0", "-l --timeout 86401", "suspend disk/m --timeout 0",
        "map --export disk/a --timeout 1.5", "unmap disk/m --timeout 0", "info disk/m --timeout 0", "version --timeout -5",
    )
]

OF_EACH_VERB = [
    case("map", 64, "volume", "usage: qbd map"),
    case("map disk/a disk/b --export", 64, "disk/b"),
    case("map disk/a --exprt", 64, "--exprt"),
    case("map disk/a --export=yes", 64, "--export"),
    case("map disk/a --export --device /dev/nbd0", 64, "--device does not go with it"),
    case("map disk/a --export -f {map}", 64, "it goes with --save", map=""),
    case("map disk/a --export --hook run-me", 22, "'--hook'", "absolute path", "'run-me'"),
    case("map disk/a --export --hook-timeout 0", 22, "'--hook-timeout' is '0'", "from 1 to 86400"),
    case("map disk/a --export --hook-timeout 1h", 22, "'1h'", "seconds"),
    case("map disk/a --export --read-bps 1Q", 22, "'--read-bps'", "unknown suffix 'Q'"),
    case("map disk/a --export --burst soon", 22, "'--burst'", "'soon'"),
    case("map disk/a --device nbd0", 22, "'--device' is 'nbd0'", "absolute path"),
    case("map disk/a --export -c 'a b'", 22, "blank"),
    case("unmap", 64, "volume", "usage: qbd unmap"),
    case("unmap disk/a --save", 64, "--save"),
    case("unmap disk/m -f {map}", 64, "it goes with --forget", map=""),
    case("unmap disk/a --force=1", 64, "--force"),
    case("remap", 64, "volume", "usage: qbd remap"),
    case("-r", 64, "-r needs a volume's name"),
    case("list disk/a", 64, "disk/a", "usage: qbd list"),
    case("list --export", 64, "--export"),
    case("info", 64, "volume", "usage: qbd info"),
    case("info disk/a disk/m", 64, "disk/m"),
    case("map-all disk/a", 64, "disk/a", "usage: qbd map-all"),
    case("map-all --file", 64, "--file"),
    case("unmap-all --force", 64, "--force", "usage: qbd unmap-all"),
    case("throttle disk/m", 64, "throttle", "usage: qbd throttle"),
    case("-s disk/m", 64, "throttle"),
    case("suspend", 64, "volume", "usage: qbd suspend"),
    case("resume disk/m", 64, "usage: qbd resume"),
    case("resize disk/m", 64, "size", "usage: qbd resize"),
    case("create disk/b", 64, "size", "usage: qbd create"),
    case("create -k 1M", 64, "volume"),
    case("create disk/b -k 1M --block-size 513", 22, "512 or 4096", "'513'"),
    case("delete", 64, "volume", "usage: qbd delete"),
    case("delete disk/a disk/b", 64, "disk/b"),
    case("volumes disk ram", 64, "ram", "usage: qbd volumes"),
    case("version now", 64, "now"),
    case("snapshot", 64, "create, delete, rollback or list", "usage: qbd snapshot"),
    case("snapshot frobnicate disk/a@s", 64, "there is no 'snapshot frobnicate'", "usage: qbd snapshot"),
    case("map disk/a --export -c {conf} -c {conf}", 64, "-c is given twice", conf=""),
    case("create disk/b -k 1M --size 2M", 64, "--size is given twice"),
    case("resize disk/m -k 2M -k 3M", 64, "-k is given twice"),
    case("resume disk/m -t normal -t error", 64, "-t is given twice"),
    case("-R disk/m -t normal -t error", 64, "-t is given twice"),
    case("throttle disk/m -t iops=1 -t bps=1", 64, "-t is given twice"),
    case("snapshot create", 64, "snapshot", "usage: qbd snapshot"),
    case("clone disk/a@s", 64, "usage: qbd clone"),
]

NAMES = [
    case("map --export foo", 22, "'foo' names no pool; write pool/volume"),
    case("map --export ''", 22, "the name is empty"),
    case("map --export /a", 22, "the pool name is empty"),
    case("map --export disk/", 22, "the volume name is empty"),
    case("map --export disk/..", 22, "cannot be '..'"),
    case("map --export disk/a/b", 22, "'a/b'"),
    case("map --export 'disk/a b'", 22, "' '"),
    case("map --export disk/ä", 22, "U+00E4"),
    case("unmap nfs://disk/a", 22, "unknown protocol 'nfs'"),
    case("info disk:a", 22, "names no pool"),
    case("-i /dev/qbd0", 22, "pool name is empty"),
    case("create ../a -k 1M", 22, "cannot be '..'"),
    case("delete 'disk/*'", 22, "'*'"),
    case("volumes di/sk", 22, "pool name", "'/'"),
    case("snapshot create disk/a", 22, "is a volume, and this takes a snapshot"),
    case("snapshot create disk/a@..", 22, "the snapshot name cannot be '..'"),
    case("delete disk/a@s", 22, "is a snapshot, and this takes a volume"),
    case("map --export disk/" + "v" * 129, 22, "at most 128"),
]

SIZES = [
    case(f"{verb} {size}", 64, says, f"usage: qbd {verb.split()[0]}")
    for verb in ("create disk/b -k", "resize disk/m --size")
    for size, says in (
        ("0", "greater than 0"), ("1X", "unknown suffix 'X'"), ("abc", "is not a size"), ("1.5G", "1536M for 1.5G"),
        ("99999999P", "too large"), ("99999999999999999999", "too large"), ("''", "needs a value"), ("-5", "negative"),
        ("1KK", "'KK'"), ("0x10", "'x10'"), ("１M", "is not a size"),
    )
] + [
    case("create disk/b --size=-1", 64, "negative"),
    case("-z disk/m --size=-1", 64, "negative", "usage: qbd resize"),
    case("create disk/b -k 1000", 22, "multiple of the block size"),
    case("create disk/b -k 6K --block-size 4096", 22, "multiple of the block size"),
    case("resize disk/m -k 2M --to-store-size", 64, "do not go together"),
    case("resize disk/m -k 1M", 22, "disk/m", "1048576 bytes are the same"),
    case("resize disk/m -k 512K", 22, "disk/m", "1048576", "524288 bytes are less"),
    case("resize disk/missing -k 2M", 2, "missing"),
]  # fmt: skip

THROTTLES = [
    case(f"throttle disk/m -t {text}", 22, says)
    for text, says in (
        ("read_bps", "'read_bps'"), ("read_bps=", "missing"), ("read=10", "'read'"), ("read_bps=-5", "negative"),
        ("read_bps=10,", "''"), ("read_iops=1,read_iops=2", "read_iops is given twice"),
        ("write_bps=1,bps=2", "write_bps is given twice; bps sets it, too"),
        ("burst_ms=5 --burst 6", "burst_ms is given twice; --burst sets it, too"), ("write_bps=10Q", "unknown suffix 'Q'"),
        ("write_iops=1.5", "whole number"), ("read_bps=99999999P", "too large"),
        ("write_iops=5KiB", "unknown suffix 'KiB'"), ("READ_BPS=1", "'READ_BPS'"),
    )
] + [
    case("throttle disk/m -t ''", 64, "-t needs a value"),
    case("throttle disk/m --burst 0", 22, "'--burst' is '0'"),
    case("resume disk/m -t maybe", 22, "'maybe'", "normal", "discard"),
    case("-R disk/m -t Normal", 22, "'Normal'"),
]  # fmt: skip

VOLUMES = [
    case("map --export disk/missing", 2, "QBD_IOC_MAP_VOLUME:2", "missing"),
    case("map --export nopool/a", 2, "nopool"),
    case("map --export disk/a@gone", 2, "gone"),
    case("clone disk/a@gone disk/b", 2, "gone"),
    case("map disk/m --export --read-only", 17, "disk/m", "mapped"),
    case("unmap disk/a", 25, "QBD_IOC_UNMAP_VOLUME:25", "disk/a", "not mapped"),
    case("unmap disk/missing", 25, "not mapped"),
    case("unmap disk/m -c {conf}", 25, "disk/m", "not mapped with", conf=""),
    case("remap disk/a", 25, "QBD_IOC_REMAP_VOLUME:25", "not mapped"),
    case("info disk/a", 25, "QBD_IOC_VOLUME_INFO:25", "not mapped"),
    case("throttle disk/a -t read_bps=1M", 25, "QBD_IOC_SET_THROTTLE:25", "not mapped"),
    case("suspend disk/a", 25, "QBD_IOC_SUSPEND_VOLUME:25", "not mapped"),
    case("resume disk/a -t normal", 25, "QBD_IOC_RESUME_VOLUME:25", "not mapped"),
    case("create disk/a -k 1M", 17, "disk/a", "exists"),
    case("delete disk/m", 16, "disk/m", "unmap"),
    case("delete disk/missing", 2, "missing"),
    case("volumes nopool", 2, "nopool"),
]

LISTS = [
    case("map-all -f {missing}", 2, "{missing}", "create it, or name another with --file"),
    case("unmap-all -f {missing}", 2, "{missing}", "No such file"),
    case("map-all -f {directory}", 21, "{directory}", "not a regular file"),
    case("map-all -f ''", 64, "-f needs a value"),
    case("unmap disk/a --forget -f {map}", 25, "not mapped", map="disk/a\n"),
    map_conf("disk", 22, "'disk' names no pool"),
    map_conf("disk/a\texport", 22, "'export' is not key=value"),
    map_conf("disk/a export = 1", 22, "without blanks around '='"),
    map_conf("disk/a,export=1", 22, "','"),
    map_conf("export=1 disk/a", 22, "'export=1' names no pool"),
    map_conf("disk/a export=1 colour=red", 22, "unknown key 'colour'", "hook_timeout"),
    map_conf("disk/a export=1 EXPORT=1", 22, "unknown key 'EXPORT'"),
    map_conf("disk/a export=1 readonly=maybe", 22, "'readonly' is 'maybe'; it must be 1 or 0"),
    map_conf("disk/a export=1 readonly=", 22, "'readonly' has no value"),
    map_conf("disk/a export=1 export=0", 22, "'export' is given twice"),
    map_conf("disk/a export=1 device=/dev/nbd0", 22, "does not go with 'export'"),
    map_conf("disk/a export=1 config=qbd.conf", 22, "absolute path"),
    map_conf('disk/a export=1 hook="/bin/true', 22, "no closing quote"),
    map_conf("disk/a export=1 hook_timeout=soon", 22, "seconds from 1 to 86400"),
    map_conf("disk/a export=1 read_bps=fast", 22, "'read_bps'", "'fast'"),
    map_conf("disk/a export=1 write_iops=-1", 22, "'write_iops'", "negative"),
    map_conf("disk/a export=1 burst_ms=0", 22, "'burst_ms' is '0'"),
    map_conf("disk/a export=1 \x07", 22, "control character"),
    map_conf("disk/missing export=1", 2, "QBD_IOC_MAP_VOLUME:2", "missing"),
    map_conf("disk/m export=1 readonly=1", 17, "QBD_IOC_MAP_VOLUME:17"),
    map_conf("disk/a export=1 config=/nonexistent/qbd.conf", 2, "/nonexistent/qbd.conf"),
]

CONFIGURATIONS = [
    case("map --export disk/a -c {missing}", 2, "{missing}", "create it"),
    case("map --export disk/a -c {directory}", 21, "{directory}", "not a regular file"),
    case("map --export disk/a -c {conf}", 2, "disk", conf="[pool.other]\ntype=memory\n"),
    qbd_conf("[pool.disk\n", ":1: ", "no ']'"),
    qbd_conf("[pool.disk]\ntype=floppy\n", ":2: ", "'floppy'", "local or memory"),
    qbd_conf("[pool.disk]\ntype=local\n", ":1: ", "has no 'path'"),
    qbd_conf("[pool.disk]\ntype=local\npath=pool\n", ":3: ", "absolute path"),
    qbd_conf("[pool.a b]\n", ":1: ", "pool name"),
    qbd_conf("[pool.disk]\ntype memory\n", ":2: ", "key = value"),
    qbd_conf('[pool.disk]\ntype="memory\n', ":2: ", "no closing quote"),
    qbd_conf("[client]\nio_depth=0\n", ":2: ", "from 1 to 255"),
    qbd_conf("[client]\nio_timeout=30s\n", ":2: ", "whole number of seconds"),
    qbd_conf("[client]\nconn_type=udp\n", ":2: ", "tcp or rdma"),
    qbd_conf("[nbd]\nlisten=10809\n", ":2: ", "listen"),
    qbd_conf("[nbd]\nmax_connections=-1\n", ":2: ", "from 1 to 1024"),
]

WITHOUT_A_DAEMON = [
    case(line, 111, "not running", "{socket}")
    for line in (
        "list", "-l", "map --export disk/a", "-m disk/a", "unmap disk/a", "-r disk/a", "info disk/a",
        "create disk/b -k 1M", "delete disk/a", "volumes", "map-all -f {map}", "unmap-all -f {map}",
    )
]  # fmt: skip
# Each gets an empty list of volumes.
WITHOUT_A_DAEMON = [dataclasses.replace(one, files={"map": "disk/a export=1\n"}) for one in WITHOUT_A_DAEMON]

WRONG_SOCKETS = [
    case("list --socket {file}", 88, "{file}", "not a socket", file=""),
    case("list --socket {nbd_socket}", 71, "{nbd_socket}", "not qbdd"),
    case("list --socket " + "s" * 108, 22, "longer than 107 bytes"),
    case("map-all -f {map} --socket {file}", 88, "not a socket", file="", map="disk/a\n"),
]

NOT_ALLOWED = [
    case(line, 1, "no permission", "{socket}")
    for line in ("list", "map --export disk/a", "unmap disk/m", "create disk/b -k 1M", "delete disk/a", "volumes")
] + [
    case("map-all -f {map}", 1, "no permission", map="disk/a\n"),
    case("map-all -f {secret}", 1, "Permission denied", secret="disk/a\n"),
]

WITH_A_DAEMON = (
    OF_THE_COMMAND + TIMEOUTS + OF_EACH_VERB + NAMES + SIZES + THROTTLES + VOLUMES + LISTS + CONFIGURATIONS + WRONG_SOCKETS
)
