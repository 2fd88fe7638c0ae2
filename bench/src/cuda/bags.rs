//! Sums of rows and dots with them.

use memlayer_core::element::Format;
use memlayer_core::ops::EmbeddingBag;
use memlayer_core::ops::bag::{BagDot, BagSum};
use memlayer_core::{Bf16, E4m3, Element, F16, Int4};
use memlayer_cuda::{CudaError, Rows};

use super::device::{Bench, SETS};
use super::{BAG, Case, TOKENS};

impl Bench<'_> {
    /// Bags of all formats and widths, and of few and many tokens.
    pub(super) fn bags(&self) -> Result<(), CudaError> {
        #[allow(clippy::cast_possible_truncation, reason = "any code does")]
        let int8 = |x: f32| (x * 30.0) as i8;
        #[allow(clippy::cast_possible_truncation, reason = "any code does")]
        let e4m3 = |x: f32| E4m3((x.to_bits() >> 20) as u8 & 0x77);
        // A scale is then two such bytes: some number of about 2^-9.
        #[allow(clippy::cast_possible_truncation, reason = "any code does")]
        let int4 = |x: f32| Int4::<32>((x.to_bits() >> 20) as u8 & 0x1f);
        if !self.wants("bag_sum") && !self.wants("bag_dot") {
            return Ok(());
        }
        let widths: &[usize] = if self.options.quick { &[256, 1024] } else { &[64, 100, 256, 1000, 1024, 4096] };
        for &width in widths {
            self.bags_of(TOKENS, (width, width), 1 << 20, |x| x)?;
            self.bags_of(TOKENS, (width, width), 1 << 20, Bf16::from_f32)?;
            self.bags_of(TOKENS, (width, width), 1 << 20, F16::from_f32)?;
            self.bags_of(TOKENS, (width, width), 1 << 20, int8)?;
            self.bags_of(TOKENS, (width, width), 1 << 20, e4m3)?;
            self.bags_of(TOKENS, (width, width), 1 << 20, int4)?;
            // Rows that begin with a line of memory, of which no more is fetched than they need.
            if !width.is_multiple_of(64) {
                let wide = width.next_multiple_of(128);
                self.fetching(32)?;
                self.bags_of(TOKENS, (width, width.next_multiple_of(64)), 1 << 20, Bf16::from_f32)?;
                self.bags_of(TOKENS, (width, wide), 1 << 20, int8)?;
                self.bags_of(TOKENS, (width, wide), 1 << 20, e4m3)?;
                self.fetching(64)?;
            }
        }
        for slots in [1 << 22, 1 << 24] {
            self.bags_of(TOKENS, (1024, 1024), slots, Bf16::from_f32)?;
            self.bags_of(TOKENS, (1024, 1024), slots, int8)?;
            self.bags_of(TOKENS, (1024, 1024), slots, e4m3)?;
        }
        for tokens in [1, 32, 32_768] {
            self.bags_of(tokens, (1024, 1024), 1 << 20, Bf16::from_f32)?;
        }
        Ok(())
    }

    /// Sums and dots of bags in one format, of rows so many values wide and so many apart.
    fn bags_of<E: Element>(
        &self,
        tokens: usize,
        (width, stride): (usize, usize),
        slots: usize,
        of: impl Fn(f32) -> E,
    ) -> Result<(), CudaError> {
        let codes = self.codes(slots * E::codes(stride), of)?;
        let scaled = matches!(E::FORMAT, Format::Int8 | Format::E4m3 | Format::E5m2);
        let scales = self.cuda.upload(&vec![0.01f32; if scaled { slots } else { 0 }])?;
        let scales = scaled.then_some(scales.view());
        let table = Rows::padded(codes.view(), scales, width, width, E::codes(stride)).expect("a scale for each row");
        let padded = stride > width;
        let entries = tokens * BAG;
        let weights = self.reals(entries, 3)?;
        let vectors = self.reals(tokens * width, 4)?;
        let mut out = self.cuda.zeros::<f32>(tokens * width)?;
        let mut dots = self.cuda.zeros::<f32>(entries)?;
        let row_bytes = E::codes(width) * size_of::<E>() + if scaled { 4 } else { 0 };
        let bytes = (entries * (row_bytes + 8) + tokens * width * 4) as f64;
        for zipf in [false, true] {
            let sets: Result<Vec<_>, _> = (0..SETS).map(|s| self.ids(entries, slots, zipf, s as u64)).collect();
            let sets = sets?;
            let row = Case {
                op: if padded { "bag_sum, padded, fetch 32" } else { "bag_sum" },
                format: E::FORMAT.name(),
                ids: if zipf { "zipf" } else { "uniform" },
                tokens,
                width,
                slots,
            };
            if self.wants("bag_sum") {
                let ms = self.time(|set| {
                    let (ids, weights, out) = (sets[set].view(), weights.view(), out.view_mut());
                    self.cuda.bag_sum(&table, BagSum { bag: BAG, ids, weights, out, accumulate: false })
                })?;
                self.report(row, bytes, ms);
            }
            if self.wants("bag_dot") {
                let ms = self.time(|set| {
                    let (ids, vectors, out) = (sets[set].view(), vectors.view(), dots.view_mut());
                    self.cuda.bag_dot(&table, BagDot { bag: BAG, ids, vectors, out })
                })?;
                let op = if padded { "bag_dot, padded, fetch 32" } else { "bag_dot" };
                self.report(Case { op, ..row }, bytes, ms);
            }
        }
        Ok(())
    }
}
