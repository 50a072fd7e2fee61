import CLinux
import Glibc

/// A joinable POSIX thread with a name that shows in ps and gdb.
package struct Thread: Sendable {
    private let handle: pthread_t

    private final class Start {
        let name: String
        let body: @Sendable () -> Void
        init(name: String, body: @escaping @Sendable () -> Void) {
            self.name = name
            self.body = body
        }
    }

    /// Starts a thread. Signals are blocked in it: they belong to the main thread.
    /// - Parameter name: cut to the kernel's 15 bytes.
    package init(name: String, _ body: @escaping @Sendable () -> Void) throws(SystemError) {
        let start = Unmanaged.passRetained(Start(name: name, body: body))
        var thread = pthread_t()
        var attributes = pthread_attr_t()
        pthread_attr_init(&attributes)
        pthread_attr_setstacksize(&attributes, 512 * 1024)
        var all = sigset_t()
        var old = sigset_t()
        sigfillset(&all)
        // A fault belongs to the thread that makes it; blocked, it would end the process past every handler.
        for fault in [SIGILL, SIGTRAP, SIGABRT, SIGBUS, SIGFPE, SIGSEGV] { sigdelset(&all, fault) }
        pthread_sigmask(SIG_SETMASK, &all, &old)
        let code = pthread_create(
            &thread, &attributes,
            { argument in
                guard let argument else { return nil }
                let start = Unmanaged<Start>.fromOpaque(argument).takeRetainedValue()
                pthread_setname_np(pthread_self(), String(start.name.utf8.prefix(15)) ?? "qbd")
                start.body()
                return nil
            }, start.toOpaque())
        pthread_sigmask(SIG_SETMASK, &old, nil)
        pthread_attr_destroy(&attributes)
        guard code == 0 else {
            start.release()
            throw SystemError(code: code, operation: "start thread \(name)")
        }
        handle = thread
    }

    /// Lets the thread end by itself. Call once, instead of `join`.
    package func detach() { pthread_detach(handle) }

    /// Waits until the thread's body has returned. Call once, from another thread.
    package func join() { pthread_join(handle, nil) }
}
