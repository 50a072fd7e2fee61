import Control
import Testing

@Suite("Letters become words")
struct LetterUsageTests {
    struct Line: Sendable, CustomTestStringConvertible {
        let typed: String
        let words: [String]
        init(_ typed: String, _ words: String...) {
            self.typed = typed
            self.words = words
        }
        var testDescription: String { "qbd \(typed)" }
    }

    private static let documented = [
        Line("-m csi/foo", "map", "csi/foo"),
        Line("--map csi/foo", "map", "csi/foo"),
        Line("--map=csi/foo", "map", "csi/foo"),
        Line("-mcsi/foo", "map", "csi/foo"),
        Line("-m rdma://csi/foo -c conf", "map", "-c=conf", "rdma://csi/foo"),
        Line("-c conf -m csi/foo", "map", "-c=conf", "csi/foo"),
        Line("--config=conf --map csi/foo", "map", "--config=conf", "csi/foo"),
        Line("-cconf -mcsi/foo", "map", "-c=conf", "csi/foo"),
        Line("-u csi/foo", "unmap", "csi/foo"),
        Line("--unmap csi/foo --config conf", "unmap", "--config=conf", "csi/foo"),
        Line("-r csi/foo", "remap", "csi/foo"),
        Line("--remap csi/foo", "remap", "csi/foo"),
        Line("-l", "list"),
        Line("--list", "list"),
        Line("-l -c conf", "list", "-c=conf"),
        Line("-M", "map-all"),
        Line("--mapall --file=f", "map-all", "--file=f"),
        Line("-M -f f", "map-all", "-f=f"),
        Line("-f f -U", "unmap-all", "-f=f"),
        Line("--unmapall -ff", "unmap-all", "-f=f"),
        Line("-s csi/foo -t read_bps=1,write_iops=2", "throttle", "-t=read_bps=1,write_iops=2", "csi/foo"),
        Line("--setthrottle csi/foo --throttle=read_bps=1", "throttle", "--throttle=read_bps=1", "csi/foo"),
        Line("-t read_bps=1 -s csi/foo", "throttle", "-t=read_bps=1", "csi/foo"),
        Line("-S csi/foo", "suspend", "csi/foo"),
        Line("--suspend csi/foo", "suspend", "csi/foo"),
        Line("-R csi/foo -t normal", "resume", "-t=normal", "csi/foo"),
        Line("--resume=csi/foo -terror", "resume", "-t=error", "csi/foo"),
        Line("-i csi/foo", "info", "csi/foo"),
        Line("--info csi/foo", "info", "csi/foo"),
        Line("-z csi/foo -k 20G", "resize", "-k=20G", "csi/foo"),
        Line("--size 20G --resize csi/foo", "resize", "--size=20G", "csi/foo"),
        Line("-v", "version"),
        Line("--version", "version"),
        Line("-h", "help"),
        Line("--help", "help"),
        Line("-V -m csi/foo", "map", "-V", "csi/foo"),
        Line("-Vmcsi/foo", "map", "-V", "csi/foo"),
        Line("-Vl", "list", "-V"),
        Line("-lV", "list", "-V"),
        Line("--verbose -u csi/foo", "unmap", "--verbose", "csi/foo"),
    ]

    private static let ours = [
        Line("-m csi/foo --export", "map", "--export", "csi/foo"),
        Line("--read-only --export -m csi/foo", "map", "--read-only", "--export", "csi/foo"),
        Line("-m csi/foo --device /dev/nbd3", "map", "--device=/dev/nbd3", "csi/foo"),
        Line("--force -u csi/foo", "unmap", "--force", "csi/foo"),
        Line("-l --json", "list", "--json"),
        Line("--socket s --timeout=5 -l", "list", "--socket=s", "--timeout=5"),
        Line("-h -m csi/foo", "help", "map"),
        Line("-m csi/foo --help", "help", "map"),
        Line("-h map", "help", "map"),
        // A value is a value, even one that looks like an option; the parser must not take it for one.
        Line("-m -u/a", "map", "--", "-u/a"),
        Line("-c -x -m a/b", "map", "-c=-x", "a/b"),
    ]

    private static let words = [
        Line("map csi/foo --export", "map", "csi/foo", "--export"),
        Line("create -k 5 a/b", "create", "-k=5", "a/b"),
        Line("--socket s list --json", "list", "--socket=s", "--json"),
        Line("-c conf --json volumes", "volumes", "-c=conf", "--json"),
        Line("map-all -f f", "map-all", "-f=f"),
        Line("map-all -ff", "map-all", "-f=f"),
        Line("map-all -f=f -V", "map-all", "-f=f", "-V"),
        Line("map-all -Vf f", "map-all", "-V", "-f=f"),
        Line("create a/b -k -1", "create", "a/b", "-k=-1"),
        Line("map -- -c -c", "map", "--", "-c", "-c"),
        Line("map a/b --frob -x", "map", "a/b", "--frob", "-x"),
        Line("map -Vu", "map", "-Vu"),
        Line("-V list -V", "list", "-V", "-V"),
        Line("map -h", "map", "-h"),
        Line("map -u", "map", "-u"),
        Line("help map", "help", "map"),
        Line("snapshot create a/b@s", "snapshot", "create", "a/b@s"),
        Line("--json -c conf snapshot list a/b", "snapshot", "list", "--json", "-c=conf", "a/b"),
        Line("snapshot --socket s list a/b --json", "snapshot", "list", "--socket=s", "a/b", "--json"),
        Line("snapshot delete a/list", "snapshot", "delete", "a/list"),
        Line("snapshot list -h", "snapshot", "list", "-h"),
        Line("snapshot -h", "help", "snapshot"),
        Line("-h snapshot", "help", "snapshot"),
        Line("-h snapshot list", "help", "snapshot", "list"),
        Line("help snapshot list", "help", "snapshot", "list"),
    ]

    @Test("the documented usage", arguments: documented)
    func documentedUsage(line: Line) throws {
        #expect(try LetterUsage.words(split(line.typed)) == line.words)
    }

    @Test("letters with options of our own", arguments: ours)
    func ownOptions(line: Line) throws {
        #expect(try LetterUsage.words(split(line.typed)) == line.words)
    }

    @Test("words stay words", arguments: words)
    func wordsStay(line: Line) throws {
        #expect(try LetterUsage.words(split(line.typed)) == line.words)
    }

    struct Wrong: Sendable, CustomTestStringConvertible {
        let typed: String
        let complaint: String
        let verb: Verb?
        init(_ typed: String, _ complaint: String, _ verb: Verb? = nil) {
            self.typed = typed
            self.complaint = complaint
            self.verb = verb
        }
        var testDescription: String { "qbd \(typed)" }
    }

    private static let wrong = [
        Wrong("", "a verb is missing"),
        Wrong("-c conf", "a verb is missing"),
        Wrong("-", "no verb '-'"),
        Wrong("--", "no verb '--'"),
        Wrong("mop a/b", "no verb 'mop'"),
        Wrong("-m", "-m needs a volume's name", .map),
        Wrong("--unmap", "--unmap needs a volume's name", .unmap),
        Wrong("-m a/b -u c/d", "-m and -u are both verbs", .map),
        Wrong("-l -l", "-l and -l are both verbs", .list),
        Wrong("-l --version", "-l and --version are both verbs", .list),
        Wrong("-m a/b c/d", "unexpected argument 'c/d'", .map),
        Wrong("-l a/b", "unexpected argument 'a/b'", .list),
        Wrong("-m a/b map", "unexpected argument 'map'", .map),
        Wrong("-l -c", "-c needs a value", .list),
        Wrong("-l --config", "--config needs a value", .list),
        Wrong("--config= -l", "--config needs a value"),
        Wrong("-l --config=", "--config needs a value", .list),
        Wrong("-c= -l", "-c needs a value"),
        Wrong("list -c", "-c needs a value", .list),
        Wrong("list --config=", "--config needs a value", .list),
        Wrong("list -c --json", "-c needs a value", .list),
        Wrong("map a/b -c -- x", "-c needs a value", .map),
        Wrong("-l -c a -c b", "-c is given twice", .list),
        Wrong("-c a -l --config=b", "--config is given twice", .list),
        Wrong("list -c a -c a", "-c is given twice", .list),
        Wrong("-c a list -c b", "-c is given twice", .list),
        Wrong("throttle a/b -t iops=1 -t bps=1", "-t is given twice", .throttle),
        Wrong("resize a/b --size 1G -k 2G", "-k is given twice", .resize),
        Wrong("map a/b --hook none --hook=none", "--hook is given twice", .map),
        Wrong("snapshot -c a list a/b -c b", "-c is given twice", .snapshot),
        Wrong("snapshot", "create, delete, rollback or list", .snapshot),
        Wrong("snapshot --json", "what to do is missing", .snapshot),
        Wrong("snapshot ls a/b", "there is no 'snapshot ls'; write create, delete, rollback or list", .snapshot),
        Wrong("-u -V a/b", "-u needs a volume's name right behind it, not '-V'", .unmap),
        Wrong("-Vm -u", "-m needs a volume's name right behind it, not '-u'", .map),
        Wrong("map a/b --export=yes", "--export takes no value", .map),
        Wrong("--list=a", "--list takes no value", .list),
        Wrong("-l --verbose=1", "--verbose takes no value", .list),
        Wrong("--help=1", "--help takes no value"),
        Wrong("-x", "unknown option '-x'"),
        Wrong("-lx", "unknown option '-x'", .list),
        Wrong("-m a/b --frob", "unknown option '--frob'", .map),
        Wrong("--ma a/b", "unknown option '--ma'"),
    ]

    @Test("wrong usage is refused and says what was wrong", arguments: wrong)
    func wrongUsage(line: Wrong) {
        let error = #expect(throws: UsageError.self) { try LetterUsage.words(split(line.typed)) }
        #expect(error?.message.contains(line.complaint) == true, "said: \(error?.message ?? "nothing")")
        #expect(error?.verb == line.verb)
    }

    @Test("an empty value is none, in letters and in words")
    func emptyValue() {
        for line in [["-u", "a/b", "-c", ""], ["unmap", "a/b", "-c", ""], ["-c", "", "unmap", "a/b"]] {
            let error = #expect(throws: UsageError.self) { try LetterUsage.words(line) }
            #expect(error?.message == "-c needs a value")
        }
    }

    @Test("every documented letter and its long form lead to the same verb", arguments: Verb.allCases)
    func lettersAgree(verb: Verb) throws {
        guard let letters = verb.letters else { return }
        let name = verb.letterTakesName ? ["a/b"] : []
        let short = try LetterUsage.words(["-\(letters.short)"] + name)
        #expect(try LetterUsage.words(["--\(letters.long)"] + name) == short)
        #expect(short == [verb.word] + name)
        #expect(verb.usage.first?.hasPrefix("qbd \(verb.word)") == true)
    }

    private func split(_ line: String) -> [String] { line.split(separator: " ").map(String.init) }
}
