/// Takes an input apart; zeros follow its end.
package struct InputReader {
    private var bytes: ArraySlice<UInt8>

    package init(_ bytes: some Collection<UInt8>) { self.bytes = Array(bytes)[...] }

    package var isEmpty: Bool { bytes.isEmpty }

    package mutating func byte() -> UInt8 { bytes.popFirst() ?? 0 }

    package mutating func half() -> UInt16 { UInt16(byte()) | UInt16(byte()) << 8 }

    package mutating func take(_ count: Int) -> [UInt8] {
        defer { bytes = bytes.dropFirst(count) }
        return Array(bytes.prefix(count))
    }
}
