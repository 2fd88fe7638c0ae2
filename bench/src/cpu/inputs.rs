//! Tables and ids of a case. Inputs rotate, so that rows come from memory and not from a cache.

use std::sync::Arc;

use half::f16;
use memlayer_core::{Element, Random, Row, RowId, RowStore, Table};
use memlayer_cpu::{Cpu, PanelKeys, TableMemory};

use super::Case;
use crate::error::BenchError;

/// Rotating inputs touch this many bytes of rows, more than the last cache has, in at most so many sets.
const ROTATE_BYTES: usize = 1 << 30;
const ROTATE_SETS: usize = 16 << 10;

/// Values that share a scale in rows of int4.
pub(super) const INT4_GROUP: usize = 32;

/// Bytes of the codes of a row.
pub(super) fn row_bytes(format: &str, v: usize) -> usize {
    match format {
        "f32" => 4 * v,
        "bf16" | "f16" => 2 * v,
        "int4" => v.div_ceil(INT4_GROUP) * (INT4_GROUP / 2 + 2),
        _ => v,
    }
}

/// Codes of rows, and their scales if they have any.
#[derive(Clone)]
pub(super) struct Rows {
    pub(super) codes: Arc<TableMemory<u8>>,
    pub(super) scales: Arc<TableMemory<f32>>,
}

/// The last table, and its format, width and rows.
#[derive(Default)]
pub(super) struct Tables(Option<((String, usize, usize), Rows)>);

impl Tables {
    /// A table of random rows of finite values.
    pub(super) fn get(&mut self, format: &str, v: usize, slots: usize) -> Result<Rows, BenchError> {
        let key = (format.to_owned(), v, slots);
        if let Some((found, rows)) = &self.0
            && *found == key
        {
            return Ok(rows.clone());
        }
        self.0 = None;
        let mut codes = memory::<u8>(slots * row_bytes(format, v))?;
        fill(format, &mut codes);
        let mut scales = memory(if matches!(format, "int8" | "e4m3" | "e5m2") { slots } else { 0 })?;
        scales.fill(0.01);
        let rows = Rows { codes: Arc::new(codes), scales: Arc::new(scales) };
        self.0 = Some((key, rows.clone()));
        Ok(rows)
    }

    /// Gives the last table's memory back.
    pub(super) fn clear(&mut self) {
        self.0 = None;
    }
}

/// Memory for a table.
pub(super) fn memory<T: bytemuck::Pod>(len: usize) -> Result<TableMemory<T>, BenchError> {
    TableMemory::zeroed(len).map_err(|source| BenchError::Io { path: "memory".into(), source })
}

fn fill(format: &str, codes: &mut [u8]) {
    let mut random = Random::new(7);
    for chunk in codes.chunks_exact_mut(8) {
        chunk.copy_from_slice(&random.bits().to_le_bytes());
    }
    match format {
        // A fraction of random bits under the exponent of 1, made -1 to 1 by the sign: 1 to 2 in magnitude.
        "f32" => codes.chunks_exact_mut(4).for_each(|x| (x[3], x[2]) = (x[3] & 0x80 | 0x3f, x[2] | 0x80)),
        "bf16" => codes.chunks_exact_mut(2).for_each(|x| (x[1], x[0]) = (x[1] & 0x80 | 0x3f, x[0] | 0x80)),
        "f16" => codes.chunks_exact_mut(2).for_each(|x| x[1] = x[1] & 0x83 | 0x3c),
        "e4m3" => codes.iter_mut().for_each(|x| *x &= 0xf7),
        "e5m2" => codes.iter_mut().for_each(|x| *x &= 0xbf),
        "int4" => {
            let scale = f16::from_f32(0.1).to_le_bytes();
            codes.chunks_exact_mut(INT4_GROUP / 2 + 2).for_each(|block| block[..2].copy_from_slice(&scale));
        }
        _ => {}
    }
}

/// Sub-keys that belong to a call.
pub(super) struct OwnedRows<E> {
    codes: Vec<E>,
    /// One a row, or none.
    scales: Vec<f32>,
    dim: usize,
}

impl<E> OwnedRows<E> {
    pub(super) fn new(codes: Vec<E>, dim: usize) -> Self {
        Self { codes, scales: Vec::new(), dim }
    }
}

impl OwnedRows<i8> {
    /// Numbers from -1 to 1 as integers.
    pub(super) fn int8(keys: &[f32], dim: usize) -> Self {
        #[allow(clippy::cast_possible_truncation, reason = "-127 to 127")]
        let codes = keys.iter().map(|x| (x * 127.0).round() as i8).collect();
        Self { codes, scales: vec![1.0 / 127.0; keys.len() / dim], dim }
    }
}

impl<E: Element> Table for OwnedRows<E> {
    type Elem = E;
    fn rows(&self) -> usize {
        self.codes.len() / self.dim
    }
    fn dim(&self) -> usize {
        self.dim
    }
}

impl<E: Element> RowStore for OwnedRows<E> {
    fn row(&self, id: RowId) -> Row<'_, E> {
        let (id, dim) = (id as usize, self.dim);
        let scales = self.scales.get(id..=id).unwrap_or_default();
        Row { codes: &self.codes[id * dim..(id + 1) * dim], scales, group: dim }
    }
    fn run(&self, first: RowId, count: usize) -> Option<Row<'_, E>> {
        let rows = first as usize..first as usize + count;
        let codes = self.codes.get(rows.start * self.dim..rows.end * self.dim)?;
        Some(Row { codes, scales: self.scales.get(rows).unwrap_or_default(), group: self.dim })
    }
}

/// The same laid out for inference.
pub(super) fn int8_panels(
    keys: &[f32],
    dim: usize,
    sub_keys: usize,
    cpu: &Cpu,
) -> Result<PanelKeys<OwnedRows<i8>>, BenchError> {
    let panels = PanelKeys::new(cpu, OwnedRows::int8(keys, dim), sub_keys);
    panels.map_err(|source| BenchError::Io { path: "memory".into(), source })
}

/// Numbers from -1 to 1.
pub(crate) fn reals(n: usize, seed: u64) -> Vec<f32> {
    let mut random = Random::new(seed);
    #[allow(clippy::cast_possible_truncation, reason = "rounded")]
    (0..n).map(|_| (2.0 * random.uniform() - 1.0) as f32).collect()
}

/// One of `slots`, uniformly or by Zipf's law (exponent 1) with its ranks scattered.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "below the slots, whose ids have 32 bits")]
pub(crate) fn slot(random: &mut Random, slots: usize, zipf: bool) -> u32 {
    if !zipf {
        return random.below(slots) as u32;
    }
    // By inversion.
    let rank = (random.uniform() * (slots as f64).ln()).exp() as usize - 1;
    (rank.wrapping_mul(0x9e37_79b1) % slots) as u32
}

/// Sets of ids `[T, L]`, taken in turn.
pub(super) struct Turns {
    sets: Vec<Vec<u32>>,
    turn: usize,
}

impl Turns {
    /// As many sets as it takes; of another `seed` where one side must not find what the other has just read.
    pub(super) fn new(case: &Case, seed: u64) -> Self {
        let n = case.t * case.bag();
        let count = ROTATE_BYTES.div_ceil(n * case.row_bytes).clamp(1, ROTATE_SETS);
        let mut random = Random::new(n as u64 ^ seed << 32);
        let mut id = || slot(&mut random, case.slots, case.zipf);
        Self { sets: (0..count).map(|_| (0..n).map(|_| id()).collect()).collect(), turn: 0 }
    }

    /// The next set.
    pub(super) fn next(&mut self) -> &[u32] {
        self.turn = (self.turn + 1) % self.sets.len();
        &self.sets[self.turn]
    }
}
