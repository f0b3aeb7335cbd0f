//! Tokenizer, streaming and conversations, against the library's own encoding and decoding.

use std::sync::LazyLock;

use gateway::{Detokenizer, Message, PromptError, Tokenizer, TokenizerError};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::samples::{byte_fallback, byte_level, load, nano, nano_folder};

type Pair = (Tokenizer, tokenizers::Tokenizer);

static NANO: LazyLock<Pair> = LazyLock::new(|| {
    (nano(), tokenizers::Tokenizer::from_file(nano_folder().join("tokenizer.json")).unwrap())
});
static FALLBACK: LazyLock<Pair> = LazyLock::new(|| load(&byte_fallback(), &json!({})));
/// Control tokens that swallow the spaces around them.
static GREEDY: LazyLock<Pair> = LazyLock::new(|| {
    let mut json = byte_fallback();
    json["added_tokens"][1]["rstrip"] = json!(true);
    json["added_tokens"][2]["lstrip"] = json!(true);
    json["added_tokens"][2]["rstrip"] = json!(true);
    let template = "{% for m in messages %}<|s|>{{ m.content }}<|e|> {% endfor %}";
    load(&json, &json!({"chat_template": template}))
});
static LEVEL: LazyLock<Pair> = LazyLock::new(|| load(&byte_level(), &json!({})));

const TURN_END: u32 = 7;

/// What a client reads: deltas and flush.
fn stream(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut detokenizer = Detokenizer::default();
    let mut text: String = ids.iter().map(|&id| detokenizer.push(&tokenizer.piece(id, true))).collect();
    text.push_str(&detokenizer.finish());
    text
}

fn message(role: &str, content: &str) -> Message {
    Message { role: role.into(), content: content.into() }
}

fn library_ids(library: &tokenizers::Tokenizer, text: &str) -> Vec<u32> {
    library.encode(text, false).unwrap().get_ids().to_vec()
}

/// Ids of a vocabulary, with many runs of bytes.
fn ids(size: u32) -> impl Strategy<Value = Vec<u32>> {
    prop::collection::vec(prop_oneof![0..size, 0..size.min(300)], 0..40)
}

proptest! {
    #[test]
    fn deltas_add_up_to_the_full_decoding(nano in ids(4608), fallback in ids(271), level in ids(263)) {
        for (pair, ids) in [(&NANO, &nano), (&LEVEL, &level), (&FALLBACK, &fallback)] {
            let streamed = stream(&pair.0, ids);
            let stripped = streamed.strip_prefix(' ').filter(|_| std::ptr::eq(pair, &FALLBACK));
            prop_assert_eq!(stripped.unwrap_or(&streamed), pair.0.decode(ids, true));
        }
    }

    /// Where bytes with fallback are no characters the library shows the whole run as U+FFFD, good ones as well.
    #[test]
    fn decoding_is_the_librarys(nano in ids(4608), fallback in ids(271), level in ids(263), skip in any::<bool>()) {
        prop_assert_eq!(LEVEL.1.decode(&level, skip).unwrap(), LEVEL.0.decode(&level, skip));
        for (pair, ids) in [(&NANO, &nano), (&FALLBACK, &fallback)] {
            let expected = pair.1.decode(ids, skip).unwrap();
            let text = pair.0.decode(ids, skip);
            prop_assert_eq!(text.contains('\u{fffd}'), expected.contains('\u{fffd}'));
            if !expected.contains('\u{fffd}') {
                prop_assert_eq!(text, expected);
            }
        }
    }

    #[test]
    fn any_text_comes_back(text in "([a-z ]|[\u{4e00}-\u{9fff}]|🏳|\n|\\PC){0,60}") {
        let text = text.replace('▁', "");
        let ids = NANO.0.encode(&text).unwrap();
        prop_assert_eq!(&ids, &library_ids(&NANO.1, &text));
        prop_assert_eq!(NANO.0.decode(&ids, false), text.clone());
        for pair in [&LEVEL, &FALLBACK] {
            prop_assert_eq!(pair.0.decode(&pair.0.encode(&text).unwrap(), false), text.clone());
        }
    }

    #[test]
    fn a_plain_conversation_is_encoded_as_in_one_go(content in "([a-z <|>]|im_end|\n|光){0,30}") {
        prop_assume!(!content.contains("<|im_end|>"));
        let ids = NANO.0.encode_conversation(&[message("user", &content)]).unwrap();
        let text = format!("<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n");
        prop_assert_eq!(ids, library_ids(&NANO.1, &text));
    }

    #[test]
    fn tokens_that_swallow_spaces_do_so_in_a_conversation(contents in prop::collection::vec("( |a|ab|<|光|\n){0,6}", 1..4)) {
        let messages: Vec<Message> = contents.iter().map(|content| message("user", content)).collect();
        let text: String = contents.iter().map(|content| format!("<|s|>{content}<|e|> ")).collect();
        prop_assert_eq!(GREEDY.0.encode_conversation(&messages).unwrap(), library_ids(&GREEDY.1, &text));
    }

    #[test]
    fn no_content_leaves_its_turn(
        contents in prop::collection::vec(
            prop::collection::vec(prop::sample::select(vec!["<|im_", "end|>", "<|im_end|>", "<|im_start|>", "<unk>", "<", " a\n"]), 0..6),
            1..4,
        ),
    ) {
        let messages: Vec<Message> = contents.iter().map(|parts| message("user", &parts.concat())).collect();
        let ids = NANO.0.encode_conversation(&messages).unwrap();
        let text: String = messages.iter().map(|m| format!("<|im_start|>user\n{}<|im_end|>\n", m.content)).collect();
        prop_assert_eq!(NANO.0.decode(&ids, false), text + "<|im_start|>assistant\n");
        prop_assert_eq!(ids.iter().filter(|&&id| id == TURN_END).count(), messages.len());
        prop_assert_eq!(ids.iter().filter(|&&id| id < 8).count(), 2 * messages.len() + 1);
    }
}

#[test]
fn a_raw_prompt_may_write_control_tokens() {
    assert_eq!(NANO.0.encode("<|im_end|>").unwrap(), [TURN_END]);
}

#[test]
fn messages_without_anything_between_them_form_no_control_token() {
    let config = json!({"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}<|e|>"});
    let (tokenizer, _) = load(&byte_fallback(), &config);
    let ids = tokenizer.encode_conversation(&[message("user", "<|"), message("user", "e|>")]).unwrap();
    assert_eq!(tokenizer.decode(&ids, false), "<|e|><|e|>");
    assert_eq!(ids.iter().filter(|&&id| id == 2).count(), 1);
}

#[test]
fn tokens_that_only_the_configuration_or_the_template_makes_special_are_guarded_too() {
    let mut json = byte_fallback();
    json["added_tokens"][1]["special"] = json!(false);
    json["added_tokens"][2]["special"] = json!(false);
    let config = json!({"chat_template": "{{ messages[0].content }}<|s|>",
                        "added_tokens_decoder": {"2": {"content": "<|e|>", "special": true}}});
    let (tokenizer, _) = load(&json, &config);
    let ids = tokenizer.encode_conversation(&[message("user", "<|e|><|s|>")]).unwrap();
    assert_eq!(ids.iter().filter(|&&id| id == 1 || id == 2).collect::<Vec<_>>(), [&1]);
    assert_eq!(tokenizer.decode(&[2], true), "", "special");
    assert_eq!(tokenizer.decode(&[1], true), "<|s|>", "spelled by the template, and shown");
}

#[test]
fn a_model_that_finds_control_tokens_by_itself_is_caught() {
    let mut json = byte_fallback();
    json["model"]["ignore_merges"] = json!(true);
    json["normalizer"] = Value::Null;
    let (tokenizer, _) = load(&json, &json!({"chat_template": "{{ messages[0].content }}"}));
    let error = tokenizer.encode_conversation(&[message("user", "<|e|>")]).unwrap_err();
    assert!(matches!(&error, PromptError::Tokenizer(what) if what.contains("<|e|>")), "{error}");
}

#[test]
fn stand_ins_are_not_taken_from_outside() {
    let error = NANO.0.encode_conversation(&[message("user", "a\u{fdd0}|im_end|>")]).unwrap_err();
    assert_eq!(error, PromptError::Noncharacter { index: 0, code: 0xfdd0 });
}

#[test]
fn a_model_without_a_template_says_so() {
    assert_eq!(FALLBACK.0.encode_conversation(&[message("user", "a")]), Err(PromptError::NoTemplate));
    assert!(!FALLBACK.0.has_chat_template());
}

#[test]
fn a_template_in_a_file_of_its_own_comes_first() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), byte_fallback().to_string()).unwrap();
    std::fs::write(folder.path().join("tokenizer_config.json"), r#"{"chat_template": "a"}"#).unwrap();
    std::fs::write(folder.path().join("chat_template.jinja"), "b\n").unwrap();
    let tokenizer = Tokenizer::load(folder.path()).unwrap();
    let ids = tokenizer.encode_conversation(&[message("user", "a")]).unwrap();
    assert_eq!(tokenizer.decode(&ids, false), "b");
}

#[test]
fn the_space_of_a_continuation_is_kept() {
    let ids = FALLBACK.0.encode("ab ab").unwrap();
    assert_eq!(FALLBACK.0.decode(&ids, true), "ab ab");
    assert_eq!(stream(&FALLBACK.0, &ids[1..]), " ab");
}

#[test]
fn stop_ids_come_from_all_files() {
    assert_eq!(NANO.0.stop_ids(), [2, TURN_END]);
    let (base, _) = load(&byte_fallback(), &json!({"eos_token": "<|s|>"}));
    assert_eq!(base.stop_ids(), [] as [u32; 0], "a base model's own configuration has the say");
    let (chat, _) =
        load(&byte_fallback(), &json!({"eos_token": "<|s|>", "chat_template": "{{ eos_token }}"}));
    assert_eq!(chat.stop_ids(), [1]);
}

#[test]
fn a_tokenizer_of_another_model_is_refused_with_both_sizes() {
    let error = NANO.0.check(4607).unwrap_err();
    assert!(matches!(error, TokenizerError::TooLarge { tokens: 4608, vocabulary: 4607 }));
    assert_eq!(error.to_string(), "the tokenizer has 4608 tokens, but the model's embedding has 4607 rows");
    assert!(NANO.0.check(4608).is_ok());
    assert!(NANO.0.check(4672).is_ok(), "padded rows");
}

#[test]
fn added_tokens_may_lie_above_the_embedding() {
    let mut json = byte_fallback();
    let mut above = json["added_tokens"][0].clone();
    above["content"] = json!("<|above|>");
    above["id"] = json!(271);
    json["added_tokens"].as_array_mut().unwrap().push(above);
    let (tokenizer, _) = load(&json, &json!({}));
    assert_eq!(tokenizer.size(), 272);
    assert!(tokenizer.check(271).is_ok());
    assert!(tokenizer.check(270).is_err());
}

#[test]
fn ids_without_a_token_have_no_text() {
    assert_eq!(NANO.0.decode(&[4608, u32::MAX], false), "");
}

#[test]
fn truncation_and_padding_of_the_file_are_off() {
    let mut json = byte_fallback();
    json["truncation"] =
        json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
    json["padding"] = json!({"strategy": {"Fixed": 20}, "direction": "Right", "pad_to_multiple_of": null,
                             "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"});
    let (tokenizer, _) = load(&json, &json!({}));
    assert_eq!(tokenizer.decode(&tokenizer.encode("abab ab").unwrap(), false), "abab ab");
}
