/// What `resume -t` says: what becomes of held-back and later I/O.
package enum ResumeMode: String, CaseIterable, Sendable, Codable {
    /// It runs, in its order.
    case normal
    /// It fails with EIO.
    case error
    /// It is answered with success; writes go nowhere, reads return zeros. Loses data by design.
    case discard

    /// - Throws: code 22 for anything but the three.
    package init(parsing text: String) throws(ControlError) {
        guard let mode = ResumeMode(rawValue: text) else {
            throw .invalid("'\(text)' is no way to resume; write -t normal, -t error or -t discard")
        }
        self = mode
    }
}
