import Configuration
import EventLoop
import FuzzSupport
import Glibc
import Logging
import StoreServer

/// A store with one volume in memory, in this process: one for the whole run.
final class Server: Sendable {
    static let shared = Server()
    /// Bytes: two objects and a piece of a third.
    static let size: UInt64 = 130 << 20

    let dataPort: UInt16
    let volume: UInt64
    private let server: StoreServer

    private init() {
        let ports = (0..<3).map { _ in Loopback.listen() }
        for port in ports { close(port.descriptor) }
        dataPort = ports[0].port
        let settings = StoreServer.Settings(
            address: "127.0.0.1", conductorPort: ports[1].port, dataPort: ports[0].port, storePort: ports[2].port,
            stores: ["127.0.0.1"], durable: false, allowFaults: false,
            pools: [PoolConfiguration(name: "fuzz", kind: .memory)], zookeeper: nil)
        let started = Answer<StoreServer>()
        let done = Semaphore()
        Task.detached {
            do {
                started.set(
                    try await StoreServer(settings, logger: Logger(label: "fuzz") { _ in SwiftLogNoOpLogHandler() }))
            } catch { fatalError("the store does not start: \(error)") }
            done.signal()
        }
        done.wait()
        server = started.take { fatalError("the store does not start") }
        let volume = "tenant_name=fuzz&volume_name=v"
        _ = Self.ask(ports[1].port, "op=create_volume&\(volume)&size=\(Self.size)&rep_cnt=1")
        let answer = Self.ask(ports[1].port, "op=open_volume&\(volume)&snapshot_name=")
        let digits = answer.split(separator: "\"volume_id\" : ").last?.prefix { $0.isNumber } ?? ""
        guard let id = UInt64(digits) else { fatalError("the volume is not opened: \(answer)") }
        self.volume = id
    }

    private static func ask(_ port: UInt16, _ query: String) -> String {
        let client = Loopback.connect(port: port)
        defer { Loopback.reset(client) }
        require(
            Loopback.send(client, Array("GET /s5c/?\(query) HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".utf8)))
        var bytes: [UInt8] = []
        while Loopback.receive(client, into: &bytes) {}
        return String(decoding: bytes, as: UTF8.self)
    }
}
