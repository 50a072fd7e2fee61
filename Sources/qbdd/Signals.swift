import Control
import EventLoop
import Glibc

/// The signals that tell the daemon to stop, taken by a thread of their own.
///
/// The first one is an answer to `first`; the second ends the process at once. SIGHUP does nothing: configurations are
/// read again by themselves when they change.
struct Signals: Sendable {
    private let stream: AsyncStream<String>

    private static let names = [SIGTERM: "SIGTERM", SIGINT: "SIGINT", SIGHUP: "SIGHUP"]

    private static var set: sigset_t {
        var set = sigset_t()
        sigemptyset(&set)
        for signal in names.keys { sigaddset(&set, signal) }
        return set
    }

    /// Call while there is one thread: the others inherit it.
    static func block() {
        var set = set
        pthread_sigmask(SIG_BLOCK, &set, nil)
        // A client that goes away is an error of its write, not the daemon's end.
        signal(SIGPIPE, SIG_IGN)
    }

    init() throws(ControlError) {
        let (stream, continuation) = AsyncStream.makeStream(of: String.self)
        self.stream = stream
        do throws(SystemError) {
            // The thread waits as long as the process lives.
            _ = try Thread(name: "qbd:signals") {
                var isSecond = false
                while true {
                    var set = Self.set
                    var number: CInt = 0
                    guard sigwait(&set, &number) == 0, number != SIGHUP else { continue }
                    if isSecond { _exit(128 + number) }
                    isSecond = true
                    continuation.yield(Self.names[number] ?? "signal \(number)")
                }
            }
        } catch {
            throw ControlError(error.code, error.description)
        }
    }

    /// Waits for the signal to stop; its name.
    func first() async -> String {
        for await name in stream { return name }
        return "nothing"
    }
}
