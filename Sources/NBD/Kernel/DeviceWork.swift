import EventLoop
import Glibc

/// What is done to a device that may wait for the device's I/O. `DeviceProcess` does it.
package enum DeviceWork: Sendable, Equatable {
    /// All that follows on new connections: queue, access, partitions, names.
    /// - Parameters:
    ///   - size: bytes it must have after at most 10 s; nil when the volume's I/O does not run, so that a look
    ///     for partitions would wait for it, or find none.
    ///   - resendInterval: see `QueueSettings.setResendInterval`; nil for a device that is in use already. Who uses it
    ///     needs its connections and not its names: what fails then is a remark.
    case settle(size: UInt64?, readOnly: Bool, resendInterval: UInt32?)
    /// Milliseconds; see `QueueSettings.setResendInterval`.
    case setResendInterval(UInt32)
    /// Gives it another size, in bytes, unless it has that. Only while the volume's I/O runs.
    case grow(to: UInt64)
    /// Reads the partition table again.
    case rescanPartitions
    /// Lets the kernel forget the partitions of a disk that has gone.
    case dropPartitions
    /// Keeps others from using it, and writes back what the kernel holds for it: see `DeviceClaim`.
    /// - Parameter flush: whether the volume is asked to make everything durable, too; else it hears of what was not
    ///   written yet and of nothing else.
    case claim(flush: Bool)

    /// Seconds the driver has to say a size.
    private static let sizeTimeout = 10.0
    /// Seconds another process of ours has to let go of the device.
    private static let claimTimeout = 10.0

    // MARK: As words of a command line

    package var words: [String] {
        func word<Value>(_ value: Value?) -> String { value.map { "\($0)" } ?? "-" }
        return switch self {
        case .settle(let size, let readOnly, let interval): ["settle", word(size), word(readOnly), word(interval)]
        case .setResendInterval(let interval): ["set-resend-interval", word(interval)]
        case .grow(let size): ["grow", word(size)]
        case .rescanPartitions: ["rescan-partitions"]
        case .dropPartitions: ["drop-partitions"]
        case .claim(let flush): ["claim", word(flush)]
        }
    }

    /// Nil for what `words` does not make.
    package init?(words: [String]) {
        switch words.first {
        case "settle" where words.count == 4:
            guard let readOnly = Bool(words[2]) else { return nil }
            self = .settle(size: UInt64(words[1]), readOnly: readOnly, resendInterval: UInt32(words[3]))
        case "set-resend-interval" where words.count == 2:
            guard let interval = UInt32(words[1]) else { return nil }
            self = .setResendInterval(interval)
        case "grow" where words.count == 2:
            guard let size = UInt64(words[1]) else { return nil }
            self = .grow(to: size)
        case "rescan-partitions": self = .rescanPartitions
        case "drop-partitions": self = .dropPartitions
        case "claim" where words.count == 2:
            guard let flush = Bool(words[1]) else { return nil }
            self = .claim(flush: flush)
        default: return nil
        }
        guard self.words == words else { return nil }
    }

    // MARK: Doing it

    /// Does it, in the calling thread.
    /// - Parameter remark: told one line for each thing that is not as it should be.
    /// - Returns: what a claim keeps; nil for all others.
    func perform(
        _ device: KernelDevice, _ identifier: DeviceIdentifier, _ remark: (String) -> Void
    ) throws(KernelDeviceError) -> DeviceClaim? {
        let settings = QueueSettings(device)
        switch self {
        case .settle(let size, let readOnly, let resendInterval):
            if let size { try Self.wait(for: size, device) }
            settings.apply(resendInterval: resendInterval).forEach(remark)
            do throws(KernelDeviceError) {
                try Self.open(device, identifier, readOnly: readOnly, isServed: size != nil, remark)
            } catch {
                guard resendInterval == nil else { throw error }
                remark(error.message)
            }
        case .setResendInterval(let interval): settings.setResendInterval(interval).forEach(remark)
        case .grow(let size):
            guard try Self.naming({ () throws(SystemError) in try device.size }) != size else { break }
            var reconfigure = KernelReconfigure(index: device.index, identifier: identifier.description)
            reconfigure.size = size
            try KernelDevices(root: device.root).reconfigure(reconfigure)
            try Self.wait(for: size, device)
        case .rescanPartitions: try Self.naming { () throws(SystemError) in try settings.rescanPartitions() }
        case .dropPartitions: try Self.naming { () throws(SystemError) in try settings.scanPartitions() }
        case .claim(let flush):
            return try Self.naming { () throws(SystemError) in
                let claim = try Self.claim(device)
                if flush { try claim.flush() } else { try claim.flushDirty() }
                return claim
            }
        }
        return nil
    }

    /// A daemon that was killed while it had a claim leaves that until the device's cache is written back.
    private static func claim(_ device: KernelDevice) throws(SystemError) -> DeviceClaim {
        let deadline = Deadline(seconds: claimTimeout)
        while true {
            do throws(SystemError) { return try DeviceClaim(device) } catch {
                guard error.code == EBUSY, !deadline.passed, try DeviceUsers(device).hasWorker else { throw error }
                pause(5_000_000)
            }
        }
    }

    private static func wait(for size: UInt64, _ device: KernelDevice) throws(KernelDeviceError) {
        try naming { () throws(SystemError) in
            let isThere = try device.wait(sizeTimeout) { (device) throws(SystemError) in try device.size == size }
            guard !isThere else { return }
            throw SystemError(
                code: ETIMEDOUT, operation: "wait for \(device.path) to have \(size) bytes",
                reason: "it has \(try device.size) after \(Int(sizeTimeout)) s")
        }
    }

    /// - Parameter isServed: whether who reads the device gets an answer.
    private static func open(
        _ device: KernelDevice, _ identifier: DeviceIdentifier, readOnly: Bool, isServed: Bool,
        _ remark: (String) -> Void
    ) throws(KernelDeviceError) {
        try naming { () throws(SystemError) in
            let names = DeviceNames(root: device.root)
            try names.makeNodes(device)
            try QueueSettings(device).setReadOnly(readOnly)
            if isServed { try QueueSettings(device).scanPartitions() }
            // Whoever looks at a device reads it.
            try names.make(device, identifier, asksUdev: isServed).forEach(remark)
        }
    }

    private static func naming<Value>(
        _ body: () throws(SystemError) -> Value
    ) throws(KernelDeviceError) -> Value {
        do throws(SystemError) { return try body() } catch { throw KernelDeviceError(error) }
    }
}
