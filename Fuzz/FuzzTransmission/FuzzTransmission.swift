import Glibc
import NBD

/// Whole sessions: a client over a socket, the listener, the volume, its backend. The client's requests are decoded
/// from the input (see `Script`), so that most of them are nearly right; what must be answered is worked out apart
/// from the server (see `Model`) and compared with every byte of every reply.
@_cdecl("LLVMFuzzerTestOneInput")
func fuzzOneInput(_ start: UnsafePointer<UInt8>?, _ count: Int) -> CInt {
    let script = Script(decoding: UnsafeBufferPointer(start: start, count: count))
    let server = Server.shared
    let client = Client(path: server.socketPath)
    let received = client.converse(script)
    guard script.ending != .cutOff else {
        server.awaitNoClients()
        return 0
    }
    var replies = Replies(received[...], script)
    replies.parse()
    Model(script).check(replies.byRequest)
    return 0
}
