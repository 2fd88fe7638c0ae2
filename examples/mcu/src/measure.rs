//! What a token costs: instructions, and memory.

use core::arch::asm;

use cortex_m::peripheral::SYST;
use cortex_m::peripheral::syst::SystClkSource;

/// Counts down from here, 24 bits.
const RELOAD: u32 = 0x00ff_ffff;

/// Counts instructions by the system timer.
///
/// QEMU has no cycle counter, but with `-icount shift=0` its clock moves by one nanosecond an instruction, and the timer
/// with it. How many instructions a tick of the timer is, depends on the board and is measured first, on a loop of known
/// length. On hardware the unit is then a third or so of that loop's pass: compare it with itself alone.
pub struct Instructions {
    timer: SYST,
    /// Instructions in 256 ticks.
    rate: u32,
}

impl Instructions {
    /// Starts the timer and measures its rate.
    pub fn new(mut timer: SYST) -> Self {
        timer.set_clock_source(SystClkSource::Core);
        timer.set_reload(RELOAD);
        timer.clear_current();
        timer.enable_counter();
        let mut counter = Self { timer, rate: 256 };
        const PASSES: u32 = 1_000_000;
        let ticks = counter.ticks(|| spin(PASSES));
        // Two instructions a pass.
        counter.rate = u32::try_from(u64::from(PASSES) * 2 * 256 / u64::from(ticks.max(1))).unwrap_or(u32::MAX);
        counter
    }

    fn ticks(&mut self, work: impl FnOnce()) -> u32 {
        let before = SYST::get_current();
        work();
        before.wrapping_sub(SYST::get_current()) & RELOAD
    }

    /// Instructions of `work`, to about 50.
    pub fn of(&mut self, work: impl FnOnce()) -> u64 {
        let _ = &self.timer;
        u64::from(self.ticks(work)) * u64::from(self.rate) / 256
    }
}

/// A loop of two instructions a pass.
#[inline(never)]
fn spin(passes: u32) {
    // SAFETY: counts a register down to zero, and touches nothing else but the flags.
    unsafe {
        asm!("2:", "subs {0}, {0}, #1", "bne 2b", inout(reg) passes => _, options(nomem, nostack));
    }
}

/// Bytes of flash and memory, by the symbols of the linker script.
pub struct Memory {
    /// Everything that is loaded: program, constants, images, and the start values of variables.
    pub flash: usize,
    /// Variables.
    pub ram: usize,
    /// The most the stack ever held. It was painted before the program began.
    pub stack: usize,
}

/// What `paint-stack` of `cortex-m-rt` writes.
const PAINT: u32 = 0xcccc_cccc;

unsafe extern "C" {
    static __vector_table: u32;
    static __sidata: u32;
    static __sdata: u32;
    static __edata: u32;
    static __sbss: u32;
    static __ebss: u32;
    static __sheap: u32;
    static _stack_start: u32;
}

/// Measures, at the end of a run.
pub fn memory() -> Memory {
    let at = |symbol: *const u32| symbol.addr();
    let data = at(&raw const __edata) - at(&raw const __sdata);
    let top = at(&raw const _stack_start);
    let mut lowest = &raw const __sheap;
    // SAFETY: from the end of the variables to the top of the stack there is memory, aligned and painted at the start;
    // what is in use holds some word, which is all that is looked at.
    while lowest.addr() < top && unsafe { lowest.read_volatile() } == PAINT {
        lowest = lowest.wrapping_add(1);
    }
    Memory {
        flash: at(&raw const __sidata) + data - at(&raw const __vector_table),
        ram: data + at(&raw const __ebss) - at(&raw const __sbss),
        stack: top - lowest.addr(),
    }
}
