import Backend
import EventLoop
import Glibc
import Logging
import PureFlash

/// I/O on a volume of a PureFlash cluster from inside the process: what the client alone costs.
///
/// usage: client-load HOST:CONDUCTOR-PORT STORE-PORT BYTES randread|randwrite DEPTH SECONDS
///
/// Makes the volume `bench/load`, fills it, runs 4 KiB I/O at random places, and prints one line of JSON: the rate, and
/// this process' CPU time for each I/O.
@main
enum ClientLoad {
    static func main() async throws {
        let words = CommandLine.arguments
        let endpoint = words.count == 7 ? words[1].split(separator: ":") : []
        guard endpoint.count == 2, let conductorPort = Int(endpoint[1]), let port = UInt16(words[2]),
            let size = UInt64(words[3]), ["randread", "randwrite"].contains(words[4]), let depth = Int(words[5]),
            let seconds = UInt64(words[6]), (1...1024).contains(depth), seconds > 0, size >= 1 << 20
        else {
            fatalError("usage: client-load HOST:CONDUCTOR-PORT STORE-PORT BYTES randread|randwrite DEPTH SECONDS")
        }
        let second: UInt64 = 1_000_000_000
        var logger = Logger(label: "client-load") { StreamLogHandler.standardError(label: $0) }
        logger.logLevel = .warning
        let settings = PureFlashSettings(
            noDelay: true, port: port, depth: 128, ioTimeout: 30 * second, connectTimeout: 5 * second)
        let conductor = ConductorClient(
            .endpoints([.init(host: String(endpoint[0]), port: conductorPort)]), timeout: Int64(5 * second))
        let pool = PureFlashPool(name: "bench", conductor: conductor, settings: settings, logger: logger)
        _ = try pool.create(volume: "load", size: size, blockSize: 512)
        let loop = try EventLoop(name: "load")
        let load = Load(loop: loop, opened: try pool.open(volume: "load", readOnly: false), size: size, depth: depth)
        try await load.run(.write, sequentially: true, for: nil)
        // The first moments are not counted.
        let operation: Operation = words[4] == "randread" ? .read : .write
        try await load.run(operation, sequentially: false, for: second / 2)
        let cpu = cpuMicroseconds()
        let began = monotonicNanoseconds()
        let count = try await load.run(operation, sequentially: false, for: seconds * second)
        let taken = Double(monotonicNanoseconds() - began) / 1e9
        let each = (cpuMicroseconds() - cpu) / Double(max(count, 1))
        await load.close()
        loop.stop()
        try pool.delete(volume: "load", snapshots: false)
        print("{\"iops\": \(Double(count) / taken), \"cpu_us_per_io\": \(each)}")
    }

    private static func cpuMicroseconds() -> Double {
        var time = timespec()
        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time)
        return Double(time.tv_sec) * 1e6 + Double(time.tv_nsec) / 1e3
    }
}

/// As many requests in flight as its depth, each replaced by another when it completes.
final class Load: BackendClient, @unchecked Sendable {
    private static let block: UInt32 = 4096

    private let loop: EventLoop
    private let opened: any OpenVolume
    private let blocks: UInt64
    private let depth: Int
    private let buffers = BufferPool(maximumRegions: 4)
    private var backend: (any Backend)?
    private let requests: UnsafeMutablePointer<IO>
    private let payload: UnsafeMutableRawPointer
    private var random: UInt64 = 0x9E37_79B9_7F4A_7C15

    // Of one run.
    private var operation = Operation.read
    private var isSequential = false
    private var next: UInt64 = 0
    private var end: UInt64 = 0
    private var inFlight = 0
    private var count = 0
    private var failure: Int32 = 0
    private var done: (() -> Void)?
    var maximumInFlight: Int { depth }

    init(loop: EventLoop, opened: any OpenVolume, size: UInt64, depth: Int) {
        self.loop = loop
        self.opened = opened
        self.depth = depth
        blocks = size / UInt64(Self.block)
        requests = .allocate(capacity: depth)
        payload = .allocate(byteCount: Int(Self.block), alignment: 4096)
        for place in 0..<Int(Self.block) {
            payload.storeBytes(of: UInt8.random(in: 0...255), toByteOffset: place, as: UInt8.self)
        }
    }

    /// - Parameter nanoseconds: nil for one pass over the volume.
    /// - Returns: requests that were completed.
    @discardableResult
    func run(_ operation: Operation, sequentially: Bool, for nanoseconds: UInt64?) async throws -> Int {
        await withCheckedContinuation { continuation in
            loop.post { [self] in
                begin(operation, sequentially, nanoseconds) { continuation.resume() }
            }
        }
        guard failure == 0 else { throw SystemError(code: failure, operation: "I/O") }
        return count
    }

    func close() async { _ = await loop.call { [self] in backend?.close() } }

    private func begin(
        _ operation: Operation, _ isSequential: Bool, _ nanoseconds: UInt64?, _ done: @escaping () -> Void
    ) {
        self.done = done
        self.operation = operation
        self.isSequential = isSequential
        next = 0
        count = 0
        end = nanoseconds.map { loop.now + $0 } ?? .max
        do {
            if backend == nil { backend = try opened.start(on: loop, buffers: buffers, client: self) }
        } catch {
            failure = error.code
            return done()
        }
        for index in 0..<depth { submit(requests + index) }
        loop.runAgain()
    }

    private func submit(_ io: UnsafeMutablePointer<IO>) {
        guard let backend, failure == 0, loop.now < end, !isSequential || next < blocks else { return }
        var block = next
        if isSequential {
            next += 1
        } else {
            random ^= random << 13
            random ^= random >> 7
            random ^= random << 17
            block = random % blocks
        }
        io.initialize(
            to: IO(operation: operation, offset: block * UInt64(Self.block), length: Self.block, request: payload))
        io.pointee.segment = Segment(base: payload, count: Int(Self.block))
        inFlight += 1
        backend.submit(io)
    }

    func completed(_ io: UnsafeMutablePointer<IO>) {
        if io.pointee.ownsBuffer, let buffer = io.pointee.buffer { buffers.free(buffer) }
        inFlight -= 1
        count += 1
        if io.pointee.status != 0 { failure = io.pointee.status }
        submit(io)
        if inFlight == 0 {
            done?()
            done = nil
        }
    }
}
