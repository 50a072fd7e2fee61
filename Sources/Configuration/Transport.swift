/// How the daemon talks to the stores of a volume: the scheme of a volume's name, and the key `conn_type`.
package enum Transport: String, CaseIterable, Sendable, Codable {
    case tcp
    case rdma
}
