import Backend
import FuzzSupport
import PureFlash

/// A conductor's answer to open_volume: what is taken for a layout must be one by which data can be written; and to
/// list_store: what is taken for a store must be an address.
@_cdecl("LLVMFuzzerTestOneInput")
func fuzzOneInput(_ start: UnsafePointer<UInt8>?, _ count: Int) -> CInt {
    let bytes = Array(UnsafeBufferPointer(start: start, count: count))
    do throws(BackendError) {
        let layout = try VolumeLayout(decoding: bytes)
        require(layout.id > 0 && layout.id % StoreProtocol.volumeIDUnit == 0)
        require(layout.size > 0 && layout.size % UInt64(StoreProtocol.sector) == 0 && layout.size <= UInt64(Int64.max))
        let last = UInt64(layout.shards.count - 1)
        require(layout.size > last * StoreProtocol.shardSize)
        require((layout.size - 1) / StoreProtocol.shardSize == last)
        for address in layout.shards.flatMap(\.addresses) { require(StoreAddress(address) != nil) }
    } catch {
        require(error.code > 0 && !error.message.isEmpty && error.message.utf8.count < 4096)
    }
    do throws(BackendError) {
        let stores = try ConductorStatus.decode(ListStoreAnswer.self, "list_store", bytes)
        require(stores.alive.count <= ListStoreAnswer.maximumStores)
        for address in stores.alive { require(StoreAddress(address) != nil) }
    } catch {
        require(error.code > 0 && !error.message.isEmpty && error.message.utf8.count < 4096)
    }
    return 0
}
