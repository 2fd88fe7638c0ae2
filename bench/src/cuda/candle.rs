//! The same in candle's own operations: rows by `index_select`, their weighted sum as a product of matrices, and the gradients
//! as candle takes them, dense in the table.

use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor, Var};
use memlayer_core::Random;

use super::device::SETS;
use super::{BAG, Options, Other, TOKENS};

const SLOTS: usize = 1 << 20;
/// A call takes up to a second.
const REPEATS: usize = 5;

/// What candle took, as a peer.
pub(super) fn others(options: &Options) -> Result<Vec<Other>> {
    let wants = |name: &str| options.only.as_ref().is_none_or(|only| name.contains(only.as_str()));
    let mut all = Vec::new();
    if !wants("bag_sum") && !wants("sparse") {
        return Ok(all);
    }
    let device = Device::new_cuda(0)?;
    for width in [256, 1024] {
        let bags = Bags::new(width, &device)?;
        let mut put = |op: &str, ms| {
            let (by, format, ids) = ("candle (bf16)".to_owned(), "bf16".to_owned(), "uniform".to_owned());
            all.push(Other { by, op: op.to_owned(), format, ids, tokens: TOKENS, width, slots: SLOTS, ms: Some(ms) });
        };
        if wants("bag_sum") {
            put("bag_sum", bags.time(|set| bags.sums(set).map(|_| ()))?);
        }
        if wants("sparse") {
            put("forward+backward", bags.time(|set| bags.gradients(set))?);
        }
    }
    Ok(all)
}

struct Bags {
    table: Var,
    weights: Var,
    dout: Tensor,
    sets: Vec<Tensor>,
}

impl Bags {
    fn new(width: usize, device: &Device) -> Result<Self> {
        let random = |shape: (usize, usize, usize)| Tensor::randn(0f32, 1f32, shape, device)?.to_dtype(DType::BF16);
        let sets = (0..SETS).map(|set| {
            let mut random = Random::new(set as u64);
            #[allow(clippy::cast_possible_truncation, reason = "fewer than 2^32 slots")]
            let ids: Vec<u32> = (0..TOKENS * BAG).map(|_| random.below(SLOTS) as u32).collect();
            Tensor::from_vec(ids, TOKENS * BAG, device)
        });
        Ok(Self {
            sets: sets.collect::<Result<_>>()?,
            table: Var::from_tensor(&random((1, SLOTS, width))?.squeeze(0)?)?,
            weights: Var::from_tensor(&random((TOKENS, 1, BAG))?)?,
            dout: random((TOKENS, 1, width))?,
        })
    }

    fn sums(&self, set: usize) -> Result<Tensor> {
        let rows = self.table.index_select(&self.sets[set], 0)?;
        let width = rows.dim(1)?;
        self.weights.matmul(&rows.reshape((TOKENS, BAG, width))?)
    }

    fn gradients(&self, set: usize) -> Result<()> {
        let loss = (self.sums(set)? * &self.dout)?.sum_all()?;
        loss.backward().map(|_| ())
    }

    /// The median of a few calls in milliseconds. candle has no events: each call is waited for.
    fn time(&self, call: impl Fn(usize) -> Result<()>) -> Result<f64> {
        let device = self.dout.device();
        call(0)?;
        device.synchronize()?;
        let mut times = Vec::new();
        for repeat in 0..REPEATS {
            let start = Instant::now();
            call(repeat % SETS)?;
            device.synchronize()?;
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
        times.sort_by(f64::total_cmp);
        Ok(times[REPEATS / 2])
    }
}
