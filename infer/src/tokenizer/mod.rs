//! Byte-level byte-pair encoding (Sennrich et al. 2016), read in place.
//!
//! A text gets a space in front unless it has one, is split into words, and each word's bytes merge, the pair of the lowest
//! rank first, until no pair of neighbours has one. No text gives the special tokens: `<eos>` typed by a user is text.
//!
//! The section is little-endian: version (1), tokens V, merges M and text bytes T, each a `u32`; the token of each byte,
//! `[256]` `u32`; where each token's text begins, `[V + 1]` `u32`; merges ordered by their pair, `[M]` of left, right, rank and
//! token, `u32`; T bytes of text. Tokens 0 to 3 are [`PAD`], [`BOS`], [`SEP`] and [`EOS`].

mod ranges;
mod split;

use crate::error::Error;
use split::Words;

/// Fills the end of a sequence.
pub const PAD: u32 = 0;
/// Begins a sequence.
pub const BOS: u32 = 1;
/// Stands between question and answer.
pub const SEP: u32 = 2;
/// Ends a sequence.
pub const EOS: u32 = 3;
/// Special tokens: those below are no text.
pub const SPECIAL: u32 = 4;

/// Bytes of the longest word. Merging takes the square of a word's length.
pub const MAX_WORD: usize = 4096;

/// The layout that is read.
pub const VERSION: u32 = 1;

/// Tokens and how they merge.
#[derive(Clone, Copy, Debug)]
pub struct Tokenizer<'a> {
    bytes: &'a [[u8; 4]],
    starts: &'a [[u8; 4]],
    merges: &'a [[u8; 16]],
    text: &'a [u8],
}

/// Two neighbours that become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Merge {
    /// The first.
    pub left: u32,
    /// The second.
    pub right: u32,
    /// Lower ranks merge first.
    pub rank: u32,
    /// What they become.
    pub token: u32,
}

impl Merge {
    fn read(bytes: &[u8; 16]) -> Self {
        let (words, _) = bytes.as_chunks::<4>();
        let word = |at: usize| words.get(at).map_or(0, |word| u32::from_le_bytes(*word));
        Self { left: word(0), right: word(1), rank: word(2), token: word(3) }
    }

    /// As the section has it.
    #[must_use]
    pub fn encode(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        for (place, word) in bytes.as_chunks_mut::<4>().0.iter_mut().zip([self.left, self.right, self.rank, self.token])
        {
            *place = word.to_le_bytes();
        }
        bytes
    }
}

fn number(word: Option<&[u8; 4]>) -> u32 {
    word.map_or(0, |word| u32::from_le_bytes(*word))
}

impl<'a> Tokenizer<'a> {
    /// The tokenizer in a section's bytes. Looks at sizes only: see [`Tokenizer::check`].
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if it is of another version or length.
    pub fn new(section: &'a [u8]) -> Result<Self, Error> {
        let fail = |what| Error::Tokenizer { what, at: section.len() };
        let (head, rest) = section.split_at_checked(16).ok_or(fail("is cut off"))?;
        let (head, _) = head.as_chunks::<4>();
        let word = |at: usize| number(head.get(at)) as usize;
        if word(0) != VERSION as usize {
            return Err(Error::Tokenizer { what: "is of another version", at: word(0) });
        }
        let (tokens, merges) = (word(1), word(2));
        let cut = |rest: &'a [u8], len: Option<usize>| {
            len.and_then(|len| rest.split_at_checked(len)).ok_or(fail("is cut off"))
        };
        let (bytes, rest) = cut(rest, Some(4 * 256))?;
        let (starts, rest) = cut(rest, tokens.checked_add(1).and_then(|n| n.checked_mul(4)))?;
        let (merges, text) = cut(rest, merges.checked_mul(16))?;
        if text.len() != word(3) {
            return Err(fail("has bytes that belong to nothing"));
        }
        Ok(Self { bytes: bytes.as_chunks().0, starts: starts.as_chunks().0, merges: merges.as_chunks().0, text })
    }

    /// Reads all of it once: tokens are where they are said to be, merges in order and of tokens, and each makes the text of
    /// both.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] with the first token or merge that is wrong.
    pub fn check(&self) -> Result<(), Error> {
        if self.vocab() < SPECIAL as usize {
            return Err(Error::Tokenizer { what: "has no room for the special tokens", at: self.vocab() });
        }
        let mut end = 0;
        for (at, start) in self.starts.iter().enumerate() {
            let start = u32::from_le_bytes(*start) as usize;
            if start < end || start > self.text.len() || at == self.vocab() && start != self.text.len() {
                return Err(Error::Tokenizer { what: "a token's text is elsewhere", at });
            }
            end = start;
        }
        for (at, byte) in (0u8..=255).zip(self.bytes) {
            if self.token_text(u32::from_le_bytes(*byte)) != [at] {
                return Err(Error::Tokenizer { what: "a byte's token is another text", at: at.into() });
            }
        }
        let mut before = None;
        for (at, merge) in self.merges.iter().map(Merge::read).enumerate() {
            let pair = Some((merge.left, merge.right));
            if pair <= before {
                return Err(Error::Tokenizer { what: "a merge is out of order", at });
            }
            before = pair;
            let [left, right, whole] = [merge.left, merge.right, merge.token].map(|token| self.token_text(token));
            let joined = whole.strip_prefix(left).is_some_and(|rest| rest == right);
            if !joined || left.is_empty() || right.is_empty() {
                return Err(Error::Tokenizer { what: "a merge makes another text", at });
            }
        }
        Ok(())
    }

    /// The number of tokens.
    #[must_use]
    pub fn vocab(&self) -> usize {
        self.starts.len().saturating_sub(1)
    }

    /// The text of a token: nothing if there is no such token.
    #[must_use]
    pub fn token_text(&self, token: u32) -> &'a [u8] {
        let at = token as usize;
        let (start, end) = (number(self.starts.get(at)), number(self.starts.get(at.saturating_add(1))));
        self.text.get(start as usize..end as usize).unwrap_or(&[])
    }

    /// The tokens of a text, in the first places of `out` (overwritten). They are at most as many as the text's bytes and one.
    ///
    /// # Errors
    /// [`Error::TooLong`] if `out` has no place for the tokens and the bytes of the word being merged, [`Error::Word`] if a
    /// word exceeds [`MAX_WORD`].
    pub fn encode<'t>(&self, text: &str, out: &'t mut [u32]) -> Result<&'t [u32], Error> {
        let (mut len, limit) = (0, out.len());
        for word in Words::new(text) {
            let bytes = word.text.len() + usize::from(word.space);
            if bytes > MAX_WORD {
                return Err(Error::Word { bytes, limit: MAX_WORD });
            }
            let found = len + bytes;
            let place = out.get_mut(len..found).ok_or(Error::TooLong { found, limit })?;
            let lead = word.space.then_some(b' ');
            for (place, byte) in place.iter_mut().zip(lead.into_iter().chain(word.text.bytes())) {
                *place = number(self.bytes.get(usize::from(byte)));
            }
            len += self.merge(place);
        }
        out.get(..len).ok_or(Error::TooLong { found: len, limit })
    }

    /// Merges the tokens of a word until no two neighbours do; says how many are left, in the first places.
    fn merge(&self, tokens: &mut [u32]) -> usize {
        let mut len = tokens.len();
        loop {
            let pairs = tokens.iter().zip(tokens.iter().skip(1)).take(len.saturating_sub(1)).enumerate();
            let found = pairs.filter_map(|(at, (&left, &right))| Some((self.merge_of(left, right)?, at)));
            // Of equal ranks the leftmost.
            let Some((merge, at)) = found.min_by_key(|&(merge, at)| (merge.rank, at)) else { return len };
            if let Some(left) = tokens.get_mut(at) {
                *left = merge.token;
            }
            // What stands behind moves up by one.
            let (_, behind) = tokens.split_at_mut((at + 1).min(tokens.len()));
            for i in 1..behind.len() {
                if let Some([to, from]) = behind.get_mut(i - 1..=i) {
                    *to = *from;
                }
            }
            len -= 1;
        }
    }

    fn merge_of(&self, left: u32, right: u32) -> Option<Merge> {
        let pair = |merge: &[u8; 16]| {
            let merge = Merge::read(merge);
            (merge.left, merge.right)
        };
        let at = self.merges.binary_search_by_key(&(left, right), pair).ok()?;
        self.merges.get(at).map(Merge::read)
    }

    /// `<bos> question <sep>`, in the first places of `out` (overwritten).
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn prompt<'t>(&self, question: &str, out: &'t mut [u32]) -> Result<&'t [u32], Error> {
        let limit = out.len();
        let (first, rest) = out.split_first_mut().ok_or(Error::TooLong { found: 2, limit })?;
        *first = BOS;
        let len = 1 + match self.encode(question, rest) {
            Err(Error::TooLong { found, .. }) => return Err(Error::TooLong { found: found + 2, limit }),
            tokens => tokens?.len(),
        };
        *out.get_mut(len).ok_or(Error::TooLong { found: len + 1, limit })? = SEP;
        out.get(..=len).ok_or(Error::TooLong { found: len + 1, limit })
    }

    /// The text of tokens, special ones left out, as bytes: a character that an answer broke off is not whole.
    pub fn decode<'t>(&self, tokens: &'t [u32]) -> impl Iterator<Item = u8> + use<'a, 't> {
        let this = *self;
        tokens.iter().filter(|&&token| token >= SPECIAL).flat_map(move |&token| this.token_text(token).iter().copied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    /// All bytes, "ab" and "abc".
    fn section() -> Vec<u8> {
        let texts: Vec<Vec<u8>> = ["<pad>", "<bos>", "<sep>", "<eos>"]
            .map(|s| s.as_bytes().to_vec())
            .into_iter()
            .chain((0..=255u8).map(|b| alloc::vec![b]))
            .chain([b"ab".to_vec(), b"abc".to_vec(), b" a".to_vec()])
            .collect();
        let merges = [
            Merge { left: 4 + u32::from(b' '), right: 4 + u32::from(b'a'), rank: 2, token: 262 },
            Merge { left: 4 + u32::from(b'a'), right: 4 + u32::from(b'b'), rank: 0, token: 260 },
            Merge { left: 260, right: 4 + u32::from(b'c'), rank: 1, token: 261 },
        ];
        let mut out = Vec::new();
        let word = |n: usize| u32::try_from(n).expect("a number").to_le_bytes();
        let text: Vec<u8> = texts.concat();
        for n in [1, texts.len(), merges.len(), text.len()] {
            out.extend(word(n));
        }
        (0..256).for_each(|byte| out.extend(word(4 + byte)));
        let mut start = 0;
        for token in &texts {
            out.extend(word(start));
            start += token.len();
        }
        out.extend(word(start));
        merges.iter().for_each(|merge| out.extend(merge.encode()));
        out.extend(text);
        out
    }

    #[test]
    fn lower_ranks_merge_first() {
        let section = section();
        let tokenizer = Tokenizer::new(&section).expect("a tokenizer");
        tokenizer.check().expect("a tokenizer");
        let mut out = [0; 64];
        assert_eq!(tokenizer.encode("abc a", &mut out), Ok(&[36, 261, 262][..]));
        assert_eq!(tokenizer.prompt("abc", &mut out), Ok(&[BOS, 36, 261, SEP][..]));
        let text: Vec<u8> = tokenizer.decode(&[BOS, 36, 261, 262, 9999]).collect();
        assert_eq!(text, b" abc a");
        assert_eq!(tokenizer.encode("abc", &mut out[..3]), Err(Error::TooLong { found: 4, limit: 3 }));
        assert_eq!(tokenizer.prompt("abc", &mut out[..4]), Err(Error::TooLong { found: 6, limit: 4 }));
        let long = "a".repeat(MAX_WORD);
        assert!(matches!(tokenizer.encode(&long, &mut out), Err(Error::Word { .. })));
    }

    #[test]
    fn any_damage_is_found_or_harmless() {
        let good = section();
        for cut in 0..good.len() {
            assert!(Tokenizer::new(&good[..cut]).is_err());
        }
        let mut out = [0; 64];
        for at in 0..good.len() {
            for flip in [1, 0x80, 0xff] {
                let mut bytes = good.clone();
                bytes[at] ^= flip;
                let Ok(tokenizer) = Tokenizer::new(&bytes) else { continue };
                // Texts of special tokens are of no use.
                assert!(tokenizer.check().is_err() || at >= 16, "byte {at}");
                if let Ok(tokens) = tokenizer.encode("abc a \u{e9}", &mut out) {
                    let _ = tokenizer.decode(tokens).count();
                }
            }
        }
    }
}
