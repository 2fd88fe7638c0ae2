//! Sums of many bags of narrow rows, whose kernels know their team. Skipped, and said so, where there is no device.

use memlayer_core::ops::EmbeddingBag;
use memlayer_core::ops::bag::BagSum;
use memlayer_core::{ArgError, Bf16, Device, E4m3, E5m2, Element, F16, Reference, Table};
use memlayer_cuda::{Cuda, CudaError, Rows};
use memlayer_tests::conformance::select::host_rows;
use memlayer_tests::conformance::{assert_same_bits, skipped};
use memlayer_tests::device::TestDevice;
use memlayer_tests::random::Random;

mod common;
use common::cuda;

const ROWS: usize = 500;
/// Every team, with lanes that have columns and lanes that have none, and rows of several slices.
const WIDTHS: [usize; 8] = [32, 44, 64, 100, 128, 136, 256, 1004];
/// Around what a team of each size takes at once.
const BAGS: [usize; 8] = [1, 7, 8, 17, 24, 33, 64, 128];

/// Sums of `ids` in bags, added to ones.
fn sum<D, S>(device: &D, table: &S, bag: usize, ids: &[u32], weights: &[f32]) -> Vec<f32>
where
    S: Table,
    D: TestDevice<Scalar = f32> + EmbeddingBag<S>,
{
    let mut out = device.upload(&vec![1f32; ids.len() / bag * table.dim()]);
    let (ids, weights) = (device.upload(ids), device.upload(weights));
    let (ids, weights, view) = (D::view(&ids), D::view(&weights), D::view_mut(&mut out));
    device.bag_sum(table, BagSum { bag, ids, weights, out: view, accumulate: true }).expect("a sum");
    device.synchronize().expect("a sum");
    device.download(&out)
}

fn check<E: Element>(cuda: &Cuda, of: impl Fn(u64) -> E) {
    for width in WIDTHS {
        let mut random = Random::new(width as u64);
        let codes: Vec<E> = (0..ROWS * width).map(|_| of(random.bits())).collect();
        // No bag has row 0, whose scale would spoil every sum: behind the end of a bag nothing is added.
        let mut scales = random.reals::<f32>(ROWS);
        scales[0] = f32::NAN;
        let (device_codes, device_scales) =
            (cuda.upload(&codes).expect("codes"), cuda.upload(&scales).expect("scales"));
        // So many that no few tokens are read by narrower loads.
        let tokens = 100_000 / width;
        for bag in BAGS {
            let ids: Vec<u32> = random.ids(tokens * bag, ROWS - 1).into_iter().map(|id| id + 1).collect();
            let weights = random.reals::<f32>(tokens * bag);
            let expected = sum(&Reference::new(), &host_rows(&codes, &scales, width), bag, &ids, &weights);
            let found = sum(cuda, &Cuda::packed(&device_codes, &device_scales, width), bag, &ids, &weights);
            assert_same_bits(&expected, &found, &format!("{} rows of {width} in bags of {bag}", E::FORMAT));
        }
    }
}

#[test]
#[allow(clippy::cast_possible_truncation, reason = "random bits, cut to the width of a code")]
fn sums_of_many_bags_have_the_references_bits() {
    let Some(cuda) = cuda() else { return skipped("cuda") };
    check(&cuda, |bits| bits as i8);
    check(&cuda, |bits| E4m3(bits as u8 & 0xf7));
    check(&cuda, |bits| E5m2(bits as u8 & 0xdf));
    check(&cuda, |bits| F16::from_bits(bits as u16 & 0xbfff));
    check(&cuda, |bits| Bf16::from_bits(bits as u16 & 0xbfff));
}

#[test]
fn a_bad_id_among_many_bags_is_reported() {
    let Some(cuda) = cuda() else { return skipped("cuda") };
    let (bag, width, tokens) = (33, 64, 3000);
    let (codes, scales) = (cuda.zeros::<i8>(ROWS * width).expect("codes"), cuda.zeros::<f32>(ROWS).expect("scales"));
    // In a whole round, in a part of one, in the last bag; and the first id behind the rows and the greatest.
    for (at, id) in [(5, 500), (32, u32::MAX), (tokens * bag - 1, 777)] {
        let mut ids = vec![3u32; tokens * bag];
        ids[at] = id;
        let (ids, weights) =
            (cuda.upload(&ids).expect("ids"), cuda.upload(&vec![1f32; tokens * bag]).expect("weights"));
        let mut out = cuda.zeros::<f32>(tokens * width).expect("sums");
        let table: Rows<'_, i8> = Cuda::packed(&codes, &scales, width);
        let args = BagSum { bag, ids: ids.view(), weights: weights.view(), out: out.view_mut(), accumulate: false };
        cuda.bag_sum(&table, args).expect("a launch");
        let bad = ArgError::RowOutOfRange { op: "bag_sum", row: id, rows: ROWS };
        assert_eq!(cuda.synchronize(), Err(CudaError::Arg(bad)));
    }
}
