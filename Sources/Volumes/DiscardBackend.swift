import Backend
import EventLoop
import Glibc
import NBD

/// Takes a store's place while a volume's I/O is discarded: everything succeeds, nothing is stored, reads are zeros.
final class DiscardBackend: Backend {
    /// As long as the longest read. Nobody writes there, so all of it is the kernel's one page of zeros.
    private nonisolated(unsafe) static let zeros: UnsafeMutableRawPointer? = {
        let area = mmap(
            nil, Int(NBD.maximumPayload), PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        return area == MAP_FAILED ? nil : area
    }()

    private(set) var geometry: Geometry
    private let buffers: BufferPool
    private unowned(unsafe) let client: any BackendClient

    /// - Parameter geometry: the store's.
    init(_ geometry: Geometry, buffers: BufferPool, client: any BackendClient) {
        var geometry = geometry
        geometry.maximumTransfer = .max
        geometry.boundary = 0
        self.geometry = geometry
        self.buffers = buffers
        self.client = client
    }

    func close() {}

    func resized(to size: UInt64) { geometry.size = size }

    func placement(offset: UInt64, length: UInt32) -> UnsafeMutableRawPointer? { nil }

    func submit(_ io: UnsafeMutablePointer<IO>) {
        io.pointee.status = 0
        switch io.pointee.operation {
        case .read:
            if let zeros = Self.zeros {
                io.pointee.segment.base = zeros
                io.pointee.segment.count = Int(io.pointee.length)
            } else {
                io.pointee.status = ENOMEM
            }
        case .extents:
            if let buffer = buffers.allocate(BufferPool.blockSize) {
                io.pointee.buffer = buffer
                io.pointee.ownsBuffer = true
                buffer.base.storeBytes(
                    of: Extent(length: io.pointee.length, flags: Extent.holeAndZero), as: Extent.self)
                io.pointee.segment.base = buffer.base
                io.pointee.segment.count = MemoryLayout<Extent>.stride
            } else {
                io.pointee.status = ENOMEM
            }
        case .write, .flush, .trim, .writeZeroes, .cache: break
        }
        client.completed(io)
    }
}
