//! Memory for tables: zeroed, on pages of 2 MiB where the system gives them.
//!
//! A table's rows are read at random. On pages of 4 KiB nearly every row of a large table is a miss of the processor's
//! address cache as well as of its data caches, so the same rows cost more in a larger table; on pages of 2 MiB they do
//! not. Pages come to be when they are first touched: state of rows that were never trained takes no memory.

use core::marker::PhantomData;
use core::ops::{Deref, DerefMut};
use std::io;

use bytemuck::Pod;
use memmap2::MmapMut;

/// A buffer of `len` items in memory of its own, all zero at first.
#[derive(Debug)]
pub struct TableMemory<T> {
    map: Option<MmapMut>,
    len: usize,
    huge: bool,
    items: PhantomData<T>,
}

impl<T: Pod> TableMemory<T> {
    /// Memory for `len` items.
    ///
    /// # Errors
    /// The system's, if it gives no such memory; also if the bytes do not fit its address space.
    pub fn zeroed(len: usize) -> io::Result<Self> {
        let bytes = len.checked_mul(size_of::<T>()).filter(|&bytes| isize::try_from(bytes).is_ok());
        let bytes = bytes.ok_or_else(|| {
            io::Error::new(io::ErrorKind::OutOfMemory, format!("{len} items exceed the address space"))
        })?;
        // An empty map is an error of the system's, an empty table is none.
        let map = if bytes == 0 { None } else { Some(MmapMut::map_anon(bytes)?) };
        let huge = map.as_ref().is_some_and(ask_for_huge_pages);
        Ok(Self { map, len, huge, items: PhantomData })
    }

    /// Whether the system took the wish for pages of 2 MiB. It may still not have had any.
    #[must_use]
    pub fn huge_pages(&self) -> bool {
        self.huge
    }
}

#[cfg(target_os = "linux")]
fn ask_for_huge_pages(map: &MmapMut) -> bool {
    map.advise(memmap2::Advice::HugePage).is_ok()
}

#[cfg(not(target_os = "linux"))]
fn ask_for_huge_pages(_: &MmapMut) -> bool {
    false
}

impl<T: Pod> Deref for TableMemory<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // A map begins at a page, which is aligned for every item; its length was made from theirs.
        self.map.as_ref().map_or(&[], |map| &bytemuck::cast_slice(map)[..self.len])
    }
}

impl<T: Pod> DerefMut for TableMemory<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        self.map.as_mut().map_or(&mut [], |map| &mut bytemuck::cast_slice_mut(map)[..self.len])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_zero_and_keeps_what_is_written() {
        let mut table = TableMemory::<f32>::zeroed(1_000_003).expect("memory");
        assert_eq!(table.len(), 1_000_003);
        assert!(table.iter().all(|x| x.to_bits() == 0));
        table[1_000_002] = 3.0;
        assert!((table[1_000_002] - 3.0).abs() < 1e-9);
    }

    #[test]
    fn empty_and_absurd_sizes_are_no_panics() {
        let mut nothing = TableMemory::<f32>::zeroed(0).expect("nothing");
        assert!(nothing.is_empty() && nothing.iter_mut().next().is_none());
        assert!(TableMemory::<f32>::zeroed(usize::MAX).is_err());
        assert!(TableMemory::<u8>::zeroed(usize::MAX).is_err());
    }
}
