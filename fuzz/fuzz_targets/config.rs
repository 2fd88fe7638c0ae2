//! Any sizes as a configuration: an error, or sizes that no product of a layer overflows; and as 64 bytes of an image.
#![no_main]

use libfuzzer_sys::fuzz_target;
use memlayer_core::Config;
use memlayer_core::config::Kind;
use memlayer_fuzz::Input;
use memlayer_fuzz::file::{File, mend};
use memlayer_quantize::image::{Image, Section, Writer};

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let mut size = || match input.size(0..=3) {
        0 => input.size(0..=4),
        1 => input.size(0..=1 << 17),
        2 => 1 << input.size(0..=63),
        _ => input.bits() as usize,
    };
    let sizes = [size(), size(), size(), size(), size(), size(), size()];
    let [dim, output, value, heads, sub_keys, half, top_k] = sizes;
    let mut builder = Config::builder(dim).qk_norm(input.flag()).silu_gate(input.flag()).sigmoid_gate(input.flag());
    if input.flag() {
        builder = builder.output_dim(output).value_dim(value).heads(heads).half_dim(half);
    }
    if input.flag() {
        builder = builder.sub_keys(sub_keys).top_k(top_k);
    }
    if input.flag() {
        builder = builder.flat_keys();
    }
    if input.flag() {
        builder = builder.kind(Kind::Peer);
    }
    match builder.build() {
        Ok(config) => {
            lengths(&config);
            comes_back(&config);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    // The bytes themselves as the configuration of an image whose checksums are right.
    let mut raw = [0; 64];
    let rest = input.rest();
    raw[..rest.len().min(64)].copy_from_slice(&rest[..rest.len().min(64)]);
    let mut bytes = image_of(&Config::builder(4).sub_keys(4).top_k(2).build().expect("a layer"));
    bytes[64..128].copy_from_slice(&raw);
    mend(&mut bytes);
    let file = File::new(&bytes);
    match Image::parse(file.bytes()).expect("an image").config("c") {
        Ok(config) => {
            lengths(&config);
            assert_eq!(image_of(&config)[64..128], raw, "a configuration has a single form");
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});

/// Everything that is computed from a configuration.
fn lengths(config: &Config) {
    assert!(config.top_k() <= config.sub_keys() && config.slots() as u64 <= 1 << 32);
    assert!(config.slots().is_multiple_of(config.sub_keys()));
    assert_eq!(config.gain_len(), config.query_len());
    assert!(config.keys_len() >= config.key_rows() && config.query_len() <= config.keys_len());
    assert!(config.bag_len() * config.parts() <= isize::MAX as usize / 8);
    let req = [0, 1, 3].map(|tokens| config.activations_req(tokens));
    // A token more takes as much as the one before, unless that is more than can be counted.
    assert!(req[0].reals <= req[1].reals && req[1].ids <= req[2].ids);
    let _ = config.activations_req(usize::MAX);
}

fn image_of(config: &Config) -> Vec<u8> {
    let mut plan = [Section::config("c").expect("a name")];
    let mut bytes = vec![0; 64 + 64 + 128 + 4];
    let mut writer = Writer::new(&mut bytes[..], &mut plan).expect("a plan");
    writer.config("c", config).expect("the section");
    assert!(writer.finish().expect("the whole image").is_empty());
    bytes
}

fn comes_back(config: &Config) {
    let file = File::new(&image_of(config));
    let image = Image::parse(file.bytes()).expect("an image");
    image.verify().expect("sound");
    assert_eq!(image.config("c").expect("a configuration"), *config);
}
