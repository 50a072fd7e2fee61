import Configuration
import Control
import Glibc

/// Maps and unmaps a volume with all that belongs to it, for the verbs of one volume and of many.
struct Mapper: Sendable {
    let client: ControlClient

    /// What was done, and what went wrong behind it.
    struct Outcome: Sendable {
        var mapping: MappingRecord?
        /// In the order in which they happened.
        var problems: [ControlError] = []
    }

    /// Maps a volume. Its hook is run unless it was mapped before.
    ///
    /// - Parameters:
    ///   - config: for an entry that names none.
    ///   - mapped: whether it is mapped; nil when that is not known yet.
    ///   - deviceID: the number it gets if that is free.
    func map(
        _ entry: MapEntry, config: String, mapped: Bool? = nil, deviceID: UInt32? = nil
    ) async throws(Failure) -> Outcome {
        let hook = Hook(for: entry, socket: client.path)
        let request = MapRequest(
            volume: entry.fullName, config: entry.config.map(ConfigPath.canonical) ?? config, readOnly: entry.readOnly,
            export: entry.export,
            device: entry.device, limits: ThrottleArgument(entry), deviceID: deviceID)
        var wasMapped = mapped ?? false
        if hook != nil, mapped == nil { wasMapped = try await find(entry, config: nil, for: .map) != nil }
        let mapping = try await ask(request)
        if request.limits.change(mapping.limits) {
            Output.complain(
                "qbd: warning: \(mapping.volume) is mapped already, and its limits stay as they are"
                    + " (\(StatusText.limits(mapping.limits))); 'qbd throttle' changes them")
        }
        var outcome = Outcome(mapping: mapping)
        if let hook, !wasMapped { await run(hook, .map, mapping, &outcome) }
        return outcome
    }

    /// Runs the volume's hook if it is mapped, and unmaps it, whatever the hook says.
    func unmap(_ entry: MapEntry, force: Bool = false) async throws(Failure) -> Outcome {
        var outcome = Outcome()
        let config = entry.config.map(ConfigPath.canonical)
        if let hook = Hook(for: entry, socket: client.path),
            let mapping = try await find(entry, config: config, for: .unmap)
        {
            await run(hook, .unmap, mapping, &outcome)
        }
        do throws(Failure) {
            let answer = try await ask(UnmapRequest(volume: entry.fullName, config: config, force: force))
            if let warning = answer.warning { Output.complain("qbd: warning: \(warning)") }
        } catch {
            for problem in outcome.problems { Output.complain("qbd: \(problem.message)") }
            throw error
        }
        return outcome
    }

    /// Asks the daemon.
    func ask<Request: ControlRequest>(
        _ request: Request, for command: Command = Request.command
    ) async throws(Failure) -> Request.Answer {
        do throws(ControlError) {
            return try await client.send(request)
        } catch {
            throw Failure(command, error)
        }
    }

    /// Nil when it is not mapped, or not with the configuration that is named.
    private func find(
        _ entry: MapEntry, config: String?, for command: Command
    ) async throws(Failure) -> MappingRecord? {
        do throws(Failure) {
            return try await ask(InfoRequest(volume: entry.fullName, config: config), for: command).mapping
        } catch {
            guard error.error.code == ENOTTY else { throw error }
            return nil
        }
    }

    private func run(_ hook: Hook, _ event: Hook.Event, _ mapping: MappingRecord, _ outcome: inout Outcome) async {
        do throws(ControlError) {
            try await hook.run(event, mapping)
        } catch {
            outcome.problems.append(error)
        }
    }
}

extension MapEntry {
    /// The name with its scheme, as the daemon is asked for it.
    var fullName: String { (name.transport.map { "\($0.rawValue)://" } ?? "") + "\(name)" }
}

extension MappingRecord {
    /// What a client of the volume opens: the device, or the URI of an export.
    var place: String { device == "-" ? uri : "/dev/\(device)" }

    /// One line for `-V`.
    var summary: String {
        "mapped \(volume) id=\(volumeID) size=\(size) block_size=\(blockSize)"
            + " protocol=\(transport) read_only=\(readOnly) config=\(config)"
    }
}
