import Backend
import EventLoop
import Glibc
import Logging
import NBD

// A volume grows from its store upwards: the file, the volume's loop, the kernel's device. When a step fails, those
// below it have grown and stay so; `resize` to the store's size takes up from there.
extension VolumeManager {
    /// Seconds that I/O in flight gets before a device grows.
    private static let answerTimeout = 10.0

    /// Grows a mapped volume, its device included, under the file systems on it.
    /// - Parameters:
    ///   - size: bytes; nil takes over the size the volume has at its store.
    ///   - rescan: read the device's partition table again.
    /// - Returns: nil when it is not mapped.
    package func resize(
        pool: String, volume: String, to size: UInt64?, rescan: Bool
    ) async throws(BackendError) -> VolumeRecord? {
        let name = "\(pool)/\(volume)"
        return try await names.run(name) { [self] () throws(BackendError) -> VolumeRecord? in
            guard let mapping = mapping(name) else { return nil }
            guard mapping.settings.gate != .suspended else {
                throw BackendError(
                    code: EBUSY,
                    message: "\(name) is suspended, and growing its device waits for its I/O;"
                        + " `qbd resume \(name) -t normal` first")
            }
            let opened = mapping.volume.opened
            let before = opened.record.size
            let record = try await Aside.run { () throws(BackendError) in try opened.grow(to: size) }
            await mapping.volume.resized()
            if let device = mapping.device {
                do throws(BackendError) {
                    try await grow(device, mapping.volume, rescan: rescan)
                } catch {
                    throw BackendError(
                        code: error.code,
                        message: "\(name) has grown to \(record.size) bytes, but \(error.message); then repeat it with"
                            + " --to-store-size")
                }
            }
            if record.size != before {
                mapping.volume.logger.info("grown from \(before) to \(record.size) bytes")
            }
            return record
        }
    }

    /// Grows a volume that is not mapped.
    package func resize(
        _ pool: any VolumePool, volume: String, to size: UInt64?
    ) async throws(BackendError) -> VolumeRecord {
        let name = "\(pool.name)/\(volume)"
        return try await names.run(name) { [self] () throws(BackendError) in
            try refuseLeftover(name)
            let record = try await Aside.run { () throws(BackendError) in
                try pool.grow(volume: volume, to: size)
            }
            logger.info("has \(record.size) bytes now", metadata: ["volume": "\(name)"])
            return record
        }
    }

    /// Gives the device the size of its volume; `/dev` has it on return, and the names of its partitions.
    private func grow(_ attached: AttachedDevice, _ volume: Volume, rescan: Bool) async throws(BackendError) {
        try await setSize(attached, volume)
        if rescan {
            _ = try await Aside.run { () throws(BackendError) in
                do throws(BackendError) { return try Self.run(.rescanPartitions, attached) } catch {
                    guard error.code == EBUSY else { throw error }
                    throw BackendError(
                        code: EBUSY,
                        message:
                            "the partition table of \(attached.device.path) was not read again, because a partition"
                            + " is in use; unmount it")
                }
            }
        }
        await renew(attached, volume)
    }

    /// Tells the kernel of a device's size, if it is another one.
    ///
    /// From Linux 6.11 on, that waits for all I/O in flight, and while it does no device of the host is connected or
    /// disconnected; not even a new daemon could answer that I/O. So it is begun when the volume answers, and not before.
    func setSize(_ attached: AttachedDevice, _ volume: Volume) async throws(BackendError) {
        let size = volume.export.size
        guard try Self.looking({ () throws(SystemError) in try attached.device.size }) != size else { return }
        let (asked, late) = (monotonicNanoseconds(), Deadline(seconds: Self.answerTimeout))
        while await !volume.hasAnswered(allBefore: asked) {
            guard !late.passed else {
                throw BackendError(
                    code: EBUSY,
                    message: "\(attached.device.path) has not, because I/O that is in flight was not done within"
                        + " \(Int(Self.answerTimeout)) s, and the kernel would wait for it; see `qbd info`")
            }
            await wait(nanoseconds: 5_000_000)
        }
        _ = try await Aside.run { () throws(BackendError) in try Self.run(.grow(to: size), attached) }
    }
}
