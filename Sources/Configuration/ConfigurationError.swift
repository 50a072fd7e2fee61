/// What is wrong in a configuration file, a name, a size or a rate: what, where, and what to do about it.
package struct ConfigurationError: Error, Hashable, Sendable, CustomStringConvertible {
    /// The file the fault is in; nil for text that came from elsewhere, such as the command line.
    package var file: String?
    /// The line of `file`, counted from 1; nil when the fault is not in one line.
    package var line: Int?
    /// One line, without the place and without a full stop.
    package var message: String
    /// The errno of the system call that failed while reading the file; nil when the text is at fault.
    package var systemError: Int32?

    package init(_ message: String, file: String? = nil, line: Int? = nil, systemError: Int32? = nil) {
        self.message = message
        self.file = file
        self.line = line
        self.systemError = systemError
    }

    /// The same fault with its place, unless it has one already.
    func placed(at line: Int?, in file: String) -> ConfigurationError {
        guard self.file == nil else { return self }
        return ConfigurationError(message, file: file, line: line, systemError: systemError)
    }

    /// `FILE:LINE: message`, as compilers and editors write it, with as much of the place as is known.
    package var description: String {
        switch (file, line) {
        case (let file?, let line?): "\(file):\(line): \(message)"
        case (let file?, nil): "\(file): \(message)"
        case (nil, let line?): "line \(line): \(message)"
        case (nil, nil): message
        }
    }
}
