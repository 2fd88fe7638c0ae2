//! Integer dot products: fours of `i8 · i8`, summed in 32 bits, where the CPU has an instruction for them.
//!
//! Every sum is exact. Four codes lie in a word, the first in its low byte. x86 multiplies bytes without a sign by bytes
//! with one: there the codes of a panel have [`OFFSET`] added, and what that adds to a product is taken off again.

#[cfg(target_arch = "aarch64")]
mod arm;
#[cfg(target_arch = "x86_64")]
mod vnni;

use super::{Simd, Token, dispatch};

/// Columns of a panel.
pub(crate) const WIDTH: usize = 32;

/// The most rows that [`Int8::multiply`] takes.
pub(crate) const ROWS: usize = 8;

/// The most values of a vector: so that a sum of products of codes has 24 bits, and is exact as a float.
pub(crate) const MAX_DIM: usize = 1024;

/// What is added to a code of a panel whose bytes have no sign.
const OFFSET: i32 = 128;

/// Words of `dim` codes: whole pairs, for instructions that take eight codes at a time.
pub(crate) const fn words(dim: usize) -> usize {
    dim.div_ceil(8) * 2
}

/// Words of a left row that holds `dim` codes: a start, then the codes.
pub(crate) const fn left_len(dim: usize) -> usize {
    1 + words(dim)
}

/// Gives each of the [`words`] of `codes`, in order, zeros behind the last code.
#[inline(always)]
fn for_words(codes: &[i8], mut put: impl FnMut(usize, u32)) {
    let (fours, rest) = codes.as_chunks::<4>();
    for (k, four) in fours.iter().enumerate() {
        put(k, u32::from_le_bytes(four.map(i8::cast_unsigned)));
    }
    let last = [0, 1, 2, 3].map(|i| *rest.get(i).unwrap_or(&0));
    for k in fours.len()..words(codes.len()) {
        put(k, if k == fours.len() { u32::from_le_bytes(last.map(i8::cast_unsigned)) } else { 0 });
    }
}

/// Writes `codes` as a row on the left of [`Int8::multiply`], of [`left_len`] words.
#[inline(always)]
pub(crate) fn pack_left(codes: &[i8], to: &mut [u32]) {
    let Some((start, to)) = to.split_first_mut() else { return };
    // Of every product with the offset of the other side, where it has one.
    *start = (-OFFSET * codes.iter().map(|&code| i32::from(code)).sum::<i32>()).cast_unsigned();
    for_words(codes, |k, word| to[k] = word);
}

/// The right to use the instructions.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Int8 {
    /// AVX-512 VNNI.
    #[cfg(target_arch = "x86_64")]
    Vnni(vnni::Vnni),
    /// AVX-VNNI, of processors without AVX-512.
    #[cfg(target_arch = "x86_64")]
    AvxVnni(vnni::AvxVnni),
    /// `sdot`.
    #[cfg(target_arch = "aarch64")]
    Dot(arm::Dot),
    /// `smmla`.
    #[cfg(target_arch = "aarch64")]
    Matrix(arm::Matrix),
}

/// Calls the same function of whichever it is.
macro_rules! each {
    ($self:ident, $it:ident => $body:expr) => {
        match $self {
            #[cfg(target_arch = "x86_64")]
            Self::Vnni($it) => $body,
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni($it) => $body,
            #[cfg(target_arch = "aarch64")]
            Self::Dot($it) => $body,
            #[cfg(target_arch = "aarch64")]
            Self::Matrix($it) => $body,
        }
    };
}

impl Int8 {
    /// The instructions that go with an instruction set, of those that this machine has; the best first.
    fn available(token: Token) -> impl Iterator<Item = Self> {
        #[cfg(target_arch = "x86_64")]
        let all = match token {
            Token::Avx512(_) => [vnni::Vnni::new().map(Self::Vnni), None],
            Token::Avx2(_) => [vnni::AvxVnni::new().map(Self::AvxVnni), None],
            Token::Scalar(_) => [None, None],
        };
        #[cfg(target_arch = "aarch64")]
        let all = match token {
            Token::Neon(_) => [arm::Matrix::new().map(Self::Matrix), arm::Dot::new().map(Self::Dot)],
            Token::Scalar(_) => [None, None],
        };
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        let all: [Option<Self>; 0] = {
            let Token::Scalar(_) = token;
            []
        };
        all.into_iter().flatten()
    }

    /// The best of them.
    pub(crate) fn new(token: Token) -> Option<Self> {
        Self::available(token).next()
    }

    /// Writes `codes` as column `n` of a panel of [`WIDTH`] columns, [`words`] high.
    #[inline(always)]
    pub(crate) fn pack_column(self, codes: &[i8], n: usize, panel: &mut [u32]) {
        each!(self, it => it.pack_column(codes, n, panel));
    }

    /// Writes [`WIDTH`] rows of `dim` codes that lie one after the other as the columns of a panel, and gives the sum of each
    /// one's squares; nothing if it is not by squares of words that they can be turned.
    pub(crate) fn pack_rows(self, token: Token, codes: &[i8], dim: usize, panel: &mut [u32]) -> Option<[i32; WIDTH]> {
        let words = bytemuck::try_cast_slice(codes).ok().filter(|_| dim.is_multiple_of(4))?;
        // What is added to the codes of a panel of rows of words.
        let turn = |offset, panel: &mut [u32]| dispatch!(token, s => turn_words(s, words, dim / 4, offset, panel));
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Vnni(it) => turn(vnni::OFFSETS, panel).then(|| it.squares(panel)),
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni(it) => turn(vnni::OFFSETS, panel).then(|| it.squares(panel)),
            #[cfg(target_arch = "aarch64")]
            Self::Dot(it) => turn(0, panel).then(|| it.squares(panel)),
            #[cfg(target_arch = "aarch64")]
            Self::Matrix(_) => None,
        }
    }

    /// `out[r · stride + j] = scales[j] · Σ left(r) · panel(j)`, for the rows of `left`, at most [`ROWS`] of [`left_len`],
    /// and the [`WIDTH`] columns of `panel`.
    ///
    /// # Panics
    /// If an operand is too short or there are too many rows.
    #[inline(always)]
    pub(crate) fn multiply(self, left: &[u32], panel: &[u32], scales: &[f32], out: &mut [f32], stride: usize) {
        let depth = panel.len() / WIDTH;
        let rows = left.len() / (1 + depth);
        assert!(scales.len() >= WIDTH && rows <= ROWS && depth.is_multiple_of(2), "a panel of integers");
        assert!(rows == 0 || (rows - 1) * stride + WIDTH <= out.len(), "out of integers");
        let tile = Tile { left, depth, panel, scales, stride };
        each!(self, it => it.multiply(tile, rows, out));
    }

    /// `out[n] = Σ query · row n`, for rows of `dim` codes; behind so many the query is zero.
    ///
    /// # Panics
    /// If there are fewer rows than places in `out`.
    #[inline(always)]
    pub(crate) fn dots(self, query: &[i8; MAX_DIM], dim: usize, rows: &[i8], out: &mut [f32]) {
        let rows = &rows[..out.len() * dim];
        each!(self, it => it.dots(query, dim, rows, out));
    }
}

/// Turns [`WIDTH`] rows of `depth` words, if they are whole squares, and flips the bits of `offset` in each word.
#[inline(always)]
fn turn_words<S: Simd>(s: S, from: &[f32], depth: usize, offset: u32, panel: &mut [u32]) -> bool {
    if !depth.is_multiple_of(S::LANES) || !WIDTH.is_multiple_of(S::LANES) {
        return false;
    }
    let to: &mut [f32] = bytemuck::cast_slice_mut(panel);
    for k in (0..depth).step_by(S::LANES) {
        for n in (0..WIDTH).step_by(S::LANES) {
            s.turn((&from[n * depth + k..], depth), (&mut to[k * WIDTH + n..], WIDTH));
        }
    }
    for word in panel {
        *word ^= offset;
    }
    true
}

/// The operands of a product, of sizes that [`Int8::multiply`] has checked.
#[derive(Clone, Copy)]
struct Tile<'a> {
    /// Rows of `1 + depth`.
    left: &'a [u32],
    /// Words of a row or column, even.
    depth: usize,
    /// `depth · WIDTH`.
    panel: &'a [u32],
    /// At least `WIDTH`.
    scales: &'a [f32],
    /// From a row of the result to the next.
    stride: usize,
}

impl<'a> Tile<'a> {
    /// Behind the first `r` rows.
    #[inline(always)]
    fn rows_from(self, r: usize) -> Self {
        Self { left: &self.left[r * (1 + self.depth)..], ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;

    /// All that this machine has, with what they go with.
    fn all() -> impl Iterator<Item = (Token, Int8)> {
        Isa::available().filter_map(Token::new).flat_map(|token| Int8::available(token).map(move |int8| (token, int8)))
    }

    #[test]
    fn sums_are_exact() {
        if all().next().is_none() {
            eprintln!("skipped: no integer dot products here");
        }
        all().for_each(|(token, int8)| sums_of(token, int8));
    }

    #[allow(clippy::cast_possible_truncation, reason = "codes")]
    fn sums_of(token: Token, int8: Int8) {
        let mut random = memlayer_core::Random::new(1);
        for dim in [1, 3, 4, 5, 16, 63, 64, 65, 129, MAX_DIM] {
            let mut codes = |n: usize| -> Vec<i8> { (0..n).map(|_| random.below(256) as u8 as i8).collect() };
            let mut rows: Vec<Vec<i8>> = (0..WIDTH).map(|_| codes(dim)).collect();
            rows[3].fill(i8::MIN);
            let mut queries: Vec<Vec<i8>> = (0..ROWS).map(|_| codes(dim)).collect();
            queries.iter_mut().flatten().for_each(|code| *code = (*code).max(-127));
            queries[2].fill(-127);
            queries[1].fill(127);
            let dot = |a: &[i8], b: &[i8]| a.iter().zip(b).map(|(&a, &b)| i32::from(a) * i32::from(b)).sum::<i32>();
            let mut panel = vec![u32::MAX; WIDTH * words(dim)];
            rows.iter().enumerate().for_each(|(n, row)| int8.pack_column(row, n, &mut panel));
            let mut together = vec![u32::MAX; panel.len()];
            // From a vector of bytes on, as the allocator aligns them.
            if let Some(squares) = int8.pack_rows(token, &rows.concat(), dim, &mut together) {
                assert_eq!(panel, together, "{int8:?}, dim {dim}");
                assert!(rows.iter().map(|row| dot(row, row)).eq(squares), "{int8:?}, dim {dim}");
            } else {
                assert!(!cfg!(target_arch = "x86_64") || !dim.is_multiple_of(64), "{int8:?}, dim {dim}");
            }
            let scales: Vec<f32> = (0..WIDTH).map(|n| 0.5 + n as f32).collect();
            for count in 0..=ROWS {
                let mut left = vec![0; count * left_len(dim)];
                queries.iter().zip(left.chunks_mut(left_len(dim))).for_each(|(query, to)| pack_left(query, to));
                let mut out = vec![f32::NAN; count * 40];
                int8.multiply(&left, &panel, &scales, &mut out, 40);
                for (query, out) in queries.iter().zip(out.chunks(40)) {
                    for ((row, scale), &out) in rows.iter().zip(&scales).zip(out) {
                        assert_eq!(out, scale * dot(query, row) as f32, "{int8:?}, {count} rows, dim {dim}");
                    }
                }
            }
            for count in [0, 1, 15, 16, 17, WIDTH] {
                let (mut out, mut query) = (vec![f32::NAN; count], [0; MAX_DIM]);
                query[..dim].copy_from_slice(&queries[1]);
                int8.dots(&query, dim, &rows.concat(), &mut out);
                let expected: Vec<f32> = rows[..count].iter().map(|row| dot(&queries[1], row) as f32).collect();
                assert_eq!(out, expected, "{int8:?}, {count} rows, dim {dim}");
            }
        }
    }
}
