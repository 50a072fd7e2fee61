/// The command table of the control device.
///
/// The original driver took these as ioctls of magic `0xfa` on `/dev/qbdctl`; here each is one request on the daemon's
/// Unix socket, under the same name and number, so that every verb, log line and error can be traced to its code.
/// Numbers from 16 up are ours.
package enum Command: UInt8, CaseIterable, Sendable {
    case map = 0
    case unmap = 1
    case remap = 2
    case list = 3
    case setThrottle = 4
    case suspend = 5
    case resume = 6
    case info = 7
    case resize = 8
    case version = 9
    case create = 16
    case delete = 17
    case volumes = 18
    case createSnapshot = 19
    case deleteSnapshot = 20
    case rollback = 21
    case snapshots = 22
    case clone = 23

    /// The name under which people, scripts and logs know the command, as in `QBD_IOC_MAP_VOLUME`.
    package var ioctlName: String {
        switch self {
        case .map: "QBD_IOC_MAP_VOLUME"
        case .unmap: "QBD_IOC_UNMAP_VOLUME"
        case .remap: "QBD_IOC_REMAP_VOLUME"
        case .list: "QBD_IOC_LIST_VOLUME"
        case .setThrottle: "QBD_IOC_SET_THROTTLE"
        case .suspend: "QBD_IOC_SUSPEND_VOLUME"
        case .resume: "QBD_IOC_RESUME_VOLUME"
        case .info: "QBD_IOC_VOLUME_INFO"
        case .resize: "QBD_IOC_RESIZE_VOLUME"
        case .version: "QBD_IOC_GET_VERSION"
        case .create: "QBD_IOC_CREATE_VOLUME"
        case .delete: "QBD_IOC_DELETE_VOLUME"
        case .volumes: "QBD_IOC_LIST_POOL"
        case .createSnapshot: "QBD_IOC_CREATE_SNAPSHOT"
        case .deleteSnapshot: "QBD_IOC_DELETE_SNAPSHOT"
        case .rollback: "QBD_IOC_ROLLBACK_VOLUME"
        case .snapshots: "QBD_IOC_LIST_SNAPSHOT"
        case .clone: "QBD_IOC_CLONE_VOLUME"
        }
    }

    /// `_IO(0xfa, n)` of the kernel's `asm-generic/ioctl.h`: no direction, no size, the magic above the number.
    package var ioctlNumber: UInt32 { 0xfa00 | UInt32(rawValue) }

    /// Where the command is asked for: `POST` to this path.
    package var path: String { "/v1/\(ioctlName)" }

    /// The command whose path this is.
    package init?(path: some StringProtocol) {
        guard let found = Self.allCases.first(where: { $0.path == path }) else { return nil }
        self = found
    }
}
