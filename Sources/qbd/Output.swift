import Control
import Glibc

/// stdout for scripts, stderr for people.
enum Output {
    /// Writes all of it to stdout.
    static func print(_ text: String) throws(ControlError) {
        guard let code = write(text, to: STDOUT_FILENO) else { return }
        throw ControlError(
            code, "what was asked is done, but stdout cannot be written: \(String(cString: strerror(code)))")
    }

    /// One line on stderr.
    static func complain(_ line: String) {
        // There is nobody left to tell that stderr is closed.
        _ = write(line + "\n", to: STDERR_FILENO)
    }

    /// Tells of what went wrong behind a command that did its work.
    ///
    /// - Throws: the last one, if there is one.
    static func complain(_ problems: [ControlError]) throws(ControlError) {
        for problem in problems.dropLast() { complain("qbd: \(problem.message)") }
        if let last = problems.last { throw last }
    }

    /// - Returns: the errno of what failed, nil for success.
    private static func write(_ text: String, to descriptor: CInt) -> CInt? {
        var bytes = Array(text.utf8)[...]
        while !bytes.isEmpty {
            let count = bytes.withUnsafeBytes { Glibc.write(descriptor, $0.baseAddress, $0.count) }
            if count >= 0 {
                bytes = bytes.dropFirst(count)
            } else if errno != EINTR {
                return errno
            }
        }
        return nil
    }

    /// Prints the answer of a command, as JSON if that was asked for.
    static func answer<Answer: Encodable>(
        _ command: Command, _ answer: Answer, asJSON: Bool, _ text: (Answer) -> String
    ) throws(Failure) {
        try checked(for: command) { () throws(ControlError) in
            try print(asJSON ? try ControlJSON.pretty(answer) : text(answer))
        }
    }
}
