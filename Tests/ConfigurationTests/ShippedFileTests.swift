import Configuration
import Glibc
import Testing

/// A file of this repository's etc. Uncommented: with the '#' removed from every line in which no blank follows it,
/// which are the settings.
func shippedFile(
    _ name: String = "qbd.conf", uncommented: Bool, from testFile: String = #filePath
) throws -> String {
    let root = testFile.split(separator: "/", omittingEmptySubsequences: false).dropLast(3).joined(separator: "/")
    let path = "\(root)/etc/\(name)"
    let file = try #require(fopen(path, "r"), "cannot open \(path)")
    defer { fclose(file) }
    var bytes = [UInt8](repeating: 0, count: 1 << 20)
    let count = fread(&bytes, 1, bytes.count, file)
    let text = try #require(String(validating: bytes[..<count], as: UTF8.self))
    guard uncommented else { return text }
    return text.split(separator: "\n", omittingEmptySubsequences: false)
        .map { $0.hasPrefix("#") && !$0.hasPrefix("# ") ? $0.dropFirst() : $0 }
        .joined(separator: "\n")
}

@Suite("etc/qbd.conf")
struct ShippedFileTests {
    @Test("As it is shipped it says nothing but the defaults, and without a warning")
    func shipped() throws {
        let shipped = try configuration(shippedFile(uncommented: false))
        let defaults = try configuration("")
        #expect(shipped.warnings == [])
        #expect(shipped.zookeeper == defaults.zookeeper)
        #expect(shipped.conductor == defaults.conductor)
        #expect(shipped.client == defaults.client)
        #expect(shipped.nbd == defaults.nbd)
        #expect(shipped.pools == defaults.pools)
    }

    @Test("With every setting uncommented it is right, without a warning, and the defaults it shows are the defaults")
    func uncommented() throws {
        let all = try configuration(shippedFile(uncommented: true))
        let defaults = try configuration("")
        #expect(all.warnings == [])
        #expect(all.client == defaults.client)
        #expect(all.nbd == defaults.nbd)
        #expect(all.zookeeper.ip.count == 3)
        #expect(all.zookeeper.clusterName == "cluster1")
        #expect(all.conductor.endpoints.count == 2)
        #expect(try all.pool(named: "local").kind == .local(path: "/var/lib/qbd/pool"))
        #expect(try all.pool(named: "memory").kind == .memory)
    }

    @Test(
        "Every key is in it",
        arguments: [
            "type", "path", "listen", "max_connections", "ip", "cluster_name", "name", "endpoints", "conn_type",
            "tcp_no_delay", "store_port", "store_http_port", "store_grace", "connections_per_store", "io_depth",
            "io_timeout", "conn_timeout",
            "open_volume_timeout",
        ])
    func everyKey(key: String) throws {
        let lines = try shippedFile(uncommented: false).split(separator: "\n")
        #expect(lines.contains { $0.hasPrefix("#\(key) =") })
    }
}
