import Backend
import EventLoop
import FuzzSupport
import Glibc
import Logging
import PureFlash
import Synchronization

/// The volume on its loop, new for each input, and what becomes of its requests.
final class Client: BackendClient, @unchecked Sendable {
    static let shared = Client()
    private static let capacity = 16
    let maximumInFlight = capacity

    /// Where the store is to accept.
    let listener: Int32
    private let loop: EventLoop
    private let opened: any OpenVolume
    private let left = Atomic<Int>(0)
    var remaining: Int { left.load(ordering: .acquiring) }

    // The loop's.
    private let buffers = BufferPool(maximumRegions: 4)
    private var backend: (any Backend)?
    private let requests = UnsafeMutablePointer<IO>.allocate(capacity: capacity)
    private let payloads = UnsafeMutableRawPointer.allocate(byteCount: capacity << 17, alignment: 4096)
    private var completions = [Int](repeating: 0, count: capacity)
    private var failures = 0

    private init() {
        let store = Loopback.listen()
        listener = store.descriptor
        var settings = PureFlashSettings(
            noDelay: true, port: store.port, depth: Volume.depth, ioTimeout: 20_000_000_000,
            connectTimeout: 20_000_000_000)
        settings.retryPause = 1000
        let conductor = Loopback.listen()
        do {
            // Before anybody asks it, and for ever.
            _ = try Thread(name: "conductor") { Self.conduct(conductor.descriptor) }
            let pool = PureFlashPool(
                name: "fuzz",
                conductor: ConductorClient(
                    .endpoints([.init(host: "127.0.0.1", port: Int(conductor.port))]), timeout: 10_000_000_000),
                settings: settings, logger: Logger(label: "fuzz") { _ in SwiftLogNoOpLogHandler() })
            opened = try pool.open(volume: "v", readOnly: false)
            loop = try EventLoop(name: "fuzz")
        } catch { fatalError("the client does not start: \(error)") }
    }

    private static func conduct(_ listener: Int32) {
        let body = """
            {"volume_size":\(Volume.size),"volume_id":\(Volume.id),"shard_count":1,"meta_ver":0,"snap_seq":-1,\
            "shards":[{"index":0,"store_ips":"127.0.0.1"}],"shard_lba_cnt_order":36,"ret_code":0}
            """
        let answer = Array("HTTP/1.1 200 OK\r\nContent-Length: \(body.utf8.count)\r\n\r\n\(body)".utf8)
        while true {
            let client = Loopback.retrying { accept(listener, nil, nil) }
            require(client >= 0)
            var head: [UInt8] = []
            while Loopback.receive(client, into: &head), !head.suffix(4).elementsEqual("\r\n\r\n".utf8) {}
            _ = Loopback.send(client, answer)
            // The client closes when it has the answer.
            while Loopback.receive(client, into: &head) {}
            Loopback.reset(client)
        }
    }

    func begin(_ wanted: [Request]) {
        left.store(wanted.count, ordering: .releasing)
        onLoop { [self] in
            failures = 0
            do { backend = try opened.start(on: loop, buffers: buffers, client: self) } catch {
                fatalError("the volume does not start: \(error)")
            }
            for (index, request) in wanted.enumerated() {
                completions[index] = 0
                let payload = payloads + index << 17
                let io = requests + index
                io.initialize(
                    to: IO(
                        operation: request.isWrite ? .write : .read, offset: UInt64(request.offset),
                        length: UInt32(request.length), request: UnsafeMutableRawPointer(requests)))
                if request.isWrite {
                    Volume.bytes(request.offset, request.length).withUnsafeBytes {
                        payload.copyMemory(from: $0.baseAddress.unsafelyUnwrapped, byteCount: $0.count)
                    }
                    io.pointee.segment = Segment(base: payload, count: request.length)
                }
                backend?.submit(io)
            }
            loop.runAgain()
        }
    }

    func completed(_ io: UnsafeMutablePointer<IO>) {
        let index = io - requests
        completions[index] += 1
        require(completions[index] == 1, "a request is completed twice")
        require([0, EIO, ENOSPC, EROFS].contains(io.pointee.status), "status \(io.pointee.status)")
        if io.pointee.status != 0 { failures += 1 } else if io.pointee.operation == .read { check(io) }
        if io.pointee.ownsBuffer, let buffer = io.pointee.buffer { buffers.free(buffer) }
        left.subtract(1, ordering: .acquiringAndReleasing)
    }

    private func check(_ io: UnsafeMutablePointer<IO>) {
        require(io.pointee.segment.count == Int(io.pointee.length))
        Volume.bytes(Int(io.pointee.offset), Int(io.pointee.length)).withUnsafeBytes { expected in
            require(
                memcmp(expected.baseAddress.unsafelyUnwrapped, io.pointee.segment.base, expected.count) == 0,
                "wrong bytes were read")
        }
    }

    func end(mayFail: Bool) {
        onLoop { [self] in
            require(mayFail || failures == 0, "a request failed that the store did not fail")
            backend?.close()
            backend = nil
        }
    }

    private func onLoop(_ work: @escaping @Sendable () -> Void) {
        let done = Semaphore()
        loop.post {
            work()
            done.signal()
        }
        done.wait()
    }
}
