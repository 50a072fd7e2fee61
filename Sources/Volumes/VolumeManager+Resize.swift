import Backend
import EventLoop
import Glibc
import Logging
import NBD

// A volume grows from its store upwards: the file, the volume's loop, the kernel's device. When a step fails, those
// below it have grown and stay so; `resize` to the store's size takes up from there.
extension VolumeManager {
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
        let size = volume.export.size
        try await Aside.run { () throws(BackendError) in
            try Self.grow(attached, to: size)
            guard rescan else { return }
            do throws(SystemError) { try QueueSettings(attached.device).rescanPartitions() } catch {
                guard error.code == EBUSY else { throw BackendError(error) }
                throw BackendError(
                    code: EBUSY,
                    message: "the partition table of \(attached.device.path) was not read again, because a partition"
                        + " is in use; unmount it")
            }
        }
        await renew(attached, volume)
    }

    /// On a thread of its own, while the volume's I/O runs: the kernel waits for all that is in flight.
    static func grow(_ attached: AttachedDevice, to size: UInt64) throws(BackendError) {
        let device = attached.device
        guard device.size != size else { return }
        var reconfigure = KernelReconfigure(index: device.index, identifier: attached.identifier.description)
        reconfigure.size = size
        do throws(KernelDeviceError) { try KernelDevices().reconfigure(reconfigure) } catch {
            throw BackendError(code: error.code, message: error.message)
        }
        guard device.wait(10, until: { $0.size == size }) else {
            throw BackendError(
                code: ETIMEDOUT, message: "\(device.path) has \(device.size) bytes after 10 s instead of \(size)")
        }
    }
}
