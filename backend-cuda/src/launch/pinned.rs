//! Memory of the host that the device reaches.

use core::ptr::NonNull;

use cudarc::driver::{result, sys};
use memlayer_core::Item;

use super::{EMPTY, Stream, driver};
use crate::error::CudaError;
use crate::recording::apart;

/// Memory of the host that the device reaches, and the system does not move.
pub(crate) struct Pinned<T> {
    memory: NonNull<T>,
    /// Its address on the device.
    pointer: u64,
    len: usize,
    stream: Stream,
}

// SAFETY: it owns its memory, as a box does, and hands it out by `&mut self` alone.
unsafe impl<T: Item> Send for Pinned<T> {}
// SAFETY: as above.
unsafe impl<T: Item> Sync for Pinned<T> {}

impl<T: Item> Pinned<T> {
    /// `len` items, zero.
    pub(crate) fn zeroed(stream: &Stream, len: usize) -> Result<Self, CudaError> {
        const CALL: &str = "cuMemHostAlloc";
        let no_memory = || CudaError::Driver { call: CALL, error: "no memory".to_owned() };
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(no_memory)?;
        let mut this = Self { memory: NonNull::dangling(), pointer: EMPTY, len: 0, stream: stream.clone() };
        if bytes == 0 {
            return Ok(this);
        }
        stream.bind()?;
        // SAFETY: a context is bound. What is returned is that many bytes of no one else's, aligned to a page.
        let memory =
            apart(|| unsafe { result::malloc_host(bytes, sys::CU_MEMHOSTALLOC_DEVICEMAP) }).map_err(driver(CALL))?;
        (this.memory, this.len) = (NonNull::new(memory.cast()).ok_or_else(no_memory)?, len);
        // SAFETY: the memory is that long. All bits zero make a `T` (it is `Pod`).
        unsafe { core::ptr::write_bytes(this.memory.as_ptr(), 0, len) };
        // SAFETY: both pointers are to memory of the right kind, the first to a local.
        unsafe { sys::cuMemHostGetDevicePointer_v2(&raw mut this.pointer, this.memory.as_ptr().cast(), 0) }
            .result()
            .map_err(driver("cuMemHostGetDevicePointer"))?;
        Ok(this)
    }

    /// The address on the device.
    pub(crate) const fn pointer(&self) -> u64 {
        self.pointer
    }

    /// The memory. Callers have waited for all work that may touch it.
    pub(crate) const fn lend(&mut self) -> &mut [T] {
        // SAFETY: `len` items from `memory` on are this value's own and were written when it was made; any bits make a `T`.
        // No work of the stream is under way that touches them: `CachedTable::host` alone calls this, behind
        // `synchronize`, and starts none while they are lent.
        unsafe { core::slice::from_raw_parts_mut(self.memory.as_ptr(), self.len) }
    }
}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        if self.len > 0 && self.stream.synchronize().is_ok() && self.stream.bind().is_ok() {
            // SAFETY: the memory came from `malloc_host`, is freed once, and the work that reached it is over.
            let _ = apart(|| unsafe { result::free_host(self.memory.as_ptr().cast()) });
        }
    }
}
