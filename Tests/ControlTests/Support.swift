import Control
import Glibc
import Testing

/// A folder of a test's own, gone with it.
final class TemporaryFolder: Sendable {
    let path: String

    init() throws {
        var template = Array("/tmp/qbd-control-XXXXXX".utf8CString)
        try #require(mkdtemp(&template) != nil)
        path = String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }

    deinit {
        remove(path)
    }

    var socket: String { path + "/ctl.sock" }

    func names(in folder: String? = nil) -> [String] {
        guard let handle = opendir(folder ?? path) else { return [] }
        defer { closedir(handle) }
        var names: [String] = []
        while let entry = readdir(handle) {
            let name = withUnsafePointer(to: &entry.pointee.d_name) {
                $0.withMemoryRebound(to: CChar.self, capacity: 256) { String(cString: $0) }
            }
            if name != ".", name != ".." { names.append(name) }
        }
        return names.sorted()
    }

    private func remove(_ path: String) {
        for name in names(in: path) { remove(path + "/" + name) }
        Glibc.remove(path)
    }
}

/// Runs what blocks on a thread of its own: the tasks of a test, and those of the server in it, share few threads.
func onThread<Value: Sendable>(_ body: @escaping @Sendable () -> Value) async -> Value {
    await withCheckedContinuation { continuation in
        let work = Unmanaged.passRetained(Work { continuation.resume(returning: body()) })
        var thread = pthread_t()
        let status = pthread_create(
            &thread, nil,
            { pointer in
                if let pointer { Unmanaged<Work>.fromOpaque(pointer).takeRetainedValue().body() }
                return nil
            }, work.toOpaque())
        precondition(status == 0, "no thread")
        pthread_detach(thread)
    }
}

private final class Work: Sendable {
    let body: @Sendable () -> Void
    init(_ body: @escaping @Sendable () -> Void) { self.body = body }
}

/// A client that sends whatever bytes it likes.
final class RawClient: @unchecked Sendable {
    private let descriptor: CInt

    /// - Parameter seconds: the longest wait of any call.
    init(_ path: String, seconds: Int = 20) throws {
        descriptor = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0)
        var wait = timeval(tv_sec: seconds, tv_usec: 0)
        setsockopt(descriptor, SOL_SOCKET, SO_RCVTIMEO, &wait, socklen_t(MemoryLayout<timeval>.size))
        setsockopt(descriptor, SOL_SOCKET, SO_SNDTIMEO, &wait, socklen_t(MemoryLayout<timeval>.size))
        let status = withUnixAddress(path) { connect(descriptor, $0, $1) }
        try #require(status == 0, "cannot connect to \(path)")
    }

    deinit { close(descriptor) }

    /// - Returns: false when the other side did not take all of it.
    @discardableResult
    func send(_ bytes: [UInt8]) -> Bool {
        var rest = bytes[...]
        while !rest.isEmpty {
            let count = rest.withUnsafeBytes {
                Glibc.send(descriptor, $0.baseAddress, $0.count, CInt(MSG_NOSIGNAL))
            }
            if count <= 0 { return false }
            rest = rest.dropFirst(count)
        }
        return true
    }

    @discardableResult
    func send(_ text: String) -> Bool { send(Array(text.utf8)) }

    /// Whether the other side has neither closed nor sent anything.
    var isOpen: Bool {
        var byte: UInt8 = 0
        return recv(descriptor, &byte, 1, CInt(MSG_PEEK | MSG_DONTWAIT)) < 0 && errno == EAGAIN
    }

    func closeInput() { shutdown(descriptor, Int32(SHUT_WR)) }

    /// All that comes until the other side closes; nil when it does not close in time.
    func readToEnd() -> String? {
        var bytes: [UInt8] = []
        var chunk = [UInt8](repeating: 0, count: 65536)
        while true {
            let count = recv(descriptor, &chunk, chunk.count, 0)
            if count > 0 {
                bytes += chunk[..<count]
            } else if count == 0 || errno == ECONNRESET {
                return String(decoding: bytes, as: UTF8.self)
            } else {
                return nil
            }
        }
    }
}

/// Listens and does one thing to the first client that comes.
final class Peer: Sendable {
    private let descriptor: CInt

    init(_ path: String) throws {
        descriptor = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0)
        let descriptor = descriptor
        try #require(withUnixAddress(path) { bind(descriptor, $0, $1) } == 0)
        try #require(listen(descriptor, 5) == 0)
    }

    deinit { close(descriptor) }

    /// Accepts one client, sends it `greeting`, and closes it; or, with nil, keeps it until the peer goes.
    func serve(_ greeting: String?) async {
        let descriptor = descriptor
        await onThread {
            let client = accept(descriptor, nil, nil)
            guard let greeting else { return }
            var room = [UInt8](repeating: 0, count: 4096)
            _ = recv(client, &room, room.count, 0)
            _ = Array(greeting.utf8).withUnsafeBytes {
                send(client, $0.baseAddress, $0.count, CInt(MSG_NOSIGNAL))
            }
            close(client)
        }
    }
}

func withUnixAddress<Result>(_ path: String, _ body: (UnsafePointer<sockaddr>, socklen_t) -> Result) -> Result {
    var address = sockaddr_un()
    address.sun_family = sa_family_t(AF_UNIX)
    withUnsafeMutableBytes(of: &address.sun_path) { $0.copyBytes(from: path.utf8) }
    return withUnsafePointer(to: address) {
        $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { body($0, socklen_t(MemoryLayout<sockaddr_un>.size)) }
    }
}
