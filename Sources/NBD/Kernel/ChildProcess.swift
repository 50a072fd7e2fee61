import CLinux
import EventLoop
import Glibc

/// A program run for its result.
enum ChildProcess {
    struct Result {
        /// As wait(2) has it; 0 is success.
        var status: Int32
        /// What it wrote to its error output, at most 4096 bytes, without line ends at the end.
        var errorOutput: String
        var timedOut: Bool
    }

    /// Runs a program with no input, its output thrown away. No signal is blocked in it.
    /// - Parameters:
    ///   - path: absolute.
    ///   - timeout: seconds; the program is killed then.
    static func run(_ path: String, _ arguments: [String], timeout: Double) throws(SystemError) -> Result {
        var ends: [Int32] = [-1, -1]
        try retrying("pipe") { pipe2(&ends, O_CLOEXEC) }
        let output = ends[0]
        defer { close(output) }
        let child: pid_t
        do throws(SystemError) {
            child = try spawn(path, [path] + arguments, errors: ends[1])
            close(ends[1])
        } catch {
            close(ends[1])
            throw error
        }
        let deadline = Deadline(seconds: timeout)
        var text: [UInt8] = []
        var ready = pollfd(fd: output, events: Int16(POLLIN), revents: 0)
        // The end of its error output is the end of the program, of which nobody else has that pipe.
        while !deadline.passed {
            guard poll(&ready, 1, deadline.milliseconds) > 0 else { continue }
            var count = 0
            let chunk = [UInt8](unsafeUninitializedCapacity: 4096) { buffer, filled in
                count = read(output, buffer.baseAddress, buffer.count)
                filled = max(count, 0)
            }
            if count == 0 { break }
            text += chunk.prefix(max(0, 4096 - text.count))
        }
        let timedOut = deadline.passed
        if timedOut { kill(child, SIGKILL) }
        var status: Int32 = 0
        try retrying("wait for \(path)") { waitpid(child, &status, 0) }
        while text.last == 10 { text.removeLast() }
        return Result(status: status, errorOutput: String(decoding: text, as: UTF8.self), timedOut: timedOut)
    }

    /// Starts a program, with no signal blocked and nothing of ours open in it but what is given.
    /// - Parameters:
    ///   - words: its arguments, the first of which is its name.
    ///   - input: nil for none, as for the outputs; they stay the caller's to close.
    static func spawn(
        _ path: String, _ words: [String], input: Int32? = nil, output: Int32? = nil, errors: Int32? = nil
    ) throws(SystemError) -> pid_t {
        var actions = posix_spawn_file_actions_t()
        posix_spawn_file_actions_init(&actions)
        defer { posix_spawn_file_actions_destroy(&actions) }
        for (standard, given) in [(STDIN_FILENO, input), (STDOUT_FILENO, output), (STDERR_FILENO, errors)] {
            if let given {
                posix_spawn_file_actions_adddup2(&actions, given, standard)
            } else {
                let flags = standard == STDIN_FILENO ? O_RDONLY : O_WRONLY
                posix_spawn_file_actions_addopen(&actions, standard, "/dev/null", flags, 0)
            }
        }
        qbd_spawn_closefrom(&actions, STDERR_FILENO + 1)
        var attributes = posix_spawnattr_t()
        posix_spawnattr_init(&attributes)
        defer { posix_spawnattr_destroy(&attributes) }
        // Our threads block all signals.
        var none = sigset_t()
        sigemptyset(&none)
        posix_spawnattr_setsigmask(&attributes, &none)
        posix_spawnattr_setflags(&attributes, Int16(POSIX_SPAWN_SETSIGMASK))
        let arguments: [UnsafeMutablePointer<CChar>?] = words.map { strdup($0) } + [nil]
        defer { for word in arguments { free(word) } }
        // A program of the system finds what it needs along this path, whatever ours is.
        let environment: [UnsafeMutablePointer<CChar>?] = [strdup("PATH=/usr/sbin:/usr/bin:/sbin:/bin"), nil]
        defer { for word in environment { free(word) } }
        var child: pid_t = 0
        let code = posix_spawn(&child, path, &actions, &attributes, arguments, environment)
        guard code == 0 else { throw SystemError(code: code, operation: "run \(path)") }
        // The daemon is never ended when memory runs out; what it runs has no such claim. Where the daemon's own was not
        // set, there is nothing to change.
        try? TextFile.write("0", to: "/proc/\(child)/oom_score_adj")
        return child
    }
}
