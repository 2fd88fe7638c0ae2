//! Plans and the sums over them on every instruction set: the reference's plan, the reference's bits, for ids and
//! values of any kind, hot rows included.
#![no_main]

use libfuzzer_sys::fuzz_target;
use memlayer_core::Reference;
use memlayer_core::ops::RowReduce;
use memlayer_core::ops::plan::{PlanBuffers, RowGradient};
use memlayer_fuzz::{Input, Values, cpus};
use memlayer_tests::conformance::assert_same_bits;
use memlayer_tests::device::{Memory, TestDevice, poisoned};

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let input = &mut input;
    let bag = input.size(1..=9);
    let most = input.pick([3, 40, 700]);
    let tokens = input.size(0..=most / bag);
    let dim = input.size(1..=(3000 / (tokens * bag).max(1)).clamp(1, 70));
    let rows = match input.size(0..=3) {
        0 => input.size(1..=3),
        1 => input.size(1..=300),
        2 => input.size(1..=1 << 22),
        _ => 1 << 32,
    };
    let wild = input.size(0..=15) == 15;
    let kind = input.pick([Values::Exact, Values::Special, Values::Any]);
    let case = Case {
        bag,
        dim,
        rows,
        ids: input.ids(tokens * bag, rows, wild),
        weights: input.values(tokens * bag, kind),
        sources: input.values(tokens * dim, kind),
    };
    let expected = case.run(&Reference::<f32>::new());
    let in_range = case.ids.iter().all(|&id| u64::from(id) < rows as u64);
    assert_eq!(expected.is_ok(), in_range);
    if let Ok(plan) = &expected {
        case.is_sound(plan);
    }
    for cpu in cpus() {
        match (case.run(cpu), &expected) {
            (Ok(found), Ok(expected)) => {
                assert_eq!(found.rows, expected.rows, "{}", cpu.name());
                assert_eq!(found.starts, expected.starts, "{}", cpu.name());
                assert_eq!(found.entries, expected.entries, "{}", cpu.name());
                assert_same_bits(&expected.grads, &found.grads, cpu.name());
                case.squares(expected, found.squares, cpu.name());
            }
            (found, expected) => assert_eq!(found.err().as_ref(), expected.as_ref().err()),
        }
    }
});

struct Case {
    bag: usize,
    dim: usize,
    rows: usize,
    ids: Vec<u32>,
    weights: Vec<f32>,
    sources: Vec<f32>,
}

struct Sums {
    rows: Vec<u32>,
    starts: Vec<u32>,
    entries: Vec<u32>,
    grads: Vec<f32>,
    squares: f32,
}

impl Case {
    fn run<D: TestDevice<Scalar = f32> + RowReduce>(&self, device: &D) -> Result<Sums, D::Error> {
        let entries = self.ids.len();
        let mut buffer = device.upload(&vec![u32::MAX; PlanBuffers::<D>::ids_len(entries)]);
        let (ids, weights, sources) =
            (device.upload(&self.ids), device.upload(&self.weights), device.upload(&self.sources));
        let mut grads = poisoned(device, entries * self.dim);
        let mut squares = poisoned(device, 1);
        {
            let (mut buffers, _) = PlanBuffers::<D>::carve(D::view_mut(&mut buffer), entries)?;
            let mut memory = Memory::new(device, device.plan_scratch(entries));
            device.plan(D::view(&ids), self.rows, buffers.reborrow(), memory.lend())?;
            let (weights, sources) = (D::view(&weights), D::view(&sources));
            let gradient = RowGradient { bag: self.bag, dim: self.dim, weights, sources };
            device.reduce(buffers.plan(), gradient, D::view_mut(&mut grads))?;
            let mut memory = Memory::new(device, device.square_sum_scratch(entries));
            let (grads, out) = (D::view(&grads), D::view_mut(&mut squares));
            device.square_sum(buffers.plan(), self.dim, grads, out, memory.lend())?;
            device.synchronize()?;
        }
        let plan = device.download(&buffer);
        let unique = plan[0] as usize;
        let mut grads = device.download(&grads);
        grads.truncate(unique * self.dim);
        Ok(Sums {
            rows: plan[1..][..unique].to_vec(),
            starts: plan[1 + entries..][..unique + 1].to_vec(),
            entries: plan[2 + 2 * entries..][..entries].to_vec(),
            grads,
            squares: device.download(&squares)[0],
        })
    }

    /// The plan by its definition.
    fn is_sound(&self, plan: &Sums) {
        assert!(plan.rows.windows(2).all(|pair| pair[0] < pair[1]), "rows ascend");
        assert_eq!(plan.starts.first(), Some(&0));
        assert_eq!(plan.starts.last().map(|&end| end as usize), Some(self.ids.len()));
        for (u, &row) in plan.rows.iter().enumerate() {
            let entries = &plan.entries[plan.starts[u] as usize..plan.starts[u + 1] as usize];
            assert!(!entries.is_empty() && entries.windows(2).all(|pair| pair[0] < pair[1]));
            assert!(entries.iter().all(|&e| self.ids[e as usize] == row));
        }
    }

    fn squares(&self, expected: &Sums, found: f32, name: &str) {
        let exact: f64 = expected.grads.iter().map(|&g| f64::from(g) * f64::from(g)).sum();
        let bound = exact * f64::from(f32::EPSILON) * (expected.grads.len() + 4) as f64
            + f64::from(f32::from_bits(1)) * expected.grads.len() as f64;
        if exact.is_finite() && exact < 1e37 {
            assert!((f64::from(found) - exact).abs() <= bound, "{name}: {found}, not {exact}");
        } else if exact.is_nan() {
            assert!(found.is_nan(), "{name}: {found} where a gradient is no number");
        }
    }
}
