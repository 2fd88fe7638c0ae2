//! Sub-keys, made ready for packing.

use memlayer_core::ops::dense::{Dense, NormDims, RmsNorm};
use memlayer_core::{ArgError, Config, Reference};

/// The sub-keys of a layer with qk-norm as they are multiplied with queries: each of `keys` (`[H, P, N, C]`) divided
/// by its root mean square and times its part's `gain` (`[H, P, C]`), into `out`.
///
/// A trained layer does this in every call; a packed one stores the result and does not.
///
/// # Errors
/// [`ArgError::Shape`] if a size does not fit `config`.
pub fn prepare_keys(config: &Config, keys: &[f32], gain: &[f32], out: &mut [f32]) -> Result<(), ArgError> {
    let groups = config.heads() * config.parts();
    let dims = NormDims { rows: config.key_rows(), dim: config.half_dim(), groups, repeat: config.sub_keys() };
    Reference::<f32>::new().rms_norm(RmsNorm { dims, x: keys, gain, out })
}
