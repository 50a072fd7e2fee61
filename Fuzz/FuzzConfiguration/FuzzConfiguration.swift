import Configuration
import FuzzSupport

/// qbd.conf, map.conf, and every text that people write by hand: names, sizes, rates. What one part of the program accepts, the
/// others must be able to rely on.
@_cdecl("LLVMFuzzerTestOneInput")
func fuzzOneInput(_ start: UnsafePointer<UInt8>?, _ count: Int) -> CInt {
    let bytes = Array(UnsafeBufferPointer(start: start, count: count))
    checkFile(bytes)
    checkList(bytes)
    if count <= 512, let text = String(validating: bytes, as: UTF8.self) {
        checkName(text)
        checkQuantities(text)
    }
    return 0
}

private func checkFile(_ bytes: [UInt8]) {
    do throws(ConfigurationError) {
        let configuration = try DaemonConfiguration(parsing: bytes, file: "qbd.conf")
        require((1...255).contains(configuration.client.ioDepth))
        require((1...1024).contains(configuration.nbd.maxConnections))
        require(configuration.warnings.count <= 101)
        configuration.warnings.forEach(checkText)
        for (name, pool) in configuration.pools {
            require(name == pool.name && isAllowed(name))
            if case .local(let path) = pool.kind {
                // By bytes, as the kernel reads it: a slash with an accent is one character to Swift.
                require(path.utf8.first == UInt8(ascii: "/") && !path.utf8.contains(0))
            }
        }
    } catch {
        checkFault(error, in: bytes, of: "qbd.conf")
    }
}

private func checkList(_ bytes: [UInt8]) {
    do throws(ConfigurationError) {
        let file = try MapFile(parsing: bytes, file: "map.conf")
        var last = 0
        var names: Set<VolumeName> = []
        for line in file.lines {
            require(line.number > last)
            last = line.number
            switch line.content {
            case .failure(let error):
                require(error.line == line.number)
                checkFault(error, in: bytes, of: "map.conf")
            case .success(let entry):
                require(names.insert(entry.name).inserted)
                // What is written is what was read.
                let again = try MapFile(parsing: Array(entry.line.utf8), file: "map.conf").lines
                require(again.count == 1)
                guard case .success(let same) = again[0].content else { return require(false) }
                require(same == entry && same.name.transport == entry.name.transport)
            }
        }
    } catch {
        checkFault(error, in: bytes, of: "map.conf")
    }
}

private func checkFault(_ error: ConfigurationError, in bytes: [UInt8], of file: String) {
    require(error.file == file && error.systemError == nil)
    if let line = error.line {
        require(line >= 1 && line <= bytes.count { $0 == UInt8(ascii: "\n") } + 1)
    }
    checkText(error.description)
}

private func checkName(_ text: String) {
    do throws(ConfigurationError) {
        let name = try VolumeName(parsing: text)
        require([name.pool, name.volume, name.snapshot ?? "-"].allSatisfy(isAllowed))
        let again = try VolumeName(parsing: name.description)
        require(again == name)
    } catch {
        checkText(error.description)
    }
}

private func checkQuantities(_ text: String) {
    do throws(ConfigurationError) {
        let size = try Quantity.parseSize(text)
        require(size >= 1 && size <= Quantity.maximum)
        let again = try Quantity.parseSize(Quantity.formatSize(size))
        require(again == size)
    } catch {
        checkText(error.description)
    }
    if let rate = try? Quantity.parseRate(operationsPerSecond: text) {
        require(rate <= Quantity.maximum)
    }
}

/// One component of a volume's name: it becomes a part of paths and URIs.
private func isAllowed(_ component: String) -> Bool {
    (1...128).contains(component.utf8.count) && component != "." && component != ".."
        && component.utf8.allSatisfy { byte in
            switch byte {
            case UInt8(ascii: "A")...UInt8(ascii: "Z"), UInt8(ascii: "a")...UInt8(ascii: "z"),
                UInt8(ascii: "0")...UInt8(ascii: "9"), UInt8(ascii: "."), UInt8(ascii: "_"), UInt8(ascii: "-"):
                true
            default: false
            }
        }
}

/// What goes to a log or a terminal is one line of sane length.
private func checkText(_ text: String) {
    require(!text.isEmpty && text.utf8.count < 4096)
    require(text.utf8.allSatisfy { $0 >= 0x20 && $0 != 0x7F })
}
