// swift-tools-version:6.2
import PackageDescription

// Rooms of the data path: one thread owns every object there, so the run-time exclusivity checks find nothing
// that the design does not already forbid, and cost a call per access.
let dataPath: [SwiftSetting] = [
    .unsafeFlags(["-enforce-exclusivity=unchecked", "-cross-module-optimization"], .when(configuration: .release))
]

// The Swift runtime is linked into the executables, so that they run on a host without Swift; everything else,
// the tests among it, is compiled once with the same flags.
let staticRuntime: [LinkerSetting] = [
    .unsafeFlags(["-static-stdlib"], .when(configuration: .release)),
    // What FoundationEssentials' static archive leaves to its user.
    .linkedLibrary("_FoundationCollections", .when(configuration: .release)),
    .linkedLibrary("_FoundationCShims", .when(configuration: .release)),
    .linkedLibrary("swiftSynchronization", .when(configuration: .release)),
]

let package = Package(
    name: "qbd",
    products: [
        .executable(name: "qbd", targets: ["qbd"]),
        .executable(name: "qbdd", targets: ["qbdd"]),
        .executable(name: "qbd-store", targets: ["qbd-store"]),
    ],
    dependencies: [
        .package(url: "https://github.com/apple/swift-argument-parser", from: "1.8.0"),
        .package(url: "https://github.com/apple/swift-nio", from: "2.101.0"),
        .package(url: "https://github.com/apple/swift-log", from: "1.16.0"),
    ],
    targets: [
        .executableTarget(
            name: "qbd",
            dependencies: [
                "Control", "Configuration", "CLinux",
                .product(name: "ArgumentParser", package: "swift-argument-parser"),
            ],
            linkerSettings: staticRuntime),
        .executableTarget(
            name: "qbdd",
            dependencies: [
                "Service", "Control", "Volumes", "Backend", "LocalPool", "PureFlash", "NBD", "EventLoop",
                "Configuration", "CLinux",
                .product(name: "ArgumentParser", package: "swift-argument-parser"),
                .product(name: "Logging", package: "swift-log"),
            ],
            linkerSettings: staticRuntime),
        .executableTarget(
            name: "qbd-store",
            dependencies: [
                "Service", "StoreServer", "PureFlash", "Backend", "Configuration", "Control",
                .product(name: "ArgumentParser", package: "swift-argument-parser"),
                .product(name: "Logging", package: "swift-log"),
            ],
            linkerSettings: staticRuntime),
        .target(
            name: "Service",
            dependencies: ["EventLoop", .product(name: "Logging", package: "swift-log")]),
        .target(
            name: "StoreServer",
            dependencies: [
                "PureFlash", "LocalPool", "Backend", "ZooKeeper", "EventLoop", "Configuration", "CLinux",
                .product(name: "NIOCore", package: "swift-nio"),
                .product(name: "NIOPosix", package: "swift-nio"),
                .product(name: "NIOHTTP1", package: "swift-nio"),
                .product(name: "Logging", package: "swift-log"),
            ],
            swiftSettings: dataPath),
        .target(
            name: "Control",
            dependencies: [
                "Configuration", "CLinux",
                .product(name: "NIOCore", package: "swift-nio"),
                .product(name: "NIOPosix", package: "swift-nio"),
                .product(name: "NIOHTTP1", package: "swift-nio"),
            ]),
        .target(
            name: "Volumes",
            dependencies: ["Backend", "NBD", "EventLoop", "CLinux", .product(name: "Logging", package: "swift-log")],
            swiftSettings: dataPath),
        .target(name: "Backend", dependencies: ["EventLoop", "CLinux"], swiftSettings: dataPath),
        .target(name: "LocalPool", dependencies: ["Backend", "EventLoop", "CLinux"], swiftSettings: dataPath),
        .target(
            name: "PureFlash",
            dependencies: [
                "ZooKeeper", "Backend", "EventLoop", "CLinux",
                .product(name: "NIOCore", package: "swift-nio"),
                .product(name: "NIOPosix", package: "swift-nio"),
                .product(name: "NIOHTTP1", package: "swift-nio"),
                .product(name: "Logging", package: "swift-log"),
            ],
            swiftSettings: dataPath),
        .target(name: "ZooKeeper", dependencies: ["EventLoop", "CZooKeeper"]),
        .target(name: "NBD", dependencies: ["EventLoop", "CLinux"], swiftSettings: dataPath),
        .target(name: "EventLoop", dependencies: ["CLinux"], swiftSettings: dataPath),
        .target(name: "Configuration"),
        .target(name: "CLinux", linkerSettings: [.linkedLibrary(":liburing.a")]),
        .target(name: "CZooKeeper", linkerSettings: [.linkedLibrary(":libzookeeper_mt.a")]),
        .testTarget(name: "ConfigurationTests", dependencies: ["Configuration"]),
        .testTarget(name: "ControlTests", dependencies: ["Control"]),
        .testTarget(name: "EventLoopTests", dependencies: ["EventLoop"]),
        .testTarget(name: "NBDTests", dependencies: ["NBD"]),
        .testTarget(name: "LocalPoolTests", dependencies: ["LocalPool", "CLinux"]),
        .testTarget(name: "PureFlashTests", dependencies: ["PureFlash", "Backend"]),
        .testTarget(name: "StoreServerTests", dependencies: ["StoreServer", "PureFlash", "Backend"]),
        .testTarget(name: "VolumesTests", dependencies: ["Volumes", "LocalPool"]),
    ],
    swiftLanguageModes: [.v6]
)

// `make fuzz` and nothing else: programs that libFuzzer drives.
if Context.environment["QBD_FUZZ"] != nil {
    let programs: [(name: String, rooms: [Target.Dependency])] = [
        ("FuzzConductor", ["PureFlash", "Backend", "FuzzSupport"]),
        ("FuzzConfiguration", ["Configuration", "FuzzSupport"]),
        ("FuzzHandshake", ["NBD", "FuzzSupport"]),
        (
            "FuzzStoreClient",
            [
                "PureFlash", "Backend", "EventLoop", "FuzzSupport", .product(name: "Logging", package: "swift-log"),
            ]
        ),
        (
            "FuzzStoreServer",
            [
                "StoreServer", "PureFlash", "EventLoop", "Configuration", "FuzzSupport",
                .product(name: "Logging", package: "swift-log"),
            ]
        ),
        (
            "FuzzTransmission",
            [
                "Volumes", "LocalPool", "Backend", "NBD", "EventLoop", "FuzzSupport",
                .product(name: "Logging", package: "swift-log"),
            ]
        ),
    ]
    package.targets.append(.target(name: "FuzzSupport", path: "Fuzz/Support"))
    package.targets += programs.map { name, rooms in
        .executableTarget(name: name, dependencies: rooms, path: "Fuzz/\(name)")
    }
}

// `make bench` and nothing else.
if Context.environment["QBD_BENCH"] != nil {
    package.targets.append(
        .executableTarget(
            name: "client-load",
            dependencies: ["PureFlash", "Backend", "EventLoop", .product(name: "Logging", package: "swift-log")],
            path: "Benchmarks/ClientLoad", swiftSettings: dataPath, linkerSettings: staticRuntime))
}

for target in package.targets {
    target.swiftSettings = (target.swiftSettings ?? []) + [.treatAllWarnings(as: .error)]
    target.cSettings = (target.cSettings ?? []) + [.treatAllWarnings(as: .error)]
}
