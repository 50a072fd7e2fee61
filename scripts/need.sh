#!/usr/bin/env bash
# Makes sure that what a make target uses is there, and installs it with apt when it is not.
#
# usage: need.sh WHAT-FOR ITEM...
#
# An item is `swift`, a Debian package (`liburing-dev`), or a package with the command that is wanted of it
# (`qemu-utils:qemu-io`): then the command counts, wherever it came from.
set -euo pipefail

purpose=$1
shift

say() { printf 'need: %s\n' "$*" >&2; }

check_swift() {
    local version=""
    if command -v swift >/dev/null; then
        version=$(swift --version 2>/dev/null | sed -n 's/.*Swift version \([0-9][0-9]*\.[0-9][0-9]*\).*/\1/p' | head -n 1)
    fi
    case $version in
        6.[3-9] | 6.[1-9][0-9] | [7-9].* | [1-9][0-9].*) return ;;
    esac
    if [ -n "$version" ]; then
        say "Swift 6.3 or later is needed to $purpose; $(command -v swift) is $version."
    else
        say "Swift 6.3 or later is needed to $purpose, and no working 'swift' is in PATH."
    fi
    say "Debian has no package of it. https://www.swift.org/install/linux/ has it for Debian 12: unpack it, for"
    say "example to /opt/swift, put its usr/bin into PATH (export PATH=/opt/swift/usr/bin:\$PATH) and run make again."
    exit 1
}

present() {
    case $1 in
        *:*) command -v "${1#*:}" >/dev/null ;;
        *) [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ] ;;
    esac
}

missing=()
for item in "$@"; do
    if [ "$item" = swift ]; then
        check_swift
    elif ! present "$item"; then
        missing+=("${item%%:*}")
    fi
done
[ ${#missing[@]} -gt 0 ] || exit 0

if ! command -v apt-get >/dev/null; then
    say "to $purpose these Debian packages, or what is in them, must be installed first: ${missing[*]}"
    exit 1
fi
root=()
if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null; then
        say "to $purpose, run as root: apt-get install --no-install-recommends ${missing[*]}"
        exit 1
    fi
    root=(sudo)
fi
say "installing ${missing[*]} with apt, to $purpose"
apt() { "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 "$@" >&2; }
apt update
apt install -y --no-install-recommends "${missing[@]}"
