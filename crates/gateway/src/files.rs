//! The files of a checkpoint's folder that say how text becomes tokens and back.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};

/// Why a checkpoint's tokenizer can not be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A file is missing or can not be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{}: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The tokenizer was made for another model.
    #[error("the tokenizer has {tokens} tokens, but the model's embedding has {vocabulary} rows")]
    TooLarge {
        /// Tokens of the tokenizer, without those added to it.
        tokens: u32,
        /// Rows of the embedding.
        vocabulary: u32,
    },
}

/// What is read of `tokenizer_config.json`; the file may be absent.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct TokenizerConfig {
    bos_token: Option<TokenText>,
    eos_token: Option<TokenText>,
    chat_template: Option<Templates>,
    #[serde(default)]
    pub(crate) added_tokens_decoder: HashMap<String, AddedToken>,
}

/// A token that was added to the trained vocabulary.
#[derive(Debug, Deserialize)]
pub(crate) struct AddedToken {
    pub(crate) content: String,
    #[serde(default)]
    pub(crate) special: bool,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum TokenText {
    Plain(String),
    Full { content: String },
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Debug, Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

/// What is read of `generation_config.json`; the file may be absent.
#[derive(Debug, Default, Deserialize)]
struct GenerationConfig {
    eos_token_id: Option<OneOrMany>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

impl TokenText {
    fn into_string(self) -> String {
        match self {
            Self::Plain(content) | Self::Full { content } => content,
        }
    }
}

impl TokenizerConfig {
    pub(crate) fn read(folder: &Path) -> Result<Self, TokenizerError> {
        read_json(&folder.join("tokenizer_config.json"))
    }

    /// Takes the text of the token that begins a sequence.
    pub(crate) fn take_bos(&mut self) -> Option<String> {
        self.bos_token.take().map(TokenText::into_string)
    }

    /// Takes the text of the token that ends a sequence.
    pub(crate) fn take_eos(&mut self) -> Option<String> {
        self.eos_token.take().map(TokenText::into_string)
    }

    /// Takes the chat template: of several named ones that called `default`, or else the first.
    pub(crate) fn take_template(&mut self) -> Option<String> {
        match self.chat_template.take()? {
            Templates::One(template) => Some(template),
            Templates::Named(mut named) => {
                let index = named.iter().position(|entry| entry.name == "default").unwrap_or(0);
                (index < named.len()).then(|| named.swap_remove(index).template)
            }
        }
    }
}

/// The chat template that has a file of its own.
pub(crate) fn read_template(folder: &Path) -> Result<Option<String>, TokenizerError> {
    let path = folder.join("chat_template.jinja");
    let Some(bytes) = read_optional(&path)? else { return Ok(None) };
    let text = String::from_utf8(bytes)
        .map_err(|error| TokenizerError::Malformed { path, reason: error.utf8_error().to_string() })?;
    Ok(Some(text))
}

/// The ids that `generation_config.json` says end an answer.
pub(crate) fn read_eos_ids(folder: &Path) -> Result<Vec<u32>, TokenizerError> {
    let config: GenerationConfig = read_json(&folder.join("generation_config.json"))?;
    Ok(match config.eos_token_id {
        None => Vec::new(),
        Some(OneOrMany::One(id)) => vec![id],
        Some(OneOrMany::Many(ids)) => ids,
    })
}

/// Reads `tokenizer.json`.
pub(crate) fn read_tokenizer(folder: &Path) -> Result<tokenizers::Tokenizer, TokenizerError> {
    let path = folder.join("tokenizer.json");
    let bytes = std::fs::read(&path).map_err(|source| TokenizerError::Read { path: path.clone(), source })?;
    // The library expects JSON at the least, and panics where it is none.
    serde_json::from_slice::<IgnoredAny>(&bytes)
        .map_err(|error| error.to_string())
        .and_then(|_| tokenizers::Tokenizer::from_bytes(&bytes).map_err(|error| error.to_string()))
        .map_err(|reason| TokenizerError::Malformed { path, reason })
}

fn read_json<T: DeserializeOwned + Default>(path: &Path) -> Result<T, TokenizerError> {
    let Some(bytes) = read_optional(path)? else { return Ok(T::default()) };
    serde_json::from_slice(&bytes)
        .map_err(|error| TokenizerError::Malformed { path: path.to_owned(), reason: error.to_string() })
}

fn read_optional(path: &Path) -> Result<Option<Vec<u8>>, TokenizerError> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TokenizerError::Read { path: path.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_spellings_that_checkpoints_use() {
        let mut config: TokenizerConfig = serde_json::from_str(
            r#"{"bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "</s>", "chat_template": [
                {"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}"#,
        )
        .unwrap();
        assert_eq!(config.take_bos().as_deref(), Some("<s>"));
        assert_eq!(config.take_eos().as_deref(), Some("</s>"));
        assert_eq!(config.take_template().as_deref(), Some("D"));
        let mut empty: TokenizerConfig =
            serde_json::from_str(r#"{"bos_token": null, "chat_template": []}"#).unwrap();
        assert_eq!((empty.take_bos(), empty.take_template()), (None, None));
    }

    #[test]
    fn one_id_or_several_may_end_an_answer() {
        let folder = tempfile::tempdir().unwrap();
        assert!(read_eos_ids(folder.path()).unwrap().is_empty());
        for (json, ids) in [(r#"{"eos_token_id": 2}"#, vec![2]), (r#"{"eos_token_id": [2, 7]}"#, vec![2, 7])]
        {
            std::fs::write(folder.path().join("generation_config.json"), json).unwrap();
            assert_eq!(read_eos_ids(folder.path()).unwrap(), ids);
        }
    }

    #[test]
    fn a_broken_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let missing = read_tokenizer(folder.path()).unwrap_err().to_string();
        assert!(missing.contains("tokenizer.json") && missing.contains("No such file"), "{missing}");
        for json in ["{\"decoder\": {", "{}", "[]", "{\"version\": \"1.0\", \"decoder\": 3, \"model\": 7}"] {
            std::fs::write(folder.path().join("tokenizer.json"), json).unwrap();
            assert!(matches!(read_tokenizer(folder.path()), Err(TokenizerError::Malformed { .. })), "{json}");
        }
    }
}
