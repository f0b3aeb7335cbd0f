//! Text out of tokens, one at a time.
//!
//! A token stands for bytes ([`crate::pieces`]), not for characters: an emoji or a rare hanzi may take four tokens.
//! Deltas hold whole characters only; bytes that can not become one are shown as U+FFFD, as soon as that is certain.
//! The deltas and the final flush together are the lossy UTF-8 decoding of all the bytes, and at most three bytes
//! are ever held back, so the cost of a token does not grow with the text.

/// Puts characters together out of the bytes of tokens.
#[derive(Debug, Default)]
pub struct Detokenizer {
    /// The beginning of a character, at most three bytes.
    pending: Vec<u8>,
}

impl Detokenizer {
    /// Takes the bytes of the next token and gives back the characters that are now complete.
    pub fn push(&mut self, piece: &[u8]) -> String {
        let bytes = [std::mem::take(&mut self.pending).as_slice(), piece].concat();
        let mut text = String::new();
        let mut rest = bytes.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    return text;
                }
                Err(error) => {
                    let (valid, broken) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    let Some(length) = error.error_len() else {
                        self.pending = broken.to_vec();
                        return text;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &broken[length..];
                }
            }
        }
    }

    /// What is left at the end: U+FFFD for a character that was never completed.
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&self.pending).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_character_comes_whole_with_its_last_byte() {
        let mut detokenizer = Detokenizer::default();
        let emoji = "🏳".as_bytes();
        assert_eq!(detokenizer.push(b"a"), "a");
        assert_eq!(detokenizer.push(&emoji[..1]), "");
        assert_eq!(detokenizer.push(&emoji[1..3]), "");
        assert_eq!(detokenizer.push(&emoji[3..]), "🏳");
        assert_eq!(detokenizer.finish(), "");
    }

    #[test]
    fn broken_bytes_are_shown_once_they_are_certain() {
        let mut detokenizer = Detokenizer::default();
        assert_eq!(detokenizer.push(&[0xe4, 0xbd]), "");
        assert_eq!(detokenizer.push(b"x"), "\u{fffd}x");
        assert_eq!(detokenizer.push(&[0xff]), "\u{fffd}");
        assert_eq!(detokenizer.push(&[0xe4]), "");
        assert_eq!(detokenizer.finish(), "\u{fffd}");
    }

    proptest! {
        #[test]
        fn deltas_add_up_to_the_lossy_decoding(pieces in prop::collection::vec(byte_pieces(), 0..40)) {
            let mut detokenizer = Detokenizer::default();
            let mut text = String::new();
            for piece in &pieces {
                text.push_str(&detokenizer.push(piece));
                prop_assert!(detokenizer.pending.len() <= 3);
            }
            text.push_str(&detokenizer.finish());
            prop_assert_eq!(text, String::from_utf8_lossy(&pieces.concat()).into_owned());
        }
    }

    /// Text, single bytes of it, and noise.
    fn byte_pieces() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            "[a光🏳]{0,3}".prop_map(String::into_bytes),
            prop::collection::vec(any::<u8>(), 0..3),
            prop::sample::select(vec![0xe5u8, 0x85, 0x89, 0xf0, 0x9f, 0x8f, 0xb3])
                .prop_map(|byte| vec![byte]),
        ]
    }
}
