import ArgumentParser
import Configuration
import Control
import Glibc

/// The list of volumes.
struct MapFileOption: ParsableArguments {
    @Option(
        name: [.customShort("f"), .long],
        help: ArgumentHelp("The list of volumes (\(MapFile.defaultPath)); see map.conf(5).", valueName: "file"),
        completion: .file())
    var file: String?

    var path: String { file ?? MapFile.defaultPath }

    func load() throws(ControlError) -> MapFile {
        do throws(ConfigurationError) {
            return try MapFile.load(path: path)
        } catch {
            throw ControlError(error)
        }
    }

    func save(_ entry: MapEntry) throws(ControlError) {
        do throws(ConfigurationError) {
            try MapFile.save(entry, path: path)
        } catch {
            throw ControlError(
                error.systemError ?? EINVAL, "\(error); \(entry.name) is mapped, and not in that file")
        }
    }

    func forget(_ name: VolumeName) throws(ControlError) {
        let found: Bool
        do throws(ConfigurationError) {
            found = try MapFile.forget(name, path: path)
        } catch {
            throw ControlError(error)
        }
        guard found else { throw ControlError(ENOENT, "\(path) has no line for \(name) that could be removed") }
    }
}

extension ControlError {
    init(_ error: ConfigurationError) {
        self.init(error.systemError == EACCES ? EPERM : error.systemError ?? EINVAL, "\(error)")
    }
}

struct MapAll: VerbCommand {
    static let configuration = CommandConfiguration(
        commandName: Verb.mapAll.word, abstract: "Map every volume of a map.conf.",
        usage: Verb.mapAll.usageText,
        discussion: """
            Prints a line for each, in the order of the file: the volume, and its device or URI. What is mapped already \
            is a success. One that fails does not stop the rest: it is named with file and line, and the first one's \
            error is the exit status. Eight are mapped at a time; their numbers are in the order of the file all the \
            same.
            """)

    @OptionGroup var file: MapFileOption
    @OptionGroup var common: CommonOptions

    /// How many are mapped at the same time.
    private static let width = 8

    func perform() async throws {
        let file = try file.load()
        let mapper = Mapper(client: try common.client(for: .map))
        let config = try ConfigOption.standardPath(for: .map)
        let numbers = Numbers(of: file, try await mapper.ask(ListRequest(), for: .map).mappings)
        var report = MapReport(path: file.path, common: common)
        try await withThrowingTaskGroup(of: (Int, MapReport.Result).self) { group in
            var rest = file.lines.enumerated().makeIterator()
            func startNext() {
                guard let (index, line) = rest.next() else { return }
                group.addTask {
                    (index, await Self.map(line.content, mapper, config, numbers))
                }
            }
            for _ in 0..<Self.width { startNext() }
            var results: [Int: MapReport.Result] = [:]
            var next = 0
            for try await (index, result) in group {
                startNext()
                results[index] = result
                // In the order of the file, each as soon as those before it are known.
                while let result = results.removeValue(forKey: next) {
                    try report.add(result, line: file.lines[next].number)
                    next += 1
                }
            }
        }
        if common.json { try Output.answer(.map, report.mappings, asJSON: true) { _ in "" } }
        try report.finish()
    }

    private static func map(
        _ line: Result<MapEntry, ConfigurationError>, _ mapper: Mapper, _ config: String, _ numbers: Numbers
    ) async -> MapReport.Result {
        switch line {
        case .failure(let fault): return .fault(fault)
        case .success(let entry):
            do throws(Failure) {
                let name = "\(entry.name)"
                return .done(
                    try await mapper.map(
                        entry, config: config, mapped: numbers.mapped.contains(name),
                        deviceID: numbers.wanted[name]))
            } catch {
                return .failed(error)
            }
        }
    }
}

/// What the volumes of a list are to be numbered, so that it does not depend on which of them is ready first.
private struct Numbers: Sendable {
    /// What has its number already.
    let mapped: Set<String>
    /// Free ones, ascending in the order of the file.
    private(set) var wanted: [String: UInt32] = [:]

    init(of file: MapFile, _ mappings: [MappingRecord]) {
        mapped = Set(mappings.map(\.volume))
        let used = Set(mappings.map(\.deviceID))
        var free = (UInt32(0)...).lazy.filter { !used.contains($0) }.makeIterator()
        for case .success(let entry) in file.lines.map(\.content) where !mapped.contains("\(entry.name)") {
            wanted["\(entry.name)"] = free.next()
        }
    }
}

struct UnmapAll: VerbCommand {
    static let configuration = CommandConfiguration(
        commandName: Verb.unmapAll.word, abstract: "Unmap every volume of a map.conf, the last one first.",
        usage: Verb.unmapAll.usageText,
        discussion: """
            What is not mapped is a success. One that fails does not stop the rest: it is named with file and line, and \
            the first one's error is the exit status.
            """)

    @OptionGroup var file: MapFileOption
    @OptionGroup var common: CommonOptions

    func perform() async throws {
        let file = try file.load()
        let mapper = Mapper(client: try common.client(for: .unmap))
        let mapped = Set(try await mapper.ask(ListRequest(), for: .unmap).mappings.map(\.volume))
        var report = MapReport(path: file.path, common: common)
        for line in file.lines.reversed() {
            switch line.content {
            case .failure(let fault): try report.add(.fault(fault), line: line.number)
            case .success(let entry):
                guard mapped.contains("\(entry.name)") else { continue }
                try report.add(await Self.unmap(entry, mapper), line: line.number)
            }
        }
        if common.json { try Output.answer(.unmap, Done(), asJSON: true) { _ in "" } }
        try report.finish()
    }

    private static func unmap(_ entry: MapEntry, _ mapper: Mapper) async -> MapReport.Result {
        do throws(Failure) {
            return .done(try await mapper.unmap(entry))
        } catch {
            // Another one was faster, or it is another volume of that name, mapped with another configuration.
            return error.error.code == ENOTTY ? .done(Mapper.Outcome()) : .failed(error)
        }
    }
}

/// What became of the lines of a map.conf, told as it becomes known.
private struct MapReport {
    enum Result: Sendable {
        case done(Mapper.Outcome)
        case failed(Failure)
        /// The line is wrong.
        case fault(ConfigurationError)
    }

    let path: String
    let common: CommonOptions
    private(set) var mappings: [MappingRecord] = []
    /// Of the first that failed.
    private var status: Int32?

    init(path: String, common: CommonOptions) {
        self.path = path
        self.common = common
    }

    mutating func add(_ result: Result, line: Int) throws(Failure) {
        let place = "\(path):\(line):"
        switch result {
        case .done(let outcome):
            if let mapping = outcome.mapping { try add(mapping) }
            for problem in outcome.problems { complain("\(place) \(problem.message)", problem.code) }
        case .failed(let failure): complain("\(place) \(failure.error.line(for: failure.command))", failure.status)
        case .fault(let fault): complain("\(fault)", EINVAL)
        }
    }

    /// - Throws: the status of what failed, if something did.
    func finish() throws(Reported) {
        if let status { throw Reported(status: status) }
    }

    private mutating func add(_ mapping: MappingRecord) throws(Failure) {
        mappings.append(mapping)
        if common.verbose { Output.complain(mapping.summary) }
        guard !common.json else { return }
        try Output.answer(.map, mapping, asJSON: false) { "\($0.volume) \($0.place)\n" }
    }

    private mutating func complain(_ text: String, _ code: Int32) {
        Output.complain(text)
        status = status ?? code
    }
}
