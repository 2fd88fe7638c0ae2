//! A layer's configuration in 64 bytes.

use memlayer_core::config::Kind;
use memlayer_core::{Config, ConfigError};

/// Bytes of a configuration.
pub(super) const CONFIG_LEN: usize = 64;

const QK_NORM: u8 = 1;
const SILU_GATE: u8 = 2;
const SIGMOID_GATE: u8 = 4;

/// Why 64 bytes are no configuration.
pub(super) enum Invalid {
    /// A field has a value that means nothing here.
    Field(&'static str, u64),
    /// The sizes make no layer.
    Sizes(ConfigError),
}

pub(super) fn encode(config: &Config) -> [u8; CONFIG_LEN] {
    let flags = [(config.qk_norm(), QK_NORM), (config.silu_gate(), SILU_GATE), (config.sigmoid_gate(), SIGMOID_GATE)];
    let mut bytes = [0; CONFIG_LEN];
    bytes[0] = match config.kind() {
        Kind::Memory => 0,
        Kind::Peer => 1,
    };
    bytes[1] = if config.parts() == 1 { 1 } else { 2 };
    bytes[2] = flags.iter().map(|&(on, bit)| if on { bit } else { 0 }).sum();
    let sizes = [
        config.input_dim(),
        config.output_dim(),
        config.value_dim(),
        config.heads(),
        config.sub_keys(),
        config.half_dim(),
        config.top_k(),
    ];
    for (field, size) in bytes[8..].chunks_exact_mut(8).zip(sizes) {
        field.copy_from_slice(&(size as u64).to_le_bytes());
    }
    bytes
}

pub(super) fn decode(bytes: &[u8; CONFIG_LEN]) -> Result<Config, Invalid> {
    let (&[kind, parts, flags, a, b, c, d, e], sizes) =
        bytes.split_first_chunk::<8>().ok_or(Invalid::Field("length", 0))?;
    let reserved = u64::from_le_bytes([a, b, c, d, e, 0, 0, 0]);
    if reserved != 0 {
        return Err(Invalid::Field("reserved bytes", reserved));
    }
    if flags > (QK_NORM | SILU_GATE | SIGMOID_GATE) {
        return Err(Invalid::Field("flags", u64::from(flags)));
    }
    let kind = match kind {
        0 => Kind::Memory,
        1 => Kind::Peer,
        other => return Err(Invalid::Field("kind", u64::from(other))),
    };
    let [input, output, value, heads, sub_keys, half, top_k] = decode_sizes(sizes)?;
    let builder = Config::builder(input).kind(kind).output_dim(output).value_dim(value).heads(heads);
    let builder = builder.sub_keys(sub_keys).half_dim(half).top_k(top_k).qk_norm(flags & QK_NORM != 0);
    let builder = builder.silu_gate(flags & SILU_GATE != 0).sigmoid_gate(flags & SIGMOID_GATE != 0);
    let builder = match parts {
        1 => builder.flat_keys(),
        2 => builder,
        other => return Err(Invalid::Field("parts", u64::from(other))),
    };
    builder.build().map_err(Invalid::Sizes)
}

fn decode_sizes(bytes: &[u8]) -> Result<[usize; 7], Invalid> {
    const NAMES: [&str; 7] = ["input_dim", "output_dim", "value_dim", "heads", "sub_keys", "half_dim", "top_k"];
    let mut sizes = [0; 7];
    for ((size, name), field) in sizes.iter_mut().zip(NAMES).zip(bytes.as_chunks::<8>().0) {
        let found = u64::from_le_bytes(*field);
        *size = usize::try_from(found).map_err(|_| Invalid::Field(name, found))?;
    }
    Ok(sizes)
}
