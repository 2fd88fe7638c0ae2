//! Recordings of graphs, and what must stay away from them.
//!
//! While a stream records, whatever waits for its whole context breaks the recording, from any thread
//! (`CUDA_ERROR_STREAM_CAPTURE_INVALIDATED`). Making and ending a cuBLAS handle, loading and unloading code, and pinning memory
//! wait so, or may. A process may have several [`crate::Cuda`]s in one context, so the lock is the process's: who records has it
//! alone, those calls share it. Launches and copies, which are of one stream, do not take it.

use core::cell::Cell;
use std::sync::{PoisonError, RwLock};

static RECORDING: RwLock<()> = RwLock::new(());

thread_local! {
    /// Whether this thread records: it would wait for itself.
    static HERE: Cell<bool> = const { Cell::new(false) };
}

/// Makes a call that may wait for the whole context, while no other thread records. Such calls do not nest.
pub(crate) fn apart<R>(call: impl FnOnce() -> R) -> R {
    // The lock guards no data that a panic could leave half-written.
    let _shared = (!HERE.get()).then(|| RECORDING.read().unwrap_or_else(PoisonError::into_inner));
    call()
}

/// Records while no other thread records or makes such a call.
pub(crate) fn alone<R>(record: impl FnOnce() -> R) -> R {
    struct Until;
    impl Drop for Until {
        fn drop(&mut self) {
            HERE.set(false);
        }
    }
    if HERE.get() {
        return record();
    }
    let _alone = RECORDING.write().unwrap_or_else(PoisonError::into_inner);
    HERE.set(true);
    let _until = Until;
    record()
}

#[cfg(test)]
mod tests {
    use core::sync::atomic::{AtomicBool, Ordering};
    use core::time::Duration;
    use std::thread;

    use super::{alone, apart};

    #[test]
    fn a_recording_is_not_disturbed_and_waits_for_nothing_of_its_own() {
        let recording = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        apart(|| assert!(!recording.load(Ordering::SeqCst), "a call in the midst of a recording"));
                    }
                });
            }
            for _ in 0..5 {
                alone(|| {
                    recording.store(true, Ordering::SeqCst);
                    thread::sleep(Duration::from_millis(1));
                    apart(|| ());
                    alone(|| ());
                    assert!(recording.swap(false, Ordering::SeqCst));
                });
            }
        });
    }
}
