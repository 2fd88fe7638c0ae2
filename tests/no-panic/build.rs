//! Links a bare program: no start-up files, and of the C library only what copies memory.

fn main() {
    for argument in ["-nostartfiles", "-nostdlib", "-nodefaultlibs", "-static", "-lc"] {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
}
