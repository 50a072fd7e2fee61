import Backend
import Testing
import Volumes

@Suite struct SplitTests {
    private func pieces(
        _ operation: Operation, offset: UInt64, length: UInt32, transfer: UInt32, boundary: UInt64
    ) -> [UInt32] {
        var geometry = Geometry(size: 1 << 40, blockSize: 512)
        geometry.maximumTransfer = transfer
        geometry.boundary = boundary
        var pieces: [UInt32] = []
        var done: UInt32 = 0
        while done < length {
            let piece = Volume.partLength(operation, offset: offset + UInt64(done), left: length - done, geometry)
            pieces.append(piece)
            done += piece
        }
        return pieces
    }

    @Test func withoutLimitsARequestStaysWhole() {
        #expect(pieces(.read, offset: 512, length: 32 << 20, transfer: .max, boundary: 0) == [32 << 20])
    }

    @Test func noPieceIsLargerThanATransfer() {
        #expect(
            pieces(.write, offset: 512, length: 300 << 10, transfer: 128 << 10, boundary: 0)
                == [128 << 10, 128 << 10, 44 << 10])
    }

    @Test func noPieceCrossesABoundary() {
        let object: UInt64 = 64 << 20
        #expect(
            pieces(.read, offset: object - 512, length: 8192, transfer: 128 << 10, boundary: object) == [512, 7680])
        #expect(pieces(.read, offset: object - 512, length: 512, transfer: 128 << 10, boundary: object) == [512])
        #expect(pieces(.read, offset: object, length: 8192, transfer: 128 << 10, boundary: object) == [8192])
    }

    @Test func whatCarriesNoDataIsCutAtBoundariesOnly() {
        let object: UInt64 = 64 << 20
        #expect(
            pieces(.writeZeroes, offset: 4096, length: 128 << 20, transfer: 128 << 10, boundary: object)
                == [(64 << 20) - 4096, 64 << 20, 4096])
    }
}
