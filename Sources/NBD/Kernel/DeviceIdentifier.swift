/// Whose a kernel device is, in the words that sysfs shows as its `backend`: `qbd:N:pool/volume:cookie`.
package struct DeviceIdentifier: Equatable, Sendable, CustomStringConvertible {
    package static let prefix = "qbd:"

    /// The N of /dev/qbdN.
    package let deviceID: UInt32
    /// `pool/volume`, neither of them empty, `.` or `..`; of letters, digits, `.`, `_` and `-`.
    package let volume: String
    /// Made anew for each mapping: tells its device from one that had the same name before.
    package let cookie: UInt64

    package init(deviceID: UInt32, volume: String, cookie: UInt64 = .random(in: 1 ... .max)) {
        self.deviceID = deviceID
        self.volume = volume
        self.cookie = cookie
    }

    /// Nil for what is not written exactly as we write it.
    package init?(_ text: String) {
        let fields = text.split(separator: ":", omittingEmptySubsequences: false)
        guard fields.count == 4, fields[0] == "qbd", let deviceID = UInt32(fields[1]),
            fields[3].utf8.count == 16, let cookie = UInt64(fields[3], radix: 16), Self.isVolume(fields[2])
        else { return nil }
        self.init(deviceID: deviceID, volume: String(fields[2]), cookie: cookie)
        guard description == text else { return nil }
    }

    private static func isVolume(_ name: Substring) -> Bool {
        let parts = name.split(separator: "/", omittingEmptySubsequences: false)
        guard parts.count == 2 else { return false }
        let inPool = parts[1].split(separator: "@", maxSplits: 1, omittingEmptySubsequences: false)
        return (parts[..<1] + inPool).allSatisfy { part in
            !part.isEmpty && part != "." && part != ".."
                && part.unicodeScalars.allSatisfy { scalar in
                    switch scalar {
                    case "A"..."Z", "a"..."z", "0"..."9", ".", "_", "-": true
                    default: false
                    }
                }
        }
    }

    package var description: String {
        let digits = String(cookie, radix: 16)
        return "qbd:\(deviceID):\(volume):" + String(repeating: "0", count: 16 - digits.count) + digits
    }
}
