import Backend

/// A command from the first try to its outcome. Lives in a slab of its volume.
struct StoreRequest {
    /// The command as it is sent. First in the struct, and sent from here.
    var command: (UInt64, UInt64, UInt64, UInt64, UInt64, UInt64, UInt64, UInt64) = (0, 0, 0, 0, 0, 0, 0, 0)
    let io: UnsafeMutablePointer<IO>
    /// What a write sends; where the data of a read goes.
    var payload: UnsafeMutableRawPointer
    /// Bytes from the start of the volume.
    var offset: UInt64
    /// Bytes.
    var length: UInt32
    /// What the reply must bring back: unlike that of any other request, and one more with each time it is sent.
    var sequence: UInt32
    var shard: Int32
    /// The volume's layout by which it was sent.
    var view: UInt32 = 0
    var isWrite: Bool
    /// The loop's time at which its connection took it to send, this time.
    var sent: UInt64 = 0
    /// All of it is in the socket: an answer may come.
    var isSent = false
    /// Of a read's data.
    var received: UInt32 = 0
    /// The loop's time at which it fails.
    var deadline: UInt64
    /// In a queue of its connection or its volume.
    var next: UnsafeMutablePointer<StoreRequest>?
    /// Among all of the volume, by age.
    var older: UnsafeMutablePointer<StoreRequest>?
    var newer: UnsafeMutablePointer<StoreRequest>?
}

/// Requests in the order they came.
struct StoreQueue {
    private(set) var first: UnsafeMutablePointer<StoreRequest>?
    private var last: UnsafeMutablePointer<StoreRequest>?

    var isEmpty: Bool { first == nil }

    @inline(__always)
    mutating func append(_ request: UnsafeMutablePointer<StoreRequest>) {
        request.pointee.next = nil
        if let last { last.pointee.next = request } else { first = request }
        last = request
    }

    @inline(__always)
    mutating func removeFirst() -> UnsafeMutablePointer<StoreRequest>? {
        guard let request = first else { return nil }
        first = request.pointee.next
        if first == nil { last = nil }
        request.pointee.next = nil
        return request
    }

    /// Takes out those whose deadline has come, all in one pass.
    mutating func removeExpired(at now: UInt64) -> StoreQueue {
        var rest = self
        var expired = StoreQueue()
        self = StoreQueue()
        while let request = rest.removeFirst() {
            if request.pointee.deadline <= now { expired.append(request) } else { append(request) }
        }
        return expired
    }
}
