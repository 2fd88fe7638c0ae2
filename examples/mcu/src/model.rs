//! The sizes of the layer: shared by the firmware and by the program on the host that makes its image.

use memlayer_core::Config;
use memlayer_quantize::{Image, ImageError};

/// A Memory+ layer with 4,096 slots and qk-norm that keeps `top_k` rows a head.
pub const fn config(top_k: usize) -> Config {
    let builder = Config::builder(64).heads(2).sub_keys(64).half_dim(16).top_k(top_k);
    match builder.qk_norm(true).silu_gate(true).build() {
        Ok(config) => config,
        Err(_) => panic!("sizes do not fit"),
    }
}

/// The layer.
pub const CONFIG: Config = config(8);

/// Tokens that the host recorded.
pub const TOKENS: usize = 32;

/// The greatest relative error of weights and outputs, in Euclidean norms: that of the golden files.
pub const BOUND: f64 = 1e-5;

/// The format of keys and values.
#[cfg(feature = "f32")]
pub type Code = f32;
/// The format of keys and values.
#[cfg(feature = "int8")]
pub type Code = i8;
/// The format of keys and values.
#[cfg(feature = "e4m3")]
pub type Code = memlayer_core::E4m3;

/// Rows in this format, where they lie.
#[cfg(feature = "f32")]
pub type Rows<'a> = memlayer_core::DenseRows<'a, Code>;
/// Rows in this format, where they lie.
#[cfg(not(feature = "f32"))]
pub type Rows<'a> = memlayer_core::ScaledRows<'a, Code>;

/// The rows called `name`.
pub fn rows<'a>(image: &Image<'a>, name: &str) -> Result<Rows<'a>, ImageError> {
    #[cfg(feature = "f32")]
    return image.dense(name);
    #[cfg(not(feature = "f32"))]
    return image.rows(name);
}

#[cfg(not(any(
    all(feature = "f32", not(any(feature = "int8", feature = "e4m3"))),
    all(feature = "int8", not(any(feature = "f32", feature = "e4m3"))),
    all(feature = "e4m3", not(any(feature = "f32", feature = "int8"))),
)))]
compile_error!("pick one format: --no-default-features --features f32, int8 or e4m3");
