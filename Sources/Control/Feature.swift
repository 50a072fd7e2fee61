/// What the documented usage holds and this version does not do yet.
///
/// This file is the one place that decides it.
package enum Feature: CaseIterable, Sendable {
    case rdma

    /// The error that says so, with code 95.
    package var comesLater: ControlError { .comesLater(subject) }

    private var subject: String {
        switch self {
        case .rdma: "the transport rdma:// (use tcp://, or no scheme at all)"
        }
    }
}
