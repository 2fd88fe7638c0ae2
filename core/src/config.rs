//! The sizes of a layer.

use core::fmt;

use crate::device::ScratchReq;

/// What a layer does with the rows it selected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Kind {
    /// The weighted sum of value rows (Berges et al. 2024, section 2).
    Memory,
    /// Rows are experts of one neuron each: the weighted sum of `gelu(<x, u>) · v` ("Mixture of a Million
    /// Experts", He 2024). It has two tables, `u` of width D and `v` of width V.
    Peer,
}

/// The validated sizes of a memory layer. Made by [`Config::builder`], also in `const` contexts:
///
/// ```
/// use memlayer_core::Config;
/// const CONFIG: Config = match Config::builder(32).heads(2).sub_keys(16).half_dim(8).top_k(4).build() {
///     Ok(config) => config,
///     Err(_) => panic!("sizes do not fit"),
/// };
/// static QUERY: [f32; CONFIG.query_len()] = [0.0; CONFIG.query_len()];
/// assert_eq!(CONFIG.slots(), 256);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Config {
    kind: Kind,
    input_dim: usize,
    output_dim: usize,
    value_dim: usize,
    heads: usize,
    parts: usize,
    sub_keys: usize,
    half_dim: usize,
    top_k: usize,
    qk_norm: bool,
    silu_gate: bool,
    sigmoid_gate: bool,
}

/// Sizes that make no layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum ConfigError {
    /// A size is zero.
    Zero {
        /// Which.
        field: &'static str,
    },
    /// A head cannot keep more rows than a half has sub-keys.
    TopKExceedsSubKeys {
        /// Rows kept per head.
        top_k: usize,
        /// Sub-keys per part.
        sub_keys: usize,
    },
    /// Row ids have 32 bits.
    TooManySlots {
        /// Sub-keys per part.
        sub_keys: usize,
        /// Parts of a key.
        parts: usize,
    },
    /// A buffer of this layer has more bytes than this machine can address.
    TooLarge {
        /// Which.
        buffer: &'static str,
    },
    /// The SiLU gate belongs to a memory, not to PEER.
    GateOnPeer,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Zero { field } => write!(f, "{field} is 0"),
            Self::TopKExceedsSubKeys { top_k, sub_keys } => write!(f, "top_k {top_k} exceeds sub_keys {sub_keys}"),
            Self::TooManySlots { sub_keys, parts } => {
                write!(f, "sub_keys {sub_keys} in {parts} parts make more than 2^32 slots")
            }
            Self::TooLarge { buffer } => write!(f, "{buffer} exceeds the address space of this machine"),
            Self::GateOnPeer => write!(f, "silu_gate is for memory layers, not for peer"),
        }
    }
}

impl core::error::Error for ConfigError {}

/// Builds a [`Config`]; what is not set has the paper's value, scaled to `input_dim`.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct ConfigBuilder {
    config: Config,
}

macro_rules! setters {
    ($($(#[$doc:meta])* $field:ident: $t:ty),* $(,)?) => {
        $($(#[$doc])* pub const fn $field(mut self, $field: $t) -> Self { self.config.$field = $field; self })*
    };
}

impl ConfigBuilder {
    setters! {
        /// Memory or PEER.
        kind: Kind,
        /// O, the width of the output.
        output_dim: usize,
        /// V, the width of a value row.
        value_dim: usize,
        /// H.
        heads: usize,
        /// N, sub-keys per part; the slots themselves where keys are flat.
        sub_keys: usize,
        /// C, the width of one part of a key.
        half_dim: usize,
        /// K, rows kept per head.
        top_k: usize,
        /// Whether queries and sub-keys are normalized (RMSNorm over each part, learned gain, eps 1e-6).
        qk_norm: bool,
        /// Whether the sum is gated by `silu(x W + b)` and projected: Memory+ (Berges et al. 2024, section 2.3).
        silu_gate: bool,
        /// Whether the output is scaled by `sigmoid(x w + b)`.
        sigmoid_gate: bool,
    }

    /// Keys of one part: every slot has a key of its own and the search is over all of them, the plain key-value
    /// memory. [`ConfigBuilder::sub_keys`] is then the number of slots.
    pub const fn flat_keys(mut self) -> Self {
        self.config.parts = 1;
        self
    }

    /// The configuration, if its sizes make a layer.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub const fn build(self) -> Result<Config, ConfigError> {
        let c = self.config;
        let sizes = [c.input_dim, c.output_dim, c.value_dim, c.heads, c.sub_keys, c.half_dim, c.top_k];
        let names = ["input_dim", "output_dim", "value_dim", "heads", "sub_keys", "half_dim", "top_k"];
        let mut i = 0;
        while i < sizes.len() {
            if sizes[i] == 0 {
                return Err(ConfigError::Zero { field: names[i] });
            }
            i += 1;
        }
        if c.top_k > c.sub_keys {
            return Err(ConfigError::TopKExceedsSubKeys { top_k: c.top_k, sub_keys: c.sub_keys });
        }
        if matches!(c.kind, Kind::Peer) && c.silu_gate {
            return Err(ConfigError::GateOnPeer);
        }
        let limit = if c.parts == 2 { 1 << 16 } else { 1u64 << 32 };
        if c.sub_keys as u64 > limit {
            return Err(ConfigError::TooManySlots { sub_keys: c.sub_keys, parts: c.parts });
        }
        let slots = if c.parts == 2 { c.sub_keys as u64 * c.sub_keys as u64 } else { c.sub_keys as u64 };
        let wide = if c.value_dim > c.input_dim { c.value_dim } else { c.input_dim };
        let wide = if wide > c.output_dim { wide } else { c.output_dim };
        if !addressable(&[slots, wide as u64]) {
            return Err(ConfigError::TooLarge { buffer: "the value table" });
        }
        let key = [c.heads as u64, c.parts as u64, c.half_dim as u64];
        if !addressable(&[key[0], key[1], key[2], c.sub_keys as u64]) {
            return Err(ConfigError::TooLarge { buffer: "the key table" });
        }
        if !addressable(&[key[0], key[1], key[2], wide as u64]) || !addressable(&[wide as u64, wide as u64]) {
            return Err(ConfigError::TooLarge { buffer: "a projection" });
        }
        if !addressable(&[key[0], key[1], c.top_k as u64]) {
            return Err(ConfigError::TooLarge { buffer: "a token's bag" });
        }
        Ok(c)
    }
}

/// Whether an array of 64-bit scalars with these sizes could be addressed.
const fn addressable(sizes: &[u64]) -> bool {
    let mut bytes = 8u64;
    let mut i = 0;
    while i < sizes.len() {
        bytes = match bytes.checked_mul(sizes[i]) {
            Some(bytes) => bytes,
            None => return false,
        };
        i += 1;
    }
    bytes <= isize::MAX as u64
}

impl Config {
    /// Starts from a plain product-key memory over inputs of `input_dim`: output and values as wide as the input,
    /// 4 heads, 1024 sub-keys per half, half keys of a quarter of the width, 32 rows a head, no gate, no norm.
    pub const fn builder(input_dim: usize) -> ConfigBuilder {
        let quarter = if input_dim >= 4 { input_dim / 4 } else { 1 };
        ConfigBuilder {
            config: Self {
                kind: Kind::Memory,
                input_dim,
                output_dim: input_dim,
                value_dim: input_dim,
                heads: 4,
                parts: 2,
                sub_keys: 1024,
                half_dim: quarter,
                top_k: 32,
                qk_norm: false,
                silu_gate: false,
                sigmoid_gate: false,
            },
        }
    }

    /// Memory or PEER.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        self.kind
    }
    /// D, the width of the input.
    #[must_use]
    pub const fn input_dim(&self) -> usize {
        self.input_dim
    }
    /// O, the width of the output.
    #[must_use]
    pub const fn output_dim(&self) -> usize {
        self.output_dim
    }
    /// V, the width of a value row.
    #[must_use]
    pub const fn value_dim(&self) -> usize {
        self.value_dim
    }
    /// H.
    #[must_use]
    pub const fn heads(&self) -> usize {
        self.heads
    }
    /// P: 2 for product keys, 1 for flat keys.
    #[must_use]
    pub const fn parts(&self) -> usize {
        self.parts
    }
    /// N, sub-keys per part.
    #[must_use]
    pub const fn sub_keys(&self) -> usize {
        self.sub_keys
    }
    /// C, the width of one part of a key.
    #[must_use]
    pub const fn half_dim(&self) -> usize {
        self.half_dim
    }
    /// K, rows kept per head.
    #[must_use]
    pub const fn top_k(&self) -> usize {
        self.top_k
    }
    /// Whether queries and sub-keys are normalized.
    #[must_use]
    pub const fn qk_norm(&self) -> bool {
        self.qk_norm
    }
    /// Whether the sum is gated by `silu(x W + b)` (Memory+).
    #[must_use]
    pub const fn silu_gate(&self) -> bool {
        self.silu_gate
    }
    /// Whether the output is scaled by `sigmoid(x w + b)`.
    #[must_use]
    pub const fn sigmoid_gate(&self) -> bool {
        self.sigmoid_gate
    }
    /// Whether the sum is projected from V to O: with the SiLU gate, and wherever V differs from O.
    #[must_use]
    pub const fn value_proj(&self) -> bool {
        self.silu_gate || self.value_dim != self.output_dim
    }
    /// `N^P`, the rows of the value table.
    #[must_use]
    pub const fn slots(&self) -> usize {
        if self.parts == 2 { self.sub_keys * self.sub_keys } else { self.sub_keys }
    }
    /// `L = H·K`, the rows a token reads.
    #[must_use]
    pub const fn bag_len(&self) -> usize {
        self.heads * self.top_k
    }
    /// `H·P·C`, the scalars of a token's query.
    #[must_use]
    pub const fn query_len(&self) -> usize {
        self.heads * self.parts * self.half_dim
    }
    /// `H·P·N`, the rows of the key table.
    #[must_use]
    pub const fn key_rows(&self) -> usize {
        self.heads * self.parts * self.sub_keys
    }
    /// `H·P·N·C`, the scalars of the key table.
    #[must_use]
    pub const fn keys_len(&self) -> usize {
        self.key_rows() * self.half_dim
    }
    /// `H·P·C`, the scalars of a gain of the norm of queries or sub-keys.
    #[must_use]
    pub const fn gain_len(&self) -> usize {
        self.query_len()
    }

    /// What [`crate::layer::Activations`] takes for `tokens` tokens.
    #[must_use]
    pub const fn activations_req(&self, tokens: usize) -> ScratchReq {
        let (v, o, l) = (self.value_dim, self.output_dim, self.bag_len());
        let mut per_token = self.query_len() + 2 * l + v;
        let mut reals = 0;
        if self.qk_norm {
            per_token += self.query_len();
            reals += self.keys_len();
        }
        if matches!(self.kind, Kind::Peer) {
            per_token += 2 * l;
        }
        if self.silu_gate {
            per_token += 2 * v;
        }
        if self.sigmoid_gate {
            per_token += o + 1;
        }
        ScratchReq::new(per_token, l).times(tokens).and(ScratchReq::new(reals, 0))
    }
}
