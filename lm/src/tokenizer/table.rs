//! The tokenizer that the tokenizers crate trained, as the section that answering reads.

use std::collections::HashMap;

use memlayer_infer::tokenizer::{Merge, VERSION};
use serde::Deserialize;

use super::{SPECIAL, wrong};
use crate::error::Result;

/// What is read of the crate's JSON.
#[derive(Deserialize)]
struct Json {
    model: Model,
    added_tokens: Vec<Added>,
}

#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type")]
    kind: String,
    vocab: HashMap<String, u32>,
    merges: Vec<(String, String)>,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
}

/// The characters that stand for the bytes 0 to 255 in the crate's texts: printable ones for themselves, the others for
/// characters from U+0100 on, in order.
fn characters() -> [char; 256] {
    let mut next = 0x100;
    core::array::from_fn(|byte| {
        let itself = matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        let code = if itself {
            u32::try_from(byte).unwrap_or(0)
        } else {
            next += 1;
            next - 1
        };
        char::from_u32(code).unwrap_or('\0')
    })
}

/// The section of a tokenizer in the crate's JSON.
pub(super) fn of_json(json: &str) -> Result<Vec<u8>> {
    let Json { model, added_tokens } = serde_json::from_str(json).map_err(wrong)?;
    if model.kind != "BPE" {
        return Err(wrong(format!("its model is {}, not BPE", model.kind)));
    }
    for (id, name) in (0u32..).zip(SPECIAL) {
        if !added_tokens.iter().any(|added| added.id == id && added.content == name) {
            return Err(wrong(format!("`{name}` is not token {id}")));
        }
    }
    let bytes: HashMap<char, u8> = characters().into_iter().zip(0..=255).collect();
    let mut texts = vec![None; model.vocab.len()];
    for (text, &id) in &model.vocab {
        let special = SPECIAL.get(id as usize).map(|special| special.as_bytes().to_vec());
        let read = || text.chars().map(|c| bytes.get(&c).copied()).collect::<Option<Vec<u8>>>();
        let raw = special.or_else(read).ok_or_else(|| wrong(format!("token {id}, `{text}`, is no bytes")))?;
        let place = texts.get_mut(id as usize);
        *place.ok_or_else(|| wrong(format!("token {id} of {}", model.vocab.len())))? = Some(raw);
    }
    let texts: Vec<Vec<u8>> =
        texts.into_iter().collect::<Option<_>>().ok_or_else(|| wrong("two tokens have one number"))?;
    let id = |text: &str| model.vocab.get(text).copied().ok_or_else(|| wrong(format!("`{text}` is no token")));
    let mut merges = Vec::new();
    for (rank, (left, right)) in (0u32..).zip(&model.merges) {
        let token = id(&format!("{left}{right}"))?;
        merges.push(Merge { left: id(left)?, right: id(right)?, rank, token });
    }
    merges.sort_by_key(|merge| (merge.left, merge.right));

    let mut table = Vec::new();
    let word = |n: usize| u32::try_from(n).map(u32::to_le_bytes).map_err(wrong);
    let length = texts.iter().map(Vec::len).sum();
    for n in [VERSION as usize, texts.len(), merges.len(), length] {
        table.extend(word(n)?);
    }
    for c in characters() {
        table.extend(id(c.encode_utf8(&mut [0; 4]))?.to_le_bytes());
    }
    let mut start = 0;
    for text in &texts {
        table.extend(word(start)?);
        start += text.len();
    }
    table.extend(word(start)?);
    merges.iter().for_each(|merge| table.extend(merge.encode()));
    texts.iter().for_each(|text| table.extend(text));
    memlayer_infer::Tokenizer::new(&table)?.check()?;
    Ok(table)
}
