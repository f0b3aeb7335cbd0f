//! A model's `config.json` and `generation_config.json`, parsed into what the software can serve.
//!
//! The keys are those of Hugging Face transformers (`LlamaConfig`, and `YiConfig` of the publisher's first
//! release). Whatever would change the arithmetic and is not implemented is refused by name, so that a model
//! is never served with wrong numbers. Sizes are bounded here, before anyone allocates by them.

mod presets;
mod quantization;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use engine::ModelShape;
use serde_json::{Map, Value};

pub use presets::Preset;
pub use quantization::{Layout, Quantization};

/// The base frequency that transformers takes where a LLaMA config names none.
const LLAMA_ROPE_THETA: f64 = 10_000.0;
/// The same for the publisher's own `YiConfig`.
const YI_ROPE_THETA: f64 = 5_000_000.0;
/// JSON files of a checkpoint are read up to this size.
const MAX_JSON_BYTES: u64 = 16 << 20;
/// A value in an error message is cut to about this many bytes.
const MAX_SHOWN_BYTES: usize = 80;

/// A model that can be served.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The class of the model, as written: `YiForCausalLM` or `LlamaForCausalLM`.
    pub architecture: String,
    /// The family of the model, as written: `Yi`, `yi` or `llama`.
    pub model_type: String,
    /// The sizes.
    pub shape: ModelShape,
    /// The epsilon of every RMSNorm.
    pub rms_norm_eps: f64,
    /// The base frequency of the rotary embedding.
    pub rope_theta: f64,
    /// Tokens of context that the model was made for.
    pub max_positions: usize,
    /// The head is the embedding.
    pub tied: bool,
    /// The id that a text begins with.
    pub bos: Option<u32>,
    /// The ids that end a text: those of `config.json`, then further ones of `generation_config.json`.
    pub eos: Vec<u32>,
    /// How the projections are stored, where they are quantised.
    pub quantization: Option<Quantization>,
}

/// Why a config cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is far larger than any config.
    #[error("{}: {bytes} bytes, but at most {MAX_JSON_BYTES} are read of a JSON file", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// The file is not JSON.
    #[error("{}: not valid JSON: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A key that has no default is not there.
    #[error("{}: {key} is missing, expected {expected}", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What it should hold.
        expected: String,
    },
    /// A value that cannot be served.
    #[error("{}: {key} is {value}, expected {expected}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What it holds, perhaps cut.
        value: String,
        /// What it should hold.
        expected: String,
    },
}

impl Config {
    /// Reads `config.json` of a model directory, and `generation_config.json` where there is one.
    pub fn load(dir: &Path) -> Result<Config, ConfigError> {
        Config::from_file(&dir.join("config.json"))
    }

    /// Reads a config file of any name, and a `generation_config.json` beside it.
    pub fn from_file(path: &Path) -> Result<Config, ConfigError> {
        let keys = Keys::read(path)?;
        let (architecture, model_type) = architecture(&keys)?;
        refuse_what_is_not_implemented(&keys)?;
        let eos = end_of_text_ids(&keys, &path.with_file_name("generation_config.json"))?;
        let shape = shape(&keys)?;
        Ok(Config {
            quantization: quantization::quantization(&keys, &shape)?,
            shape,
            rms_norm_eps: keys
                .number("rms_norm_eps", 0.0, 1.0)?
                .ok_or_else(|| keys.missing("rms_norm_eps", "a number"))?,
            rope_theta: rope_theta(&keys, &model_type)?,
            max_positions: keys.size("max_position_embeddings", 1 << 24)?,
            tied: keys.flag("tie_word_embeddings")?,
            bos: keys.id("bos_token_id")?,
            eos,
            architecture,
            model_type,
        })
    }
}

/// The base frequency of a config that names none.
pub(crate) fn default_rope_theta(model_type: &str) -> f64 {
    if model_type.eq_ignore_ascii_case("yi") { YI_ROPE_THETA } else { LLAMA_ROPE_THETA }
}

/// Reads a JSON object from a file of bounded size.
pub(crate) fn read_json(path: &Path) -> Result<Map<String, Value>, ConfigError> {
    let io = |source| ConfigError::Io { path: path.to_owned(), source };
    let file = File::open(path).map_err(io)?;
    let bytes = file.metadata().map_err(io)?.len();
    if bytes > MAX_JSON_BYTES {
        return Err(ConfigError::TooLarge { path: path.to_owned(), bytes });
    }
    let mut text = Vec::new();
    file.take(MAX_JSON_BYTES).read_to_end(&mut text).map_err(io)?;
    serde_json::from_slice(&text).map_err(|source| ConfigError::Json { path: path.to_owned(), source })
}

fn architecture(keys: &Keys) -> Result<(String, String), ConfigError> {
    let expected = r#"["YiForCausalLM"] or ["LlamaForCausalLM"]"#;
    let found = keys.get("architectures").ok_or_else(|| keys.missing("architectures", expected))?;
    let architecture = match found.as_array().map(Vec::as_slice) {
        Some([Value::String(name)]) if matches!(name.as_str(), "YiForCausalLM" | "LlamaForCausalLM") => {
            name.clone()
        }
        _ => return Err(keys.refuse("architectures", found, expected)),
    };
    let expected = r#""Yi", "yi" or "llama""#;
    let found = keys.get("model_type").ok_or_else(|| keys.missing("model_type", expected))?;
    match found.as_str() {
        Some(name @ ("Yi" | "yi" | "llama")) => Ok((architecture, name.to_owned())),
        _ => Err(keys.refuse("model_type", found, expected)),
    }
}

fn refuse_what_is_not_implemented(keys: &Keys) -> Result<(), ConfigError> {
    for key in ["attention_bias", "mlp_bias"] {
        if keys.flag(key)? {
            return Err(keys.refuse(key, &Value::Bool(true), "false: biases are not supported"));
        }
    }
    match keys.get("hidden_act") {
        Some(found) if found != "silu" => Err(keys.refuse("hidden_act", found, r#""silu""#)),
        _ => Ok(()),
    }
}

fn shape(keys: &Keys) -> Result<ModelShape, ConfigError> {
    let hidden = keys.size("hidden_size", 1 << 20)?;
    let heads = keys.size("num_attention_heads", 1 << 10)?;
    let kv_heads = match keys.get("num_key_value_heads") {
        Some(_) => keys.size("num_key_value_heads", 1 << 10)?,
        None => heads,
    };
    if heads % kv_heads != 0 {
        let expected = format!("a divisor of num_attention_heads ({heads})");
        return Err(keys.refuse("num_key_value_heads", &kv_heads.into(), &expected));
    }
    let head_dim = match keys.get("head_dim") {
        Some(_) => keys.size("head_dim", 1 << 10)?,
        None if hidden % heads == 0 => hidden / heads,
        None => {
            let expected =
                format!("a number: hidden_size ({hidden}) is no multiple of num_attention_heads ({heads})");
            return Err(keys.missing("head_dim", &expected));
        }
    };
    let ffn = keys.size("intermediate_size", 1 << 22)?;
    for (key, size) in [("hidden_size", hidden), ("head_dim", head_dim)] {
        if size % 2 != 0 {
            return Err(keys.refuse(key, &size.into(), "an even number"));
        }
    }
    let vocab = keys.size("vocab_size", 1 << 24)?;
    if vocab < kv_heads {
        let expected = format!("at least num_key_value_heads ({kv_heads}): every shard unit holds a part");
        return Err(keys.refuse("vocab_size", &vocab.into(), &expected));
    }
    Ok(ModelShape {
        hidden,
        layers: keys.size("num_hidden_layers", 1 << 12)?,
        heads,
        kv_heads,
        head_dim,
        ffn,
        vocab,
    })
}

/// The base frequency: at the top level in classic configs, in `rope_parameters` in those of transformers 5.
fn rope_theta(keys: &Keys, model_type: &str) -> Result<f64, ConfigError> {
    let classic = keys.number("rope_theta", 1.0, 1e12)?;
    let mut theta = classic.unwrap_or(default_rope_theta(model_type));
    for key in ["rope_parameters", "rope_scaling"] {
        let Some(found) = keys.get(key) else { continue };
        let nested = found.as_object().ok_or_else(|| keys.refuse(key, found, "an object"))?;
        let rope = Keys { path: keys.path, prefix: format!("{key}."), map: nested.clone() };
        let kind = nested.get("rope_type").or_else(|| nested.get("type"));
        if kind.is_none_or(|kind| kind != "default") {
            return Err(keys.refuse(key, found, r#"rope_type "default": rope scaling is not supported"#));
        }
        match rope.number("partial_rotary_factor", 0.0, 1.0)? {
            Some(part) if part != 1.0 => return Err(rope.refuse("partial_rotary_factor", &part.into(), "1")),
            _ => {}
        }
        theta = rope.number("rope_theta", 1.0, 1e12)?.unwrap_or(theta);
    }
    Ok(theta)
}

fn end_of_text_ids(keys: &Keys, generation: &Path) -> Result<Vec<u32>, ConfigError> {
    let mut ids = keys.ids("eos_token_id")?;
    if generation.exists() {
        for id in Keys::read(generation)?.ids("eos_token_id")? {
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
    }
    Ok(ids)
}

/// A JSON object that knows where it came from. A key whose value is null counts as absent.
struct Keys<'a> {
    path: &'a Path,
    prefix: String,
    map: Map<String, Value>,
}

impl<'a> Keys<'a> {
    fn read(path: &'a Path) -> Result<Self, ConfigError> {
        Ok(Keys { path, prefix: String::new(), map: read_json(path)? })
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn size(&self, key: &str, max: u64) -> Result<usize, ConfigError> {
        let expected = format!("a whole number from 1 to {max}");
        let found = self.get(key).ok_or_else(|| self.missing(key, &expected))?;
        let size = found.as_u64().filter(|size| (1..=max).contains(size));
        size.and_then(|size| usize::try_from(size).ok()).ok_or_else(|| self.refuse(key, found, &expected))
    }

    fn number(&self, key: &str, min: f64, max: f64) -> Result<Option<f64>, ConfigError> {
        let Some(found) = self.get(key) else { return Ok(None) };
        match found.as_f64().filter(|number| (min..=max).contains(number)) {
            None => Err(self.refuse(key, found, &format!("a number from {min} to {max}"))),
            number => Ok(number),
        }
    }

    fn flag(&self, key: &str) -> Result<bool, ConfigError> {
        match self.get(key) {
            None => Ok(false),
            Some(found) => found.as_bool().ok_or_else(|| self.refuse(key, found, "true or false")),
        }
    }

    fn id(&self, key: &str) -> Result<Option<u32>, ConfigError> {
        self.get(key)
            .map(|found| token_id(found).ok_or_else(|| self.refuse(key, found, "a token id")))
            .transpose()
    }

    fn ids(&self, key: &str) -> Result<Vec<u32>, ConfigError> {
        let Some(found) = self.get(key) else { return Ok(Vec::new()) };
        let ids = match found {
            Value::Array(list) => list.iter().map(token_id).collect(),
            one => token_id(one).map(|id| vec![id]),
        };
        ids.ok_or_else(|| self.refuse(key, found, "a token id or a list of token ids"))
    }

    fn missing(&self, key: &str, expected: &str) -> ConfigError {
        ConfigError::Missing {
            path: self.path.to_owned(),
            key: format!("{}{key}", self.prefix),
            expected: expected.to_owned(),
        }
    }

    fn refuse(&self, key: &str, value: &Value, expected: &str) -> ConfigError {
        let mut value = value.to_string();
        if value.len() > MAX_SHOWN_BYTES {
            value.truncate(value.floor_char_boundary(MAX_SHOWN_BYTES));
            value.push('…');
        }
        let key = format!("{}{key}", self.prefix);
        ConfigError::Value { path: self.path.to_owned(), key, value, expected: expected.to_owned() }
    }
}

fn token_id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    /// Yi-34B's, with one key replaced (null takes it away).
    fn with(key: &str, value: Value) -> Result<Config, ConfigError> {
        let mut config = json!({
            "architectures": ["YiForCausalLM"], "model_type": "Yi", "bos_token_id": 1, "eos_token_id": 2,
            "hidden_act": "silu", "hidden_size": 7168, "intermediate_size": 20480, "num_hidden_layers": 60,
            "num_attention_heads": 56, "num_key_value_heads": 8, "vocab_size": 64000,
            "max_position_embeddings": 4096, "rope_theta": 5000000.0, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": false, "rope_scaling": null,
        });
        config[key] = value;
        load(&config.to_string(), None)
    }

    fn load(config: &str, generation: Option<&str>) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), config).unwrap();
        if let Some(generation) = generation {
            std::fs::write(dir.path().join("generation_config.json"), generation).unwrap();
        }
        Config::load(dir.path())
    }

    #[test]
    fn yi_34b_parses() {
        let config = with("use_cache", json!(true)).unwrap();
        assert_eq!(config.shape.head_dim, 128);
        assert_eq!((config.rope_theta, config.rms_norm_eps, config.max_positions), (5e6, 1e-5, 4096));
        assert_eq!((config.bos, config.eos, config.tied), (Some(1), vec![2], false));
        assert_eq!((config.architecture.as_str(), config.model_type.as_str()), ("YiForCausalLM", "Yi"));
    }

    #[test]
    fn defaults_are_those_of_transformers() {
        assert_eq!(with("num_key_value_heads", Value::Null).unwrap().shape.kv_heads, 56);
        assert_eq!(with("rope_theta", Value::Null).unwrap().rope_theta, YI_ROPE_THETA);
        assert_eq!(with("head_dim", json!(64)).unwrap().shape.head_dim, 64);
        let llama = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
            "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 256,
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5}"#;
        let config = load(llama, None).unwrap();
        assert_eq!((config.rope_theta, config.bos, config.eos), (LLAMA_ROPE_THETA, None, vec![]));
    }

    #[test]
    fn rope_parameters_of_transformers_5_are_read() {
        let rope = json!({"rope_theta": 1000000.0, "rope_type": "default"});
        assert_eq!(with("rope_parameters", rope).unwrap().rope_theta, 1e6);
    }

    #[test]
    fn generation_config_adds_ends_of_text() {
        let config = with("eos_token_id", json!([2, 5])).unwrap();
        assert_eq!(config.eos, [2, 5]);
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/yi-nano");
        assert_eq!(Config::load(&dir).unwrap().eos, [2, 7]);
    }

    #[test]
    fn what_cannot_be_served_is_refused_by_file_key_value_and_expectation() {
        let refused = [
            ("architectures", json!(["MistralForCausalLM"]), "YiForCausalLM"),
            ("model_type", json!("mistral"), "llama"),
            ("attention_bias", json!(true), "false"),
            ("mlp_bias", json!(true), "false"),
            ("hidden_act", json!("gelu"), "silu"),
            ("num_key_value_heads", json!(9), "divisor"),
            ("num_key_value_heads", json!(0), "from 1"),
            ("head_dim", json!(127), "even"),
            ("num_hidden_layers", json!(0), "from 1"),
            ("num_hidden_layers", json!(1e300), "from 1"),
            ("num_hidden_layers", json!(5000), "to 4096"),
            ("vocab_size", json!(u64::MAX), "from 1"),
            ("vocab_size", json!(7), "num_key_value_heads"),
            ("hidden_size", json!(-1), "from 1"),
            ("max_position_embeddings", json!("4096"), "from 1"),
            ("rms_norm_eps", json!("small"), "a number"),
            ("rope_theta", json!(0), "a number"),
            ("rope_scaling", json!({"type": "dynamic", "factor": 2.0}), "rope scaling"),
            ("rope_parameters", json!({"rope_type": "yarn", "rope_theta": 1e6}), "rope scaling"),
            ("rope_parameters.partial_rotary_factor", json!(0.5), "1"),
            ("eos_token_id", json!(-1), "token id"),
            ("eos_token_id", json!([2, "x"]), "token id"),
            ("tie_word_embeddings", json!("no"), "true or false"),
        ];
        for (key, value, expected) in refused {
            let (outer, content) = match key.split_once('.') {
                Some((outer, inner)) => (outer, json!({"rope_type": "default", inner: value})),
                None => (key, value),
            };
            let message = with(outer, content).unwrap_err().to_string();
            assert!(message.contains("config.json") && message.contains(key), "{message}");
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn a_missing_key_or_file_is_named() {
        let message = with("hidden_size", Value::Null).unwrap_err().to_string();
        assert!(
            message
                .ends_with("config.json: hidden_size is missing, expected a whole number from 1 to 1048576")
        );
        let message = with("hidden_size", json!(7169)).unwrap_err().to_string();
        assert!(
            message.contains("head_dim is missing") && message.contains("hidden_size (7169)"),
            "{message}"
        );
        let message = Config::load(Path::new("/nowhere")).unwrap_err().to_string();
        assert!(message.starts_with("/nowhere/config.json: "), "{message}");
    }

    #[test]
    fn a_huge_file_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        File::create(dir.path().join("config.json")).unwrap().set_len(1 << 40).unwrap();
        assert!(matches!(Config::load(dir.path()), Err(ConfigError::TooLarge { .. })));
    }

    proptest! {
        #[test]
        fn no_content_panics(
            content in "\\PC{0,80}", key in 0usize..14, value in "[-0-9.e\\[\\]{}\":a-z]{0,12}",
        ) {
            let _ = load(&content, Some(&content));
            let keys = [
                "architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
                "max_position_embeddings", "rope_theta", "rope_parameters", "rms_norm_eps", "eos_token_id",
            ];
            if let Ok(value) = serde_json::from_str::<Value>(&value) {
                let _ = with(keys[key], value);
            }
        }
    }
}
