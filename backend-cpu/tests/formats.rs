//! Rows of every format: sums have the reference's bits, dots stay in their bound, on every instruction set.

use memlayer_core::ops::EmbeddingBag;
use memlayer_core::ops::bag::{BagDot, BagSum};
use memlayer_core::{Bf16, DenseRows, E4m3, E5m2, Element, F16, Int4, Random, Reference, RowStore, ScaledRows};
use memlayer_cpu::{Cpu, Isa};

const ROWS: usize = 40;
const BAG: usize = 9;
const TOKENS: usize = 5;

fn cpus() -> impl Iterator<Item = Cpu> {
    Isa::available().map(|isa| Cpu::builder().isa(isa).threads(2).build().expect("an instruction set of this machine"))
}

/// Compares over `table`, whose rows have `dim` values.
fn compare<T: RowStore + Sync>(table: &T, dim: usize, what: &str) {
    let mut random = Random::new(dim as u64);
    let ids: Vec<u32> = (0..TOKENS * BAG).map(|_| u32::try_from(random.below(ROWS)).expect("small")).collect();
    let (mut weights, mut vectors) = (vec![0.0f32; TOKENS * BAG], vec![0.0f32; TOKENS * dim]);
    random.fill_normal(&mut weights, 1.0);
    random.fill_normal(&mut vectors, 1.0);
    let (ids, weights) = (&ids[..], &weights[..]);
    let mut expected = vec![f32::NAN; TOKENS * dim];
    let args = BagSum { bag: BAG, ids, weights, out: &mut expected[..], accumulate: false };
    Reference::<f32>::new().bag_sum(table, args).expect("sums");
    for cpu in cpus() {
        let what = format!("{what}, {dim} values, {}", cpu.name());
        let mut found = vec![f32::NAN; TOKENS * dim];
        let out = &mut found[..];
        cpu.bag_sum(table, BagSum { bag: BAG, ids, weights, out, accumulate: false }).expect("sums");
        for (i, (e, f)) in expected.iter().zip(&found).enumerate() {
            assert!(e.to_bits() == f.to_bits() || e.is_nan() && f.is_nan(), "{what}: sum {i} is {f} for {e}");
        }
        let mut dots = vec![f32::NAN; TOKENS * BAG];
        cpu.bag_dot(table, BagDot { bag: BAG, ids, vectors: &vectors[..], out: &mut dots[..] }).expect("dots");
        for (l, (&id, dot)) in ids.iter().zip(dots).enumerate() {
            let row = table.row(id);
            let terms = (0..dim).map(|i| row.value::<f64>(i) * f64::from(vectors[l / BAG * dim + i]));
            let (exact, scale) = terms.fold((0.0, 0.0), |(sum, scale), x| (sum + x, scale + x.abs()));
            let bound = (dim + 3) as f64 * f64::from(f32::EPSILON) * scale;
            let error = (f64::from(dot) - exact).abs();
            let same = f64::from(dot) == exact || exact.is_nan() && dot.is_nan();
            assert!(error <= bound || same, "{what}: dot {l} is {dot} for {exact}");
        }
    }
}

/// Widths around every edge of a vector, a group and a block of columns.
const WIDTHS: [usize; 12] = [1, 3, 8, 15, 16, 31, 32, 33, 64, 100, 128, 300];

fn all_codes<E: Element>(what: &str, code: impl Fn(u64) -> E) {
    for dim in WIDTHS {
        let mut random = Random::new(3);
        let codes: Vec<E> = (0..ROWS * E::codes(dim)).map(|_| code(random.bits())).collect();
        compare(&DenseRows::new(&codes, dim), dim, what);
        for group in [dim, 7] {
            let mut scales = vec![0.0f32; ROWS * dim.div_ceil(group)];
            random.fill_normal(&mut scales, 1.0);
            if E::codes(dim) == dim {
                let table = ScaledRows::new(&codes, &scales, dim, group).expect("sizes");
                compare(&table, dim, &format!("{what} in groups of {group}"));
            }
        }
    }
}

#[test]
#[allow(clippy::cast_possible_truncation, reason = "bits of a code")]
fn all_codes_of_every_format() {
    all_codes("int8", |bits| bits as i8);
    all_codes("e4m3", |bits| E4m3(bits as u8));
    all_codes("e5m2", |bits| E5m2(bits as u8));
    all_codes("f16", |bits| F16::from_bits(bits as u16));
    // Less than 2: products of greater ones overflow in `f32` where they do not in `f64`.
    all_codes("bf16", |bits| Bf16::from_bits(bits as u16 & 0xbfff));
    all_codes("int4", |bits| Int4::<32>(bits as u8));
    all_codes("int4x64", |bits| Int4::<64>(bits as u8));
}

/// Every code of a byte, one a row: infinities and NaN do not hide the others.
#[test]
fn each_code_alone() {
    fn rows<E: Element>(what: &str, code: impl Fn(u8) -> E) {
        for cpu in cpus() {
            let codes: Vec<E> = (0..=255u8).flat_map(|bits| [code(bits); 32]).collect();
            let table = DenseRows::new(&codes, 32);
            let ids: Vec<u32> = (0..256).collect();
            let mut out = vec![f32::NAN; 256 * 32];
            let args = BagSum { bag: 1, ids: &ids[..], weights: &[1.0; 256][..], out: &mut out[..], accumulate: false };
            cpu.bag_sum(&table, args).expect("sums");
            for (row, id) in out.chunks(32).zip(0..) {
                // A sum starts at zero, which takes the sign of a negative zero.
                let value = 0.0 + table.row(id).value::<f32>(0);
                for x in row {
                    let same = x.to_bits() == value.to_bits() || x.is_nan() && value.is_nan();
                    assert!(same, "{what} code {id} on {}: {x} for {value}", cpu.name());
                }
            }
        }
    }
    rows("e4m3", E4m3);
    rows("e5m2", E5m2);
    rows("int8", |bits| bits.cast_signed());
}

/// Factors so great or small that a power of two cannot be moved between them and the values.
#[test]
fn factors_at_the_ends_of_their_range() {
    fn rows<E: Element>(what: &str, code: impl Fn(u32) -> E) {
        let dim = 288;
        let codes: Vec<E> = (0..2 * E::codes(dim)).zip(0..).map(|(_, i)| code(i)).collect();
        let table = DenseRows::new(&codes, dim);
        let greatest =
            [f32::MAX, f32::MAX / 2.0, f32::MAX / 255.0, f32::MAX / 256.0, f32::MAX / 257.0, f32::MAX / 1024.0];
        let least = [f32::MIN_POSITIVE, 1e-40, 1e-45, 0.0, f32::INFINITY, f32::NAN];
        for weight in greatest.into_iter().chain(least).flat_map(|x| [x, -x]) {
            let (ids, weights) = (&[0, 1][..], &[weight, 1.0][..]);
            let (mut expected, mut found) = (vec![0.0; dim], vec![0.0; dim]);
            let args = BagSum { bag: 2, ids, weights, out: &mut expected[..], accumulate: false };
            Reference::<f32>::new().bag_sum(&table, args).expect("sums");
            for cpu in cpus() {
                let args = BagSum { bag: 2, ids, weights, out: &mut found[..], accumulate: false };
                cpu.bag_sum(&table, args).expect("sums");
                for (i, (e, f)) in expected.iter().zip(&found).enumerate() {
                    let same = e.to_bits() == f.to_bits() || e.is_nan() && f.is_nan();
                    assert!(same, "{what} times {weight} on {}: sum {i} is {f} for {e}", cpu.name());
                }
            }
        }
    }
    // No code is NaN: a block with one is summed otherwise.
    rows("e4m3", |i| E4m3(u8::try_from(i % 127).expect("a byte") | if i % 3 == 0 { 0x80 } else { 0 }));
    rows("int4", |i| Int4::<32>(u8::try_from(i % 251).expect("a byte")));
    rows("int4x64", |i| Int4::<64>(u8::try_from(i % 251).expect("a byte")));
}
