import CLinux
import Configuration
import Control
import Glibc

/// A program of the administrator that is run after a volume was mapped and before it is unmapped. The command runs it,
/// not the daemon: it is a child of whoever asked, and nothing of it is left in the daemon's memory, limits or cgroup.
struct Hook: Sendable {
    enum Event: String { case map, unmap }

    private let path: String
    private let volume: String
    private let timeout: Duration
    private let socket: String

    static let defaultFolder = "/etc/neonsan/hooks.d"
    static let defaultTimeout = Duration.seconds(60)
    /// From the first signal to the last.
    private static let grace = Duration.seconds(2)

    /// Nil when nothing is to be run: `hook` is `none`, or nothing was said and the folder has no file for the volume.
    init?(for entry: MapEntry, socket: String) {
        guard entry.hook != MapEntry.noHook else { return nil }
        volume = "\(entry.name)"
        timeout = entry.hookTimeout ?? Self.defaultTimeout
        self.socket = socket
        if let hook = entry.hook {
            path = hook
        } else {
            path = "\(Environment["QBD_HOOKS"] ?? Self.defaultFolder)/\(volume)"
            // A name that is longer than that of a file can be has none there.
            if access(path, F_OK) != 0, [ENOENT, ENOTDIR, ENAMETOOLONG].contains(errno) { return nil }
        }
    }

    /// - Throws: code 10 when it did not end well.
    func run(_ event: Event, _ mapping: MappingRecord) async throws(ControlError) {
        let device = mapping.device == "-" ? mapping.uri : "/dev/\(mapping.device)"
        func failure(_ what: String) -> ControlError {
            let rest = event == .map ? "\(volume) stays mapped" : "unmapping \(volume) goes on"
            return ControlError(ECHILD, "the hook '\(path) \(event.rawValue) \(device)' \(what); \(rest)")
        }
        let child: pid_t
        switch spawn([path, event.rawValue, device]) {
        case .success(let pid): child = pid
        case .failure(let code): throw failure("cannot be run: \(String(cString: strerror(code.number)))")
        }
        guard let status = await end(of: child) else {
            throw failure("was not done after \(timeout) and was ended")
        }
        // As WIFSIGNALED and WEXITSTATUS of wait(2) have it.
        let signal = status & 0x7f
        if signal != 0 { throw failure("was ended by signal \(signal)") }
        if status != 0 { throw failure("ended with exit status \(status >> 8 & 0xff)") }
    }

    private struct Errno: Error { let number: Int32 }

    /// Starts it in a process group of its own, in `/`, with umask 022, no input, and standard error as its output.
    private func spawn(_ words: [String]) -> Result<pid_t, Errno> {
        var actions = posix_spawn_file_actions_t()
        posix_spawn_file_actions_init(&actions)
        defer { posix_spawn_file_actions_destroy(&actions) }
        posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0)
        posix_spawn_file_actions_adddup2(&actions, STDERR_FILENO, STDOUT_FILENO)
        qbd_spawn_closefrom(&actions, STDERR_FILENO + 1)
        qbd_spawn_chdir(&actions, "/")
        var attributes = posix_spawnattr_t()
        posix_spawnattr_init(&attributes)
        defer { posix_spawnattr_destroy(&attributes) }
        var signals = sigset_t()
        sigemptyset(&signals)
        posix_spawnattr_setsigmask(&attributes, &signals)
        sigfillset(&signals)
        posix_spawnattr_setsigdefault(&attributes, &signals)
        posix_spawnattr_setpgroup(&attributes, 0)
        posix_spawnattr_setflags(
            &attributes, Int16(POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETPGROUP))
        // Whoever starts a program with this signal ignored takes the children's statuses from it.
        signal(SIGCHLD, SIG_DFL)
        umask(0o022)
        let environment = [
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "QBD_VOLUME=\(volume)",
            "QBD_SOCKET=\(socket)",
        ]
        var child: pid_t = 0
        let code = withStrings(words) { words in
            withStrings(environment) { posix_spawn(&child, path, &actions, &attributes, words, $0) }
        }
        return code == 0 ? .success(child) : .failure(Errno(number: code))
    }

    private func withStrings<Value>(
        _ texts: [String], _ body: ([UnsafeMutablePointer<CChar>?]) -> Value
    ) -> Value {
        let copies: [UnsafeMutablePointer<CChar>?] = texts.map { strdup($0) } + [nil]
        defer { for copy in copies { free(copy) } }
        return body(copies)
    }

    /// - Returns: the status of wait(2); nil when its time was up, and it and what it started were killed.
    private func end(of child: pid_t) async -> Int32? {
        if let status = await wait(for: child, timeout) { return status }
        kill(-child, SIGTERM)
        if await wait(for: child, Self.grace) == nil {
            kill(-child, SIGKILL)
            var status: Int32 = 0
            while waitpid(child, &status, 0) < 0, errno == EINTR {}
        }
        // What ignored the first signal may outlive its parent.
        kill(-child, SIGKILL)
        return nil
    }

    private func wait(for child: pid_t, _ time: Duration) async -> Int32? {
        let clock = ContinuousClock()
        let deadline = clock.now + time
        var status: Int32 = 0
        while waitpid(child, &status, WNOHANG) == 0 {
            guard clock.now < deadline else { return nil }
            // Hooks of several volumes run at the same time, and none of them may block a thread that all share.
            try? await clock.sleep(for: .milliseconds(2))
        }
        return status
    }
}
