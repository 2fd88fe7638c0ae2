//! Plans of few entries, which one block makes, and of a few more, which many make. Skipped, and said so, where there is no
//! device.

use memlayer_core::ops::RowReduce;
use memlayer_core::ops::plan::PlanBuffers;
use memlayer_core::{ArgError, Device, Reference};
use memlayer_cuda::{Cuda, CudaError};
use memlayer_tests::conformance::plan::plan;
use memlayer_tests::conformance::skipped;
use memlayer_tests::device::{Memory, TestDevice};
use memlayer_tests::random::Random;

mod common;
use common::cuda;

/// Around the lanes of a warp, the threads of a block, what each of them holds, and what one block plans.
const ENTRIES: [usize; 20] =
    [0, 1, 2, 31, 32, 33, 128, 255, 256, 257, 1023, 1024, 1025, 2048, 3071, 3073, 4095, 4096, 4097, 8200];

#[test]
fn plans_are_the_references_whoever_makes_them() {
    let Some(cuda) = cuda() else { return skipped("cuda") };
    let reference = Reference::<f32>::new();
    for entries in ENTRIES {
        for rows in [1, 2, 300, 1 << 20, (1 << 20) + 1, 1 << 24, u32::MAX as usize] {
            let mut random = Random::new((entries + rows) as u64);
            let uniform = random.ids(entries, rows);
            let last = u32::try_from(rows - 1).expect("a row id");
            let falling = (0..entries).map(|e| last - u32::try_from(e % rows).expect("a row id")).collect();
            let some: Vec<u32> =
                uniform.iter().map(|&id| if id % 3 == 0 { last } else { id % 7 % (last + 1) }).collect();
            for (ids, which) in
                [(uniform, "uniform"), (falling, "falling"), (some, "few"), (vec![last; entries], "one")]
            {
                let case = format!("{entries} entries, {rows} rows, ids {which}");
                assert_eq!(plan(&cuda, &ids, rows), plan(&reference, &ids, rows), "{case}");
            }
        }
    }
}

#[test]
fn a_bad_id_is_planned_as_row_0_and_reported() {
    let Some(cuda) = cuda() else { return skipped("cuda") };
    let rows = 1000;
    for entries in [1, 200, 4096, 4097] {
        for (at, bad) in [(0, 1000), (entries / 2, u32::MAX), (entries - 1, 1024)] {
            let mut ids = Random::new(entries as u64).ids(entries, rows);
            ids[at] = bad;
            let device_ids = cuda.upload(&ids).expect("ids");
            let mut buffer = cuda.zeros::<u32>(PlanBuffers::<Cuda>::ids_len(entries)).expect("a plan");
            let (buffers, _) = PlanBuffers::<Cuda>::carve(buffer.view_mut(), entries).expect("a plan");
            let mut scratch = Memory::new(&cuda, cuda.plan_scratch(entries));
            cuda.plan(device_ids.view(), rows, buffers, scratch.lend()).expect("a launch");
            let found = cuda.synchronize();
            assert_eq!(found, Err(CudaError::Arg(ArgError::RowOutOfRange { op: "plan", row: bad, rows })));
            ids[at] = 0;
            let expected = plan(&Reference::<f32>::new(), &ids, rows);
            let found = TestDevice::download(&cuda, &buffer);
            let unique = expected.rows.len();
            assert_eq!(found[0] as usize, unique, "{entries} entries");
            assert_eq!(&found[1..=unique], &expected.rows[..], "{entries} entries");
            assert_eq!(&found[1 + entries..][..=unique], &expected.starts[..], "{entries} entries");
            assert_eq!(&found[2 + 2 * entries..][..entries], &expected.entries[..], "{entries} entries");
        }
    }
}
