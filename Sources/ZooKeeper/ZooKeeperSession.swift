import CZooKeeper
import EventLoop
import Glibc

/// A session with an ensemble: from its beginning until it expires or is closed. On its client's thread; every call waits
/// for the server's answer, or fails when the connection is lost.
package final class ZooKeeperSession {
    enum State {
        case connecting, connected
        /// Only a new session helps.
        case over
    }

    /// Bytes of a node that are read, at most.
    private static let maximumData = 4096

    private let handle: OpaquePointer

    /// - Parameters:
    ///   - servers: `host:port`, separated by commas. Names are looked up here.
    ///   - timeout: milliseconds without a sign of life after which the ensemble ends the session.
    ///   - events: called on a thread of the C client. Alive until the session is closed.
    init(servers: String, timeout: Int32, events: ZooKeeperEvents) throws(ZooKeeperError) {
        // It would write to the standard error; what matters comes back as states and errors.
        zoo_set_debug_level(ZooLogLevel(rawValue: 0))
        let watcher: watcher_fn = { _, _, _, _, context in
            guard let context else { return }
            Unmanaged<ZooKeeperEvents>.fromOpaque(context).takeUnretainedValue().happened()
        }
        errno = 0
        guard
            let handle = zookeeper_init(
                servers, watcher, timeout, nil, Unmanaged.passUnretained(events).toOpaque(), 0)
        else {
            let reason = errno == 0 ? "its name cannot be resolved" : errnoText(errno)
            throw ZooKeeperError(ZCONNECTIONLOSS, message: "no address to connect to: \(reason)")
        }
        self.handle = handle
    }

    /// Takes the session's ephemeral nodes away, when there is a connection.
    func close() { zookeeper_close(handle) }

    var state: State {
        let state = zoo_state(handle)
        if state == ZOO_CONNECTED_STATE { return .connected }
        return state == ZOO_EXPIRED_SESSION_STATE || state == ZOO_AUTH_FAILED_STATE ? .over : .connecting
    }

    /// Identifies the session at the ensemble.
    package var id: Int64 { zoo_client_id(handle)?.pointee.client_id ?? 0 }

    /// The names of a node's children, in no order. Watched: the duty is attended to again when one comes or goes.
    package func children(of path: String) throws(ZooKeeperError) -> [String] {
        var names = String_vector()
        try check(zoo_get_children(handle, path, 1, &names), "list \(path)")
        defer { deallocate_String_vector(&names) }
        return (0..<Int(names.count)).compactMap { index in names.data[index].map { String(cString: $0) } }
    }

    /// What a node holds. Watched: the duty is attended to again when that changes or the node goes.
    package func data(of path: String) throws(ZooKeeperError) -> [UInt8] {
        var bytes = [CChar](repeating: 0, count: Self.maximumData)
        var count = Int32(bytes.count)
        try check(zoo_get(handle, path, 1, &bytes, &count, nil), "read \(path)")
        // -1 for none at all.
        return bytes.prefix(min(max(Int(count), 0), bytes.count)).map { UInt8(bitPattern: $0) }
    }

    /// Watched: the duty is attended to again when the node comes or goes.
    package func exists(_ path: String) throws(ZooKeeperError) -> Bool {
        do throws(ZooKeeperError) { try check(zoo_exists(handle, path, 1, nil), "look for \(path)") } catch {
            guard error.isMissingNode else { throw error }
            return false
        }
        return true
    }

    /// Makes a node that stays, and those above it; what exists already is left as it is.
    package func createPath(_ path: String) throws(ZooKeeperError) {
        var made = ""
        for name in path.split(separator: "/") {
            made += "/\(name)"
            do throws(ZooKeeperError) { _ = try create(made, "", flags: ZOO_PERSISTENT) } catch {
                guard error.isExistingNode else { throw error }
            }
        }
    }

    /// Makes a node that goes with the session, with a number behind its name that only grows.
    /// - Returns: its path.
    package func createEphemeral(_ prefix: String, _ data: String) throws(ZooKeeperError) -> String {
        try create(prefix, data, flags: ZOO_EPHEMERAL | ZOO_SEQUENCE)
    }

    private func create(_ path: String, _ data: String, flags: Int32) throws(ZooKeeperError) -> String {
        // With the number.
        var made = [CChar](repeating: 0, count: path.utf8.count + 16)
        var unrestricted = qbd_zookeeper_open_acl()
        try check(
            zoo_create(handle, path, data, Int32(data.utf8.count), &unrestricted, flags, &made, Int32(made.count)),
            "create \(path)")
        return String(decoding: made.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }

    private func check(_ code: Int32, _ operation: @autoclosure () -> String) throws(ZooKeeperError) {
        guard code == ZOK.rawValue else { throw ZooKeeperError(code, operation()) }
    }
}
