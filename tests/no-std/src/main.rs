//! A program of nothing but `core` and `quantize`: it runs a Memory+ layer forward and backward, updates its rows, packs
//! them into an image and reads that again. It links without std, without an allocator and with nothing of the C library
//! but what copies memory; that it links is the proof. It is not run, and it says nothing of panics.
#![no_std]
#![no_main]

use core::panic::PanicInfo;

use memlayer_core::layer::{Activations, Grads, Keys, Params, Projection, backward, forward};
use memlayer_core::ops::RowUpdate;
use memlayer_core::ops::optim::{Adam, Step};
use memlayer_core::ops::plan::{PlanBuffers, RowGradient, RowReduce};
use memlayer_core::{Config, DenseRows, Reference, RowStore, Scratch, TrainRows};
use memlayer_quantize::image::{Aligned, encoded_len};
use memlayer_quantize::{Image, Section, Writer};

const CONFIG: Config =
    match Config::builder(8).heads(2).sub_keys(4).half_dim(2).top_k(2).silu_gate(true).qk_norm(true).build() {
        Ok(config) => config,
        Err(_) => panic!("sizes do not fit"),
    };
const TOKENS: usize = 3;
const BAGS: usize = TOKENS * CONFIG.bag_len();

/// Buffers of everything, on the stack.
struct Buffers {
    activations: ([f32; 1024], [u32; BAGS]),
    scratch: ([f32; 1024], [u32; 1024]),
    plan: [u32; 3 * BAGS + 2],
}

fn step(values: &mut [f32], state: &mut [f32], weights: &[f32], x: &[f32], b: &mut Buffers) -> Option<f32> {
    let device = Reference::<f32>::new();
    let (query, weights) = weights.split_at_checked(CONFIG.query_len() * 8)?;
    let (keys, weights) = weights.split_at_checked(CONFIG.keys_len())?;
    let (gain, weights) = weights.split_at_checked(CONFIG.gain_len())?;
    let square = weights.get(..64)?;
    let mut out = [0.0; TOKENS * 8];
    let mut sums = [0.0; TOKENS * 8];
    {
        let table = DenseRows::new(&*values, 8);
        let keys: Keys<'_, _, DenseRows<'_, f32>> = Keys::Trained { keys, gain: Some(gain) };
        let params = Params {
            query: Projection { weight: query, bias: None },
            keys,
            query_gain: Some(gain),
            values: &table,
            experts: None,
            silu: Some(Projection { weight: square, bias: None }),
            value_proj: Some(Projection { weight: square, bias: None }),
            sigmoid: None,
        };
        let memory = Scratch { reals: &mut b.activations.0[..], ids: &mut b.activations.1[..] };
        let mut act = Activations::new(&CONFIG, TOKENS, memory).ok()?;
        let scratch = Scratch { reals: &mut b.scratch.0[..], ids: &mut b.scratch.1[..] };
        forward(&device, &CONFIG, &params, x, &mut act, &mut out[..], scratch).ok()?;
        let grads = Grads::new(&mut sums[..]);
        let scratch = Scratch { reals: &mut b.scratch.0[..], ids: &mut b.scratch.1[..] };
        let dout = [1.0; TOKENS * 8];
        backward(&device, &CONFIG, &params, x, &mut act, &dout[..], grads, scratch).ok()?;
        let (mut plan, _) = PlanBuffers::carve(&mut b.plan[..], BAGS).ok()?;
        let scratch = Scratch { reals: &mut b.scratch.0[..], ids: &mut b.scratch.1[..] };
        device.plan(act.ids, CONFIG.slots(), plan.reborrow(), scratch).ok()?;
    }
    let (plan, _) = PlanBuffers::carve(&mut b.plan[..], BAGS).ok()?;
    let rule = Adam { betas: (0.9, 0.95), eps: 1e-8 };
    let weights = &b.activations.0[BAGS..2 * BAGS];
    let gradient = RowGradient { bag: CONFIG.bag_len(), dim: 8, weights, sources: &sums[..] };
    let scratch = Scratch { reals: &mut b.scratch.0[..], ids: &mut b.scratch.1[..] };
    let table = TrainRows::new(values, 8, state, 16)?;
    device.reduce_and_update(table, &rule, &Step::new(0.1, 1), plan.plan(), gradient, scratch).ok()?;
    out.first().copied()
}

/// Packs rows into an image and reads one value of it again.
fn packed(values: &[f32]) -> Option<f32> {
    let mut file = Aligned([0; 4096]);
    let mut sections = [Section::rows::<i8>("values", CONFIG.slots(), 8, 8).ok()?];
    let len = usize::try_from(encoded_len(&sections).ok()?).ok()?;
    let mut writer = Writer::new(file.0.get_mut(..len)?, &mut sections).ok()?;
    writer.pack("values", &DenseRows::new(values, 8), &mut [0i8; 8]).ok()?;
    writer.finish().ok()?;
    let image = Image::parse(file.0.get(..len)?).ok()?;
    image.verify().ok()?;
    Some(image.rows::<i8>("values").ok()?.row(3).value(2))
}

#[unsafe(no_mangle)]
extern "C" fn _start() -> ! {
    let (mut values, mut state) = ([0.5; CONFIG.slots() * 8], [0.0; CONFIG.slots() * 16]);
    let (weights, x) = ([0.25; 1024], [1.0; TOKENS * 8]);
    let mut buffers =
        Buffers { activations: ([0.0; 1024], [0; BAGS]), scratch: ([0.0; 1024], [0; 1024]), plan: [0; 3 * BAGS + 2] };
    let first = step(&mut values, &mut state, &weights, &x, &mut buffers);
    let image = packed(&values);
    core::hint::black_box((first, image));
    loop {
        core::hint::spin_loop();
    }
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    loop {
        core::hint::spin_loop();
    }
}
