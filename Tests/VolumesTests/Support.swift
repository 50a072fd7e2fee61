import Backend
import EventLoop
import Glibc
import Logging
import NBD
import Volumes

/// A backend of 1 MiB that a test controls.
protocol TestBackend: Backend, Sendable {
    func start(_ loop: EventLoop, _ client: any BackendClient)
}

private final class TestVolume: OpenVolume {
    let record = VolumeRecord(id: 1 << 24, volume: "volume", size: 1 << 20, blockSize: 512, created: 0)
    let protocolName = "test"
    let readOnly = false
    private let backend: any TestBackend

    init(_ backend: any TestBackend) { self.backend = backend }

    func start(on loop: EventLoop, buffers: BufferPool, client: any BackendClient) throws(BackendError) -> any Backend {
        backend.start(loop, client)
        return backend
    }

    func grow(to size: UInt64?) throws(BackendError) -> VolumeRecord { record }
    func close() {}
}

/// A mapped volume with this backend, for as long as `body` takes.
func withMappedVolume(
    of backend: any TestBackend, report: @escaping @Sendable (SessionEvent) -> Void = { _ in },
    _ body: (Volume) async throws -> Void
) async throws {
    try await withMappedVolume(TestVolume(backend), report: report, body)
}

/// The same with a volume of a pool.
func withMappedVolume(
    _ opened: any OpenVolume, report: @escaping @Sendable (SessionEvent) -> Void = { _ in },
    _ body: (Volume) async throws -> Void
) async throws {
    var logger = Logger(label: "test")
    logger.logLevel = .critical
    let volume = try await Volume.start(
        name: "pool/volume", opened: opened, settings: VolumeSettings(), maximumSessions: 4,
        logger: logger, report: report)
    try await body(volume)
    await volume.stop(grace: 0, failingHeld: false)
}

/// Asks in short steps until a condition holds; the suite's time limit ends it.
func waitUntil(_ condition: () async -> Bool) async {
    while !(await condition()) { usleep(1000) }
}

/// Fewer bytes where the other side closed, or sends nothing for ten seconds.
func receive(_ count: Int, from socket: Int32) -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: count)
    var got = 0
    while got < count {
        var ready = pollfd(fd: socket, events: Int16(POLLIN), revents: 0)
        poll(&ready, 1, 10_000)
        let more = bytes[got...].withUnsafeMutableBytes {
            recv(socket, $0.baseAddress, $0.count, Int32(MSG_DONTWAIT))
        }
        guard more > 0 else { return Array(bytes.prefix(got)) }
        got += more
    }
    return bytes
}
