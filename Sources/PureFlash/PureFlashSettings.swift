/// How a cluster's volumes are reached: section `[client]` of qbd.conf.
package struct PureFlashSettings: Hashable, Sendable {
    /// TCP_NODELAY.
    package var noDelay: Bool
    /// TCP port of all stores.
    package var port: UInt16
    /// Commands in flight on one connection, 1...255.
    package var depth: Int
    /// Nanoseconds from a request's arrival until it fails, whatever was tried meanwhile.
    package var ioTimeout: UInt64
    /// Nanoseconds for a connection with its handshake, and for one answer of a conductor.
    package var connectTimeout: UInt64
    /// Of each volume, which take requests in turn.
    package var connectionsPerStore: Int
    /// Nanoseconds between the first two tries. The longest pause while requests wait that may still succeed is eight
    /// times as long: a second after the cluster is well again, I/O has resumed.
    package var retryPause: UInt64 = 100_000_000

    /// TCP port on which a conductor tells stores things; nil where it is not known.
    package var httpPort: UInt16?
    /// Nanoseconds that a conductor may believe in a store that has died.
    package var grace: UInt64

    package init(
        noDelay: Bool, port: UInt16, depth: Int, ioTimeout: UInt64, connectTimeout: UInt64,
        connectionsPerStore: Int = 1, httpPort: UInt16? = nil, grace: UInt64 = 6_000_000_000
    ) {
        self.connectionsPerStore = connectionsPerStore
        self.httpPort = httpPort
        self.grace = grace
        self.noDelay = noDelay
        self.port = port
        self.depth = depth
        self.ioTimeout = ioTimeout
        self.connectTimeout = connectTimeout
    }
}
