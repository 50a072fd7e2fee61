import Glibc

/// Owns a descriptor: closed with its owner, also when making that fails half way.
struct Descriptor: ~Copyable {
    let number: Int32

    init(_ number: Int32) { self.number = number }

    deinit { close(number) }
}
