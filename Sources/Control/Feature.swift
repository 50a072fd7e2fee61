/// What the documented usage holds and this version does not do yet.
///
/// This file is the one place that decides it: the command asks here before it asks the daemon, and the daemon's
/// answers to those commands come from here.
package enum Feature: CaseIterable, Sendable {
    case throttle
    case suspend
    case resume
    case rdma
    case snapshot

    /// The error that says so, with code 95.
    package var comesLater: ControlError { .comesLater(subject) }

    private var subject: String {
        switch self {
        case .throttle: "limiting the I/O of a mapped volume (throttle)"
        case .suspend: "holding back the I/O of a mapped volume (suspend)"
        case .resume: "letting held-back I/O go on (resume)"
        case .rdma: "the transport rdma:// (use tcp://, or no scheme at all)"
        case .snapshot: "a snapshot, pool/volume@snapshot,"
        }
    }
}

extension Command {
    /// What stands between this command and an answer; nil for a command that works.
    package var missingFeature: Feature? {
        switch self {
        case .setThrottle: .throttle
        case .suspend: .suspend
        case .resume: .resume
        case .map, .unmap, .remap, .list, .info, .resize, .version, .create, .delete, .volumes: nil
        }
    }
}
