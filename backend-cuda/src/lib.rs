//! Memory layers on NVIDIA GPUs of compute capability 8.0 and newer.
//!
//! [`Cuda`] implements every operation of [`memlayer_core::ops`] and obeys its laws: vertical sums, plans and row updates
//! have the bits of the reference backend, selection is exact, and every result is the same from run to run.
//!
//! ```no_run
//! use memlayer_cuda::{Cuda, CudaError};
//! let cuda = Cuda::new(0)?;
//! let rows = cuda.upload(&[0.5f32; 8])?;
//! # Ok::<(), CudaError>(())
//! ```
//!
//! Nothing of CUDA is needed to build this: the driver, its run-time compiler (NVRTC) and cuBLAS are loaded when a
//! [`Cuda`] is made, and where one is missing that is an error. Kernels are compiled for the device when they are first
//! used, and kept on disk (see [`CudaBuilder::cache`]).
//!
//! Operations only start work, on one stream, in order; [`Device::synchronize`] waits for it and reports what the
//! kernels found, ids that are no rows above all. Buffers are freed in that order too. Once its kernels are compiled no
//! operation allocates or copies to the host.
//!
//! # Limits
//!
//! K is at most [`MAX_TOP_K`]; rows in training have at most as many values as fit into a block's shared memory (about
//! 50 000) under row-wise rules; a plan has at most 2^31 entries.
#![deny(unsafe_code)]

mod error;
mod kernels;
#[allow(unsafe_code, reason = "calls of the driver, its compiler and cuBLAS")]
mod launch;
mod memory;
mod ops;
mod recording;

use core::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

pub use cudarc::driver::{CudaSlice, CudaStream};
use cudarc::driver::{DevicePtr, DevicePtrMut};
pub use error::CudaError;
use memlayer_core::error::check_len;
use memlayer_core::{ArgError, Device, Item};
pub use memory::{Buffer, Rows, TrainRows, View, ViewMut};
pub use ops::adamw::{AdamW, SQUARE_PARTS};
pub use ops::cache::CachedTable;
pub use ops::gradient::MixedGradient;
pub use ops::optim::DeviceRule;
pub use ops::select::MAX_TOP_K;

use crate::kernels::Kernels;
use crate::launch::{Blas, Event, Properties, Stream, launch_graph};
use crate::ops::plan::Lists;

/// The environment variable that says where compiled kernels are kept; empty for nowhere.
pub const CACHE_VARIABLE: &str = "MEMLAYER_CUDA_CACHE";

/// An NVIDIA GPU as a backend, with a stream of its own.
pub struct Cuda {
    stream: Stream,
    kernels: Kernels,
    blas: Blas,
    /// What a kernel found wrong: operation, id, rows (two words).
    flag: Buffer<u32>,
    /// Rows with many entries, found and used within an operation.
    lists: Buffer<u32>,
    properties: Properties,
    scores: Scores,
    name: String,
}

/// How `select` makes the scores of sub-keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Scores {
    /// In `f32`, as the law of selection wants: the same slots as on any backend, but for rounding.
    #[default]
    Exact,
    /// On tensor cores, queries and keys rounded to bf16 first: several times as fast, and where scores are nearly equal
    /// other slots win. Selection among those scores is exact. Calls of few tokens, where it would not be faster, are exact.
    Bf16,
}

/// Builds a [`Cuda`].
#[derive(Clone, Debug)]
pub struct CudaBuilder {
    ordinal: usize,
    stream: Option<Arc<CudaStream>>,
    cache: Option<PathBuf>,
    scores: Scores,
    fetch: Option<usize>,
}

impl CudaBuilder {
    /// Where compiled kernels are kept, or `None` for nowhere. Without this call it is what [`CACHE_VARIABLE`] says, or
    /// `memlayer/cuda` in the user's cache folder.
    #[must_use]
    pub fn cache(mut self, folder: Option<PathBuf>) -> Self {
        self.cache = folder;
        self
    }
    /// Puts all work on a stream that exists, to be in order with other work there. It decides the device.
    #[must_use]
    pub fn stream(mut self, stream: Arc<CudaStream>) -> Self {
        self.stream = Some(stream);
        self
    }
    /// How scores are made.
    #[must_use]
    pub const fn scores(mut self, scores: Scores) -> Self {
        self.scores = scores;
        self
    }
    /// How many bytes at most a miss of the second-level cache should fetch: 32, 64 or 128. It changes no result. An H100 fetches
    /// 64 where nothing is said. Scattered rows that end where they like are summed faster by 32: those of 100 values
    /// by 5 to 8 %, and padded ones ([`Rows::padded`]) of 1000 values then as fast a byte as those of 1024, but for 1.4 %. Training over rows of
    /// whole lines takes 1 to 3 % longer with it, sums of int4 rows of 64 values 10 %. The driver keeps this for the whole context, so for all that this process does
    /// on the device. What the driver does not know is no error.
    #[must_use]
    pub const fn fetch(mut self, bytes: usize) -> Self {
        self.fetch = Some(bytes);
        self
    }
    /// The device.
    ///
    /// # Errors
    /// [`CudaError::Library`] where the driver or a library is missing, [`CudaError::TooOld`], or what the driver says.
    pub fn build(self) -> Result<Cuda, CudaError> {
        let stream = match &self.stream {
            Some(stream) => Stream::adopt(stream)?,
            None => Stream::open(self.ordinal)?,
        };
        if let Some(bytes) = self.fetch {
            stream.fetch(bytes)?;
        }
        let properties = stream.properties()?;
        let capability = properties.capability;
        if capability < (8, 0) {
            return Err(CudaError::TooOld { capability });
        }
        let kernels = Kernels::new(&stream, capability, self.cache)?;
        let blas = Blas::new(&stream)?;
        let flag = Buffer::new(stream.allocate(16)?, 4);
        let lists = Buffer::new(stream.allocate(Lists::WORDS * 4)?, Lists::WORDS);
        let name = format!("cuda {} sm_{}{}", properties.name, capability.0, capability.1);
        Ok(Cuda { stream, kernels, blas, flag, lists, properties, scores: self.scores, name })
    }
}

/// What [`CACHE_VARIABLE`] says, or the user's cache folder.
fn default_cache() -> Option<PathBuf> {
    if let Some(folder) = std::env::var_os(CACHE_VARIABLE) {
        return (!folder.is_empty()).then(|| folder.into());
    }
    let cache = std::env::var_os("XDG_CACHE_HOME").filter(|folder| !folder.is_empty()).map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
    cache.map(|folder| folder.join("memlayer").join("cuda"))
}

impl Cuda {
    /// Device number `ordinal`.
    ///
    /// # Errors
    /// As [`CudaBuilder::build`].
    pub fn new(ordinal: usize) -> Result<Self, CudaError> {
        Self::builder(ordinal).build()
    }

    /// Device number `ordinal`, with a choice.
    #[must_use]
    pub fn builder(ordinal: usize) -> CudaBuilder {
        CudaBuilder { ordinal, stream: None, cache: default_cache(), scores: Scores::Exact, fetch: None }
    }

    /// The stream that all work goes to.
    #[must_use]
    pub fn stream(&self) -> &Arc<CudaStream> {
        self.stream.cuda_stream()
    }

    /// A buffer of `len` items of all bits zero.
    ///
    /// # Errors
    /// The driver's.
    pub fn zeros<T: Item>(&self, len: usize) -> Result<Buffer<T>, CudaError> {
        let bytes = len.checked_mul(size_of::<T>()).ok_or(CudaError::Unsupported { op: "zeros", what: "that size" })?;
        Ok(Buffer::new(self.stream.allocate(bytes)?, len))
    }

    /// A buffer of these items.
    ///
    /// # Errors
    /// The driver's.
    pub fn upload<T: Item>(&self, items: &[T]) -> Result<Buffer<T>, CudaError> {
        let mut buffer = self.zeros(items.len())?;
        self.stream.upload(items, &buffer.view_mut())?;
        Ok(buffer)
    }

    /// Overwrites `to` with as many items of the host, and waits.
    ///
    /// # Errors
    /// [`ArgError::Shape`] if the lengths differ, or the driver's.
    pub fn write<T: Item>(&self, from: &[T], to: ViewMut<'_, T>) -> Result<(), CudaError> {
        check_len("write", "to", from.len(), to.len())?;
        self.stream.upload(from, &to)
    }

    /// Overwrites `to` with as many items of the device, behind all work started before, and waits.
    ///
    /// # Errors
    /// [`ArgError::Shape`] if the lengths differ, or the driver's.
    pub fn read<T: Item>(&self, from: View<'_, T>, to: &mut [T]) -> Result<(), CudaError> {
        check_len("read", "to", from.len(), to.len())?;
        self.stream.download(from, to)
    }

    /// Memory that cudarc allocated, such as another framework's tensors, as a view. Nothing is copied.
    ///
    /// # Errors
    /// [`CudaError::Unsupported`] if it belongs to another stream, whose work would not be in order with this one's.
    pub fn borrow<'a, T: Item>(&self, memory: &'a CudaSlice<T>) -> Result<View<'a, T>, CudaError> {
        self.same_stream("borrow", memory.stream())?;
        let (pointer, _) = memory.device_ptr(self.stream());
        Ok(View::at(pointer, memory.len()))
    }

    /// Memory that cudarc allocated, to be written.
    ///
    /// # Errors
    /// As [`Cuda::borrow`].
    pub fn borrow_mut<'a, T: Item>(&self, memory: &'a mut CudaSlice<T>) -> Result<ViewMut<'a, T>, CudaError> {
        self.same_stream("borrow", memory.stream())?;
        let len = memory.len();
        let (pointer, _) = memory.device_ptr_mut(self.stream());
        Ok(ViewMut::at(pointer, len))
    }

    fn same_stream(&self, op: &'static str, other: &Arc<CudaStream>) -> Result<(), CudaError> {
        if other.cu_stream() == self.stream().cu_stream() {
            return Ok(());
        }
        Err(CudaError::Unsupported { op, what: "memory of another stream" })
    }

    /// A point in the work behind what was started so far, to measure time from.
    ///
    /// # Errors
    /// The driver's.
    pub fn mark(&self) -> Result<Mark, CudaError> {
        Event::record(&self.stream).map(Mark)
    }

    /// Records the operations that `record` starts on buffers of `state`, to be run again and again at the cost of one
    /// launch. They are not run now. Run them once before, so that their kernels are compiled.
    ///
    /// `record` is a plain function so that it can reach no buffer but those of `state`, which the graph owns: a graph
    /// must not outlive what it reads and writes. Run the operations once before: loading their kernels is nothing that can
    /// be recorded. One recording is made at a time, and other threads make and end no [`Cuda`] and load no kernels meanwhile:
    /// `record` must not wait for such a thread. Another library that waits for the whole context breaks a recording.
    ///
    /// # Errors
    /// What `record` reports, or the driver's.
    pub fn graph<S>(
        &self,
        mut state: S,
        record: fn(&Self, &mut S) -> Result<(), CudaError>,
    ) -> Result<Graph<S>, CudaError> {
        let graph = self.stream.capture(|| record(self, &mut state))?;
        Ok(Graph { graph, state })
    }

    /// Launches a kernel that is walked through by so many threads, as many as keep the device busy at most.
    fn blocks_for(&self, items: usize, threads: usize) -> usize {
        items.div_ceil(threads).min(self.properties.multiprocessors as usize * 16)
    }
}

/// A point in the work of a [`Cuda`].
pub struct Mark(Event);

impl Mark {
    /// Waits for both, and gives the milliseconds from this to `end`.
    ///
    /// # Errors
    /// The driver's.
    pub fn milliseconds_until(&self, end: &Self) -> Result<f32, CudaError> {
        self.0.milliseconds_until(&end.0)
    }
}

/// Recorded operations and the buffers they work on: see [`Cuda::graph`].
pub struct Graph<S> {
    // Dropped first: it points into the buffers.
    graph: cudarc::driver::CudaGraph,
    state: S,
}

impl<S> Graph<S> {
    /// Runs the operations on the stream they were recorded from.
    ///
    /// # Errors
    /// The driver's.
    pub fn launch(&mut self) -> Result<(), CudaError> {
        launch_graph(&self.graph)
    }
    /// The buffers.
    pub const fn state(&self) -> &S {
        &self.state
    }
    /// Overwrites one of the buffers, that the next launch reads.
    ///
    /// # Errors
    /// As [`Cuda::write`].
    pub fn write<T: Item>(
        &mut self,
        cuda: &Cuda,
        buffer: impl FnOnce(&S) -> &Buffer<T>,
        items: &[T],
    ) -> Result<(), CudaError> {
        // Nothing else is lent from the state while this is.
        let view = buffer(&self.state).view();
        cuda.write(items, ViewMut::at(view.pointer(), view.len()))
    }
}

impl Device for Cuda {
    type Scalar = f32;
    type Error = CudaError;
    type View<'a, T: Item> = View<'a, T>;
    type ViewMut<'a, T: Item> = ViewMut<'a, T>;
    type Rows<'a> = Rows<'a, f32>;

    fn name(&self) -> &str {
        &self.name
    }
    fn synchronize(&self) -> Result<(), CudaError> {
        let mut found = [0; 4];
        self.stream.download(self.flag.view(), &mut found)?;
        let [op, row, low, high] = found;
        if op == 0 {
            return Ok(());
        }
        self.stream.zero(self.flag.view().pointer(), 16)?;
        let rows = usize::try_from(u64::from(high) << 32 | u64::from(low)).unwrap_or(usize::MAX);
        Err(ArgError::RowOutOfRange { op: ops::name_of(op), row, rows }.into())
    }
    fn len<T: Item>(view: Self::View<'_, T>) -> usize {
        view.len()
    }
    fn len_mut<T: Item>(view: &Self::ViewMut<'_, T>) -> usize {
        view.len()
    }
    fn slice<T: Item>(view: Self::View<'_, T>, range: Range<usize>) -> Self::View<'_, T> {
        view.slice(range)
    }
    fn shorten<'b, 'a: 'b, T: Item>(view: Self::View<'a, T>) -> Self::View<'b, T> {
        view
    }
    fn read<'b, T: Item>(view: &'b Self::ViewMut<'_, T>) -> Self::View<'b, T> {
        view.read()
    }
    fn reborrow<'b, T: Item>(view: &'b mut Self::ViewMut<'_, T>) -> Self::ViewMut<'b, T> {
        view.reborrow()
    }
    fn split<T: Item>(view: Self::ViewMut<'_, T>, mid: usize) -> (Self::ViewMut<'_, T>, Self::ViewMut<'_, T>) {
        view.split_at(mid)
    }
    fn copy<T: Item>(&self, from: Self::View<'_, T>, to: Self::ViewMut<'_, T>) -> Result<(), CudaError> {
        check_len("copy", "to", from.len(), to.len())?;
        self.stream.copy(from, &to)
    }
    fn rows<'a>(view: Self::View<'a, f32>, dim: usize) -> Self::Rows<'a> {
        Rows::new(view, dim)
    }
}
