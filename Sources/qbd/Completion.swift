import ArgumentParser

/// What the shells complete as a volume's name: commands for the script that the parser makes. A daemon that does not
/// answer costs two seconds and completes nothing.
enum Names {
    static let mapped = CompletionKind.shellCommand("qbd list --timeout 2 2>/dev/null | awk 'NR > 1 { print $4 }'")
    static let volumes = CompletionKind.shellCommand("qbd volumes --timeout 2 2>/dev/null | awk 'NR > 1 { print $2 }'")
    static let pools = CompletionKind.shellCommand(
        "qbd volumes --timeout 2 2>/dev/null | awk 'NR > 1 { sub(\"/.*\", \"\", $2); print $2 }' | sort -u")
}
