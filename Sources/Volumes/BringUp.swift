import Backend
import Glibc

/// What makes a volume that is being mapped wait, and what ends the attempt. Opening it is a sequence: its pool is
/// reached, the volume found and ready, its size sensible, and its store lets write what is to be written. Whatever
/// fails, the answer's errno says whether time will help.
package struct BringUp: Sendable {
    package enum Decision: Sendable {
        /// Try again after so many nanoseconds.
        case again(UInt64)
        case giveUp(BackendError)
    }

    /// Who waits for it.
    package enum Occasion: Sendable {
        /// An administrator; `limit` in seconds.
        case map(limit: UInt64)
        /// A daemon that takes over what another one had, which may still be ending and hold its lock. It tries again by
        /// itself, between which others have their turn.
        case takeover
    }

    /// Seconds for one try of a takeover, in which a daemon that ends gives its locks back.
    private static let takeoverLimit: UInt64 = 10
    private static let pause: UInt64 = 1_000_000_000
    private static let lockPause: UInt64 = 50_000_000
    /// Nanoseconds: a shorter try would tell of itself, in place of what is wrong.
    private static let shortestTry: UInt64 = 250_000_000

    private let occasion: Occasion
    private let began: UInt64

    /// - Parameter now: nanoseconds of any clock that never goes back; later calls use the same.
    package init(_ occasion: Occasion, now: UInt64) {
        self.occasion = occasion
        began = now
    }

    var isTakeover: Bool { if case .takeover = occasion { true } else { false } }

    /// Whether the store will be ready by itself. Everything else needs a person, who is told at once.
    package static func isBecomingReady(_ code: Int32) -> Bool {
        switch code {
        case EAGAIN, EINPROGRESS, EALREADY, ETIMEDOUT, ECONNREFUSED, ECONNRESET, ECONNABORTED, EHOSTUNREACH, EHOSTDOWN,
            ENETUNREACH, ENETDOWN:
            true
        default: false
        }
    }

    /// Nanoseconds that one try may take.
    package func remaining(now: UInt64) -> UInt64 {
        let limit: UInt64
        switch occasion {
        case .map(let seconds): limit = seconds * 1_000_000_000
        case .takeover: limit = Self.takeoverLimit * 1_000_000_000
        }
        let passed = now > began ? now - began : 0
        return limit > passed ? limit - passed : 0
    }

    /// What to do about an error of the open.
    package func decide(_ error: BackendError, now: UInt64) -> Decision {
        let passed = now > began ? now - began : 0
        switch occasion {
        case .takeover where error.code == EBUSY && passed < Self.takeoverLimit * 1_000_000_000:
            return .again(Self.lockPause)
        case .map(let limit) where Self.isBecomingReady(error.code):
            let left = remaining(now: now)
            guard left > Self.shortestTry else {
                return .giveUp(
                    BackendError(code: ETIMEDOUT, message: "not ready within \(limit) s: \(error.message)"))
            }
            return .again(min(Self.pause, left - Self.shortestTry))
        default: return .giveUp(error)
        }
    }

    /// What an opened volume must be to be served.
    /// - Parameter readOnly: writes will be refused anyway.
    package static func check(_ record: VolumeRecord, isProtected: Bool, readOnly: Bool, name: String)
        throws(BackendError)
    {
        guard record.size > 0, record.blockSize > 0, record.size % UInt64(record.blockSize) == 0 else {
            throw BackendError(
                code: EIO,
                message: "\(name) has \(record.size) bytes at its store, which is no multiple of its blocks of"
                    + " \(record.blockSize) bytes; it cannot be served")
        }
        guard readOnly || !isProtected else {
            throw BackendError(
                code: EROFS, message: "\(name) is write-protected at its store; map it with --read-only")
        }
    }
}
