//! Small tokenizers for the tests, and where the bundled one is.

use std::path::PathBuf;

use gateway::Tokenizer;
use serde_json::{Map, Value, json};

/// The bundled model's folder.
pub(crate) fn nano_folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../models/yi-nano")
}

/// The bundled model's tokenizer.
pub(crate) fn nano() -> Tokenizer {
    Tokenizer::load(&nano_folder()).unwrap()
}

/// Loads a tokenizer as if it lay in a checkpoint's folder, together with the library's view of it.
pub(crate) fn load(tokenizer: &Value, config: &Value) -> (Tokenizer, tokenizers::Tokenizer) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    (Tokenizer::load(folder.path()).unwrap(), serde_json::from_value(tokenizer.clone()).unwrap())
}

/// BPE with byte fallback, as LLaMA has it: the normalizer puts a space first, and the decoder takes it away.
pub(crate) fn byte_fallback() -> Value {
    let bytes = (0..=255).map(|byte| format!("<0x{byte:02X}>"));
    let letters = ["▁", "a", "b", "光", "<", "|", "e", ">", "ab", "▁ab", "<|", "<|e"].map(String::from);
    tokenizer(
        bpe(bytes.chain(letters), &["a b", "▁ ab", "< |", "<| e"], true),
        json!({"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}),
        Value::Null,
        json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}),
    )
}

/// Byte-level BPE, as GPT-2 has it.
pub(crate) fn byte_level() -> Value {
    let mut alphabet: Vec<char> =
        tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let merged = ["ab", "Ġa", "åħ", "åħī"].map(String::from);
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    tokenizer(
        bpe(alphabet.into_iter().map(String::from).chain(merged), &["a b", "Ġ a", "å ħ", "åħ ī"], false),
        Value::Null,
        byte_level.clone(),
        byte_level,
    )
}

fn bpe(tokens: impl Iterator<Item = String>, merges: &[&str], byte_fallback: bool) -> Value {
    let special = ["<unk>", "<|s|>", "<|e|>"].map(String::from);
    let vocab: Map<String, Value> =
        special.into_iter().chain(tokens).enumerate().map(|(id, token)| (token, json!(id))).collect();
    json!({"type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": byte_fallback,
           "ignore_merges": false, "vocab": vocab, "merges": merges})
}

fn tokenizer(model: Value, normalizer: Value, pre_tokenizer: Value, decoder: Value) -> Value {
    let added: Vec<Value> = ["<unk>", "<|s|>", "<|e|>"]
        .iter()
        .enumerate()
        .map(|(id, content)| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        })
        .collect();
    json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": normalizer,
           "pre_tokenizer": pre_tokenizer, "post_processor": null, "decoder": decoder, "model": model})
}
