import Backend
import CLinux
import EventLoop
import Glibc
import LocalPool
import Synchronization
import Testing

/// One I/O at a time on an open volume of a pool.
private final class Reader: BackendClient, @unchecked Sendable {
    let maximumInFlight = 64
    let pipes = PipePool()
    private let loop: EventLoop
    private let buffers = BufferPool(maximumRegions: 2)
    private var backend: (any Backend)?
    private var waiting: CheckedContinuation<Void, Never>?
    private let io = UnsafeMutablePointer<IO>.allocate(capacity: 1)

    init(_ volume: any OpenVolume) async throws {
        loop = try EventLoop(name: "test")
        let started = await loop.call { [self] in
            backend = try? volume.start(on: loop, buffers: buffers, client: self)
            return backend != nil
        }
        try #require(started == true)
    }

    deinit { io.deallocate() }

    func completed(_ io: UnsafeMutablePointer<IO>) { waiting?.resume() }

    func resized(to size: UInt64) async { _ = await loop.call { [self] in backend?.resized(to: size) } }

    /// - Returns: the data, and whether it was passed on in a pipe.
    func read(_ offset: UInt64, _ length: UInt32) async -> (data: [UInt8], inPlace: Bool) {
        await withCheckedContinuation { continuation in
            loop.post { [self] in
                waiting = continuation
                let request = UnsafeMutableRawPointer(io)
                io.initialize(to: IO(operation: .read, offset: offset, length: length, request: request))
                backend?.submit(io)
            }
        }
        return await loop.call { [self] in
            #expect(io.pointee.status == 0)
            var data = [UInt8](repeating: 0, count: Int(length))
            if let pipe = io.pointee.pipe {
                #expect(Glibc.read(pipe.reader, &data, data.count) == data.count)
                pipes?.give(pipe, isEmpty: true)
            } else if let buffer = io.pointee.buffer {
                memcpy(&data, io.pointee.segment.base, data.count)
                buffers.free(buffer)
            }
            return (data, io.pointee.pipe != nil)
        } ?? ([], false)
    }

    /// On the loop.
    func withPipes(_ body: @escaping @Sendable (PipePool) -> Void) async {
        _ = await loop.call { [self] in
            guard let pipes else { return }
            body(pipes)
        }
    }

    func close() async {
        _ = await loop.call { [self] in
            backend?.close()
            backend = nil
        }
        loop.stop()
    }
}

private let isPossible: Bool = {
    let file = open("/proc/self/exe", O_RDONLY)
    defer { close(file) }
    return qbd_cached_pages(file, 0, 1) >= 0
}()

@Suite(.enabled(if: isPossible, "the kernel tells what is in the page cache, Linux 6.5")) struct ReadsInPlaceTests {
    private let directory: TemporaryDirectory
    private let volume: any OpenVolume
    private let data = (0..<(4 << 20)).map { UInt8(truncatingIfNeeded: $0 &* 2_654_435_761 >> 13) }

    init() throws {
        signal(SIGPIPE, SIG_IGN)
        directory = try TemporaryDirectory()
        let pool = LocalPool(name: "p", path: directory.path)
        _ = try pool.create(volume: "disk", size: 8 << 20, blockSize: 512)
        volume = try pool.open(volume: "disk", readOnly: false)
        try write(at: 0)
    }

    private func write(at offset: Int) throws {
        let file = open("\(directory.path)/disk.raw", O_WRONLY)
        defer { close(file) }
        try #require(pwrite(file, data, data.count, off_t(offset)) == data.count)
    }

    @Test(arguments: [(0, 128 << 10), (512, 128 << 10), (4096 * 3, 32 << 10), (1024, 960 << 10)])
    func whatIsInMemoryIsPassedOn(offset: Int, length: Int) async throws {
        let reader = try await Reader(volume)
        var passedOn = 0
        for _ in 0..<100 {
            let (read, inPlace) = await reader.read(UInt64(offset), UInt32(length))
            #expect(read == Array(data[offset..<(offset + length)]))
            if inPlace { passedOn += 1 }
        }
        // The kernel may take pages away at any time; the next read brings them back.
        #expect(passedOn >= 95)
        await reader.close()
        volume.close()
    }

    /// Not too small, not too large for a pipe, and all of it in memory.
    @Test(arguments: [(0, 4096), (0, (960 << 10) + 512), ((4 << 20) - 4096, 128 << 10), (6 << 20, 128 << 10)])
    func otherDataIsRead(offset: Int, length: Int) async throws {
        let reader = try await Reader(volume)
        let (read, inPlace) = await reader.read(UInt64(offset), UInt32(length))
        #expect(read == (offset..<(offset + length)).map { $0 < data.count ? data[$0] : 0 })
        #expect(!inPlace)
        await reader.close()
        volume.close()
    }

    @Test func whatIsBehindTheFormerEndIsPassedOnAsWell() async throws {
        let reader = try await Reader(volume)
        let grown = try volume.grow(to: 16 << 20)
        try write(at: 8 << 20)
        #expect(await !reader.read(8 << 20, 128 << 10).inPlace)
        await reader.resized(to: grown.size)
        let (read, inPlace) = await reader.read(8 << 20, 128 << 10)
        #expect(read == Array(data[..<(128 << 10)]))
        #expect(inPlace)
        await reader.close()
        volume.close()
    }

    @Test func withoutAPipeDataIsRead() async throws {
        let reader = try await Reader(volume)
        let taken = Mutex<[Pipe]>([])
        await reader.withPipes { pipes in
            while let pipe = pipes.take() { taken.withLock { $0.append(pipe) } }
            #expect(pipes.take() == nil)
        }
        #expect(taken.withLock { $0.count } == 32)
        let (read, inPlace) = await reader.read(0, 128 << 10)
        #expect(read == Array(data[..<(128 << 10)]))
        #expect(!inPlace)
        // What is given back with data in it is made anew.
        await reader.withPipes { pipes in taken.withLock { for pipe in $0 { pipes.give(pipe, isEmpty: false) } } }
        #expect(await reader.read(0, 128 << 10).inPlace)
        await reader.close()
        volume.close()
    }
}
