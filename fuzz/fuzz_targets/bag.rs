//! Bags on every instruction set, over rows of any bits in every format: sums have the reference's bits, dots are
//! in their bound.
#![no_main]

use libfuzzer_sys::fuzz_target;
use memlayer_core::ops::EmbeddingBag;
use memlayer_core::ops::bag::{BagDot, BagSum};
use memlayer_core::{Bf16, DenseRows, E4m3, E5m2, Element, F16, Int4, Reference, RowStore, ScaledRows};
use memlayer_cpu::Cpu;
use memlayer_fuzz::{Input, Values, cpus, wide};
use memlayer_tests::conformance::assert_same_bits;
use memlayer_tests::device::TestDevice;

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let input = &mut input;
    let most = input.pick([4, 20, 70, 300]);
    let (dim, rows, bag) = (input.size(1..=most), input.size(1..=40), input.size(1..=40));
    let tokens = input.size(0..=(4000 / (dim * bag)).min(30));
    let kind = input.pick([Values::Exact, Values::Special, Values::Any]);
    let wild = input.size(0..=15) == 15;
    let case = Case {
        bag,
        ids: input.ids(tokens * bag, rows, wild),
        weights: input.values(tokens * bag, kind),
        vectors: input.values(tokens * dim, kind),
        out: input.values(tokens * dim, kind),
        accumulate: input.flag(),
    };
    let len = rows * dim;
    let group = if input.flag() { dim } else { input.size(1..=dim) };
    match input.size(0..=7) {
        0 => case.check(&DenseRows::new(&input.values(len, kind), dim)),
        1 => {
            let codes: Vec<F16> = words(input, len).map(F16::from_bits).collect();
            case.check(&DenseRows::new(&codes, dim));
        }
        2 => {
            let codes: Vec<Bf16> = words(input, len).map(Bf16::from_bits).collect();
            case.check(&DenseRows::new(&codes, dim));
        }
        6 => case.int4::<32>(input, rows, dim),
        7 => case.int4::<64>(input, rows, dim),
        format => {
            let scales = input.scales(rows * dim.div_ceil(group), kind);
            let bytes = input.bytes(len);
            match format {
                3 => case.packed(bytes.iter().map(|&b| b as i8).collect(), &scales, dim, group),
                4 => case.packed(bytes.iter().map(|&b| E4m3(b)).collect(), &scales, dim, group),
                _ => case.packed(bytes.iter().map(|&b| E5m2(b)).collect(), &scales, dim, group),
            }
        }
    }
});

fn words(input: &mut Input<'_>, len: usize) -> impl Iterator<Item = u16> {
    let bytes = input.bytes(2 * len);
    (0..len).map(move |i| u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]))
}

struct Case {
    bag: usize,
    ids: Vec<u32>,
    weights: Vec<f32>,
    vectors: Vec<f32>,
    out: Vec<f32>,
    accumulate: bool,
}

impl Case {
    fn packed<E: Element>(&self, codes: Vec<E>, scales: &[f32], dim: usize, group: usize) {
        self.check(&ScaledRows::new(&codes, scales, dim, group).expect("rows"));
    }

    fn int4<const G: usize>(&self, input: &mut Input<'_>, rows: usize, dim: usize)
    where
        Int4<G>: Element,
    {
        let codes: Vec<Int4<G>> = input.bytes(rows * Int4::<G>::codes(dim)).into_iter().map(Int4).collect();
        self.check(&DenseRows::new(&codes, dim));
    }

    fn check<S: RowStore + Sync>(&self, table: &S) {
        let reference = self.sum(&Reference::<f32>::new(), table);
        let in_range = self.ids.iter().all(|&id| (id as usize) < table.rows());
        assert_eq!(reference.is_ok(), in_range);
        for cpu in cpus() {
            match (self.sum(cpu, table), &reference) {
                (Ok(found), Ok(expected)) => assert_same_bits(expected, &found, cpu.name()),
                (found, expected) => assert_eq!(found.err().as_ref(), expected.as_ref().err()),
            }
        }
        if in_range {
            self.dots(table);
        }
    }

    fn sum<D, S: RowStore>(&self, device: &D, table: &S) -> Result<Vec<f32>, D::Error>
    where
        D: TestDevice<Scalar = f32> + EmbeddingBag<S>,
    {
        let (ids, weights) = (device.upload(&self.ids), device.upload(&self.weights));
        let mut out = device.upload(&self.out);
        let args = BagSum {
            bag: self.bag,
            ids: D::view(&ids),
            weights: D::view(&weights),
            out: D::view_mut(&mut out),
            accumulate: self.accumulate,
        };
        let result = device.bag_sum(table, args);
        if result.is_err() {
            assert_same_bits(&self.out, &device.download(&out), "what an error leaves");
        }
        result.map(|()| device.download(&out))
    }

    fn dots<S: RowStore + Sync>(&self, table: &S) {
        let mut exact = vec![0.0; self.ids.len()];
        let vectors = wide(&self.vectors);
        let args = BagDot::<Reference<f64>> { bag: self.bag, ids: &self.ids, vectors: &vectors, out: &mut exact };
        Reference::<f64>::new().bag_dot(table, args).expect("dots");
        for cpu in cpus() {
            let mut found = vec![f32::NAN; self.ids.len()];
            let (ids, x) = (&self.ids[..], &self.vectors[..]);
            let args = BagDot::<Cpu> { bag: self.bag, ids, vectors: x, out: &mut found };
            cpu.bag_dot(table, args).expect("dots");
            for (e, (&found, &exact)) in found.iter().zip(&exact).enumerate() {
                let vector = &vectors[e / self.bag * table.dim()..][..table.dim()];
                let Some(bound) = bound(vector, table, self.ids[e]) else { continue };
                let off = (f64::from(found) - exact).abs();
                assert!(off <= bound, "{}: dot {e} is {found}, not {exact} within {bound}", cpu.name());
            }
        }
    }
}

/// How far a dot may be off; `None` where a product or sum on the way leaves the range of `f32`.
fn bound<S: RowStore>(vector: &[f64], table: &S, id: u32) -> Option<f64> {
    let row = table.row(id);
    let (mut terms, mut lost) = (0.0, 0.0);
    for (i, &x) in vector.iter().enumerate() {
        let (value, scale): (f64, f64) = (row.value(i), row.scale(i));
        let ways = [x * value, x * row.code::<f64>(i), value, scale];
        if ways.iter().any(|w| !w.is_finite() || w.abs() > 1e35) {
            return None;
        }
        terms += (x * value).abs();
        lost += f64::from(f32::from_bits(1)) * (1.0 + x.abs() + scale.abs());
    }
    Some(terms * f64::from(f32::EPSILON) * (vector.len() + 4) as f64 + lost)
}
