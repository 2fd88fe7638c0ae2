//! Milliseconds of a training step: `cargo run --release -p memlayer-lm --example steps -- data`.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use memlayer_cpu::Cpu;
use memlayer_lm::data::Dataset;
use memlayer_lm::tokenizer::Tokenizer;
use memlayer_lm::train::{TrainConfig, Trainer};
use memlayer_lm::{MemoryConfig, ModelConfig, flops};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> Result<(), Box<dyn core::error::Error>> {
    let folder = std::env::args().nth(1).unwrap_or_else(|| "data".to_owned());
    let data = Dataset::world(Path::new(&folder), 10_000, 1)?;
    let tokenizer = Tokenizer::train(&data.train, 1000)?;
    let memory = MemoryConfig { layers: vec![1], heads: 4, sub_keys: 128, half_dim: 4, top_k: 8 };
    let (vocab, context) = (tokenizer.vocab(), 128);
    let memory = ModelConfig { vocab, dim: 32, layers: 2, heads: 4, hidden: 48, context, memory: Some(memory) };
    let cpu = Arc::new(Cpu::new()?);
    for (name, config) in [("memory", memory.clone()), ("dense", flops::dense_twin(&memory, 16.0)?)] {
        let mut trainer = Trainer::new(&config, &TrainConfig::default(), &data, tokenizer.clone(), &cpu)?;
        for _ in 0..20 {
            trainer.step()?;
        }
        let start = Instant::now();
        let mut loss = 0.0;
        for _ in 0..100 {
            loss = trainer.step()?.loss;
        }
        println!("{name}: {:.2} ms a step, loss {loss:.3}", start.elapsed().as_secs_f64() * 10.0);
    }
    Ok(())
}
