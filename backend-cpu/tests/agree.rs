//! The operations against the reference: bits where the laws promise them, bounds elsewhere, for every instruction
//! set and several numbers of threads.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "tests")]

use memlayer_core::ops::bag::{BagDot, BagSum};
use memlayer_core::ops::optim::*;
use memlayer_core::ops::plan::*;
use memlayer_core::ops::select::*;
use memlayer_core::ops::*;
use memlayer_core::*;
use memlayer_cpu::{Cpu, Isa};
use proptest::prelude::*;

mod common;
use common::{Random, WIDTHS, backends, bits, close, wide};

struct Memory(Vec<f32>, Vec<u32>);

impl Memory {
    fn new(req: ScratchReq) -> Self {
        Self(vec![f32::NAN; req.reals], vec![u32::MAX; req.ids])
    }
    fn lend<D: Host<Scalar = f32>>(&mut self) -> Scratch<'_, D> {
        Scratch { reals: &mut self.0, ids: &mut self.1 }
    }
}

/// What the tests do with a device whose scalar is `f32`. Only for a type that is known does the compiler know that
/// views are slices, so this is written once for each, by a macro.
trait Run {
    fn bag_sum<S: RowStore + Sync>(
        &self,
        table: &S,
        bag: usize,
        ids: &[u32],
        weights: &[f32],
        accumulate: bool,
    ) -> Vec<f32>;
    fn plan_of(&self, ids: &[u32], rows: usize) -> Vec<u32>;
    fn run_rule<O: RowRule, E: Trainable>(
        &self,
        case: &mut Rules<'_>,
        rule: &O,
        step: &Step,
        codes: &[E],
        fused: bool,
    ) -> (Vec<E>, Vec<f32>);
    fn select_on<K: RowStore + Sync>(&self, dims: SelectDims, queries: &[f32], keys: &K) -> Selected;
    fn select_back(
        &self,
        dims: SelectDims,
        queries: &[f32],
        keys: &[f32],
        chosen: &Selected,
        dw: &[f32],
    ) -> [Vec<f32>; 3];
}

/// Ids, scores, weights.
type Selected = (Vec<u32>, Vec<f32>, Vec<f32>);

macro_rules! run {
    ($device:ty) => {
        impl Run for $device {
            fn bag_sum<S: RowStore + Sync>(
                &self,
                table: &S,
                bag: usize,
                ids: &[u32],
                weights: &[f32],
                accumulate: bool,
            ) -> Vec<f32> {
                let mut out = vec![0.25; ids.len() / bag * table.dim()];
                let args = BagSum::<Self> { bag, ids, weights, out: &mut out, accumulate };
                EmbeddingBag::bag_sum(self, table, args).unwrap();
                out
            }

            fn plan_of(&self, ids: &[u32], rows: usize) -> Vec<u32> {
                let n = ids.len();
                let mut buffers = vec![0; PlanBuffers::<Self>::ids_len(n)];
                let mut memory = Memory::new(self.plan_scratch(n));
                self.plan(ids, rows, carve(&mut buffers, n), memory.lend()).unwrap();
                // What is behind the last unique row means nothing.
                let unique = buffers[0] as usize;
                buffers[1 + unique..1 + n].fill(0);
                buffers[1 + n + unique + 1..1 + n + n + 1].fill(0);
                buffers
            }

            fn run_rule<O: RowRule, E: Trainable>(
                &self,
                case: &mut Rules<'_>,
                rule: &O,
                step: &Step,
                codes: &[E],
                fused: bool,
            ) -> (Vec<E>, Vec<f32>) {
                type Rows<'a, E> = TrainRows<'a, E, f32>;
                let (dim, state_len) = (case.dim, rule.state_len(case.dim));
                let (mut codes, mut state) = (codes.to_vec(), vec![0.5; case.rows * state_len]);
                let table = TrainRows::new(&mut codes, dim, &mut state, state_len).unwrap();
                let unique = case.plan[0] as usize;
                let buffers = carve::<Self>(case.plan, case.entries);
                let gradient = RowGradient::<Self> { bag: case.bag, dim, weights: case.weights, sources: case.sources };
                if fused {
                    let req = RowUpdate::<Rows<'_, E>, O>::reduce_and_update_scratch(self, dim);
                    let mut memory = Memory::new(req);
                    self.reduce_and_update(table, rule, step, buffers.plan(), gradient, memory.lend()).unwrap();
                } else {
                    let mut grads = vec![0.0; unique * dim];
                    let mut memory = Memory::new(RowUpdate::<Rows<'_, E>, O>::update_scratch(self, dim));
                    self.reduce(buffers.plan(), gradient, &mut grads).unwrap();
                    self.update(table, rule, step, buffers.plan(), &grads, memory.lend()).unwrap();
                }
                (codes, state)
            }

            fn select_on<K: RowStore + Sync>(&self, dims: SelectDims, queries: &[f32], keys: &K) -> Selected {
                let n = dims.bags_len();
                let (mut ids, mut scores, mut weights) = (vec![u32::MAX; n], vec![f32::NAN; n], vec![f32::NAN; n]);
                let mut memory = Memory::new(SelectRows::<K>::select_scratch(self, dims));
                let (i, s, w) = (&mut ids[..], &mut scores[..], &mut weights[..]);
                let args = Select::<Self, K> { dims, queries, keys, ids: i, scores: s, weights: w };
                self.select(args, memory.lend()).unwrap();
                (ids, scores, weights)
            }

            fn select_back(
                &self,
                dims: SelectDims,
                queries: &[f32],
                keys: &[f32],
                (ids, _, weights): &Selected,
                dw: &[f32],
            ) -> [Vec<f32>; 3] {
                let keys = &DenseRows::new(keys, dims.half_dim);
                let mut dscores = dw.to_vec();
                let (mut dq, mut dk) = (vec![f32::NAN; queries.len()], vec![f32::NAN; dims.key_rows() * dims.half_dim]);
                let req = SelectRows::<DenseRows<'_, f32>>::select_backward_scratch(self, dims, true);
                let mut memory = Memory::new(req);
                let args = SelectBackward::<Self, _> {
                    dims,
                    queries,
                    keys,
                    ids,
                    weights,
                    dweights: &mut dscores,
                    dqueries: Some(&mut dq),
                    dkeys: Some(&mut dk),
                };
                self.select_backward(args, memory.lend()).unwrap();
                [dscores, dq, dk]
            }
        }
    };
}
run!(Cpu);
run!(Reference<f32>);

fn bags_of<S: RowStore + Sync>(table: &S, bag: usize, tokens: usize, random: &mut Random, cpus: &[Cpu]) {
    let (rows, dim) = (table.rows(), table.dim());
    let (ids, weights) = (random.ids(tokens * bag, rows), random.reals(tokens * bag));
    let vectors = random.reals(tokens * dim);
    let mut dots = vec![0.0; ids.len()];
    let args = BagDot::<Reference<f64>> { bag, ids: &ids, vectors: &wide(&vectors), out: &mut dots };
    Reference::<f64>::new().bag_dot(table, args).unwrap();
    for accumulate in [false, true] {
        let expected = Run::bag_sum(&Reference::<f32>::new(), table, bag, &ids, &weights, accumulate);
        for cpu in cpus {
            let got = Run::bag_sum(cpu, table, bag, &ids, &weights, accumulate);
            assert_eq!(bits(&got), bits(&expected), "{} bag {bag} dim {dim}", cpu.name());
        }
    }
    let mut first = None;
    for cpu in cpus {
        let mut got = vec![f32::NAN; ids.len()];
        cpu.bag_dot(table, BagDot { bag, ids: &ids, vectors: &vectors, out: &mut got }).unwrap();
        close(cpu.name(), &got, &dots, dim, dim as f64 * 4.0);
        let first = first.get_or_insert((cpu.isa(), got.clone()));
        if first.0 == cpu.isa() {
            assert_eq!(bits(&first.1), bits(&got), "threads change {}", cpu.name());
        } else {
            *first = (cpu.isa(), got);
        }
    }
}

#[test]
fn bags() {
    let (cpus, random) = (backends(), &mut Random(1));
    for dim in WIDTHS {
        for (bag, tokens) in [(1, 0), (1, 1), (3, 5), (9, 40), (32, 3)] {
            let codes = random.reals(37 * dim);
            bags_of(&DenseRows::new(&codes, dim), bag, tokens, random, &cpus);
        }
        let codes: Vec<i8> = (0..37 * dim).map(|_| random.next() as i8).collect();
        let scales = random.reals(37);
        bags_of(&ScaledRows::new(&codes, &scales, dim, dim).unwrap(), 5, 9, random, &cpus);
        let scales = random.reals(37 * dim.div_ceil(3));
        bags_of(&ScaledRows::new(&codes, &scales, dim, 3).unwrap(), 5, 9, random, &cpus);
        let codes: Vec<Bf16> = (0..37 * dim).map(|_| Bf16::from_f32(random.real())).collect();
        bags_of(&DenseRows::new(&codes, dim), 5, 9, random, &cpus);
        let codes: Vec<F16> = (0..37 * dim).map(|_| F16::from_f32(random.real())).collect();
        bags_of(&DenseRows::new(&codes, dim), 5, 9, random, &cpus);
    }
    let codes = random.reals(1000 * 64);
    bags_of(&DenseRows::new(&codes, 64), 32, 500, random, &cpus);
}

/// Tables of 64 MiB, whose rows are asked for in bursts: bags shorter than a burst, as long, and of several with a rest.
#[test]
fn bags_of_a_large_table() {
    let (random, cpus, dim) = (&mut Random(3), backends(), 1100);
    let rows = (1usize << 26).div_ceil(dim) + 4;
    let codes: Vec<i8> = (0..dim + 255).map(|_| random.next() as i8).collect();
    let codes: Vec<i8> = (0..rows).flat_map(|row| &codes[row % 255..][..dim]).copied().collect();
    let scales = random.reals(rows);
    let reals: Vec<f32> = codes[..codes.len().div_ceil(4)].iter().map(|&code| f32::from(code) / 128.0).collect();
    let reals = &reals[..reals.len() / dim * dim];
    for (bag, tokens) in [(5, 3), (16, 2), (100, 2)] {
        bags_of(&ScaledRows::new(&codes[..], &scales, dim, dim).unwrap(), bag, tokens, random, &cpus);
        bags_of(&DenseRows::new(reals, dim), bag, tokens, random, &cpus);
    }
}

fn carve<D: Host<Scalar = f32>>(buffers: &mut [u32], n: usize) -> PlanBuffers<'_, D> {
    PlanBuffers::carve(buffers, n).unwrap().0
}

#[test]
fn plans_sums_and_updates() {
    let (cpus, reference, random) = (backends(), Reference::<f32>::new(), &mut Random(2));
    // The last has rows of more entries than a chunk, and one of exactly so many.
    for (entries, bag, rows) in [
        (0, 1, 5),
        (1, 1, 1),
        (20, 4, 7),
        (600, 3, 3000),
        (4000, 8, 1 << 22),
        (3000, 3, 4),
        (512, 1, 1),
        (5000, 8, 900),
    ] {
        for dim in [1, 3, 8, 16, 20, 64, 130] {
            let ids = random.ids(entries, rows);
            let (weights, sources) = (random.reals(entries), random.reals(entries / bag * dim));
            let mut expected = reference.plan_of(&ids, rows);
            for cpu in &cpus {
                assert_eq!(cpu.plan_of(&ids, rows), expected, "{} {entries} {rows}", cpu.name());
            }
            let unique = expected[0] as usize;
            let mut grads = vec![0.0; unique * dim];
            let gradient = RowGradient::<Reference<f32>> { bag, dim, weights: &weights, sources: &sources };
            reference.reduce(carve(&mut expected, entries).plan(), gradient, &mut grads).unwrap();
            let squares: f64 = grads.iter().map(|&g| f64::from(g) * f64::from(g)).sum();
            for cpu in &cpus {
                let mut got = vec![f32::NAN; unique * dim];
                let gradient = RowGradient::<Cpu> { bag, dim, weights: &weights, sources: &sources };
                let buffers = carve(&mut expected, entries);
                cpu.reduce(buffers.plan(), gradient, &mut got).unwrap();
                assert_eq!(bits(&got), bits(&grads), "{} {entries} {dim}", cpu.name());
                let (mut sum, mut memory) = ([0.0], Memory::new(cpu.square_sum_scratch(entries)));
                cpu.square_sum(buffers.plan(), dim, &got, &mut sum, memory.lend()).unwrap();
                close(cpu.name(), &sum, &[squares], unique * dim, squares);
            }
            if rows <= 3000 {
                let rules =
                    Rules { plan: &mut expected, entries, bag, rows, dim, weights: &weights, sources: &sources };
                rules.all(&cpus, random);
            }
        }
    }
}

struct Rules<'a> {
    plan: &'a mut [u32],
    entries: usize,
    bag: usize,
    rows: usize,
    dim: usize,
    weights: &'a [f32],
    sources: &'a [f32],
}

impl Rules<'_> {
    fn all(mut self, cpus: &[Cpu], random: &mut Random) {
        let codes = random.reals(self.rows * self.dim);
        let half: Vec<Bf16> = codes.iter().map(|&x| Bf16::from_f32(x)).collect();
        let mut step = Step::new(0.01, 3);
        step.grad_scale = 0.7;
        let mut noisy = step;
        noisy.rounding = Rounding::Stochastic { seed: 5 };
        for step in [step, noisy] {
            self.rule(&Sgd, &step, &codes, cpus);
            self.rule(&Adagrad { eps: 1e-8 }, &step, &codes, cpus);
            self.rule(&RowwiseAdagrad { eps: 1e-8 }, &step, &codes, cpus);
            self.rule(&Adam { betas: (0.9, 0.999), eps: 1e-8 }, &step, &codes, cpus);
            self.rule(&Adam { betas: (0.9, 0.999), eps: 1e-8 }, &step, &half, cpus);
            self.rule(&RowwiseAdam { betas: (0.9, 0.999), eps: 1e-8 }, &step, &half, cpus);
        }
    }

    fn rule<O: RowRule, E: Trainable>(&mut self, rule: &O, step: &Step, codes: &[E], cpus: &[Cpu]) {
        let expected = Reference::<f32>::new().run_rule(self, rule, step, codes, true);
        for cpu in cpus {
            for fused in [true, false] {
                let got = cpu.run_rule(self, rule, step, codes, fused);
                assert_eq!(got.0, expected.0, "{}", cpu.name());
                assert_eq!(bits(&got.1), bits(&expected.1), "{}", cpu.name());
            }
        }
    }
}

/// Small integers: every sum of products is exact, and there are many ties.
fn exact(random: &mut Random, n: usize) -> Vec<f32> {
    (0..n).map(|_| (random.next() % 5) as f32 - 2.0).collect()
}

fn agree_on<K: RowStore + Sync>(cpus: &[Cpu], dims: SelectDims, queries: &[f32], keys: &K) {
    let expected = Reference::<f32>::new().select_on(dims, queries, keys);
    for cpu in cpus {
        let got = cpu.select_on(dims, queries, keys);
        assert_eq!(got.0, expected.0, "{} {dims:?}", cpu.name());
        assert_eq!(bits(&got.1), bits(&expected.1), "{} {dims:?}", cpu.name());
        for (&got, &expected) in got.2.iter().zip(&expected.2) {
            let fine = (got - expected).abs() <= 8.0 * f32::EPSILON || got.is_nan() && expected.is_nan();
            assert!(fine, "{} {dims:?}: {got} {expected}", cpu.name());
        }
    }
}

#[test]
fn selection_is_exactly_the_law() {
    let (cpus, random) = (backends(), &mut Random(3));
    for parts in [1, 2] {
        for (sub_keys, half_dim, top_k) in [
            (1, 1, 1),
            (2, 3, 2),
            (5, 4, 5),
            (16, 8, 1),
            (17, 8, 17),
            (20, 5, 3),
            (32, 2, 8),
            (33, 9, 16),
            (64, 16, 4),
            (64, 8, 64),
            (100, 3, 7),
            (128, 8, 8),
            (256, 16, 16),
            (300, 4, 5),
            (1000, 2, 32),
            (200, 300, 3),
        ] {
            for tokens in [0, 1, 3, 15, 16, 17, 70] {
                if tokens > 20 && sub_keys > 300 {
                    continue;
                }
                let dims = SelectDims { tokens, heads: 2, parts, sub_keys, half_dim, top_k };
                let (queries, keys) = (exact(random, dims.queries_len()), exact(random, dims.key_rows() * half_dim));
                agree_on(&cpus, dims, &queries, &DenseRows::new(&keys, half_dim));
            }
        }
    }
}

#[test]
fn selection_by_what_is_no_number() {
    let (cpus, random) = (backends(), &mut Random(4));
    let strange = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 1.0, f32::MAX, f32::MIN];
    for parts in [1, 2] {
        for (sub_keys, top_k) in [(3, 2), (8, 8), (40, 4), (130, 9), (256, 16)] {
            for tokens in [2, 18] {
                for rare in [1, 3, 100] {
                    let dims = SelectDims { tokens, heads: 1, parts, sub_keys, half_dim: 1, top_k };
                    let mut keys = exact(random, dims.key_rows());
                    for key in &mut keys {
                        if random.next() % rare == 0 {
                            *key = strange[(random.next() % 8) as usize];
                        }
                    }
                    let queries = vec![1.0; dims.queries_len()];
                    agree_on(&cpus, dims, &queries, &DenseRows::new(&keys, 1));
                }
            }
        }
    }
    // All equal, and in the worst order.
    for keys in [vec![1.5; 2 * 512], (0..1024).map(|i| i as f32).collect(), vec![f32::NEG_INFINITY; 1024]] {
        let dims = SelectDims { tokens: 17, heads: 1, parts: 2, sub_keys: 512, half_dim: 1, top_k: 8 };
        agree_on(&cpus, dims, &vec![1.0; dims.queries_len()], &DenseRows::new(&keys, 1));
    }
}

#[test]
fn packed_keys() {
    let (cpus, random) = (backends(), &mut Random(5));
    for tokens in [3, 40] {
        let dims = SelectDims { tokens, heads: 2, parts: 2, sub_keys: 70, half_dim: 20, top_k: 6 };
        let queries = exact(random, dims.queries_len());
        let codes: Vec<i8> = (0..dims.key_rows() * 20).map(|_| (random.next() % 9) as i8 - 4).collect();
        let scales: Vec<f32> = (0..dims.key_rows()).map(|_| [0.5, 0.25, 1.0][(random.next() % 3) as usize]).collect();
        agree_on(&cpus, dims, &queries, &ScaledRows::new(&codes, &scales, 20, 20).unwrap());
        let scales: Vec<f32> = (0..dims.key_rows() * 4).map(|_| [0.5, 0.25][(random.next() % 2) as usize]).collect();
        agree_on(&cpus, dims, &queries, &ScaledRows::new(&codes, &scales, 20, 5).unwrap());
        let codes: Vec<Bf16> = codes.iter().map(|&x| Bf16::from_f32(f32::from(x))).collect();
        agree_on(&cpus, dims, &queries, &DenseRows::new(&codes, 20));
    }
}

#[test]
fn scores_are_within_their_bound() {
    let (cpus, random) = (backends(), &mut Random(6));
    for tokens in [2, 33] {
        let dims = SelectDims { tokens, heads: 1, parts: 1, sub_keys: 50, half_dim: 77, top_k: 50 };
        let (queries, keys) = (random.reals(dims.queries_len()), random.reals(50 * 77));
        let mut of_isa: Option<(Isa, Selected)> = None;
        for cpu in &cpus {
            let got = cpu.select_on(dims, &queries, &DenseRows::new(&keys, 77));
            for (t, (ids, scores)) in got.0.chunks(50).zip(got.1.chunks(50)).enumerate() {
                for (&id, &score) in ids.iter().zip(scores) {
                    let terms = (0..77).map(|c| f64::from(queries[t * 77 + c]) * f64::from(keys[id as usize * 77 + c]));
                    let (sum, magnitude) = terms.fold((0.0, 0.0), |(s, m), x| (s + x, m + x.abs()));
                    close(cpu.name(), &[score], &[sum], 77, magnitude);
                }
            }
            match &of_isa {
                Some((isa, first)) if *isa == cpu.isa() => assert_eq!(first, &got, "threads change {}", cpu.name()),
                _ => of_isa = Some((cpu.isa(), got)),
            }
        }
    }
}

#[test]
fn select_backward() {
    let (cpus, reference, random) = (backends(), Reference::<f32>::new(), &mut Random(7));
    for parts in [1, 2] {
        for (tokens, heads, sub_keys, half_dim, top_k) in [
            (0, 1, 4, 3, 2),
            (1, 2, 4, 3, 2),
            (9, 3, 8, 16, 8),
            (600, 2, 3, 8, 2),
            (513, 1, 1, 20, 1),
            (40, 2, 64, 300, 4),
        ] {
            let dims = SelectDims { tokens, heads, parts, sub_keys, half_dim, top_k };
            let (queries, keys) = (random.reals(dims.queries_len()), random.reals(dims.key_rows() * half_dim));
            let chosen = reference.select_on(dims, &queries, &DenseRows::new(&keys, half_dim));
            let dweights = random.reals(chosen.0.len());
            // One weight a bag has no gradient; then all the rest is zero. Equal scores make equal sums.
            let expected = reference.select_back(dims, &queries, &keys, &chosen, &dweights);
            for cpu in &cpus {
                let got = cpu.select_back(dims, &queries, &keys, &chosen, &dweights);
                close(cpu.name(), &got[0], &wide(&expected[0]), top_k, 2.0);
                if got[0] == expected[0] {
                    assert_eq!(bits(&got[1]), bits(&expected[1]), "{} {dims:?}", cpu.name());
                    assert_eq!(bits(&got[2]), bits(&expected[2]), "{} {dims:?}", cpu.name());
                } else {
                    close(cpu.name(), &got[1], &wide(&expected[1]), top_k + 4, 4.0 * top_k as f64);
                    close(cpu.name(), &got[2], &wide(&expected[2]), 8, 4.0 * (tokens * top_k) as f64);
                }
            }
        }
    }
}

#[test]
fn scratch_one_short_is_refused() {
    for cpu in backends() {
        for tokens in [1, 40] {
            let dims = SelectDims { tokens, heads: 2, parts: 2, sub_keys: 40, half_dim: 8, top_k: 4 };
            let (queries, keys) = (vec![0.5; dims.queries_len()], vec![0.5; dims.key_rows() * 8]);
            let keys = &DenseRows::new(&keys, 8);
            let req = SelectRows::<DenseRows<'_, f32>>::select_scratch(&cpu, dims);
            for (reals, ids) in [(1, 0), (0, 1)] {
                let mut memory = Memory::new(ScratchReq::new(req.reals - reals, req.ids - ids));
                let (mut i, mut s, mut w) =
                    (vec![7; dims.bags_len()], vec![7.0; dims.bags_len()], vec![7.0; dims.bags_len()]);
                let args =
                    Select::<Cpu, _> { dims, queries: &queries, keys, ids: &mut i, scores: &mut s, weights: &mut w };
                assert!(matches!(cpu.select(args, memory.lend()), Err(ArgError::Scratch { .. })));
                assert!(i.iter().all(|&id| id == 7) && s == w && s[0] == 7.0);
            }
        }
        let mut buffers = vec![0; PlanBuffers::<Cpu>::ids_len(5)];
        let mut memory = Memory::new(ScratchReq::new(0, cpu.plan_scratch(5).ids - 1));
        let result = cpu.plan(&[1, 2, 3, 4, 0], 5, carve(&mut buffers, 5), memory.lend());
        assert!(matches!(result, Err(ArgError::Scratch { .. })));
        let mut memory = Memory::new(cpu.plan_scratch(1));
        let result = cpu.plan(&[5], 5, carve(&mut buffers[..5], 1), memory.lend());
        assert!(matches!(result, Err(ArgError::RowOutOfRange { row: 5, rows: 5, .. })));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn selection_is_the_best_of_all_slots(
        sub_keys in 1usize..40,
        k in 1usize..40,
        tokens in prop::sample::select(vec![1usize, 3, 17, 20]),
        values in prop::collection::vec(-4i8..5, 80),
        seed in any::<u64>(),
    ) {
        let top_k = k.min(sub_keys);
        let dims = SelectDims { tokens, heads: 1, parts: 2, sub_keys, half_dim: 2, top_k };
        let random = &mut Random(seed);
        let keys: Vec<f32> = (0..dims.key_rows() * 2).map(|i| f32::from(values[i % 80])).collect();
        let queries = exact(random, dims.queries_len());
        for isa in Isa::available() {
            let cpu = Cpu::builder().isa(isa).threads(2).build().unwrap();
            let (ids, scores, _) = cpu.select_on(dims, &queries, &DenseRows::new(&keys, 2));
            for t in 0..tokens {
                let half = |p: usize| -> Vec<(f32, usize)> {
                    let query = &queries[(t * 2 + p) * 2..][..2];
                    let mut half: Vec<_> = (0..sub_keys).map(|n| {
                        let key = &keys[(p * sub_keys + n) * 2..][..2];
                        (query[0] * key[0] + query[1] * key[1], n)
                    }).collect();
                    half.sort_by(|a, b| b.0.partial_cmp(&a.0).unwrap().then(a.1.cmp(&b.1)));
                    half
                };
                let (first, second) = (half(0), half(1));
                let mut all: Vec<(f32, usize)> = Vec::new();
                for u in &first {
                    all.extend(second.iter().map(|v| (u.0 + v.0, u.1 * sub_keys + v.1)));
                }
                // Stable: equal sums stay in the order of the pairs.
                all.sort_by(|a, b| b.0.partial_cmp(&a.0).unwrap());
                for (i, &(score, id)) in all[..top_k].iter().enumerate() {
                    prop_assert_eq!((scores[t * top_k + i], ids[t * top_k + i] as usize), (score, id));
                }
            }
        }
    }
}

/// Found by fuzzing (`args`): sizes whose products wrap around.
#[test]
fn absurd_sizes_are_no_panics() {
    let keys = [1.0f32; 8];
    let keys = &DenseRows::new(&keys, 2);
    for cpu in backends() {
        for bag in [1, 1 << 62, usize::MAX] {
            let args = BagSum::<Cpu> { bag, ids: &[], weights: &[], out: &mut [], accumulate: false };
            EmbeddingBag::bag_sum(&cpu, keys, args).unwrap();
            cpu.bag_dot(keys, BagDot::<Cpu> { bag, ids: &[], vectors: &[], out: &mut [] }).unwrap();
        }
        let dims = SelectDims { tokens: 0, heads: 0, parts: 2, sub_keys: 1 << 16, half_dim: 2, top_k: 1 << 15 };
        let wraps = SelectDims { tokens: 1 << 62, heads: 1, parts: 2, sub_keys: 2, half_dim: 2, top_k: 2 };
        for (dims, keys) in [(dims, &DenseRows::new(&[], 2)), (wraps, keys)] {
            let (ids, scores, weights) = (&mut [][..], &mut [][..], &mut [][..]);
            let args = Select::<Cpu, DenseRows<'_, f32>> { dims, queries: &[], keys, ids, scores, weights };
            assert!(cpu.select(args, Memory::new(ScratchReq::EMPTY).lend()).is_err());
        }
    }
}
