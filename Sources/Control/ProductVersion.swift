/// The version of this product, one for `qbd` and `qbdd`.
package enum ProductVersion {
    package static let string = "0.1.0"
}
