import Backend
import CLinux
import EventLoop
import Glibc

/// Takes the data of large reads as it lies in the page cache: to pass its pages on saves two copies, and costs some
/// system calls. On the volume's loop.
final class ReadsInPlace {
    /// Bytes from which on it pays.
    private static let minimum: UInt32 = 32 << 10
    /// A read that does not begin at a page takes one page more.
    private static let maximum = UInt32(PipePool.capacity - (64 << 10))
    private static let page = Int(getpagesize())

    private let file: Int32
    private let pipes: PipePool
    /// The whole file, never touched: mincore(2) asks by address.
    private var mapping: UnsafeMutableRawPointer?
    private var mapped = 0
    private let resident: UnsafeMutablePointer<UInt8>

    /// nil where data has to be in memory.
    init?(of file: Int32, size: UInt64, for client: any BackendClient) {
        guard let pipes = client.pipes, Self.isToldTheTruth(file) else { return nil }
        self.file = file
        self.pipes = pipes
        resident = .allocate(capacity: Int(Self.maximum) / Self.page + 1)
        resized(to: size)
    }

    deinit {
        unmap()
        resident.deallocate()
    }

    func resized(to size: UInt64) {
        unmap()
        guard let size = Int(exactly: size), size > 0 else { return }
        let address = mmap(nil, size, PROT_NONE, MAP_SHARED, file, 0)
        guard let address, address != qbd_map_failed() else { return }
        mapping = address
        mapped = size
    }

    /// - Returns: false where the data has to be read.
    @inline(__always)
    func take(_ io: UnsafeMutablePointer<IO>) -> Bool {
        guard io.pointee.length >= Self.minimum, io.pointee.length <= Self.maximum, let mapping else { return false }
        return take(io, mapping)
    }

    private func take(_ io: UnsafeMutablePointer<IO>, _ mapping: UnsafeMutableRawPointer) -> Bool {
        let offset = io.pointee.offset
        let length = Int(io.pointee.length)
        guard isInMemory(offset, length, mapping), let pipe = pipes.take() else { return false }
        guard pipe.fill(from: file, offset: offset, length: length) else {
            pipes.give(pipe, isEmpty: false)
            return false
        }
        io.pointee.pipe = pipe
        io.pointee.segment.pipe = pipe.reader
        io.pointee.segment.count = length
        return true
    }

    /// Whether nothing has to be waited for: no disk, and no lock of the file system.
    private func isInMemory(_ offset: UInt64, _ length: Int, _ mapping: UnsafeMutableRawPointer) -> Bool {
        let first = Int(offset) / Self.page
        let count = (Int(offset) + length - 1) / Self.page - first + 1
        guard (first + count - 1) * Self.page < mapped else { return false }
        // The cheap question first, and one that Linux before 6.5 cannot answer: there, to pass pages on to a Unix socket
        // waits while its client takes data.
        let cached = qbd_cached_pages(file, offset, UInt64(length))
        if cached < 0 { unmap() }
        guard cached == count, mincore(mapping + first * Self.page, count * Self.page, resident) == 0 else {
            return false
        }
        for index in 0..<count where resident[index] & 1 == 0 { return false }
        var byte: UInt8 = 0
        let got = qbd_read_now(file, &byte, 1, offset + UInt64(length) - 1)
        if got < 0, errno == EOPNOTSUPP { unmap() }
        return got == 1
    }

    /// Or not any more: the data is read from here on.
    private func unmap() {
        if let mapping { munmap(mapping, mapped) }
        mapping = nil
        mapped = 0
    }

    /// mincore(2) says that everything is in memory to those who may not write the file and do not own it.
    private static func isToldTheTruth(_ file: Int32) -> Bool {
        var status = stat()
        return fcntl(file, F_GETFL) & O_ACCMODE == O_RDWR
            || fstat(file, &status) == 0 && status.st_uid == geteuid()
    }
}
