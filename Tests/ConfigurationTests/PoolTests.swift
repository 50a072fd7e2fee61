import Configuration
import Testing

@Suite("qbd.conf: pools")
struct PoolTests {
    @Test("Each section [pool.NAME] is a pool")
    func pools() throws {
        let configuration = try configuration(
            """
            [pool.disk]
            type = local
            path = /srv/qbd/disk
            [pool.a.b-c_1]
            type = memory
            """)
        #expect(
            configuration.pools == [
                "disk": PoolConfiguration(name: "disk", kind: .local(path: "/srv/qbd/disk")),
                "a.b-c_1": PoolConfiguration(name: "a.b-c_1", kind: .memory),
            ])
        #expect(try configuration.pool(named: "disk").kind == .local(path: "/srv/qbd/disk"))
        #expect(configuration.warnings == [])
    }

    @Test("A pool's section may be in several places")
    func splitSection() throws {
        let configuration = try configuration("[pool.a]\npath=/a\n[nbd]\n[pool.a]\ntype=local\n")
        #expect(try configuration.pool(named: "a").kind == .local(path: "/a"))
    }

    @Test("The path of a pool is kept without slashes too many")
    func path() throws {
        for text in ["/srv/q b", "/srv/q b/", "//srv///q b//", "\"/./srv/q b/.\""] {
            let configuration = try configuration("[pool.a]\ntype=local\npath=\(text)")
            #expect(try configuration.pool(named: "a").kind == .local(path: "/srv/q b"))
        }
    }

    @Test("A pool that is not configured is an error that names it, the file, and the section to add")
    func unknownPool() throws {
        let configuration = try configuration("[pool.a]\ntype=memory")
        #expect(
            failure { try configuration.pool(named: "b") }
                == "pool 'b' is not configured; add a section [pool.b] with type = local and path = DIRECTORY"
                + " to qbd.conf")
    }

    @Test(
        "A pool that is not complete is an error at its section",
        arguments: [
            (
                "[nbd]\n[pool.a]\n",
                "qbd.conf:2: section [pool.a] has no 'type'; add type = local with path = DIRECTORY, or type = memory"
            ),
            (
                "[pool.a]\npath=/a\n",
                "qbd.conf:1: section [pool.a] has no 'type'; add type = local with path = DIRECTORY, or type = memory"
            ),
            ("[pool.a]\ntype=local\n", "qbd.conf:1: section [pool.a] has no 'path'; add path = DIRECTORY"),
        ])
    func incomplete(text: String, message: String) {
        #expect(fault(in: text) == message)
    }

    @Test("Two pools cannot share a directory")
    func sharedDirectory() {
        #expect(
            fault(in: "[pool.a]\ntype=local\npath=/x/y\n[pool.b]\ntype=local\npath=/x//y/\n")
                == "qbd.conf:6: [pool.b] has the directory of [pool.a]; give each pool its own")
    }

    @Test("A memory pool has no path")
    func memoryWithPath() throws {
        let configuration = try configuration("[pool.a]\npath=/x\ntype=memory\n")
        #expect(try configuration.pool(named: "a").kind == .memory)
        #expect(
            configuration.warnings == ["qbd.conf:2: key 'path' in section [pool.a] is ignored: a memory pool has none"])
    }

    @Test(
        "A pool's name follows the rules of volume names",
        arguments: [
            ("[pool.]", "the pool name in [pool.] is empty; it has 1 to 128 characters"),
            ("[pool..]", "the pool name in [pool..] cannot be '.'"),
            ("[pool...]", "the pool name in [pool...] cannot be '..'"),
            (
                "[pool.a/b]",
                "the pool name in [pool.a/b] 'a/b' holds '/'; allowed are A-Z, a-z, 0-9, '.', '_' and '-'"
            ),
        ])
    func badName(header: String, message: String) {
        #expect(fault(in: header) == "qbd.conf:1: \(message)")
    }
}
