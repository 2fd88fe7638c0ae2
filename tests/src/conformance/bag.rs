//! Embedding bags: sums bit for bit, dots in their bound.

use memlayer_core::ops::EmbeddingBag;
use memlayer_core::ops::bag::{BagDot, BagSum};
use memlayer_core::{Bf16, DenseRows, E4m3, E5m2, Element, F16, Reference, RowStore, Table};

use super::select::host_rows;
use super::{Subject, assert_same_bits, assert_within};
use crate::device::{TestDevice, poisoned};
use crate::random::Random;

/// `(T, L, rows, V)` around every edge of a vector and of a block of columns.
const SHAPES: [(usize, usize, usize, usize); 14] = [
    (1, 1, 1, 1),
    (0, 3, 5, 4),
    (2, 3, 7, 2),
    (3, 5, 9, 7),
    (4, 8, 100, 8),
    (1, 128, 50, 15),
    (5, 4, 33, 16),
    (2, 6, 20, 17),
    (3, 9, 64, 31),
    (7, 32, 200, 64),
    (2, 3, 11, 65),
    (3, 33, 40, 100),
    (2, 16, 30, 129),
    (2, 7, 13, 300),
];

fn sum<D, S>(device: &D, table: &S, bag: usize, ids: &[u32], weights: &[f32], start: Option<&[f32]>) -> Vec<f32>
where
    S: Table,
    D: TestDevice<Scalar = f32> + EmbeddingBag<S>,
{
    let len = ids.len() / bag * table.dim();
    let mut out = start.map_or_else(|| poisoned(device, len), |start| device.upload(start));
    let (ids, weights) = (device.upload(ids), device.upload(weights));
    let args = BagSum {
        bag,
        ids: D::view(&ids),
        weights: D::view(&weights),
        out: D::view_mut(&mut out),
        accumulate: start.is_some(),
    };
    device.bag_sum(table, args).expect("a sum");
    device.synchronize().expect("a sum");
    device.download(&out)
}

fn dot<D, S>(device: &D, table: &S, bag: usize, ids: &[u32], vectors: &[f32]) -> Vec<f32>
where
    S: Table,
    D: TestDevice<Scalar = f32> + EmbeddingBag<S>,
{
    let mut out = poisoned(device, ids.len());
    let (ids, vectors) = (device.upload(ids), device.upload(vectors));
    let args = BagDot { bag, ids: D::view(&ids), vectors: D::view(&vectors), out: D::view_mut(&mut out) };
    device.bag_dot(table, args).expect("dots");
    device.synchronize().expect("dots");
    device.download(&out)
}

/// Sums over rows of scalars, overwriting and accumulating.
///
/// # Panics
/// If a bit differs.
pub fn sums_have_the_references_bits<D: Subject>(device: &D) {
    for (i, (t, l, rows, v)) in SHAPES.into_iter().enumerate() {
        let mut random = Random::new(i as u64);
        let (ids, weights) = (random.ids(t * l, rows), random.reals::<f32>(t * l));
        let (table, start) = (random.reals::<f32>(rows * v), random.reals::<f32>(t * v));
        let buffer = device.upload(&table);
        for start in [None, Some(&start[..])] {
            let expected = sum(&Reference::new(), &DenseRows::new(&table, v), l, &ids, &weights, start);
            let found = sum(device, &D::rows(D::view(&buffer), v), l, &ids, &weights, start);
            assert_same_bits(&expected, &found, &format!("bag_sum T {t} L {l} V {v}"));
        }
    }
}

/// Random codes, all finite.
fn codes<E: Element>(random: &mut Random, len: usize, of: impl Fn(u64) -> E) -> Vec<E> {
    let mut codes = Vec::with_capacity(len);
    while codes.len() < len {
        let code = of(random.bits());
        if E::value::<f32>(&[code], 0).is_finite() {
            codes.push(code);
        }
    }
    codes
}

/// Sums over packed rows of every format.
///
/// # Panics
/// If a bit differs.
#[allow(clippy::cast_possible_truncation, reason = "random bits, cut to the width of a code")]
pub fn sums_of_packed_rows_have_the_references_bits<D: Subject>(device: &D) {
    fn check<D, E: Element>(device: &D, of: impl Fn(u64) -> E + Copy)
    where
        D: Subject + for<'x> EmbeddingBag<<D as TestDevice>::Packed<'x, E>>,
    {
        for (i, (t, l, rows, v)) in SHAPES.into_iter().enumerate() {
            let mut random = Random::new(300 + i as u64);
            let (ids, weights) = (random.ids(t * l, rows), random.reals::<f32>(t * l));
            let (codes, scales) = (codes(&mut random, rows * v, of), random.reals::<f32>(rows));
            let expected = sum(&Reference::new(), &host_rows(&codes, &scales, v), l, &ids, &weights, None);
            let (codes, scales) = (device.upload(&codes), device.upload(&scales));
            let found = sum(device, &D::packed(&codes, &scales, v), l, &ids, &weights, None);
            assert_same_bits(&expected, &found, &format!("bag_sum {} T {t} L {l} V {v}", E::FORMAT));
        }
    }
    check(device, |bits| bits as i8);
    check(device, |bits| E4m3(bits as u8));
    check(device, |bits| E5m2(bits as u8));
    check(device, |bits| F16::from_bits(bits as u16));
    check(device, |bits| Bf16::from_bits(bits as u16 & 0xbfff));
}

/// Dots against `f64`, within the bound of their terms; and exact ones exactly.
///
/// # Panics
/// If one is out of its bound.
pub fn dots_are_in_their_bound<D: Subject>(device: &D) {
    for (i, (t, l, rows, v)) in SHAPES.into_iter().enumerate() {
        let mut random = Random::new(600 + i as u64);
        let ids = random.ids(t * l, rows);
        for exact in [false, true] {
            let make = |random: &mut Random, len| -> Vec<f32> {
                if exact { random.integers(len, 8) } else { random.reals(len) }
            };
            let (vectors, table) = (make(&mut random, t * v), make(&mut random, rows * v));
            let host = DenseRows::new(&table, v);
            let (mut expected, mut bounds) = (vec![], vec![]);
            for (e, &id) in ids.iter().enumerate() {
                let terms = (0..v).map(|i| f64::from(vectors[e / l * v + i]) * host.row(id).value::<f64>(i));
                expected.push(terms.clone().sum());
                let scale = if exact { 0.0 } else { v as f64 * f64::from(f32::EPSILON) };
                bounds.push(scale * terms.map(f64::abs).sum::<f64>());
            }
            let buffer = device.upload(&table);
            let found = dot(device, &D::rows(D::view(&buffer), v), l, &ids, &vectors);
            assert_within(&expected, &found, &bounds, &format!("bag_dot T {t} L {l} V {v}"));
        }
    }
}

/// Wrong sizes and ids that are no rows are errors.
///
/// # Panics
/// If one is accepted.
pub fn refuses_what_does_not_fit<D: Subject>(device: &D) {
    let table = device.upload(&[1f32; 5 * 4]);
    let run = |bag: usize, ids: &[u32], weights: usize, out: usize| {
        let (ids, weights) = (device.upload(ids), device.upload(&vec![1f32; weights]));
        let mut out = device.upload(&vec![0f32; out]);
        let out = D::view_mut(&mut out);
        let args = BagSum { bag, ids: D::view(&ids), weights: D::view(&weights), out, accumulate: false };
        device.bag_sum(&D::rows(D::view(&table), 4), args).and_then(|()| device.synchronize()).is_ok()
    };
    assert!(run(2, &[0, 1, 2, 4], 4, 8), "exact sizes");
    assert!(!run(2, &[0, 1, 2, 5], 4, 8), "row 5 of 5");
    assert!(!run(2, &[0, u32::MAX, 2, 3], 4, 8), "row 2^32 - 1 of 5");
    assert!(!run(3, &[0, 1, 2, 3], 4, 8), "4 ids in bags of 3");
    assert!(!run(0, &[0, 1, 2, 3], 4, 8), "bags of none");
    assert!(!run(2, &[0, 1, 2, 3], 3, 8), "a weight missing");
    assert!(!run(2, &[0, 1, 2, 3], 4, 7), "an output too short");
}
