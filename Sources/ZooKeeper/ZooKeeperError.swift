import CZooKeeper
import Glibc

/// What ZooKeeper, or the way to it, has refused.
package struct ZooKeeperError: Error, Sendable, Equatable, CustomStringConvertible {
    /// Of the C client, such as `ZNONODE`.
    package let code: ZOO_ERRORS
    /// As in "read /pureflash/cluster1/conductors: no node".
    package let description: String

    init(_ code: Int32, _ operation: String) {
        self.code = ZOO_ERRORS(rawValue: code)
        description = "\(operation): \(String(cString: zerror(code)))"
    }

    init(_ code: ZOO_ERRORS, message: String) {
        self.code = code
        description = message
    }

    package static func == (left: Self, right: Self) -> Bool {
        left.code.rawValue == right.code.rawValue && left.description == right.description
    }

    /// There is no such node.
    package var isMissingNode: Bool { code.rawValue == ZNONODE.rawValue }
    var isExistingNode: Bool { code.rawValue == ZNODEEXISTS.rawValue }
}
