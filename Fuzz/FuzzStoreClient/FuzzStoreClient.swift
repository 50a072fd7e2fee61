import FuzzSupport
import Glibc
import PureFlash

/// The client of a store: a volume with some requests, and a store that answers as the input says, nearly right or not
/// at all, and at last as it should. Each request must be completed exactly once, with the store's bytes, and everything
/// the client sends must be what a store may be sent.
@_cdecl("LLVMFuzzerTestOneInput")
func fuzzOneInput(_ start: UnsafePointer<UInt8>?, _ count: Int) -> CInt {
    var input = InputReader(UnsafeBufferPointer(start: start, count: count))
    let client = Client.shared
    let requests = (0...Int(input.byte() % 16)).map { _ in Request(decoding: &input) }
    client.begin(requests)
    var store = Store(listener: client.listener)
    store.misbehave(&input, requests: requests.count)
    while client.remaining > 0 { store.behave() }
    // With a reset and first, so that no port of the client is kept for a minute.
    store.close()
    client.end(mayFail: store.hasFailedRequests)
    return 0
}

/// A read or a write within the volume, of at most what one command carries.
struct Request {
    let isWrite: Bool
    let offset: Int
    let length: Int

    init(decoding input: inout InputReader) {
        let kind = input.byte()
        isWrite = kind & 1 != 0
        // Often at the end of an object.
        let base = kind & 2 != 0 ? Int(StoreProtocol.objectSize) - Volume.edge : 0
        let first = Int(input.byte())
        offset = base + first * 512
        let object = Int(StoreProtocol.objectSize)
        length = min((Int(input.byte()) + 1) * 512, object - offset % object)
    }
}

/// What both sides know of it.
enum Volume {
    static let id: UInt64 = 0x4200_0000
    static let size = 80 << 20
    static let depth = 8
    /// Bytes before the end of an object where requests begin.
    static let edge = 64 << 10
    /// Each eight bytes tell where they are: what a write carries and a read must bring.
    static func word(at offset: Int) -> UInt64 { UInt64(offset / 8) &* 0x9E37_79B9_7F4A_7C15 | 1 }

    private static let windows = [0, object - edge].map { start in
        (
            start: start,
            bytes: stride(from: 0, to: window, by: 8).flatMap { place in
                withUnsafeBytes(of: word(at: start + place), Array.init)
            }
        )
    }
    private static let object = Int(StoreProtocol.objectSize)
    private static let window = 512 << 10

    static func bytes(_ offset: Int, _ length: Int) -> ArraySlice<UInt8> {
        let window = windows[offset < object - edge ? 0 : 1]
        return window.bytes[offset - window.start..<offset - window.start + length]
    }
}
