//! The whole way in small: learn, stop and go on, pack, answer.

use std::path::Path;
use std::sync::Arc;

use memlayer_core::element::Format;
use memlayer_core::{Device, Reference, Scratch};
use memlayer_cpu::Cpu;
use memlayer_infer::{Block, Error, Model, Runs};
use memlayer_lm::data::Dataset;
use memlayer_lm::eval::Questions;
use memlayer_lm::metrics::Normalization;
use memlayer_lm::model::Batch;
use memlayer_lm::packed::{PackedModel, pack};
use memlayer_lm::tokenizer::{EOS, Tokenizer};
use memlayer_lm::train::{TrainConfig, Trainer, latest};
use memlayer_lm::{MemoryConfig, ModelConfig};
use memlayer_quantize::Image;

fn facts(folder: &Path, count: usize) -> Dataset {
    let path = folder.join("facts.jsonl");
    let line =
        |i: usize| format!("{{\"question\": \"Where is thing {i}?\", \"answer\": [\"place {}\"]}}\n", i * 37 % 101);
    std::fs::write(&path, (0..count).map(line).collect::<String>()).expect("a file");
    Dataset::jsonl(&path).expect("facts")
}

fn sizes(tokenizer: &Tokenizer, memory: bool) -> ModelConfig {
    let memory = memory.then(|| MemoryConfig { layers: vec![0, 1], heads: 2, sub_keys: 16, half_dim: 4, top_k: 4 });
    ModelConfig { vocab: tokenizer.vocab(), dim: 16, layers: 2, heads: 2, hidden: 24, context: 48, memory }
}

fn training(steps: u64) -> TrainConfig {
    TrainConfig { steps, batch: 16, warmup: 10, lr: 1e-2, value_lr: 3e-2, ..TrainConfig::default() }
}

fn trainer(data: &Dataset, memory: bool, steps: u64, cpu: &Arc<Cpu>) -> Trainer {
    let tokenizer = Tokenizer::train(&data.train, 300).expect("a tokenizer");
    Trainer::new(&sizes(&tokenizer, memory), &training(steps), data, tokenizer, cpu).expect("a training")
}

fn cpu() -> Arc<Cpu> {
    Arc::new(Cpu::new().expect("a backend"))
}

fn losses(trainer: &mut Trainer, steps: usize) -> Vec<u64> {
    (0..steps).map(|_| trainer.step().expect("a step").loss.to_bits()).collect()
}

#[test]
fn a_broken_training_goes_on_as_if_it_had_not_been() {
    let (folder, cpu) = (tempfile::tempdir().expect("a folder"), cpu());
    let data = facts(folder.path(), 40);
    for memory in [true, false] {
        let unbroken = losses(&mut trainer(&data, memory, 20, &cpu), 20);
        let run = folder.path().join(if memory { "memory" } else { "dense" });
        let tokenizer = Tokenizer::train(&data.train, 300).expect("a tokenizer");
        let open = |steps: u64| {
            let (model, tokenizer) = (sizes(&tokenizer, memory), tokenizer.clone());
            Trainer::open(&run, &model, &training(steps), &data, tokenizer, &cpu)
        };
        let (mut first, lock) = open(20).expect("a training");
        assert_eq!(losses(&mut first, 10), unbroken[..10]);
        first.save(&run).expect("a checkpoint");
        // Steps after the checkpoint are lost, and made again.
        losses(&mut first, 3);
        assert!(open(20).is_err(), "two trainings in one folder");
        drop((first, lock));
        let (mut second, lock) = open(20).expect("a training");
        assert_eq!(second.steps(), 10);
        assert_eq!(losses(&mut second, 10), unbroken[10..]);
        drop((second, lock));

        let error = open(30).expect_err("another configuration").to_string();
        assert!(error.contains("state.json: train is"), "{error}");
        let saved = latest(&run).expect("the folder").expect("a checkpoint");
        assert_eq!(saved.step, 10);
        let model = run.join("checkpoint-10/model.safetensors");
        let bytes = std::fs::read(&model).expect("the file");
        std::fs::write(&model, &bytes[..bytes.len() / 2]).expect("a file");
        let error = open(20).expect_err("a truncated file").to_string();
        assert!(error.contains("model.safetensors"), "{error}");
    }
}

#[test]
fn inference_is_training_without_candle() {
    let (folder, cpu) = (tempfile::tempdir().expect("a folder"), cpu());
    let data = facts(folder.path(), 40);
    for memory in [true, false] {
        let mut trainer = trainer(&data, memory, 60, &cpu);
        losses(&mut trainer, 60);
        let prompts: Vec<Vec<u32>> = (10..30)
            .map(|i| trainer.tokenizer().prompt(&format!("Where is thing {i}?")).expect("tokens"))
            .filter(|p| p.len() == trainer.tokenizer().prompt("Where is thing 10?").expect("tokens").len())
            .collect();
        let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let answer =
            |batch: &[&[u32]]| trainer.with_reader(|reader, cpu| reader.answer(cpu, batch, 6, false)).expect("answers");
        let together = answer(&prompts);
        for (prompt, answered) in prompts.iter().zip(&together) {
            assert_eq!(answer(&[prompt])[0], *answered, "alone and in a batch");
            // Each token is the most likely one that candle's model sees after those before it.
            let mut tokens = prompt.to_vec();
            for &next in answered.tokens.iter().chain((answered.tokens.len() < 6).then_some(&EOS)) {
                let positions = vec![u32::try_from(tokens.len() - 1).expect("a position")];
                let batch = Batch { tokens: tokens.clone(), sequences: 1, positions, targets: vec![] };
                let logits = trainer.model().logits(&batch).expect("logits").flatten_all().expect("flat");
                let logits = logits.to_vec1::<f32>().expect("values");
                let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                assert!(best - logits[next as usize] < 1e-4, "{next} is not the most likely");
                tokens.push(next);
            }
        }
    }
}

/// `memlayer-infer` gives the answers of the batched reader, on the CPU backend and on the reference.
fn answered_without_an_allocator(model: &PackedModel<Vec<u8>>, bytes: &[u8], data: &Dataset, cpu: &Cpu) {
    let image = Image::parse(bytes).expect("an image");
    let mut blocks = [Block::default(); 2];
    let small = Model::open(&image, &mut blocks).expect("a model");
    let reference = Reference::<f32>::new();
    for example in &data.train {
        let prompt = model.tokenizer().prompt(&example.question).expect("a prompt");
        let answers = model.with_reader(|reader| reader.answer(cpu, &[&prompt], 6, false)).expect("answers");
        let mut tokens = [0; 48];
        assert_eq!(small.prompt(&example.question, &mut tokens).expect("a prompt"), prompt);
        for found in [answer(&small, cpu, &prompt), answer(&small, &reference, &prompt)] {
            assert_eq!(answers[0].tokens, found, "{}", example.question);
        }
        let text = model.tokenizer().decode(&answers[0].tokens).expect("text");
        assert_eq!(small.text(&answers[0].tokens, &mut [0; 64]), text);
    }
    let one = &mut [Block::default()];
    assert_eq!(Model::open(&image, one).expect_err("no room"), Error::Blocks { found: 2, limit: 1 });
    let (prompt, mut out) = ([5; 40], [0; 9]);
    let none = Scratch { reals: &mut [][..], ids: &mut [][..] };
    assert_eq!(
        small.answer(cpu, &prompt, &mut out, none).expect_err("too long"),
        Error::TooLong { found: 49, limit: 48 }
    );
    let none = Scratch { reals: &mut [][..], ids: &mut [][..] };
    assert!(matches!(small.answer(cpu, &prompt[..9], &mut out, none), Err(Error::Argument(_))));
}

/// What a device answers with no more scratch than it asked for, all of it NaN at first.
fn answer<D>(model: &Model<'_, '_>, device: &D, prompt: &[u32]) -> Vec<u32>
where
    for<'x> D: Runs + Device<ViewMut<'x, u32> = &'x mut [u32]>,
{
    let req = model.scratch(device, prompt.len() + 6);
    let (mut reals, mut ids) = (vec![f32::NAN; req.reals], vec![u32::MAX; req.ids]);
    let scratch = Scratch { reals: &mut reals[..], ids: &mut ids[..] };
    model.answer(device, prompt, &mut [0; 6], scratch).expect("an answer").to_vec()
}

#[test]
fn facts_are_learned_packed_and_answered() {
    let (folder, cpu) = (tempfile::tempdir().expect("a folder"), cpu());
    let data = facts(folder.path(), 12);
    let mut trainer = trainer(&data, true, 150, &cpu);
    losses(&mut trainer, 150);
    let questions = Questions::new(data.judged().0, trainer.tokenizer()).expect("questions");
    for format in [Format::F32, Format::Int8, Format::E4m3, Format::E5m2] {
        let path = folder.path().join(format.name());
        let packing = pack(trainer.model(), trainer.tokenizer(), format, &path).expect("a file");
        let bytes = std::fs::read(&path).expect("the file");
        assert_eq!(packing.bytes, bytes.len() as u64);
        let model = PackedModel::new(&path, bytes.clone()).expect("a model");
        assert_eq!(model.format().expect("a format"), format);
        assert_eq!(model.data().expect("a fingerprint"), data.fingerprint());
        let recall = model
            .with_reader(|reader| questions.ask(reader, &cpu, model.tokenizer(), Normalization::Squad, |_, _, _| {}));
        assert!((recall.expect("recall").em - 1.0).abs() < 1e-9, "{format}");

        answered_without_an_allocator(&model, &bytes, &data, &cpu);

        let mut flipped = bytes.clone();
        flipped[bytes.len() / 2] ^= 4;
        assert!(PackedModel::new(&path, flipped).expect_err("damaged").to_string().contains(format.name()));
        assert!(PackedModel::new(&path, bytes[..bytes.len() - 1].to_vec()).is_err(), "truncated");
        let mut newer = bytes;
        newer[8] = 9;
        assert!(PackedModel::new(&path, newer).expect_err("too new").to_string().contains('9'));
    }
    assert!(pack(trainer.model(), trainer.tokenizer(), Format::F16, &folder.path().join("f16")).is_err());

    // A weight that is not a number gets neither into a pool nor, were it there, into a file.
    let pool = trainer.model().pool().expect("a memory");
    let (mut rows, state) = pool.read(|rows, state| (rows.to_vec(), state.to_vec())).expect("rows");
    rows[5 * pool.dim() + 2] = f32::NAN;
    let error = pool.restore(&rows, &state, pool.steps()).expect_err("NaN").to_string();
    assert!(error.contains("row 5"), "{error}");
}
