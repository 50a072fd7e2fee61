import Logging

/// What a volume logs of its trouble: each thing once in a while, however often it happens.
struct TroubleLog {
    /// Nanoseconds before the same is logged again, and how much may be logged in that time.
    private static let repetition: UInt64 = 60_000_000_000
    private static let mostTold = 16
    /// Nanoseconds between two lines on requests that failed.
    private static let failurePause: UInt64 = 1_000_000_000

    let logger: Logger
    /// What was logged, and when.
    private var told: [String: UInt64] = [:]
    private var lastFailure: UInt64 = 0
    private var untoldFailures = 0

    init(_ logger: Logger) { self.logger = logger }

    /// Logs a text unless it was logged of late. A store that fails again and again does not fill the log, whatever it
    /// says.
    /// - Parameter now: the loop's time.
    /// - Returns: whether it was logged.
    @discardableResult
    mutating func tell(_ level: Logger.Level, _ text: String, at now: UInt64) -> Bool {
        if let last = told[text], now &- last < Self.repetition { return false }
        if told.count >= Self.mostTold { told = told.filter { now &- $0.value < Self.repetition } }
        guard told.count < Self.mostTold else { return false }
        told[text] = now
        logger.log(level: level, "\(text)")
        return true
    }

    /// Says that a request fails, once a second when there are many.
    mutating func tellFailure(_ request: UnsafeMutablePointer<StoreRequest>, _ reason: String, at now: UInt64) {
        guard lastFailure == 0 || now &- lastFailure > Self.failurePause else { return untoldFailures += 1 }
        let others = untoldFailures > 0 ? "; \(untoldFailures) others before it" : ""
        lastFailure = now
        untoldFailures = 0
        logger.error(
            "a \(request.pointee.isWrite ? "write" : "read") of \(request.pointee.length) bytes at \(request.pointee.offset) fails: \(reason)\(others)"
        )
    }
}
