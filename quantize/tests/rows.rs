//! Packed rows: bounds, round trips, extreme rows, reports.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use memlayer_core::{Bf16, Config, DenseRows, E4m3, E5m2, F16, RowStore, ScaledRows};
use memlayer_quantize::keys::prepare_keys;
use memlayer_quantize::report::{Budget, compare, kept_share};
use memlayer_quantize::rows::scale_for;
use memlayer_quantize::{Pack, PackError, PackReport, pack_rows};
use proptest::prelude::*;

struct Packed<E> {
    codes: Vec<E>,
    scales: Vec<f32>,
    report: PackReport,
}

fn pack<E: Pack>(values: &[f32], dim: usize, group: usize) -> Result<Packed<E>, PackError> {
    let rows = values.len() / dim;
    let scales = if E::SCALED { rows * dim.div_ceil(group) } else { 0 };
    let (mut codes, mut scales) = (vec![E::default(); values.len()], vec![f32::NAN; scales]);
    let report = pack_rows(&DenseRows::new(values, dim), group, &mut codes, &mut scales)?;
    Ok(Packed { codes, scales, report })
}

/// Packs and checks every value against the format's bound, in exact and in `f32` arithmetic.
fn check<E: Pack>(values: &[f32], dim: usize, group: usize) -> PackReport {
    let Packed { codes, scales, report } = pack::<E>(values, dim, group).unwrap();
    let per_row = dim.div_ceil(group);
    let mut greatest = 0f64;
    for (i, &value) in values.iter().enumerate() {
        let scale = if E::SCALED { scales[i / dim * per_row + i % dim / group] } else { 1.0 };
        assert!(scale.is_finite() && scale > 0.0);
        let code: f32 = E::value(&codes, i);
        assert!((scale * code).is_finite(), "{value:e} = {scale:e} * {code}");
        let error = (f64::from(scale) * f64::from(code) - f64::from(value)).abs();
        let bound = E::error_bound(value, scale);
        assert!(error <= bound, "{}: {value:e} = {scale:e} * {code} + {error:e} > {bound:e}", E::FORMAT);
        greatest = greatest.max(error);
    }
    assert_eq!(report.max_abs_error, greatest);
    assert_eq!(report.rows, values.len() / dim);
    if E::SCALED {
        let packed = ScaledRows::new(&codes, &scales, dim, group).unwrap();
        assert_eq!(compare(&DenseRows::new(values, dim), &packed), Some(report));
    }
    report
}

fn check_all(values: &[f32], dim: usize, group: usize) {
    check::<i8>(values, dim, group);
    check::<E4m3>(values, dim, group);
    check::<E5m2>(values, dim, group);
    check::<f32>(values, dim, group);
    check::<Bf16>(&values.iter().map(|v| v * 0.5).collect::<Vec<_>>(), dim, group);
    let halves: Vec<f32> = values.iter().map(|v| v.clamp(-65_504.0, 65_504.0)).collect();
    check::<F16>(&halves, dim, group);
}

#[test]
fn extreme_rows() {
    let tiny = f32::from_bits(1);
    for greatest in [tiny, f32::MIN_POSITIVE, f32::MAX, 1.0, f32::MIN_POSITIVE * 127.0, f32::MAX / 2.0] {
        let row: Vec<f32> = (0..64).map(|i| greatest * (1.0 - i as f32 / 32.0)).collect();
        check_all(&row, 64, 64);
        check_all(&row, 32, 10);
    }
    // Every subnormal maximum up to far beyond where scales become numbers of full precision.
    for bits in (1..5000).chain((1..=64).map(|i| i << 17)) {
        let top = f32::from_bits(bits);
        check_all(&[top, -top, top / 2.0, top / 3.0, 0.0, tiny], 6, 6);
    }
    // Every float near the greatest, where a scale rounded up would overflow.
    for below in 0..5000 {
        let top = f32::from_bits(f32::MAX.to_bits() - below);
        check_all(&[top, -top, top / 2.0, 1.0], 4, 4);
    }
}

/// The greatest value of an fp8 row is exact, and no other errs by more than a fixed share of it.
#[test]
fn fp8_errors_are_a_share_of_the_greatest_value() {
    for row in noise(64 * 200).chunks_exact(64) {
        let greatest = f64::from(row.iter().fold(0f32, |m, x| m.max(x.abs())));
        assert!(check::<E4m3>(row, 64, 64).max_abs_error <= greatest / 32.0 * 1.0001);
        assert!(check::<E5m2>(row, 64, 64).max_abs_error <= greatest / 16.0 * 1.0001);
        let at = row.iter().position(|x| f64::from(x.abs()) == greatest).unwrap();
        let packed = pack::<E4m3>(row, 64, 64).unwrap();
        assert_eq!(packed.codes[at].to_f32() * packed.scales[0], row[at]);
    }
}

#[test]
fn zero_rows_have_scale_one() {
    let packed = pack::<E4m3>(&[0.0, -0.0, 0.0, 0.0, 3.5, 0.0], 2, 2).unwrap();
    assert_eq!((packed.scales[0], packed.scales[1]), (1.0, 1.0));
    assert!(packed.codes[..4].iter().all(|code| code.to_f32() == 0.0));
    assert_eq!(packed.report, PackReport { rows: 3, ..packed.report });
    assert_eq!(packed.report.worst_row_error, 0.0);
    assert_eq!(scale_for::<i8>(254.0), 2.0);
}

#[test]
fn what_is_not_finite_is_named() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let values = [1.0, 2.0, 3.0, 4.0, bad, 6.0];
        for error in
            [pack::<i8>(&values, 3, 3).err(), pack::<F16>(&values, 3, 3).err(), pack::<f32>(&values, 3, 2).err()]
        {
            let error = error.unwrap();
            assert!(
                matches!(error, PackError::NonFinite { row: 1, column: 1, value } if value.to_bits() == bad.to_bits())
            );
            assert_eq!(error.to_string(), format!("row 1, column 1 is {bad}, which cannot be packed"));
        }
    }
    let error = pack::<F16>(&[1.0, 65_520.0], 1, 1).err().unwrap();
    assert_eq!(error.to_string(), "row 1, column 0 is 6.552e4, which is beyond the range of f16");
    assert!(matches!(pack::<Bf16>(&[f32::MAX], 1, 1), Err(PackError::OutOfRange { row: 0, column: 0, .. })));
    assert!(pack::<F16>(&[65_519.0], 1, 1).is_ok());
}

#[test]
fn wrong_sizes_are_named() {
    let (values, mut codes, mut scales) = ([1.0f32; 12], [0i8; 12], [0f32; 3]);
    let source = DenseRows::new(&values, 4);
    let wrong = |codes: &mut [i8], scales: &mut [f32], group| pack_rows(&source, group, codes, scales).unwrap_err();
    assert_eq!(wrong(&mut codes[1..], &mut scales, 4), PackError::Length { buffer: "codes", expected: 12, found: 11 });
    assert_eq!(wrong(&mut codes, &mut scales, 3), PackError::Length { buffer: "scales", expected: 6, found: 3 });
    assert_eq!(wrong(&mut codes, &mut scales, 0), PackError::Group { group: 0, dim: 4 });
    assert_eq!(wrong(&mut codes, &mut scales, 5), PackError::Group { group: 5, dim: 4 });
    let mut dense = [0f32; 12];
    assert!(pack_rows(&source, 4, &mut dense, &mut scales).is_err());
    assert!(pack_rows(&source, 4, &mut dense, &mut []).is_ok());
}

/// Sums of uniform noise: nearly normal, and the same in every run.
fn noise(n: usize) -> Vec<f32> {
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..n).map(|_| (0..12).map(|_| uniform()).sum()).collect()
}

#[test]
fn errors_of_normal_rows_are_within_budgets() {
    let values = noise(1024 * 256);
    let budget = |relative_rms| Budget { relative_rms, ..Budget::default() };
    check::<i8>(&values, 256, 256).within(&budget(0.0075)).unwrap();
    check::<i8>(&values, 256, 32).within(&budget(0.0055)).unwrap();
    check::<E4m3>(&values, 256, 256).within(&budget(0.026)).unwrap();
    check::<E5m2>(&values, 256, 256).within(&budget(0.052)).unwrap();
    let over = check::<E5m2>(&values, 256, 256).within(&budget(0.01)).unwrap_err();
    assert!(over.to_string().starts_with("relative_rms is 5."), "{over}");
    assert_eq!(check::<f32>(&values, 256, 256).relative_rms, 0.0);
}

#[test]
fn the_worst_row_is_found() {
    let mut values = noise(8 * 16);
    // One great value leaves few codes for the rest of row 5.
    values[5 * 16] = 1e4;
    values[5 * 16 + 1..6 * 16].fill(10.0);
    let report = check::<i8>(&values, 16, 16);
    assert!(report.worst_row != 5 && report.worst_row_norm > 10.0, "{report}");
    values[5 * 16 + 1..6 * 16].fill(0.0);
    values[3 * 16..4 * 16].fill(0.003);
    values[3 * 16] = 1.0;
    assert_eq!(check::<i8>(&values, 16, 16).worst_row, 3, "0.003 is nearest to code 0");
}

#[test]
fn keys_are_normalized_as_the_layer_does() {
    let config = Config::builder(8).heads(2).sub_keys(3).half_dim(4).top_k(2).qk_norm(true).build().unwrap();
    let keys = noise(config.keys_len());
    let gain: Vec<f32> = (0..config.gain_len()).map(|i| 1.0 + i as f32).collect();
    let mut out = vec![0.0; keys.len()];
    prepare_keys(&config, &keys, &gain, &mut out).unwrap();
    for (row, key) in keys.chunks_exact(4).enumerate() {
        let rms = (key.iter().map(|x| x * x).sum::<f32>() / 4.0 + 1e-6).sqrt();
        for c in 0..4 {
            let want = key[c] / rms * gain[row / 3 * 4 + c];
            assert!((out[row * 4 + c] - want).abs() < 1e-5 * want.abs().max(1.0));
        }
    }
    assert!(prepare_keys(&config, &keys[1..], &gain, &mut out).is_err());
}

#[test]
fn scores_move_by_no_more_than_the_report_says() {
    let (keys, query) = (noise(512 * 32), noise(32));
    let packed = pack::<i8>(&keys, 32, 32).unwrap();
    let rows = ScaledRows::new(&packed.codes, &packed.scales, 32, 32).unwrap();
    let norm = query.iter().map(|&q| f64::from(q).powi(2)).sum::<f64>().sqrt();
    for (id, key) in (0..).zip(keys.chunks_exact(32)) {
        let exact: f64 = query.iter().zip(key).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
        let row = rows.row(id);
        let got: f64 = (0..32).map(|c| f64::from(query[c]) * row.value::<f64>(c)).sum();
        assert!((got - exact).abs() <= norm * packed.report.worst_row_norm);
    }
    assert_eq!(kept_share(&[1, 2, 3, 4], &[2, 9, 4, 3], 2), Some(0.75));
    assert_eq!(kept_share(&[1, 2, 3], &[2, 9, 4], 2), None);
    assert_eq!(kept_share(&[], &[], 2), None);
}

fn table() -> impl Strategy<Value = (Vec<f32>, usize, usize)> {
    let finite = any::<f32>().prop_map(|x| if x.is_finite() { x } else { 1.0 });
    // Rows of one magnitude, and rows of all magnitudes there are.
    let value = prop_oneof![-1f32..1.0, finite];
    (1..20usize, 1..6usize)
        .prop_flat_map(move |(dim, rows)| (prop::collection::vec(value.clone(), dim * rows), Just(dim), 1..=dim))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn errors_are_within_bounds((values, dim, group) in table(), exponent in -140..128i32) {
        check_all(&values, dim, group);
        let scaled: Vec<f32> = values.iter().map(|v| v.clamp(-1.0, 1.0) * 2f32.powi(exponent)).collect();
        check_all(&scaled, dim, group);
    }

    /// What was packed once is packed again without loss.
    #[test]
    fn packing_twice_changes_nothing(codes in prop::collection::vec(-127i8..=127, 1..40), exponent in -120..120i32) {
        let scale = 2f32.powi(exponent);
        let mut codes = codes;
        codes[0] = 127;
        let packed = pack_rows(
            &ScaledRows::new(&codes, &[scale], codes.len(), codes.len()).unwrap(),
            codes.len(), &mut vec![0i8; codes.len()], &mut [0.0],
        ).unwrap();
        prop_assert_eq!(packed.max_abs_error, 0.0);
    }
}
