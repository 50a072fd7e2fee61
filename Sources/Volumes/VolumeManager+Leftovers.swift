import Backend
import EventLoop
import Glibc
import Logging
import NBD

/// What an earlier daemon had mapped, and this one has not taken over: its store is away, or it is not what it was.
package struct Leftover: Sendable {
    let deviceID: UInt32
    /// Nil when it cannot be read; then there is a device.
    let document: MappingDocument?
    /// Nil for an export, and while it is not known whether the kernel has its device.
    var device: AttachedDevice?
    /// Bytes of the device; 0 for an export, and while that is not known.
    package var size: UInt64
    /// Seconds since 1970.
    let since = Int64(time(nil))
    /// Why it is not taken over; nil while it is tried for the first time.
    var problem: BackendError?
    /// Whether it is tried again.
    var isAwaited = true

    /// Whether nobody else may have its name: I/O may wait for it in the kernel, or it may be served any moment.
    var isKept: Bool { isDevice || isAwaited }

    package var isDevice: Bool { device != nil || document?.device != nil }
}

/// What a daemon finds at its start.
package struct Leftovers: Sendable {
    /// By `pool/volume`.
    package private(set) var leftovers: [String: Leftover] = [:]
    /// Of devices that the kernel does not have any more.
    package private(set) var gone: [MappingDocument] = []
    /// Devices of this state folder that no document speaks of, and none that cannot be read might.
    private(set) var orphans: [AttachedDevice] = []
    package var orphanedDevices: [KernelDevice] { orphans.map(\.device) }
    /// One line each.
    package private(set) var problems: [String] = []
    /// A document cannot be read: it may be that of any device.
    private var isDamaged = false

    /// Blocking. Fails when it is not known which mappings there are.
    /// - Parameter root: where /sys is; tests put a folder here.
    package static func find(_ store: MappingStore, root: String = "") throws(BackendError) -> Leftovers {
        var found = Leftovers()
        let (documents, damaged) = try store.load()
        found.problems = damaged
        found.isDamaged = !damaged.isEmpty
        var devices: [String: AttachedDevice] = [:]
        let unknown = found.look(for: &devices, store, root)
        for document in documents { found.add(document, &devices, unknown) }
        for device in devices.values {
            guard found.isDamaged else {
                found.orphans.append(device)
                continue
            }
            let name = device.identifier.volume
            guard found.leftovers[name] == nil else { continue }
            found.leftovers[name] = Leftover(
                deviceID: device.identifier.deviceID, document: nil, device: device, size: found.size(of: device),
                problem: BackendError(code: EINVAL, message: "its document in the state folder is damaged"),
                isAwaited: false)
        }
        return found
    }

    /// - Returns: why some were not seen, so that one that is missing is not known to be gone; nil when all were.
    private mutating func look(
        for devices: inout [String: AttachedDevice], _ store: MappingStore, _ root: String
    ) -> BackendError? {
        var unknown: BackendError?
        do throws(SystemError) {
            for device in try KernelDevice.all(root: root) {
                do throws(SystemError) {
                    guard let identifier = try device.identifier, store.made(identifier) else { continue }
                    devices[identifier.description] = AttachedDevice(identifier: identifier, device: device)
                } catch {
                    unknown = BackendError(error)
                    problems.append("whose device \(device.path) is cannot be found out: \(error)")
                }
            }
        } catch {
            unknown = BackendError(error)
            problems.append("which devices the kernel has cannot be found out: \(error)")
        }
        return unknown
    }

    /// For people, until it is taken over.
    private mutating func size(of attached: AttachedDevice) -> UInt64 {
        do throws(SystemError) { return try attached.device.size } catch {
            problems.append("\(error)")
            return 0
        }
    }

    /// - Parameters:
    ///   - devices: by identifier; what belongs to a document is taken out.
    ///   - unknown: why not all devices are among them; nil when they are.
    private mutating func add(
        _ document: MappingDocument, _ devices: inout [String: AttachedDevice], _ unknown: BackendError?
    ) {
        var device: AttachedDevice?
        if let text = document.device?.identifier {
            guard DeviceIdentifier(text)?.volume == document.name else {
                isDamaged = true
                problems.append("the document of \(document.name) speaks of the device '\(text)', which is not its own")
                return
            }
            device = devices.removeValue(forKey: text)
            guard device != nil || unknown != nil else {
                gone.append(document)
                return
            }
        }
        leftovers[document.name] = Leftover(
            deviceID: document.deviceID, document: document, device: device,
            size: device.map { size(of: $0) } ?? 0)
    }
}

extension VolumeManager {
    /// The pool of a name in a configuration, and how long things may take there.
    package typealias Resolve =
        @Sendable (_ pool: String, _ config: String) async throws(BackendError) -> (any VolumePool, VolumeTiming)

    func leftover(_ name: String) -> Leftover? { state.withLock { $0.leftovers[name] } }

    /// The same with its device, if that was not found before and the kernel has it.
    func finding(_ leftover: Leftover, _ name: String) async throws(BackendError) -> Leftover {
        guard leftover.device == nil,
            let identifier = leftover.document?.device.flatMap({ DeviceIdentifier($0.identifier) })
        else { return leftover }
        var leftover = leftover
        let found = try await blocking.run { () throws(BackendError) in
            try Self.looking { () throws(SystemError) -> (device: KernelDevice, size: UInt64)? in
                guard let device = try KernelDevice.find(identifier) else { return nil }
                return (device, try device.size)
            }
        }
        guard let found else { return leftover }
        leftover.device = AttachedDevice(identifier: identifier, device: found.device)
        leftover.size = found.size
        state.withLock { state in
            state.leftovers[name]?.device = leftover.device
            state.leftovers[name]?.size = found.size
        }
        return leftover
    }

    /// Remembers why it could not be taken over.
    /// - Returns: whether it is to be tried again.
    func note(_ error: BackendError, _ name: String) -> Bool {
        let (isAwaited, isNews) = state.withLock { state in
            guard var leftover = state.leftovers[name] else { return (false, true) }
            let isNews = leftover.problem?.code != error.code
            leftover.problem = error
            // A device stays until somebody unmaps it, so its volume is waited for; unless that is another one now.
            leftover.isAwaited =
                !leftover.isDevice
                ? error.code == EBUSY || BringUp.isBecomingReady(error.code) : error.code != ESTALE
            state.leftovers[name] = leftover
            return (leftover.isAwaited, isNews)
        }
        if isNews {
            logger.error(
                "not taken over\(isAwaited ? ", tried again" : ""): \(error.message)", metadata: ["volume": "\(name)"])
        }
        return isAwaited
    }

    /// Takes it over when somebody asks for the very mapping.
    /// - Returns: nil when there is nothing to be taken over, and the volume can be mapped like any other.
    func mapLeftover(
        _ pool: any VolumePool, _ options: MapOptions, _ pending: PendingMap, _ name: String
    ) async throws(BackendError) -> MappedVolume? {
        guard let known = leftover(name), known.isKept else { return nil }
        guard let document = known.document else { throw notTakenOver(name, known) }
        let leftover = try await finding(known, name)
        // One whose device has gone is forgotten, whatever it was.
        if !leftover.isDevice || leftover.device != nil {
            try Self.checkAgreement(
                name, config: document.config, readOnly: document.readOnly, leftover.device, with: options)
        }
        do throws(BackendError) {
            return try await takeOver(
                leftover, document, pool, options.timing,
                BringUp(.map(limit: options.timing.open), now: monotonicNanoseconds()), name, pending)
        } catch {
            // That it is unmapped is said by who does it.
            if pending.reason == nil { _ = note(error, name) }
            guard let leftover = self.leftover(name), leftover.isKept else { return nil }
            // An export has nothing to lose, and why it is not there is the answer.
            throw !leftover.isDevice || pending.reason != nil ? error : notTakenOver(name, leftover)
        }
    }

    /// EBUSY when the name belongs to what may be taken over.
    func refuseLeftover(_ name: String) throws(BackendError) {
        if let leftover = leftover(name), leftover.isKept { throw notTakenOver(name, leftover) }
    }

    private func notTakenOver(_ name: String, _ leftover: Leftover) -> BackendError {
        let what =
            leftover.device.map { "its device \($0.device.path)" } ?? (leftover.isDevice ? "its device" : "its export")
        let reason = leftover.problem.map { ": \($0.message)" } ?? ""
        return BackendError(
            code: EBUSY,
            message: "\(name) is mapped since before qbdd was started, and \(what) is not taken over"
                + "\(leftover.isAwaited ? " yet" : "")\(reason); to give it up: qbd unmap \(name)")
    }

    /// ENOTTY, or EBUSY for what may be taken over.
    func notMapped(_ name: String) -> BackendError {
        if let leftover = leftover(name), leftover.isKept { return notTakenOver(name, leftover) }
        if let map = state.withLock({ $0.pending[name]?.first }) {
            let why = map.problem.map { ": \($0.message)" } ?? ""
            return BackendError(
                code: ENOTTY,
                message: "\(name) is being mapped, and not ready yet\(why); to give that up: qbd unmap \(name)")
        }
        return BackendError(code: ENOTTY, message: "\(name) is not mapped; `qbd list` shows what is")
    }

    /// Ends a mapping that was not taken over. What waits for the volume in the kernel fails.
    func unmapLeftover(_ name: String, force: Bool) async throws(BackendError) -> String? {
        guard let known = leftover(name) else { throw notMapped(name) }
        // One that is not found is gone; what cannot be found out is not given up.
        let leftover = try await finding(known, name)
        var logger = logger
        logger[metadataKey: "volume"] = "\(name)"
        var warning: String?
        if let attached = leftover.device { warning = try await detachDevice(attached, nil, logger, force: force) }
        let left = await forget(name, logger)
        logger.info("unmapped; it had not been taken over")
        return Self.joined(warning, left)
    }

    /// EEXIST unless what is mapped is what is asked for.
    static func checkAgreement(
        _ name: String, config: String, readOnly: Bool, _ device: AttachedDevice?, with options: MapOptions
    ) throws(BackendError) {
        func isMapped(_ how: String) -> BackendError {
            BackendError(code: EEXIST, message: "\(name) is mapped already, \(how); unmap it first")
        }
        if config != options.configPath { throw isMapped("with \(config)") }
        if readOnly != options.readOnly { throw isMapped(readOnly ? "read-only" : "writable") }
        switch options.target {
        case .export:
            if let device { throw isMapped("as /dev/\(device.name)") }
        case .device(let wanted):
            guard let device else { throw isMapped("as an export") }
            if let wanted, KernelDevice(path: wanted) != device.device { throw isMapped("as \(device.device.path)") }
        }
    }
}
