/// A finding when `condition` is false: ends the process, with `text` and the place. (`precondition` keeps its text to
/// itself in optimised programs.)
package func require(
    _ condition: Bool, _ text: @autoclosure () -> String = "", file: StaticString = #fileID, line: UInt = #line
) {
    if !condition { fatalError("finding at \(file):\(line): \(text())") }
}
