//! The CUDA driver, its compiler and cuBLAS: every unsafe call of this crate.
//!
//! What the proofs lean on:
//!
//! * A [`Stream`] keeps its context; every handle made from it (memory, modules, cuBLAS) keeps the stream's `Arc`, so
//!   contexts and streams outlive what lives in them. Every call binds the context to the calling thread first.
//! * Device memory is only touched by work on one stream, in its order. Memory is freed in that order too, so what was
//!   started before still finds it.
//! * Host memory is touched by synchronous copies alone: nothing of the device's points to it when a call returns. The
//!   exception is [`Pinned`], which is lent to the program while the stream is idle, and which no work outlives.
//! * Device pointers come from views ([`crate::View`], [`crate::ViewMut`]), which borrow the buffers they point into.
//!   The operations check every length before they launch, and the kernels every id. Of the host's memory a kernel reaches
//!   [`Pinned`] alone, and only `cache.cu` gets its address: it reads and writes rows whose ids it has checked against the
//!   rows there are, at places below the capacity. An error elsewhere could only damage device memory or end the context.

mod blas;
mod kernel;
mod pinned;

use core::ffi::{CStr, c_int, c_void};
use std::sync::Arc;

#[cfg(not(feature = "linked"))]
use cudarc::cublas::sys as blas_sys;
use cudarc::driver::{CudaContext, CudaGraph, CudaStream, DriverError, result, sys};
#[cfg(not(feature = "linked"))]
use cudarc::nvrtc::sys as nvrtc_sys;
use memlayer_core::Item;

pub(crate) use self::blas::{Blas, Matrix, Operands, Product};
pub(crate) use self::kernel::{Kernel, Module, compile, compiler_version};
pub(crate) use self::pinned::Pinned;
use crate::error::CudaError;
use crate::memory::{View, ViewMut};
use crate::recording::{alone, apart};

/// Gives a driver error the name of the call it came from.
fn driver(call: &'static str) -> impl Fn(DriverError) -> CudaError {
    move |error| {
        let name = error.error_name().ok().map(CStr::to_string_lossy);
        let text = error.error_string().ok().map(CStr::to_string_lossy);
        CudaError::Driver {
            call,
            error: format!("{} ({})", name.as_deref().unwrap_or("unknown error"), text.as_deref().unwrap_or("no text")),
        }
    }
}

/// A device's context, and the stream its work goes to.
#[derive(Clone)]
pub(crate) struct Stream {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    /// Whether the device can begin a kernel while the one before still runs.
    early: bool,
}

/// What kernels are compiled and launched for.
#[derive(Clone, Debug)]
pub(crate) struct Properties {
    pub(crate) name: String,
    pub(crate) capability: (i32, i32),
    pub(crate) multiprocessors: u32,
    /// Bytes of shared memory a block may ask for.
    pub(crate) shared: usize,
    /// Bytes of the second-level cache.
    pub(crate) cache: usize,
}

impl Stream {
    /// The device's primary context and a new stream in it.
    pub(crate) fn open(ordinal: usize) -> Result<Self, CudaError> {
        check_libraries()?;
        let context = apart(|| CudaContext::new(ordinal)).map_err(|error| match error.0 {
            sys::CUresult::CUDA_ERROR_NO_DEVICE | sys::CUresult::CUDA_ERROR_INVALID_DEVICE => {
                CudaError::NoDevice(ordinal)
            }
            _ => driver("cuDevicePrimaryCtxRetain")(error),
        })?;
        let stream = context.new_stream().map_err(driver("cuStreamCreate"))?;
        Self::of(stream)
    }

    /// A stream that exists already.
    pub(crate) fn adopt(stream: &Arc<CudaStream>) -> Result<Self, CudaError> {
        check_libraries()?;
        Self::of(stream.clone())
    }

    fn of(stream: Arc<CudaStream>) -> Result<Self, CudaError> {
        use sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR;
        let context = stream.context().clone();
        let early = context.attribute(MAJOR).map_err(driver("cuDeviceGetAttribute"))? >= 9;
        Ok(Self { context, stream, early })
    }

    pub(crate) fn cuda_stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    pub(crate) fn properties(&self) -> Result<Properties, CudaError> {
        use sys::CUdevice_attribute as A;
        let name = result::device::get_name(self.context.cu_device()).map_err(driver("cuDeviceGetName"))?;
        let attribute = |a| self.context.attribute(a).map_err(driver("cuDeviceGetAttribute"));
        let positive = |a| Ok::<_, CudaError>(attribute(a)?.unsigned_abs());
        Ok(Properties {
            name,
            capability: (
                attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            multiprocessors: positive(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.max(1),
            shared: positive(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize,
            cache: positive(A::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
        })
    }

    /// Wishes that misses of the second-level cache fetch `bytes` at most, in all of the context.
    pub(crate) fn fetch(&self, bytes: usize) -> Result<(), CudaError> {
        use sys::CUresult::{CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_UNSUPPORTED_LIMIT};
        self.bind()?;
        match result::ctx::set_limit(sys::CUlimit::CU_LIMIT_MAX_L2_FETCH_GRANULARITY, bytes) {
            Err(error) if !matches!(error.0, CUDA_ERROR_INVALID_VALUE | CUDA_ERROR_UNSUPPORTED_LIMIT) => {
                Err(driver("cuCtxSetLimit")(error))
            }
            _ => Ok(()),
        }
    }

    fn bind(&self) -> Result<(), CudaError> {
        self.context.bind_to_thread().map_err(driver("cuCtxSetCurrent"))
    }

    /// Waits for all work of the stream.
    pub(crate) fn synchronize(&self) -> Result<(), CudaError> {
        self.stream.synchronize().map_err(driver("cuStreamSynchronize"))
    }

    /// So many bytes, zero.
    pub(crate) fn allocate(&self, bytes: usize) -> Result<Allocation, CudaError> {
        if bytes == 0 {
            return Ok(Allocation { pointer: EMPTY, bytes, stream: self.clone() });
        }
        self.bind()?;
        // SAFETY: the stream is alive. The memory is zeroed on the stream before any other work can see it.
        let pointer = unsafe { result::malloc_async(self.stream.cu_stream(), bytes) };
        let allocation =
            Allocation { pointer: pointer.map_err(driver("cuMemAllocAsync"))?, bytes, stream: self.clone() };
        self.zero(allocation.pointer, bytes)?;
        Ok(allocation)
    }

    /// Zeroes bytes of device memory.
    pub(crate) fn zero(&self, pointer: u64, bytes: usize) -> Result<(), CudaError> {
        self.fill(pointer, 0, bytes)
    }

    /// Sets bytes of device memory.
    pub(crate) fn fill(&self, pointer: u64, byte: u8, bytes: usize) -> Result<(), CudaError> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: callers give the pointer and length of a mutable view or an allocation of their own.
        unsafe { result::memset_d8_async(pointer, byte, bytes, self.stream.cu_stream()) }
            .map_err(driver("cuMemsetD8Async"))
    }

    /// Copies within device memory.
    pub(crate) fn copy<T: Item>(&self, from: View<'_, T>, to: &ViewMut<'_, T>) -> Result<(), CudaError> {
        debug_assert_eq!(from.len(), to.len());
        if from.is_empty() {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: both views are that long (the caller checked that they are equally long), and a mutable view shares
        // no memory with another.
        unsafe {
            result::memcpy_dtod_async(
                to.pointer(),
                from.pointer(),
                size_of_val_len::<T>(from.len()),
                self.stream.cu_stream(),
            )
        }
        .map_err(driver("cuMemcpyDtoDAsync"))
    }

    /// Copies from the host, and waits.
    pub(crate) fn upload<T: Item>(&self, from: &[T], to: &ViewMut<'_, T>) -> Result<(), CudaError> {
        debug_assert_eq!(from.len(), to.len());
        if from.is_empty() {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the view is as long as the slice, and the slice is borrowed until the copy is over: the next call
        // waits for it.
        unsafe { result::memcpy_htod_async(to.pointer(), from, self.stream.cu_stream()) }
            .map_err(driver("cuMemcpyHtoDAsync"))?;
        self.synchronize()
    }

    /// Copies to the host, and waits.
    pub(crate) fn download<T: Item>(&self, from: View<'_, T>, to: &mut [T]) -> Result<(), CudaError> {
        debug_assert_eq!(from.len(), to.len());
        if from.is_empty() {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the view is as long as the slice, any bits make a `T` (it is `Pod`), and the slice is borrowed until
        // the copy is over: the next call waits for it.
        unsafe { result::memcpy_dtoh_async(to, from.pointer(), self.stream.cu_stream()) }
            .map_err(driver("cuMemcpyDtoHAsync"))?;
        self.synchronize()
    }

    /// Launches a kernel.
    ///
    /// # Panics
    /// If the arguments are not of the kernel's number and sizes: a mistake of this crate.
    pub(crate) fn launch(&self, kernel: &Kernel, shape: Shape, args: &mut Args) -> Result<(), CudaError> {
        if shape.grid.0 == 0 || shape.grid.1 == 0 {
            return Ok(());
        }
        self.bind()?;
        let function = &kernel.0;
        assert_eq!(function.sizes, args.sizes[..args.len], "arguments of {}", function.name);
        if shape.shared > DEFAULT_SHARED {
            let bytes = c_int::try_from(shape.shared).unwrap_or(c_int::MAX);
            // SAFETY: the function is alive, for its module is.
            unsafe {
                result::function::set_function_attribute(
                    function.handle,
                    sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    bytes,
                )
            }
            .map_err(driver("cuFuncSetAttribute"))?;
        }
        let mut pointers = [core::ptr::null_mut::<c_void>(); MAX_ARGS];
        for (pointer, &start) in pointers.iter_mut().zip(&args.starts[..args.len]) {
            *pointer = (&raw mut args.words[start]).cast();
        }
        let mut early = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: shape.grid.0,
            gridDimY: shape.grid.1,
            gridDimZ: 1,
            blockDimX: shape.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: u32::try_from(shape.shared).unwrap_or(u32::MAX),
            hStream: self.stream.cu_stream(),
            attrs: &raw mut early,
            numAttrs: u32::from(shape.early && self.early),
        };
        // SAFETY: the function is alive, for its module is. There is one pointer for each parameter, to storage of
        // that parameter's size (asserted above) which the call copies, as it does the configuration. Which device memory
        // the parameters reach is the kernel's contract, stated in its file; the operations check it before they launch. A
        // kernel that is launched early waits for what was launched before it touches memory: that is its contract too.
        unsafe {
            sys::cuLaunchKernelEx(&raw const config, function.handle, pointers.as_mut_ptr(), core::ptr::null_mut())
                .result()
        }
        .map_err(driver(function.name))
    }

    /// Runs `record`, whose launches are kept instead of made, and gives what was kept.
    pub(crate) fn capture(&self, record: impl FnOnce() -> Result<(), CudaError>) -> Result<CudaGraph, CudaError> {
        alone(|| self.capture_alone(record))
    }

    fn capture_alone(&self, record: impl FnOnce() -> Result<(), CudaError>) -> Result<CudaGraph, CudaError> {
        self.stream
            .begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
            .map_err(driver("cuStreamBeginCapture"))?;
        let recorded = record();
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        // The capture ends whatever the recording gave: a stream left in capture is of no use.
        let graph = self.stream.end_capture(flags).map_err(driver("cuStreamEndCapture"));
        recorded?;
        graph?
            .ok_or_else(|| CudaError::Driver { call: "cuStreamEndCapture", error: "no graph was recorded".to_owned() })
    }
}

pub(crate) fn launch_graph(graph: &CudaGraph) -> Result<(), CudaError> {
    graph.launch().map_err(driver("cuGraphLaunch"))
}

/// The address of memory of no bytes.
const EMPTY: u64 = 256;
/// Shared memory that a kernel may have without asking.
const DEFAULT_SHARED: usize = 48 << 10;

const fn size_of_val_len<T>(len: usize) -> usize {
    // A buffer of so many items exists, so their bytes are no more than a usize holds.
    len * size_of::<T>()
}

/// Where the program is linked against the libraries it would not have started without them.
#[cfg(feature = "linked")]
#[allow(clippy::unnecessary_wraps, reason = "the other form of this can fail")]
const fn check_libraries() -> Result<(), CudaError> {
    Ok(())
}

/// Fails unless the libraries are there: cudarc ends the program if it cannot load one.
#[cfg(not(feature = "linked"))]
fn check_libraries() -> Result<(), CudaError> {
    // SAFETY: the libraries are NVIDIA's; loading them runs their initializers, which is what they are for.
    unsafe {
        if !sys::is_culib_present() {
            return Err(CudaError::Library("the NVIDIA driver (libcuda)"));
        }
        if !nvrtc_sys::is_culib_present() {
            return Err(CudaError::Library("CUDA's run-time compiler (libnvrtc)"));
        }
        if !blas_sys::is_culib_present() {
            return Err(CudaError::Library("cuBLAS (libcublas)"));
        }
    }
    Ok(())
}

/// Device memory, freed in the order of the stream.
pub(crate) struct Allocation {
    pointer: u64,
    bytes: usize,
    stream: Stream,
}

impl Allocation {
    pub(crate) fn pointer(&self) -> u64 {
        self.pointer
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if self.bytes > 0 && self.stream.bind().is_ok() {
            // SAFETY: the memory came from `malloc_async`, is freed once, and behind all work that was started with it:
            // views end before their buffer does. What the driver reports here, the next call reports too.
            let _ = unsafe { result::free_async(self.pointer, self.stream.stream.cu_stream()) };
        }
    }
}

impl<T: Item> View<'_, T> {
    /// Memory of the device that another library owns.
    ///
    /// # Safety
    /// * `pointer` is device memory of `len` items, aligned to an item, that lives for the view's lifetime.
    /// * All work on it is ordered with the work of the [`crate::Cuda`] that the view is used with, as it is on one
    ///   stream.
    #[must_use]
    pub const unsafe fn from_raw(pointer: u64, len: usize) -> Self {
        Self::at(pointer, len)
    }
}

impl<T: Item> ViewMut<'_, T> {
    /// Memory of the device that another library owns.
    ///
    /// # Safety
    /// * As for [`View::from_raw`].
    /// * No other view of this memory is used in the view's lifetime.
    #[must_use]
    pub const unsafe fn from_raw(pointer: u64, len: usize) -> Self {
        Self::at(pointer, len)
    }
}

/// The shape of a launch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    grid: (u32, u32),
    block: u32,
    shared: usize,
    early: bool,
}

impl Shape {
    /// So many blocks of so many threads. The grid is cut where the device has no more: kernels over more walk on.
    pub(crate) fn new(blocks: usize, block: u32) -> Self {
        Self {
            grid: (u32::try_from(blocks).unwrap_or(u32::MAX).min(i32::MAX as u32), 1),
            block,
            shared: 0,
            early: false,
        }
    }
    /// A second dimension of the grid.
    pub(crate) fn by(mut self, blocks: usize) -> Self {
        self.grid.1 = u32::try_from(blocks).unwrap_or(u32::MAX);
        self
    }
    /// Lets the kernel begin while the one before still runs, on devices that can (`wait_for_previous` in `common.cuh`).
    pub(crate) const fn early(mut self) -> Self {
        self.early = true;
        self
    }
    /// Bytes of dynamic shared memory.
    pub(crate) const fn shared(mut self, bytes: usize) -> Self {
        self.shared = bytes;
        self
    }
}

const MAX_ARGS: usize = 16;

/// The parameters of a launch, in order.
pub(crate) struct Args {
    words: [u64; 48],
    starts: [usize; MAX_ARGS],
    sizes: [usize; MAX_ARGS],
    len: usize,
    used: usize,
}

impl Args {
    pub(crate) const fn new() -> Self {
        Self { words: [0; 48], starts: [0; MAX_ARGS], sizes: [0; MAX_ARGS], len: 0, used: 0 }
    }

    /// A value as its bytes.
    pub(crate) fn value<T: bytemuck::NoUninit>(mut self, value: T) -> Self {
        let bytes = bytemuck::bytes_of(&value);
        let words = bytes.len().div_ceil(8);
        bytemuck::cast_slice_mut::<u64, u8>(&mut self.words[self.used..self.used + words])[..bytes.len()]
            .copy_from_slice(bytes);
        (self.starts[self.len], self.sizes[self.len]) = (self.used, bytes.len());
        self.len += 1;
        self.used += words;
        self
    }
    pub(crate) fn read<T: Item>(self, view: View<'_, T>) -> Self {
        self.value(view.pointer())
    }
    /// A view, or null.
    pub(crate) fn read_or_null<T: Item>(self, view: Option<View<'_, T>>) -> Self {
        self.value(view.map_or(0, View::pointer))
    }
    pub(crate) fn write<T: Item>(self, view: &ViewMut<'_, T>) -> Self {
        self.value(view.pointer())
    }
}

/// A point in the stream's work, to measure time from.
pub(crate) struct Event {
    handle: sys::CUevent,
    stream: Stream,
}

impl Event {
    /// A point behind what was started so far.
    pub(crate) fn record(stream: &Stream) -> Result<Self, CudaError> {
        stream.bind()?;
        let handle = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map_err(driver("cuEventCreate"))?;
        let event = Self { handle, stream: stream.clone() };
        // SAFETY: event and stream are alive and of one context.
        unsafe { result::event::record(event.handle, stream.stream.cu_stream()) }.map_err(driver("cuEventRecord"))?;
        Ok(event)
    }

    /// Waits for both, and gives the milliseconds between them.
    pub(crate) fn milliseconds_until(&self, end: &Self) -> Result<f32, CudaError> {
        self.stream.bind()?;
        // SAFETY: both events are alive and recorded.
        unsafe {
            result::event::synchronize(end.handle).map_err(driver("cuEventSynchronize"))?;
            result::event::elapsed(self.handle, end.handle).map_err(driver("cuEventElapsedTime"))
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.stream.bind().is_ok() {
            // SAFETY: the event is alive and destroyed once; the driver waits with that until it is over.
            let _ = unsafe { result::event::destroy(self.handle) };
        }
    }
}

#[cfg(test)]
mod tests {
    use memlayer_core::Device as _;
    use memlayer_tests::conformance::skipped;

    use super::*;
    use crate::Cuda;
    use crate::kernels::{File, Variant};

    /// What asks for more shared memory than the device has is not run, and does not disturb what comes behind it.
    #[test]
    fn more_shared_memory_than_there_is() {
        let cuda = match Cuda::new(0) {
            Ok(cuda) => cuda,
            Err(error @ (CudaError::Library(_) | CudaError::NoDevice(_))) => {
                let required = std::env::var("MEMLAYER_REQUIRE_CUDA").is_ok_and(|v| v == "1");
                assert!(!required, "a CUDA device is required here: {error}");
                return skipped("cuda");
            }
            Err(error) => panic!("device 0: {error}"),
        };
        let kernel = cuda.kernels.get(Variant::of(File::Dense), "total").expect("a kernel");
        let (sums, mut out) = (cuda.upload(&[1f32, 2.0]).expect("a buffer"), cuda.zeros::<f32>(1).expect("a buffer"));
        let mut run = |bytes| {
            let mut args = Args::new().read(sums.view()).value(2u64).write(&out.view_mut());
            let launched = cuda.stream.launch(&kernel, Shape::new(1, 256).shared(bytes), &mut args);
            let mut found = [0f32];
            cuda.read(out.view(), &mut found).expect("a number");
            (launched, found[0])
        };
        let shared = cuda.properties.shared;
        let (refused, found) = run(shared + 1);
        assert!(matches!(refused, Err(CudaError::Driver { call: "cuFuncSetAttribute", .. })), "{refused:?}");
        assert_eq!(found, 0.0, "it ran");
        // What the kernel declares itself counts too.
        assert_eq!(run(shared - 1024), (Ok(()), 3.0));
        assert_eq!(cuda.synchronize(), Ok(()));
    }
}
