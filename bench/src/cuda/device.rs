//! The device: every time is the median of repeated calls between device events, their inputs rotated
//! among several sets.

use core::cell::RefCell;

use memlayer_core::{Device, Element, Random};
use memlayer_cuda::{Buffer, Cuda, CudaError};

use super::{Case, Measured, Options};

/// Sets of inputs that calls take turns with.
pub(super) const SETS: usize = 4;

/// A device, and what was measured on it.
pub(super) struct Bench<'o> {
    pub(super) cuda: Cuda,
    pub(super) options: &'o Options,
    /// GB/s of a device copy, read plus written.
    copy: f64,
    rows: RefCell<Vec<Measured>>,
    notes: RefCell<Vec<String>>,
}

impl<'o> Bench<'o> {
    /// Device 0.
    pub(super) fn new(options: &'o Options) -> Result<Self, CudaError> {
        Ok(Self { cuda: Cuda::new(0)?, options, copy: 1.0, rows: RefCell::default(), notes: RefCell::default() })
    }

    /// From here on misses of the second-level cache fetch so many bytes.
    pub(super) fn fetching(&self, bytes: usize) -> Result<(), CudaError> {
        Cuda::builder(0).stream(self.cuda.stream().clone()).fetch(bytes).build().map(|_| ())
    }

    pub(super) fn wants(&self, name: &str) -> bool {
        self.options.only.as_ref().is_none_or(|only| name.contains(only.as_str()))
    }

    /// The median time of a call in milliseconds; `call` gets the number of the set of inputs.
    pub(super) fn time(&self, mut call: impl FnMut(usize) -> Result<(), CudaError>) -> Result<f64, CudaError> {
        for set in 0..SETS {
            call(set)?;
        }
        self.cuda.synchronize()?;
        let repeats = if self.options.quick { 8 } else { 24 };
        let mut marks = vec![];
        for i in 0..repeats {
            let start = self.cuda.mark()?;
            call(i % SETS)?;
            marks.push((start, self.cuda.mark()?));
        }
        self.cuda.synchronize()?;
        let times: Result<Vec<f64>, _> = marks.iter().map(|(a, b)| a.milliseconds_until(b).map(f64::from)).collect();
        let mut times = times?;
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }

    /// Keeps a time; `bytes` is what must be moved, or zero where that does not decide.
    pub(super) fn report(&self, case: Case, bytes: f64, ms: f64) {
        let of_copy = (bytes > 0.0).then_some(bytes / ms / 1e6 / self.copy);
        let row = Measured { case, ms, of_copy };
        eprintln!("{}", row.line());
        self.rows.borrow_mut().push(row);
    }

    /// Keeps what is to be said beside the times.
    pub(super) fn note(&self, text: String) {
        eprintln!("{text}");
        self.notes.borrow_mut().push(text);
    }

    /// Ids of `count` entries: uniform, or with the frequencies of Zipf's law, spread over the table.
    pub(super) fn ids(&self, count: usize, slots: usize, zipf: bool, seed: u64) -> Result<Buffer<u32>, CudaError> {
        self.cuda.upload(&ids(count, slots, zipf, seed))
    }

    pub(super) fn reals(&self, count: usize, seed: u64) -> Result<Buffer<f32>, CudaError> {
        let mut random = Random::new(seed);
        let mut values = vec![0f32; count];
        random.fill_normal(&mut values, 1.0);
        self.cuda.upload(&values)
    }

    /// Random codes: some that are made here, again and again.
    pub(super) fn codes<E: Element>(&self, count: usize, of: impl Fn(f32) -> E) -> Result<Buffer<E>, CudaError> {
        let mut random = Random::new(7);
        let mut values = vec![0f32; count.min((4 << 20) + 1031)];
        random.fill_normal(&mut values, 1.0);
        let codes: Vec<E> = values.iter().map(|&v| of(v)).collect();
        let part = self.cuda.upload(&codes)?;
        let mut all = self.cuda.zeros::<E>(count)?;
        let mut rest = all.view_mut();
        while !rest.is_empty() {
            let len = rest.len().min(part.len());
            let (head, tail) = rest.split_at(len);
            self.cuda.copy(part.view().slice(0..len), head)?;
            rest = tail;
        }
        Ok(all)
    }

    pub(super) fn measure_copy(&mut self) -> Result<(), CudaError> {
        let from = self.cuda.zeros::<u64>(128 << 20)?;
        let mut to = self.cuda.zeros::<u64>(128 << 20)?;
        let ms = self.time(|_| self.cuda.copy(from.view(), to.view_mut()))?;
        let bytes = 2.0 * from.len() as f64 * 8.0;
        self.copy = bytes / ms / 1e6;
        self.report(Case { op: "copy", format: "-", ids: "-", tokens: 0, width: 0, slots: 0 }, bytes, ms);
        Ok(())
    }

    /// Everything that was measured, and the notes.
    pub(super) fn into_found(self) -> (Vec<Measured>, Vec<String>) {
        (self.rows.into_inner(), self.notes.into_inner())
    }
}

/// See [`Bench::ids`].
pub(super) fn ids(count: usize, slots: usize, zipf: bool, seed: u64) -> Vec<u32> {
    let mut random = Random::new(seed);
    (0..count)
        .map(|_| {
            #[allow(clippy::cast_possible_truncation, reason = "a rank below the number of slots")]
            let id = if zipf {
                let rank = (random.uniform() * (slots as f64).ln()).exp() as usize - 1;
                rank.wrapping_mul(0x9e37_79b1) % slots
            } else {
                random.below(slots)
            };
            u32::try_from(id).expect("fewer than 2^32 slots")
        })
        .collect()
}
