//! Number formats against PyTorch's, and byte rows against FBGEMM's.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use memlayer_core::{Bf16, DenseRows, E4m3, E5m2, F16, RowStore};
use memlayer_quantize::fbgemm::{FbgemmError, FbgemmRows};
use memlayer_quantize::formats::{Pack, e4m3, e4m3_saturating, e5m2, e5m2_saturating};
use safetensors::SafeTensors;

const GOLDEN: &[u8] = include_bytes!("../../tests/golden/quant_formats.safetensors");

fn bytes(name: &str) -> &'static [u8] {
    SafeTensors::deserialize(GOLDEN).unwrap().tensor(name).unwrap().data()
}

fn floats(name: &str) -> Vec<f32> {
    bytes(name).as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// Every f16 bit pattern in the order of the file, as f32.
fn halves() -> Vec<f32> {
    let bits = bytes("f16_all").as_chunks::<2>().0;
    assert_eq!(bits.len(), 1 << 16);
    bits.iter().map(|b| F16::from_le_bytes(*b).to_f32()).collect()
}

/// All 65536 agree, infinities, NaNs and overflows included: the torch that made the file saturates e4m3, not e5m2.
#[test]
fn casts_agree_with_torch() {
    for ((value, &torch4), &torch5) in halves().into_iter().zip(bytes("e4m3_bits")).zip(bytes("e5m2_bits")) {
        assert_eq!(e4m3_saturating(value).0, torch4, "{value}");
        assert_eq!(e5m2(value).0, torch5, "{value}");
    }
}

#[test]
fn saturating_casts_differ_only_out_of_range() {
    for value in halves() {
        if value.is_nan() {
            assert!(e4m3_saturating(value).to_f32().is_nan() && e5m2_saturating(value).to_f32().is_nan());
            continue;
        }
        let in_range4 = value.abs() <= 464.0;
        assert_eq!(e4m3_saturating(value), if in_range4 { e4m3(value) } else { e4m3(448f32.copysign(value)) });
        let in_range5 = value.abs() < 61_440.0;
        assert_eq!(e5m2_saturating(value), if in_range5 { e5m2(value) } else { e5m2(57_344f32.copysign(value)) });
    }
    assert_eq!((e4m3(464.0).to_f32(), e4m3(1e30).0, e4m3(f32::NEG_INFINITY).0), (448.0, 0x7f, 0xff));
    assert_eq!((e5m2(61_439.0).to_f32(), e5m2(61_440.0).0, e5m2(-f32::MAX).0), (57_344.0, 0x7c, 0xfc));
    assert_eq!(e4m3(f32::MIN_POSITIVE).0, 0);
    assert_eq!(e5m2(-f32::from_bits(1)).0, 0x80);
}

#[test]
fn codes_decode_as_torch_decodes_them_and_cast_back() {
    for (code, (want4, want5)) in (0..=255u8).zip(floats("e4m3_decode").into_iter().zip(floats("e5m2_decode"))) {
        let (got4, got5) = (E4m3(code).to_f32(), E5m2(code).to_f32());
        assert!(got4.to_bits() == want4.to_bits() || got4.is_nan() && want4.is_nan(), "{code:#x}: {got4}, {want4}");
        assert!(got5.to_bits() == want5.to_bits() || got5.is_nan() && want5.is_nan(), "{code:#x}: {got5}, {want5}");
        assert!(got4.is_nan() || e4m3(got4).0 == code);
        assert!(got5.is_nan() || e5m2(got5).0 == code);
    }
}

/// A cast is to the nearest code: no finite code is nearer, for values all over the range and around every midpoint.
#[test]
fn casts_are_to_nearest() {
    fn check<E: Pack>(codes: &[E], cast: impl Fn(f32) -> E) {
        let mut values: Vec<f32> = codes.iter().map(|c| E::value::<f32>(&[*c], 0)).filter(|v| v.is_finite()).collect();
        values.sort_by(f32::total_cmp);
        for pair in values.windows(2).filter(|p| p[0] < p[1]) {
            let (low, high) = (pair[0], pair[1]);
            let middle = f32::midpoint(low, high);
            assert_eq!(E::value::<f32>(&[cast(middle.next_down())], 0), low);
            assert_eq!(E::value::<f32>(&[cast(middle.next_up())], 0), high);
        }
    }
    let all = || 0..=255u8;
    check(&all().map(E4m3).collect::<Vec<_>>(), e4m3);
    check(&all().map(E5m2).collect::<Vec<_>>(), e5m2);
    check(&(-127..=127i8).collect::<Vec<_>>(), i8::nearest);
    assert_eq!([0.5f32, 1.5, 2.5, -0.5, -1.5, 126.5].map(i8::nearest), [0, 2, 2, 0, -2, 126]);
    assert_eq!([1e30, -1e30, f32::INFINITY, 127.9].map(i8::nearest), [127, -127, 127, 127]);
}

#[test]
fn greatest_codes_are_what_formats_say() {
    fn check<E: Pack>() {
        assert_eq!(E::value::<f32>(&[E::nearest(E::LARGEST)], 0), E::LARGEST);
        assert_eq!(E::value::<f32>(&[E::nearest(-E::LARGEST)], 0), -E::LARGEST);
    }
    check::<i8>();
    check::<E4m3>();
    check::<E5m2>();
    check::<F16>();
    check::<Bf16>();
    check::<f32>();
}

#[test]
fn fbgemm_rows_are_read() {
    let (rows, packed) = (floats("rows"), bytes("fbgemm_byte_rowwise"));
    let packed = FbgemmRows::new(packed, 40).unwrap();
    assert_eq!((packed.rows(), packed.dim()), (16, 40));
    let source = DenseRows::new(&rows, 40);
    for id in 0..16u32 {
        let mut decoded = [f32::NAN; 41];
        packed.decode(id as usize, &mut decoded);
        assert!(decoded[40].is_nan());
        let row = source.row(id).codes;
        let range = row.iter().copied().fold(f32::MIN, f32::max) - row.iter().copied().fold(f32::MAX, f32::min);
        for (got, want) in decoded.iter().zip(row) {
            // 255 steps over the range of the row, rounded to nearest.
            assert!((got - want).abs() <= range / 255.0 * 0.5001 + want.abs() * 1e-6, "row {id}: {got}, {want}");
        }
    }
}

#[test]
fn fbgemm_rows_are_checked() {
    let packed = bytes("fbgemm_byte_rowwise");
    assert_eq!(FbgemmRows::new(packed, 0).unwrap_err(), FbgemmError::Dim { dim: 0 });
    assert_eq!(FbgemmRows::new(packed, usize::MAX).unwrap_err(), FbgemmError::Dim { dim: usize::MAX });
    assert_eq!(FbgemmRows::new(&packed[1..], 40).unwrap_err(), FbgemmError::Length { row: 48, found: 767 });
    assert_eq!(FbgemmRows::new(&[], 40).unwrap().rows(), 0);
    let mut damaged = packed.to_vec();
    damaged[5 * 48 + 44..6 * 48].copy_from_slice(&f32::NEG_INFINITY.to_le_bytes());
    let error = FbgemmRows::new(&damaged, 40).unwrap_err();
    assert_eq!(error.to_string(), "the bias of byte row 5 is -inf");
}
