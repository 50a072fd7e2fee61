extension DaemonConfiguration {
    /// - Parameter file: the path for error texts and warnings; nothing is opened.
    package init(parsing text: String, file: String) throws(ConfigurationError) {
        try self.init(parsing: Array(text.utf8), file: file)
    }

    /// - Parameter file: the path for error texts and warnings; nothing is opened.
    package init(parsing bytes: [UInt8], file: String) throws(ConfigurationError) {
        var parser = try DaemonConfigurationParser(bytes, file: file)
        try parser.run()
        self = parser.configuration
    }
}
