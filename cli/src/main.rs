//! Train, pack, ask and check memory layers.
fn main() {}
