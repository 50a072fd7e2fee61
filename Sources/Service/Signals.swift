import Glibc

/// The signals that tell the daemon to stop. The main thread takes them and does nothing else.
///
/// The first one is an answer to `first`; the second ends the process at once. SIGHUP does nothing: configurations are
/// read again by themselves when they change.
package struct Signals: Sendable {
    private let stream: AsyncStream<String>
    private let continuation: AsyncStream<String>.Continuation

    private static let names = [SIGTERM: "SIGTERM", SIGINT: "SIGINT", SIGHUP: "SIGHUP"]

    private static var set: sigset_t {
        var set = sigset_t()
        sigemptyset(&set)
        for signal in names.keys { sigaddset(&set, signal) }
        return set
    }

    /// Blocks the signals in this thread and in those it starts. Make it while there is no other.
    package init() {
        (stream, continuation) = AsyncStream.makeStream(of: String.self)
        var set = Self.set
        pthread_sigmask(SIG_BLOCK, &set, nil)
        // A client that goes away is an error of its write, not the daemon's end.
        signal(SIGPIPE, SIG_IGN)
    }

    /// Takes signals until the process ends. On the main thread, and not in a task: what runs tasks there would let the
    /// signals through.
    package func take() -> Never {
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

    /// Waits for the signal to stop; its name. Call it once.
    package func first() async -> String {
        for await name in stream { return name }
        return "nothing"
    }
}
