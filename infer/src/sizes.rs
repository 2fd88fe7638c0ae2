//! The sizes of a model, as the image has them.

use memlayer_core::{Config, ConfigError, ScratchReq};

use crate::error::Error;

/// The layout that [`Sizes::encode`] writes.
pub(crate) const VERSION: u32 = 1;

/// The sizes of a transformer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// D, the width.
    pub dim: usize,
    /// Blocks of attention and feed-forward.
    pub layers: usize,
    /// Attention heads; their width is even.
    pub heads: usize,
    /// Width of the dense feed-forward layers (SwiGLU).
    pub hidden: usize,
    /// The longest sequence, in tokens.
    pub context: usize,
    /// Memory in place of some of the feed-forward layers.
    pub memory: Option<MemorySizes>,
}

/// Memory+ layers with qk-norm that share one pool of values of width D.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySizes {
    /// Which blocks have one: bit `i` is block `i`.
    pub layers: u64,
    /// H.
    pub heads: usize,
    /// N; the pool has N² slots.
    pub sub_keys: usize,
    /// C.
    pub half_dim: usize,
    /// K, rows kept per head.
    pub top_k: usize,
}

impl Sizes {
    /// Bytes that the sizes take.
    pub const LEN: usize = 64;
    /// The most blocks a model has.
    pub const MAX_LAYERS: usize = 64;

    /// The sizes as little-endian numbers: version (1), vocab, dim, layers, heads, hidden, context, then of the memory heads
    /// (0 without one), sub-keys, half width and K, each a `u32`; 4 bytes of zero; its layers, a `u64`; zeros.
    ///
    /// # Errors
    /// [`Error::Size`] if one is none that a model can have.
    pub fn encode(&self) -> Result<[u8; Self::LEN], Error> {
        self.check()?;
        let memory = self.memory.unwrap_or(MemorySizes { layers: 0, heads: 0, sub_keys: 0, half_dim: 0, top_k: 0 });
        let words = [
            VERSION as usize,
            self.vocab,
            self.dim,
            self.layers,
            self.heads,
            self.hidden,
            self.context,
            memory.heads,
            memory.sub_keys,
            memory.half_dim,
            memory.top_k,
        ];
        let mut bytes = [0; Self::LEN];
        for (place, word) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(words) {
            // Checked above: all are far below 2^32.
            *place = u32::try_from(word).unwrap_or(u32::MAX).to_le_bytes();
        }
        for (place, byte) in bytes.iter_mut().skip(48).zip(memory.layers.to_le_bytes()) {
            *place = byte;
        }
        Ok(bytes)
    }

    /// The sizes in the section `model` of an image.
    ///
    /// # Errors
    /// [`Error::Model`] if it has another length or version, or as [`Sizes::check`].
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let word = |at: usize| {
            let word = bytes.get(4 * at..).and_then(|rest| rest.first_chunk::<4>());
            word.map_or(0, |word| u32::from_le_bytes(*word)) as usize
        };
        let version = u32::try_from(word(0)).unwrap_or(0);
        if bytes.len() != Self::LEN || version != VERSION {
            return Err(Error::Model { bytes: bytes.len(), version });
        }
        let layers = word(12) as u64 | (word(13) as u64) << 32;
        let memory = MemorySizes { layers, heads: word(7), sub_keys: word(8), half_dim: word(9), top_k: word(10) };
        let sizes = Self {
            vocab: word(1),
            dim: word(2),
            layers: word(3),
            heads: word(4),
            hidden: word(5),
            context: word(6),
            memory: (memory.heads != 0).then_some(memory),
        };
        sizes.check()?;
        Ok(sizes)
    }

    /// Fails unless the sizes make a model.
    ///
    /// # Errors
    /// [`Error::Size`] or [`Error::Heads`] with the first that is wrong, [`Error::Memory`] if it is the memory's.
    pub fn check(&self) -> Result<(), Error> {
        for (name, found, limit) in [
            ("vocab", self.vocab, 1 << 24),
            ("dim", self.dim, 1 << 16),
            ("layers", self.layers, Self::MAX_LAYERS),
            ("heads", self.heads, 1 << 10),
            ("hidden", self.hidden, 1 << 20),
            ("context", self.context, 1 << 20),
        ] {
            if found == 0 || found > limit {
                return Err(Error::Size { name, found: found as u64, limit: limit as u64 });
            }
        }
        if !self.dim.is_multiple_of(2 * self.heads) {
            return Err(Error::Heads { dim: self.dim, heads: self.heads });
        }
        if let Some(memory) = &self.memory {
            // Bit `layers` and those above it belong to no block.
            let blocks = u64::MAX >> (Self::MAX_LAYERS - self.layers);
            if memory.layers == 0 || memory.layers & !blocks != 0 {
                return Err(Error::Size { name: "memory.layers", found: memory.layers, limit: blocks });
            }
            for (name, found, limit) in [
                ("memory.heads", memory.heads, 1 << 10),
                ("memory.sub_keys", memory.sub_keys, 1 << 16),
                ("memory.half_dim", memory.half_dim, 1 << 16),
            ] {
                if found > limit {
                    return Err(Error::Size { name, found: found as u64, limit: limit as u64 });
                }
            }
            self.memory_layer()?;
        }
        Ok(())
    }

    /// Width of an attention head, at least 1.
    #[must_use]
    pub const fn head_dim(&self) -> usize {
        match self.dim.checked_div(self.heads) {
            None | Some(0) => 1,
            Some(width) => width,
        }
    }

    /// Whether block `layer` has a memory in place of its dense feed-forward.
    #[must_use]
    pub const fn is_memory(&self, layer: usize) -> bool {
        match &self.memory {
            Some(memory) => layer < Self::MAX_LAYERS && memory.layers >> layer & 1 == 1,
            None => false,
        }
    }

    /// The sizes of every memory layer, if there is one.
    ///
    /// # Errors
    /// The layer's own.
    pub const fn memory_layer(&self) -> Result<Option<Config>, ConfigError> {
        let Some(memory) = &self.memory else { return Ok(None) };
        let builder = Config::builder(self.dim).heads(memory.heads).sub_keys(memory.sub_keys);
        let builder = builder.half_dim(memory.half_dim).top_k(memory.top_k).silu_gate(true).qk_norm(true);
        match builder.build() {
            Ok(config) => Ok(Some(config)),
            Err(error) => Err(error),
        }
    }

    /// What answering takes for at most `tokens` tokens, question and answer together, besides what the device itself asks
    /// for its memory layers: in a `const`, for a `static` in firmware. On the reference backend the latter is
    /// `Reference::<f32>::forward_scratch`.
    #[must_use]
    pub const fn scratch(&self, tokens: usize) -> ScratchReq {
        let memory = match self.memory_layer() {
            Ok(Some(config)) => config.activations_req(1),
            _ => ScratchReq::EMPTY,
        };
        let (d, h) = (self.dim, self.hidden);
        let wide = if 3 * d > 2 * h { 3 * d } else { 2 * h };
        let gated = if d > h { d } else { h };
        let own = 3 * d + wide + gated + self.head_dim() + tokens + self.vocab;
        let cache = (2 * self.layers * d).saturating_mul(tokens);
        ScratchReq::new(own.saturating_add(cache), 0).and(memory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: Sizes = Sizes {
        vocab: 1000,
        dim: 32,
        layers: 2,
        heads: 4,
        hidden: 48,
        context: 128,
        memory: Some(MemorySizes { layers: 2, heads: 4, sub_keys: 128, half_dim: 4, top_k: 8 }),
    };

    #[test]
    fn sizes_come_back() {
        for sizes in [SIZES, Sizes { memory: None, ..SIZES }, Sizes { layers: 64, ..SIZES }] {
            assert_eq!(Sizes::decode(&sizes.encode().expect("sizes")), Ok(sizes));
        }
    }

    #[test]
    fn absurd_sizes_are_refused() {
        let bytes = SIZES.encode().expect("sizes");
        assert_eq!(Sizes::decode(&bytes[..63]), Err(Error::Model { bytes: 63, version: 1 }));
        assert_eq!(Sizes::decode(&[9; 64]), Err(Error::Model { bytes: 64, version: 0x0909_0909 }));
        for at in 0..16 {
            let mut bytes = bytes;
            bytes[4 * at..4 * at + 4].fill(0xff);
            // The last words are of no use, and 44 to 48 are padding.
            assert!(Sizes::decode(&bytes).is_err() || [11, 14, 15].contains(&at), "word {at}");
        }
        let heads = Sizes { heads: 3, ..SIZES };
        assert_eq!(heads.check(), Err(Error::Heads { dim: 32, heads: 3 }));
        let memory = MemorySizes { layers: 4, heads: 4, sub_keys: 128, half_dim: 4, top_k: 8 };
        let outside = Sizes { memory: Some(memory), ..SIZES };
        assert_eq!(outside.check(), Err(Error::Size { name: "memory.layers", found: 4, limit: 3 }));
    }
}
