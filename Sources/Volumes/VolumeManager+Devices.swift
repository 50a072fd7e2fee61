import Backend
import EventLoop
import Glibc
import Logging
import NBD

/// A mapping's block device.
struct AttachedDevice: Sendable {
    let identifier: DeviceIdentifier
    let device: KernelDevice

    /// "qbdN", what the list shows.
    var name: String { "qbd\(identifier.deviceID)" }
}

/// How kernel devices are made.
package struct DeviceSettings: Sendable {
    /// Sockets between the kernel and the daemon, 1...4.
    package var connections: Int
    /// Seconds I/O waits for a daemon that is away.
    package var reattachTimeout: UInt64

    package init(connections: Int, reattachTimeout: UInt64) {
        self.connections = connections
        self.reattachTimeout = reattachTimeout
    }
}

// The kernel's side of a mapping. All blocking calls run on the blocking-work thread.
extension VolumeManager {
    /// Milliseconds after which the kernel sends a request again whose connection has died.
    private static let resendInterval: UInt32 = 2000
    /// Seconds a disconnected device has to become free.
    private static let freeTimeout = 10.0

    private static func unwrapping<Value>(
        _ body: () throws(KernelDeviceError) -> Value
    ) throws(BackendError) -> Value {
        do { return try body() } catch { throw BackendError(code: error.code, message: error.message) }
    }

    /// Loads the kernel's driver when it is missing.
    func requireDriver(for name: String) async throws(BackendError) {
        do throws(KernelDeviceError) {
            try await blocking.run { () throws(KernelDeviceError) in try KernelDriver().load() }
        } catch {
            throw BackendError(
                code: error.code,
                message:
                    "\(name) cannot become a device: \(error.message); or add --export to serve the volume over NBD"
                    + " without a kernel device")
        }
    }

    /// Makes a device of a volume that is served already; when this returns it can be formatted.
    /// - Parameter wanted: `/dev/nbdX`, or nil for any.
    func attachDevice(
        _ volume: Volume, _ identifier: DeviceIdentifier, wanted: String?
    ) async throws(BackendError) -> AttachedDevice {
        let settings = deviceSettings
        let export = volume.export
        let made = try await blocking.run { () throws(BackendError) in
            let index = try wanted.map { (path) throws(BackendError) in
                guard let device = KernelDevice(path: path) else {
                    throw BackendError(code: EINVAL, message: "\(path) is no nbd device; name one as /dev/nbdX")
                }
                return device.index
            }
            return try Self.unwrapping { () throws(KernelDeviceError) in
                try KernelDevices().connect(
                    KernelConnect(
                        index: index, sockets: [], size: export.size, blockSize: export.minimumBlock,
                        serverFlags: export.transmissionFlags(structured: false),
                        deadConnectionTimeout: settings.reattachTimeout, identifier: identifier.description),
                    connections: settings.connections)
            }
        }
        volume.attachKernel(made.sockets)
        let attached = AttachedDevice(identifier: identifier, device: KernelDevice(index: made.index))
        do throws(BackendError) {
            try await finish(attached, volume)
        } catch {
            await blocking.run {
                do throws(KernelDeviceError) {
                    try KernelDevices().disconnect(index: made.index, identifier: identifier.description)
                } catch { volume.logger.error("\(attached.device.path) is left connected: \(error.message)") }
                for remark in DeviceNames().remove(attached.device, identifier) { volume.logger.warning("\(remark)") }
            }
            throw error
        }
        return attached
    }

    /// What follows on new connections: size, queue, partitions, names.
    private func finish(_ attached: AttachedDevice, _ volume: Volume) async throws(BackendError) {
        let size = volume.export.size
        let readOnly = volume.export.readOnly
        let remarks = try await blocking.run { () throws(BackendError) in
            let device = attached.device
            guard device.wait(10, until: { $0.size == size }) else {
                throw BackendError(
                    code: ETIMEDOUT, message: "\(device.path) has \(device.size) bytes after 10 s instead of \(size)")
            }
            var remarks = QueueSettings(device).apply(resendInterval: Self.resendInterval)
            do throws(SystemError) {
                try QueueSettings(device).setReadOnly(readOnly)
                try QueueSettings(device).scanPartitions()
                remarks += try DeviceNames().make(device, attached.identifier)
            } catch { throw BackendError(error) }
            return remarks
        }
        for remark in remarks { volume.logger.warning("\(remark)") }
    }

    /// Makes the names of partitions that have come since, and removes those of partitions that have gone.
    func renew(_ attached: AttachedDevice, _ volume: Volume) async {
        let remarks = await blocking.run { () -> [String] in
            guard attached.device.backend == attached.identifier.description else { return [] }
            do throws(SystemError) { return try DeviceNames().make(attached.device, attached.identifier) } catch {
                return ["\(error)"]
            }
        }
        for remark in remarks { volume.logger.warning("\(remark)") }
    }

    /// Ends the device of a mapping. EBUSY, saying who uses it, unless forced.
    func detachDevice(_ attached: AttachedDevice, force: Bool, logger: Logger) async throws(BackendError) {
        try await blocking.run { () throws(BackendError) in
            let device = attached.device
            let identifier = attached.identifier.description
            guard device.backend == identifier else {
                logger.warning("\(device.path) is not connected any more")
                for remark in DeviceNames().remove(device, attached.identifier) { logger.warning("\(remark)") }
                return
            }
            let names = DeviceNames.paths(device, attached.identifier)
            let users = DeviceUsers(device, names: names).phrases()
            if !users.isEmpty {
                let text = "\(attached.identifier.volume) is in use: \(users.joined(separator: ", "))"
                guard force else { throw BackendError(code: EBUSY, message: text) }
                logger.warning("unmapped by force; \(text)")
            }
            if force {
                try Self.disconnect(device, identifier)
            } else {
                try Self.disconnectClaimed(device, identifier, attached.identifier.volume)
            }
            if !device.waitUntilFree(Self.freeTimeout) {
                logger.warning("\(device.path) is disconnected, and still open somewhere")
            }
            for remark in DeviceNames().remove(device, attached.identifier) { logger.warning("\(remark)") }
        }
    }

    /// The claim keeps others from mounting it between the look at its users and its end.
    private static func disconnectClaimed(
        _ device: KernelDevice, _ identifier: String, _ volume: String
    ) throws(BackendError) {
        do throws(SystemError) {
            let claim = try DeviceClaim(device)
            try claim.flush()
            do throws(BackendError) { try disconnect(device, identifier) } catch {
                throw SystemError(code: error.code, operation: error.message)
            }
        } catch {
            guard error.code == EBUSY else { throw BackendError(error) }
            throw BackendError(code: EBUSY, message: "\(volume) is in use: \(device.path) was just taken by somebody")
        }
    }

    private static func disconnect(_ device: KernelDevice, _ identifier: String) throws(BackendError) {
        try unwrapping { () throws(KernelDeviceError) in
            try KernelDevices().disconnect(index: device.index, identifier: identifier)
        }
    }

    /// Gives the device of a mapping, whose old connections have ended, new ones.
    func reconnect(_ attached: AttachedDevice, _ volume: Volume) async throws(BackendError) {
        let settings = deviceSettings
        let sockets = try await blocking.run { () throws(BackendError) in
            try Self.unwrapping { () throws(KernelDeviceError) in
                // As many as the device was made with.
                let connections = max(attached.device.queues, 1)
                return try KernelDevices().reconnect(
                    index: attached.device.index, identifier: attached.identifier.description,
                    connections: connections, deadConnectionTimeout: settings.reattachTimeout)
            }
        }
        volume.attachKernel(sockets)
        let size = volume.export.size
        try await blocking.run { () throws(BackendError) in try Self.grow(attached, to: size) }
        try await finish(attached, volume)
    }
}
