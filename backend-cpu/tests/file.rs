//! Rows in a file: the bits of rows in memory, whatever was read before and however small the cache is.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "tests")]

use std::fs::File;
use std::path::PathBuf;

use memlayer_core::ops::EmbeddingBag;
use memlayer_core::ops::bag::{BagDot, BagSum};
use memlayer_core::{Bf16, DenseRows, E4m3, Element, Int4, RowStore, ScaledRows};
use memlayer_cpu::{CachedRows, Cpu, FileError, FileRows, MappedFile};
use proptest::prelude::*;

mod common;
use common::{Random, backends, bits};

/// A file that goes with its test.
struct Temporary(PathBuf);

impl Temporary {
    fn new(name: &str, bytes: &[u8]) -> Self {
        let path = std::env::temp_dir().join(format!("memlayer-{name}-{}", std::process::id()));
        std::fs::write(&path, bytes).unwrap();
        Self(path)
    }
    fn open(&self) -> File {
        File::open(&self.0).unwrap()
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn sums<T: RowStore + Sync>(cpu: &Cpu, table: &T, ids: &[u32], weights: &[f32]) -> Vec<u32> {
    let mut out = vec![f32::NAN; ids.len() / BAG * table.dim()];
    cpu.bag_sum(table, BagSum { bag: BAG, ids, weights, out: &mut out, accumulate: false }).unwrap();
    let mut dots = vec![f32::NAN; ids.len()];
    cpu.bag_dot(table, BagDot { bag: BAG, ids, vectors: &out, out: &mut dots }).unwrap();
    out.extend(dots);
    bits(&out)
}

const BAG: usize = 6;
const ROWS: usize = 50;

/// Rows of `codes` in memory, in a map and in a cache of few places.
fn agree<E: Element>(name: &str, dim: usize, codes: &[E], scales: Option<(&[f32], usize)>) {
    // Scales begin at a multiple of 4; in front of the codes is something else.
    let mut bytes = vec![7; 64];
    bytes.extend_from_slice(bytemuck::cast_slice(codes));
    bytes.resize(bytes.len().next_multiple_of(64), 7);
    let (at, group) = (bytes.len() as u64, scales.map_or(dim, |scales| scales.1));
    bytes.extend_from_slice(bytemuck::cast_slice(scales.map_or(&[][..], |scales| scales.0)));
    let file = Temporary::new(name, &bytes);
    let layout = FileRows { codes: 64, scales: scales.map(|_| at), rows: ROWS, dim, group };
    let (random, map) = (&mut Random(3), MappedFile::open(&file.0).unwrap());
    assert_eq!(&map[..], bytes);
    let mapped: &[E] = bytemuck::cast_slice(&map[64..64 + size_of_val(codes)]);
    let row = E::codes(dim) * size_of::<E>() + if scales.is_some() { 4 * dim.div_ceil(group) } else { 0 };
    for cpu in backends() {
        let mut cache = CachedRows::<E>::new(file.open(), layout, 13 * row + row / 2).unwrap();
        assert_eq!(cache.places(), 13);
        for tokens in [0, 1, 2, 1, 2, 2, 1] {
            let (ids, weights) = (random.ids(tokens * BAG, ROWS), random.reals(tokens * BAG));
            let mut places = vec![u32::MAX; ids.len()];
            let view = cache.load(&cpu, &ids, &mut places).unwrap();
            let cached = sums(&cpu, &view, &places, &weights);
            let (memory, from_map) = match scales {
                Some((scales, group)) => (
                    sums(&cpu, &ScaledRows::new(codes, scales, dim, group).unwrap(), &ids, &weights),
                    sums(&cpu, &ScaledRows::new(mapped, scales, dim, group).unwrap(), &ids, &weights),
                ),
                None => (
                    sums(&cpu, &DenseRows::new(codes, dim), &ids, &weights),
                    sums(&cpu, &DenseRows::new(mapped, dim), &ids, &weights),
                ),
            };
            assert_eq!(cached, memory, "{name} {}", cpu.name());
            assert_eq!(from_map, memory, "{name} {}", cpu.name());
        }
    }
}

#[test]
fn rows_of_a_file_are_rows_of_memory() {
    let random = &mut Random(1);
    for dim in [5, 32, 100] {
        let reals = random.reals(ROWS * dim);
        agree(&format!("f32-{dim}"), dim, &reals, None);
        let short: Vec<Bf16> = reals.iter().map(|&x| Bf16::from_f32(x)).collect();
        agree(&format!("bf16-{dim}"), dim, &short, None);
        let codes: Vec<i8> = (0..ROWS * dim).map(|_| random.next() as i8).collect();
        let scales = random.reals(ROWS);
        agree(&format!("int8-{dim}"), dim, &codes, Some((&scales, dim)));
        let groups = random.reals(ROWS * dim.div_ceil(8));
        agree(&format!("groups-{dim}"), dim, &codes, Some((&groups, 8)));
        let codes: Vec<E4m3> = codes.iter().map(|&x| E4m3((x as u8) & 0xf7)).collect();
        agree(&format!("e4m3-{dim}"), dim, &codes, Some((&scales, dim)));
    }
    let bytes: Vec<u8> = (0..ROWS * Int4::<32>::codes(64)).map(|_| (random.next() % 64) as u8).collect();
    agree("int4", 64, bytemuck::cast_slice::<u8, Int4<32>>(&bytes), None);
}

#[test]
fn a_row_used_again_is_not_read_again() {
    let codes: Vec<f32> = (0..ROWS).map(|i| i as f32).collect();
    let file = Temporary::new("hot", bytemuck::cast_slice(&codes));
    let layout = FileRows { codes: 0, scales: None, rows: ROWS, dim: 1, group: 1 };
    let cpu = Cpu::builder().threads(1).build().unwrap();
    let mut cache = CachedRows::<f32>::new(file.open(), layout, 10 * 4).unwrap();
    let mut places = [0; 4];
    for i in 0..100 {
        // Three hot rows, and one that always is another.
        cache.load(&cpu, &[1, 2, 3, 4 + i % 40], &mut places).unwrap();
    }
    assert_eq!(cache.rows_read(), 3 + 100);
    let before = cache.rows_read();
    cache.load(&cpu, &[1, 1, 1, 1], &mut places).unwrap();
    assert_eq!((cache.rows_read(), places[0]), (before, places[3]));
}

#[test]
fn what_cannot_be_read_says_so() {
    let codes = [1.0f32; 12];
    let file = Temporary::new("errors", bytemuck::cast_slice(&codes));
    let layout = FileRows { codes: 0, scales: None, rows: 6, dim: 2, group: 2 };
    let new = |layout, budget| CachedRows::<f32>::new(file.open(), layout, budget).map(|_| ()).unwrap_err();
    assert_eq!(new(FileRows { rows: 7, ..layout }, 100).to_string(), "the rows end at byte 56 of a file of 48");
    assert_eq!(new(FileRows { codes: 4, ..layout }, 100).to_string(), "the rows end at byte 52 of a file of 48");
    assert!(matches!(new(FileRows { codes: u64::MAX - 3, ..layout }, 100), FileError::Short { .. }));
    assert!(matches!(new(FileRows { scales: Some(40), ..layout }, 100), FileError::Short { end: 64, len: 48 }));
    assert_eq!(new(FileRows { dim: 0, ..layout }, 100).to_string(), "dim cannot be 0");
    assert_eq!(new(FileRows { group: 0, scales: Some(0), ..layout }, 100).to_string(), "group cannot be 0");
    assert_eq!(new(layout, 7).to_string(), "budget cannot be 7");

    let cpu = Cpu::builder().threads(2).build().unwrap();
    let mut cache = CachedRows::<f32>::new(file.open(), layout, 3 * 8).unwrap();
    let mut places = [0; 4];
    let mut fails = |ids: &[u32]| cache.load(&cpu, ids, &mut places[..ids.len()]).map(|_| ()).unwrap_err().to_string();
    assert_eq!(fails(&[0, 6]), "row 6 is none of 6");
    assert_eq!(fails(&[0, 1, 2, 3]), "4 rows of a call exceed the 3 of the cache");
    // The file is cut off behind our back: what was to be read is forgotten, and what comes later is read anew.
    let (mut places, ids) = ([0; 2], [4, 5]);
    File::options().write(true).open(&file.0).unwrap().set_len(40).unwrap();
    let error = cache.load(&cpu, &ids, &mut places).map(|_| ()).unwrap_err();
    assert_eq!(error.to_string(), "8 bytes from byte 40 on cannot be read");
    std::fs::write(&file.0, bytemuck::cast_slice::<f32, u8>(&[2.0; 12])).unwrap();
    let view = cache.load(&cpu, &ids, &mut places).unwrap();
    assert_eq!(view.row(places[1]).codes, [2.0, 2.0]);
}

#[test]
fn a_locked_file_is_not_mapped() {
    let file = Temporary::new("locked", &[1, 2, 3]);
    let writer = File::options().write(true).open(&file.0).unwrap();
    writer.lock().unwrap();
    assert_eq!(MappedFile::open(&file.0).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    writer.unlock().unwrap();
    let map = MappedFile::open(&file.0).unwrap();
    assert!(writer.try_lock().is_err());
    assert_eq!(map[..], [1, 2, 3]);
    let empty = Temporary::new("empty", &[]);
    assert!(MappedFile::open(&empty.0).unwrap().is_empty());
    assert!(MappedFile::open(&empty.0.with_extension("none")).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn any_calls_give_the_right_rows(
        calls in prop::collection::vec(prop::collection::vec(0u32..30, 0..12), 0..40),
        places in 1usize..35,
        threads in 1usize..3,
    ) {
        let codes: Vec<f32> = (0..60).map(|i| i as f32).collect();
        let file = Temporary::new(&format!("any-{threads}"), bytemuck::cast_slice(&codes));
        let layout = FileRows { codes: 0, scales: None, rows: 30, dim: 2, group: 2 };
        let cpu = Cpu::builder().threads(threads).build().unwrap();
        let mut cache = CachedRows::<f32>::new(file.open(), layout, places * 8).unwrap();
        for ids in calls {
            let mut at = vec![0; ids.len()];
            let mut unique = ids.clone();
            unique.sort_unstable();
            unique.dedup();
            match cache.load(&cpu, &ids, &mut at) {
                Ok(view) => {
                    for (&id, &place) in ids.iter().zip(&at) {
                        prop_assert_eq!(view.row(place).codes, &[2.0 * id as f32, 2.0 * id as f32 + 1.0]);
                    }
                }
                Err(error) => {
                    prop_assert!(unique.len() > places, "{} rows, {} places: {}", unique.len(), places, error);
                }
            }
        }
    }
}
