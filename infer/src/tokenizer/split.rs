//! Words of a text, as byte-level byte-pair encoding has them since GPT-2:
//! `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`.

use super::ranges::{LETTERS, NUMBERS};

/// What a character is to the expression.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Space,
    Letter,
    Number,
    Other,
}

impl Class {
    fn of(c: char) -> Self {
        if c.is_ascii() {
            return match c {
                'a'..='z' | 'A'..='Z' => Self::Letter,
                '0'..='9' => Self::Number,
                c if c.is_whitespace() => Self::Space,
                _ => Self::Other,
            };
        }
        if c.is_whitespace() {
            return Self::Space;
        }
        let code = u32::from(c);
        let among = |ranges: &[(u32, u32)]| {
            let before = ranges.partition_point(|&(_, end)| end < code);
            ranges.get(before).is_some_and(|&(start, _)| start <= code)
        };
        if among(&LETTERS) {
            Self::Letter
        } else if among(&NUMBERS) {
            Self::Number
        } else {
            Self::Other
        }
    }
}

/// Bytes from the start of `text` whose characters are of `class`.
fn run(text: &str, class: Class) -> usize {
    text.char_indices().find(|&(_, c)| Class::of(c) != class).map_or(text.len(), |(at, _)| at)
}

/// A word: its text, behind a space that the text has only in thought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Word<'t> {
    pub(crate) space: bool,
    pub(crate) text: &'t str,
}

/// The words of a text, one after the other; together they are the text, with the space in front that it is read with.
#[derive(Clone, Debug)]
pub(crate) struct Words<'t> {
    /// Whether a space that is not there comes next.
    space: bool,
    text: &'t str,
}

impl<'t> Words<'t> {
    /// Of `text` behind a space, unless it has one or is empty.
    pub(crate) fn new(text: &'t str) -> Self {
        Self { space: !text.is_empty() && !text.starts_with(' '), text }
    }

    /// Bytes of the first word, the space in thought not among them.
    fn first(&self) -> usize {
        const CONTRACTIONS: [&str; 7] = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d"];
        let text = self.text;
        if !self.space
            && let Some(found) = CONTRACTIONS.iter().find(|c| text.starts_with(**c))
        {
            return found.len();
        }
        let body = if self.space { text } else { text.strip_prefix(' ').unwrap_or(text) };
        if let Some(class) = body.chars().next().map(Class::of)
            && class != Class::Space
        {
            return text.len() - body.len() + run(body, class);
        }
        // White space: all of it at the end of the text, elsewhere all but its last character, which leads the next word.
        let spaces = run(text, Class::Space);
        if spaces == text.len() {
            return spaces;
        }
        let last = text.get(..spaces).and_then(|t| t.chars().next_back()).map_or(0, char::len_utf8);
        if spaces > last || self.space { spaces - last } else { spaces }
    }
}

impl<'t> Iterator for Words<'t> {
    type Item = Word<'t>;
    fn next(&mut self) -> Option<Word<'t>> {
        if self.text.is_empty() {
            return None;
        }
        let (text, rest) = self.text.split_at_checked(self.first())?;
        self.text = rest;
        Some(Word { space: core::mem::replace(&mut self.space, false), text })
    }
}

#[cfg(test)]
mod tests {
    use unicode_general_category::{GeneralCategory as G, get_general_category};

    use super::{Class, Words};

    #[test]
    fn classes_are_the_general_categories() {
        for c in '\u{80}'..=char::MAX {
            let class = match get_general_category(c) {
                _ if c.is_whitespace() => Class::Space,
                G::UppercaseLetter | G::LowercaseLetter | G::TitlecaseLetter | G::ModifierLetter | G::OtherLetter => {
                    Class::Letter
                }
                G::DecimalNumber | G::LetterNumber | G::OtherNumber => Class::Number,
                _ => Class::Other,
            };
            assert_eq!(Class::of(c), class, "{c:?}");
        }
    }

    /// The words of a text that begins with a space, so that none is put in front.
    #[track_caller]
    fn check<const N: usize>(text: &str, words: [&str; N]) {
        let found = Words { space: false, text };
        assert!(found.clone().map(|word| word.text).eq(words), "{text:?}: {found:?}");
    }

    #[test]
    fn words_are_the_expressions() {
        check("", []);
        check("What's the time?", ["What", "'s", " the", " time", "?"]);
        check("a  b", ["a", " ", " b"]);
        check("a   ", ["a", "   "]);
        check("a\n\nb", ["a", "\n", "\n", "b"]);
        check("x1y2'''ll", ["x", "1", "y", "2", "'''", "ll"]);
        check("'ll'x", ["'ll", "'", "x"]);
        check(" São Tomé", [" São", " Tomé"]);
        check("½ Ⅷ", ["½", " Ⅷ"]);
        check("\u{a0}\u{a0}a", ["\u{a0}", "\u{a0}", "a"]);
        check(" 'll", [" '", "ll"]);
        check("日本 \u{1f600}", ["日本", " \u{1f600}"]);
    }

    #[test]
    fn a_text_is_read_behind_a_space() {
        let words = |text| Words::new(text).map(|word| (word.space, word.text)).collect::<alloc::vec::Vec<_>>();
        assert_eq!(words("'s a"), [(true, "'"), (false, "s"), (false, " a")]);
        assert_eq!(words(" a"), [(false, " a")]);
        assert_eq!(words("\na"), [(true, ""), (false, "\n"), (false, "a")]);
        assert_eq!(words("\n\na"), [(true, "\n"), (false, "\n"), (false, "a")]);
        assert_eq!(words("\n"), [(true, "\n")]);
        assert_eq!(words(""), []);
    }
}
