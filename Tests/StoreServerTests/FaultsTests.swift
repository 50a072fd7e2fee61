import Backend
import Glibc
import StoreServer
import Testing

/// What goes beside the data: switches for tests, and how refusals are told.
@Suite struct FaultsTests {
    @Test func switchesAreOffAndApart() {
        let faults = Faults()
        for each in Faults.Switch.allCases { #expect(faults.value(each) == 0) }
        for (number, each) in Faults.Switch.allCases.enumerated() { faults.set(each, to: number + 1) }
        for (number, each) in Faults.Switch.allCases.enumerated() { #expect(faults.value(each) == number + 1) }
    }

    @Test func whatIsCountedDownIsSpentOnce() {
        let faults = Faults()
        faults.set(.reopen, to: 2)
        #expect([faults.spend(.reopen), faults.spend(.reopen), faults.spend(.reopen)] == [true, true, false])
        #expect(faults.value(.reopen) == 0)
        #expect(!faults.spend(.twice))
    }

    @Test(arguments: [
        (EEXIST, RefusedRequest.Code.alreadyDone), (ENOENT, .invalidArgument), (EINVAL, .invalidArgument),
        (EBUSY, .invalidState), (EIO, .failed),
    ])
    func refusals(code: Int32, expected: RefusedRequest.Code) {
        let refusal = RefusedRequest(BackendError(code: code, message: "not today"))
        #expect(refusal.code == expected)
        #expect("\(refusal)" == "not today")
    }
}
