//! Workers that belong to one backend value.
//!
//! A job is a function that everyone who has time runs once; it takes pieces of work from a shared iterator until
//! there are none. The caller always takes part and never waits for a worker that has not begun: a worker joins under
//! the lock, and none joins once the caller has taken the job away. Nothing is allocated by a job.

use core::any::Any;
use core::hint::spin_loop;
use core::iter::repeat;
use core::panic::AssertUnwindSafe;
use core::sync::atomic::{AtomicUsize, Ordering};
use std::panic::{catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Work, in units of about a nanosecond, that is not worth waking anybody for.
const INLINE: usize = 20_000;

/// Looks at the door before a worker lies down, and before the caller does: some tens of microseconds, the time
/// between two operations of a layer.
const SPINS: usize = 4_000;

/// Looks between which the processor is given away.
const SPINS_IN_A_ROW: usize = 32;

/// Looks [`SPINS`] times whether it is `over`, or until it is.
///
/// Whoever is waited for may be on the same processor, though another is idle: so it looked on a virtual machine, where calls of 10
/// microseconds took 119 after a pause, seven to nine in a row. (Its system may take a processor that sleeps for one that the
/// host has taken away.) With the processor given away they took 8 to 18.
fn look(over: impl Fn() -> bool) {
    for n in 1..=SPINS {
        if over() {
            return;
        }
        if n % SPINS_IN_A_ROW == 0 { std::thread::yield_now() } else { spin_loop() }
    }
}

type Job = &'static (dyn Fn() + Sync);

#[derive(Default)]
struct State {
    job: Option<Job>,
    running: usize,
    parked: usize,
    panic: Option<Box<dyn Any + Send>>,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// Counts jobs, and the closing of the pool; changed under the lock, watched without it.
    posted: AtomicUsize,
    /// `state.running`, watched without the lock.
    running: AtomicUsize,
    wake: Condvar,
    done: Condvar,
}

/// Locks what no panic can leave half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The workers.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held by the job that has the workers; another caller meanwhile works alone.
    busy: Mutex<()>,
}

impl Pool {
    /// `threads` threads, the caller's among them.
    pub(crate) fn new(threads: usize) -> std::io::Result<Self> {
        let mut pool = Self { shared: Arc::default(), workers: Vec::new(), busy: Mutex::new(()) };
        for n in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let name = format!("memlayer-cpu {n}");
            pool.workers.push(std::thread::Builder::new().name(name).spawn(move || work(&shared))?);
        }
        Ok(pool)
    }

    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Gives every item to `body`, which is called by several threads at once if `cost`, in nanoseconds, is worth it.
    pub(crate) fn for_each<T: Send>(
        &self,
        cost: usize,
        items: impl Iterator<Item = T> + Send,
        body: impl Fn(T) + Sync,
    ) {
        self.for_each_with(cost, items, repeat(()), |(), item| body(item));
    }

    /// The same with one of `states` for every thread, of which there must be as many as [`Pool::threads`].
    pub(crate) fn for_each_with<T: Send, W>(
        &self,
        cost: usize,
        items: impl Iterator<Item = T> + Send,
        mut states: impl Iterator<Item = W> + Send,
        body: impl Fn(&mut W, T) + Sync,
    ) {
        if cost < INLINE || self.workers.is_empty() {
            if let Some(mut state) = states.next() {
                items.for_each(|item| body(&mut state, item));
            }
            return;
        }
        let (items, states) = (Mutex::new(items), Mutex::new(states));
        self.run(&|| {
            let Some(mut state) = lock(&states).next() else { return };
            loop {
                let item = lock(&items).next();
                match item {
                    Some(item) => body(&mut state, item),
                    None => return,
                }
            }
        });
    }

    /// Runs `job` on the caller's thread and on every worker that comes in time; returns when all have left it.
    fn run(&self, job: &(dyn Fn() + Sync)) {
        let Ok(_busy) = self.busy.try_lock() else { return job() };
        // SAFETY: only the lifetime changes. The reference is used by this call, which has the right one, and by
        // workers that copied it out of `state.job` and added themselves to `state.running` under one lock (`work`).
        // `guard` is dropped before this function returns or unwinds, and `Guard::drop` takes the job out under that
        // lock, so that none can join any more, then waits until `running` is 0: until each who joined has left the
        // job and counted itself out. No use of the reference outlives this call, which `job` outlives.
        let job = unsafe { core::mem::transmute::<&(dyn Fn() + Sync), Job>(job) };
        let guard = Guard(&self.shared);
        let mut state = lock(&self.shared.state);
        state.job = Some(job);
        state.panic = None;
        self.shared.posted.fetch_add(1, Ordering::Release);
        if state.parked > 0 {
            self.shared.wake.notify_all();
        }
        drop(state);
        job();
        drop(guard);
        let panic = lock(&self.shared.state).panic.take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

/// Ends a job when dropped: nobody is in it any more after that.
struct Guard<'a>(&'a Shared);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).job = None;
        look(|| self.0.running.load(Ordering::Acquire) == 0);
        let mut state = lock(&self.0.state);
        while state.running > 0 {
            state = self.0.done.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A worker's life.
fn work(shared: &Shared) {
    let mut seen = 0;
    loop {
        look(|| shared.posted.load(Ordering::Relaxed) != seen);
        let mut state = lock(&shared.state);
        while shared.posted.load(Ordering::Acquire) == seen {
            state.parked += 1;
            state = shared.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.parked -= 1;
        }
        seen = shared.posted.load(Ordering::Acquire);
        if state.closed {
            return;
        }
        let Some(job) = state.job else { continue };
        state.running += 1;
        shared.running.store(state.running, Ordering::Release);
        drop(state);
        let result = catch_unwind(AssertUnwindSafe(job));
        let mut state = lock(&shared.state);
        if let Err(panic) = result {
            state.panic.get_or_insert(panic);
        }
        state.running -= 1;
        shared.running.store(state.running, Ordering::Release);
        if state.running == 0 {
            shared.done.notify_one();
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mut state = lock(&self.shared.state);
        state.closed = true;
        self.shared.posted.fetch_add(1, Ordering::Release);
        self.shared.wake.notify_all();
        drop(state);
        for worker in self.workers.drain(..) {
            // A worker catches every panic of its jobs, and has nothing else to report.
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_done_once() {
        for threads in [1, 2, 7] {
            let pool = Pool::new(threads).expect("threads");
            for n in [0, 1, 2, 100] {
                let mut out = vec![0; n];
                pool.for_each(usize::MAX, out.iter_mut().enumerate(), |(i, out)| *out += i + 1);
                assert!(out.iter().enumerate().all(|(i, &x)| x == i + 1));
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let pool = Pool::new(3).expect("threads");
        for _ in 0..50 {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                pool.for_each(usize::MAX, 0..100, |i| assert!(i != 57, "on purpose"));
            }));
            assert!(caught.is_err());
            let sum = AtomicUsize::new(0);
            pool.for_each(usize::MAX, 0..100, |i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 4950);
        }
    }

    #[test]
    fn a_job_in_a_job_and_several_callers() {
        let pool = &Pool::new(2).expect("threads");
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        let sum = AtomicUsize::new(0);
                        pool.for_each(usize::MAX, 0..10, |_| {
                            pool.for_each(usize::MAX, 0..10, |_| {
                                sum.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                        assert_eq!(sum.into_inner(), 100);
                    }
                });
            }
        });
    }
}
