//! What bytes a token stands for, read off the tokenizer's own decoder.
//!
//! The library's decoders turn whole sequences into text. A stream needs the bytes of one token at a time, wherever
//! in the text it stands. Every decoder that Yi and LLaMA checkpoints use works token by token, except for a space
//! that is stripped from the very start of a text; decoders that do not are refused when the tokenizer is loaded.

use tokenizers::decoders::DecoderWrapper;
use tokenizers::pre_tokenizers::metaspace::PrependScheme;
use tokenizers::tokenizer::Decoder;

/// The decoder of a tokenizer, one token at a time.
#[derive(Debug, Clone, Default)]
pub(crate) struct Pieces {
    steps: Vec<Step>,
    /// Character that is stripped from the start of a text, at most so many times.
    leading: Option<(char, usize)>,
}

#[derive(Debug, Clone)]
enum Step {
    /// Maps a token to a text by itself.
    Map(DecoderWrapper),
    /// `<0xE4>` is the byte E4.
    ByteFallback,
    /// Every byte has a printable stand-in (GPT-2).
    ByteLevel,
}

impl Pieces {
    /// Reads the decoder, or says what part of it can not be streamed.
    pub(crate) fn new(decoder: Option<&DecoderWrapper>) -> Result<Self, String> {
        let decoder = decoder.ok_or("a tokenizer without a decoder")?;
        let mut pieces = Self::default();
        let mut fused = false;
        for part in flatten(decoder) {
            match part {
                DecoderWrapper::Fuse(_) => fused = true,
                DecoderWrapper::Strip(strip) if strip.stop > 0 => {
                    return Err("a decoder that strips the end of the text".into());
                }
                DecoderWrapper::Strip(strip) if fused => pieces.leading = Some((strip.content, strip.start)),
                _ if fused => return Err("a decoder that works on the whole text".into()),
                DecoderWrapper::ByteFallback(_) => pieces.steps.push(Step::ByteFallback),
                DecoderWrapper::ByteLevel(_) => pieces.steps.push(Step::ByteLevel),
                DecoderWrapper::Metaspace(metaspace) => {
                    if metaspace.prepend_scheme != PrependScheme::Never {
                        pieces.leading = Some((' ', 1));
                    }
                    pieces.steps.push(Step::Map(part.clone()));
                }
                DecoderWrapper::Replace(_) | DecoderWrapper::Strip(_) => {
                    pieces.steps.push(Step::Map(part.clone()));
                }
                DecoderWrapper::BPE(_) | DecoderWrapper::WordPiece(_) | DecoderWrapper::CTC(_) => {
                    return Err("a decoder whose words depend on their neighbours".into());
                }
                DecoderWrapper::Sequence(_) => {}
            }
        }
        Ok(pieces)
    }

    /// The bytes that a token stands for after others.
    pub(crate) fn bytes(&self, token: &str) -> Vec<u8> {
        let mut text = token.to_owned();
        for step in &self.steps {
            match step {
                Step::ByteFallback => {
                    if let Some(byte) = fallback_byte(&text) {
                        return vec![byte];
                    }
                }
                Step::ByteLevel => {
                    return text.chars().map(level_byte).collect::<Option<_>>().unwrap_or(text.into_bytes());
                }
                // An empty token in front, because the first token of a text may be treated differently.
                Step::Map(decoder) => {
                    let mapped = decoder.decode_chain(vec![String::new(), text]).unwrap_or_default();
                    text = mapped.into_iter().nth(1).unwrap_or_default();
                }
            }
        }
        text.into_bytes()
    }

    /// Takes away what the decoder strips from the start of a text that continues no other.
    pub(crate) fn strip_start(&self, text: &mut String) {
        if let Some((content, limit)) = self.leading {
            let count = text.chars().take(limit).take_while(|&c| c == content).count();
            text.drain(..count * content.len_utf8());
        }
    }
}

/// The decoders of nested sequences, in order.
fn flatten(decoder: &DecoderWrapper) -> Vec<&DecoderWrapper> {
    match decoder {
        DecoderWrapper::Sequence(sequence) => sequence.get_decoders().iter().flat_map(flatten).collect(),
        single => vec![single],
    }
}

fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let hexadecimal = digits.len() == 2 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    hexadecimal.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// GPT-2's table: printable Latin-1 stands for itself, the other 68 bytes for U+0100 and on, in order.
fn level_byte(character: char) -> Option<u8> {
    match u32::from(character) {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => u8::try_from(code).ok(),
        code @ 0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        code @ 0x121..=0x142 => u8::try_from(code - 0x121 + 0x7f).ok(),
        0x143 => Some(0xad),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(json: &str) -> Result<Pieces, String> {
        Pieces::new(Some(&serde_json::from_str(json).unwrap()))
    }

    #[test]
    fn every_byte_has_its_stand_in() {
        let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        let mut bytes: Vec<u8> = alphabet.into_iter().map(|c| level_byte(c).unwrap()).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!("ĠĊ¡".chars().map(level_byte).collect::<Option<Vec<_>>>(), Some(vec![b' ', b'\n', 0xa1]));
    }

    #[test]
    fn sentencepiece_keeps_the_space_inside_a_text_and_strips_it_at_the_start() {
        let llama = pieces(
            r#"{"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}"#,
        )
        .unwrap();
        assert_eq!(llama.bytes("▁Hello"), b" Hello");
        assert_eq!(llama.bytes("<0xE4>"), [0xe4]);
        assert_eq!(llama.bytes("<0x+4>"), b"<0x+4>");
        let mut text = String::from("  Hello");
        llama.strip_start(&mut text);
        assert_eq!(text, " Hello");
    }

    #[test]
    fn metaspace_is_a_space_wherever_the_token_stands() {
        let metaspace =
            pieces(r#"{"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}"#).unwrap();
        assert_eq!(metaspace.bytes("▁Hello"), b" Hello");
    }

    #[test]
    fn decoders_that_need_the_whole_text_are_refused() {
        assert!(Pieces::new(None).is_err());
        assert!(pieces(r###"{"type": "WordPiece", "prefix": "##", "cleanup": true}"###).is_err());
        assert!(pieces(r#"{"type": "Strip", "content": " ", "start": 0, "stop": 1}"#).is_err());
    }
}
