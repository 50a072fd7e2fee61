import Backend
import EventLoop
import Glibc
import Logging
import NBD
import Synchronization

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
    /// Milliseconds after which the kernel sends a request again whose connection has died. A request that waits longer
    /// for its answer on a connection that lives costs a line of the kernel's log, and, where there are several
    /// connections, this one: see `QueueSettings.setResendInterval`.
    /// - Parameter heldBack: the volume is suspended, so that all requests wait for minutes.
    private static func resendInterval(_ device: KernelDevice, heldBack: Bool) throws(SystemError) -> UInt32 {
        try device.queues > 1 ? (heldBack ? 600_000 : 30_000) : heldBack ? 30_000 : 2000
    }
    /// Seconds the kernel has to take a setting: newer ones finish all I/O in flight first.
    private static let settingTimeout = 5.0
    /// Seconds a disconnected device has to become free.
    private static let freeTimeout = 10.0
    /// Seconds it may take to find out who uses a device.
    private static let usersTimeout = 10.0
    /// Seconds the kernel has to say goodbye on the connections.
    private static let goodbyeTimeout = 5.0

    private static func unwrapping<Value>(
        _ body: () throws(KernelDeviceError) -> Value
    ) throws(BackendError) -> Value {
        do { return try body() } catch { throw BackendError(code: error.code, message: error.message) }
    }

    /// For what is read of a device.
    static func looking<Value>(_ body: () throws(SystemError) -> Value) throws(BackendError) -> Value {
        do { return try body() } catch { throw BackendError(error) }
    }

    /// Does what may wait for the device's I/O. Never on a loop.
    @discardableResult
    static func run(_ work: DeviceWork, _ attached: AttachedDevice) throws(BackendError) -> [String] {
        try unwrapping { () throws(KernelDeviceError) in
            try DeviceProcess.run(work, attached.device, attached.identifier)
        }
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

    /// Tells the kernel before requests are held back that they will be, and afterwards that they are not any more.
    func setResendInterval(_ attached: AttachedDevice, _ volume: Volume, heldBack: Bool) async {
        let device = attached.device
        let late = Deadline(seconds: Self.settingTimeout)
        do throws(BackendError) {
            let remarks = try await Aside.run {
                late.passed
                    ? BackendError(code: ETIMEDOUT, message: "\(device.path) has I/O in flight that does not end") : nil
            } _: { () throws(BackendError) -> [String] in
                let interval = try Self.looking { () throws(SystemError) -> UInt32? in
                    guard try device.backend == attached.identifier.description else { return nil }
                    return try Self.resendInterval(device, heldBack: heldBack)
                }
                guard let interval else { return [] }
                return try Self.run(.setResendInterval(interval), attached)
            }
            for remark in remarks { volume.logger.warning("\(remark)") }
        } catch { volume.logger.warning("the kernel was not told how long to wait: \(error.message)") }
    }

    /// Numbers of devices that other daemons on this host have.
    func numbersOfOthers(_ target: MapTarget) async throws(BackendError) -> Set<UInt32> {
        guard case .device = target, let store else { return [] }
        return try await blocking.run { () throws(BackendError) in
            try Self.looking { () throws(SystemError) in
                Set(try KernelDevice.ours().map(\.identifier).filter { !store.made($0) }.map(\.deviceID))
            }
        }
    }

    /// Makes a device of a volume that is served already; when this returns it can be formatted.
    /// - Parameter wanted: `/dev/nbdX`, or nil for any.
    func attachDevice(
        _ volume: Volume, _ identifier: DeviceIdentifier, wanted: String?
    ) async throws(BackendError) -> AttachedDevice {
        let settings = deviceSettings
        // Connections beyond the number of hardware queues, which is that of processors, are never used.
        let connections = min(settings.connections, max(sysconf(Int32(_SC_NPROCESSORS_ONLN)), 1))
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
                    connections: connections)
            }
        }
        volume.attachKernel(made.sockets)
        let attached = AttachedDevice(identifier: identifier, device: KernelDevice(index: made.index))
        do throws(BackendError) {
            try await finish(attached, volume, isOpen: true, isNew: true)
        } catch {
            await volume.severKernel()
            do throws(BackendError) {
                let remarks = try await Aside.run { () throws(BackendError) in try Self.disconnect(attached)
                }
                for remark in remarks { volume.logger.warning("\(remark)") }
            } catch { volume.logger.error("\(attached.device.path) is left connected: \(error.message)") }
            throw error
        }
        return attached
    }

    /// What follows on new connections: size, queue, partitions, names.
    /// - Parameter isOpen: whether the volume's I/O runs: a look for partitions would wait for it, or find none.
    private func finish(
        _ attached: AttachedDevice, _ volume: Volume, isOpen: Bool, isNew: Bool = false
    ) async throws(BackendError) {
        let export = volume.export
        let remarks = try await Aside.run { () throws(BackendError) in
            let interval = try Self.looking { () throws(SystemError) in
                isNew ? try Self.resendInterval(attached.device, heldBack: false) : nil
            }
            return try Self.run(
                .settle(size: isOpen ? export.size : nil, readOnly: export.readOnly, resendInterval: interval), attached
            )
        }
        for remark in remarks { volume.logger.warning("\(remark)") }
    }

    /// Makes the names of partitions that have come since, and removes those of partitions that have gone.
    func renew(_ attached: AttachedDevice, _ volume: Volume) async {
        let remarks = await blocking.run { () -> [String] in
            do throws(SystemError) {
                guard try attached.device.backend == attached.identifier.description else { return [] }
                return try DeviceNames().make(attached.device, attached.identifier)
            } catch { return ["\(error)"] }
        }
        for remark in remarks { volume.logger.warning("\(remark)") }
    }

    /// Partitions made while a device is mapped get their names.
    func watchDevices() async {
        guard state.withLock({ $0.watcher == nil && !$0.stopping }) else { return }
        let problem = await listenerLoop.call { [self] () -> String? in
            do throws(SystemError) {
                let watcher = try KernelEventWatcher(loop: listenerLoop) { [weak self] event in
                    self?.deviceChanged(event?.index)
                }
                let taken = state.withLock { state in
                    guard state.watcher == nil, !state.stopping else { return false }
                    state.watcher = watcher
                    return true
                }
                if !taken { watcher.close() }
                return nil
            } catch { return "\(error); partitions made while a device is mapped get no names" }
        }
        if let problem = problem ?? nil { logger.warning("\(problem)") }
    }

    /// - Parameter index: nil when any device may have changed.
    private func deviceChanged(_ index: UInt32?) {
        let changed = state.withLock { state in
            state.mappings.filter { $0.value.device != nil && (index == nil || $0.value.device?.device.index == index) }
        }
        for name in changed.keys {
            Task {
                await names.run(name) { [self] in
                    if let mapping = mapping(name), let device = mapping.device { await renew(device, mapping.volume) }
                }
            }
        }
    }

    /// Ends the device of a mapping. EBUSY, saying why, when somebody uses it, or when the kernel holds writes for a volume
    /// that does not answer, unless forced.
    /// - Parameter volume: nil when nothing serves the device.
    /// - Returns: who lost it by force; nil for nobody.
    func detachDevice(
        _ attached: AttachedDevice, _ volume: Volume?, _ logger: Logger, force: Bool
    ) async throws(BackendError) -> String? {
        let device = attached.device
        guard try await isConnected(attached) else {
            logger.warning("\(device.path) is not connected any more")
            for remark in await blocking.run({ DeviceNames().remove(device, attached.identifier) }) {
                logger.warning("\(remark)")
            }
            return nil
        }
        var warning: String?
        let users = try await users(of: attached, logger, force: force)
        if !users.isEmpty {
            let text = "\(attached.identifier.volume) is in use: \(users.joined(separator: ", "))"
            guard force else { throw BackendError(code: EBUSY, message: text) }
            warning = "unmapped by force; \(text)"
            logger.warning("\(warning ?? "")")
        }
        // The last who closes a device writes back what its cache holds. Where nobody serves it, that is in vain.
        var claim: DeviceProcess?
        if let volume, !force { claim = try await flush(attached, volume) }
        await volume?.expectKernelToLeave()
        // Where nothing waits for an answer, nothing keeps the kernel from letting go.
        if force { await volume?.severKernel() }
        let late = Deadline(seconds: Self.goodbyeTimeout)
        do throws(BackendError) {
            let remarks = try await Aside.run {
                if late.passed { await volume?.severKernel() }
                return nil
            } _: { [claim] () throws(BackendError) in
                try Self.disconnect(attached, claim)
            }
            for remark in remarks { logger.warning("\(remark)") }
        } catch {
            await volume?.expectKernelToStay()
            throw error
        }
        return warning
    }

    /// Whether a device is still the mapping's. An error says that this could not be found out.
    func isConnected(_ attached: AttachedDevice) async throws(BackendError) -> Bool {
        try await blocking.run { () throws(BackendError) in
            try Self.looking { () throws(SystemError) in
                try attached.device.backend == attached.identifier.description
            }
        }
    }

    /// Who uses a device, one phrase each. What there is to be looked at is not ours, and some of it may not answer.
    private func users(
        of attached: AttachedDevice, _ logger: Logger, force: Bool
    ) async throws(BackendError) -> [String] {
        let (device, identifier) = (attached.device, attached.identifier)
        let late = Deadline(seconds: Self.usersTimeout)
        do throws(BackendError) {
            return try await Aside.run {
                guard late.passed else { return nil }
                return BackendError(
                    code: ETIMEDOUT,
                    message: "who uses \(device.path) was not found out within \(Int(Self.usersTimeout)) s")
            } _: { () throws(BackendError) in
                try Self.looking { () throws(SystemError) in
                    try DeviceUsers(device, names: try DeviceNames.paths(device, identifier)).phrases()
                }
            }
        } catch {
            // A process that has it open is no hindrance to a claim: only here it is seen.
            guard force else {
                throw BackendError(
                    code: error.code,
                    message: "\(identifier.volume) is not unmapped: \(error.message); --force does not ask")
            }
            logger.warning("\(error.message)")
            return []
        }
    }

    /// Makes sure that the kernel holds nothing for a device, and that nobody can begin to use it.
    private func flush(_ attached: AttachedDevice, _ volume: Volume) async throws(BackendError) -> DeviceProcess {
        let answers = AnswerWatch(volume)
        // A flush of what is held back would wait for it; what is not written yet is all that has to be known then.
        let state = await volume.status()?.state ?? .normal
        return try await Aside.run {
            await answers.problem
        } _: { () throws(BackendError) in
            do throws(KernelDeviceError) {
                return try DeviceProcess(.claim(flush: state == .normal), attached.device, attached.identifier)
            } catch {
                guard error.code == EBUSY else {
                    throw BackendError(
                        code: error.code,
                        message: "\(volume.name) is not unmapped: \(error); with --force that is given up")
                }
                throw BackendError(
                    code: EBUSY,
                    message: "\(volume.name) is in use: \(attached.device.path) was just taken by somebody")
            }
        }
    }

    /// Disconnects a device and removes all that is left of it.
    /// - Parameter claim: released when it is disconnected; it keeps others from mounting the device meanwhile.
    /// - Returns: one line for each thing that is not as it should be.
    private static func disconnect(
        _ attached: AttachedDevice, _ claim: DeviceProcess? = nil
    ) throws(BackendError) -> [String] {
        let device = attached.device
        try unwrapping { () throws(KernelDeviceError) in
            try KernelDevices().disconnect(index: device.index, identifier: attached.identifier.description)
        }
        claim?.release()
        var remarks: [String] = []
        do throws(BackendError) {
            if try !looking({ () throws(SystemError) in try device.waitUntilFree(Self.freeTimeout) }) {
                remarks.append("\(device.path) is disconnected, and still open somewhere")
            } else if try !looking({ () throws(SystemError) in try device.partitions.isEmpty }) {
                // The kernel forgets partitions of a disk that has gone when it is opened next.
                remarks += try run(.dropPartitions, attached)
            }
        } catch { remarks.append(error.message) }
        return remarks + DeviceNames().remove(device, attached.identifier)
    }

    /// Gives the device of a mapping new connections for those that have ended.
    /// - Parameter open: connections that have not ended.
    func reconnect(
        _ attached: AttachedDevice, _ volume: Volume, _ settings: VolumeSettings, open: Int = 0
    ) async throws(BackendError) {
        let deadConnectionTimeout = deviceSettings.reattachTimeout
        let sockets = try await blocking.run { () throws(BackendError) in
            // As many as the device was made with.
            let missing = max(try Self.looking { () throws(SystemError) in try attached.device.queues }, 1) - open
            guard missing > 0 else { return [Int32]() }
            return try Self.unwrapping { () throws(KernelDeviceError) in
                try KernelDevices().reconnect(
                    index: attached.device.index, identifier: attached.identifier.description,
                    connections: missing, deadConnectionTimeout: deadConnectionTimeout)
            }
        }
        guard !sockets.isEmpty else { return }
        volume.attachKernel(sockets)
        if settings.gate != .suspended {
            do throws(BackendError) { try await setSize(attached, volume) } catch {
                // Who uses the device needs its connections more than its size.
                volume.logger.warning(
                    "the volume has grown, but \(error.message); `qbd resize --to-store-size` finishes that")
            }
        }
        try await finish(attached, volume, isOpen: settings.gate == .normal)
    }
}

/// Judges whether a volume answers requests.
private final class AnswerWatch: Sendable {
    private struct Seen {
        var answered: UInt64?
        var at = Deadline(seconds: 0)
    }
    /// Seconds without an answer: of a volume that holds requests back, and of one that only takes long.
    private static let (heldBack, slow) = (2.0, 30.0)

    private let volume: Volume
    private let seen = Mutex(Seen())

    init(_ volume: Volume) { self.volume = volume }

    /// EBUSY when nothing has been answered for some time.
    var problem: BackendError? {
        get async {
            guard let status = await volume.status() else { return nil }
            let seconds = status.state == .normal ? Self.slow : Self.heldBack
            let late = seen.withLock { seen in
                if seen.answered == status.answered { return seen.at.passed }
                seen = Seen(answered: status.answered, at: Deadline(seconds: seconds))
                return false
            }
            guard late else { return nil }
            let reason = status.state == .normal ? "does not answer" : "is in the state \(status.state.rawValue)"
            return BackendError(
                code: EBUSY,
                message: "\(volume.name) is not unmapped: the kernel holds writes for it that are not written yet, and"
                    + " the volume \(reason); unmap it when it answers again, or give them up with --force")
        }
    }
}
