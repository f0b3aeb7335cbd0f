//! `quantization_config`: how the projections of a quantised checkpoint are stored.
//!
//! Keys and defaults are those of transformers' `AwqConfig` and `GPTQConfig`, which AutoAWQ, AutoGPTQ and GPTQModel write.
//! What only says how the checkpoint was made (`sym`, `damp_percent`, `dataset`, …) is ignored; which modules it says to be
//! quantised too: the tensors tell, and are checked one by one.

use std::fmt;

use engine::ModelShape;

use super::{ConfigError, Keys};

/// The group sizes that published checkpoints have, apart from whole rows (-1).
const GROUP_SIZES: [usize; 6] = [32, 64, 128, 256, 512, 1024];
/// Where a config does not say, as in transformers.
const DEFAULT_GROUP_SIZE: usize = 128;
/// A whole row is one group.
const WHOLE_ROWS: i64 = -1;
/// Bits of the words that values are packed into.
const WORD_BITS: usize = 32;

/// How all projections of the decoder layers are stored; the embedding, the norms and the head are plain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Quantization {
    /// How values and zero points are packed.
    pub layout: Layout,
    /// Bits of a value: 4 or 8.
    pub bits: usize,
    /// Columns that share a scale and a zero point; `None`: all of a row.
    pub group_size: Option<usize>,
    /// The quantiser may have given columns to groups in another order: `g_idx` must show that it did not.
    pub reordered: bool,
}

/// A packed layout; see [`crate::checkpoint`]'s `unpack` for what it looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Layout {
    /// AutoAWQ's "gemm".
    Awq,
    /// AutoGPTQ's: zero points are stored less one.
    Gptq,
    /// GPTQModel's "gptq_v2": the same with zero points as they are.
    GptqV2,
}

impl Quantization {
    /// Values, or zero points, in a word of 32 bits.
    pub fn per_word(self) -> usize {
        WORD_BITS / self.bits
    }

    /// Columns of a group of a matrix of `cols` columns.
    pub fn group_of(self, cols: usize) -> usize {
        self.group_size.unwrap_or(cols)
    }

    /// Groups of a row of `cols` columns; the last one may be shorter than the others.
    pub fn groups(self, cols: usize) -> usize {
        cols.div_ceil(self.group_of(cols).max(1))
    }
}

impl fmt::Display for Quantization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let layout = match self.layout {
            Layout::Awq => "awq",
            Layout::Gptq => "gptq",
            Layout::GptqV2 => "gptq_v2",
        };
        match self.group_size {
            Some(size) => write!(f, "{layout} int{} in groups of {size}", self.bits),
            None => write!(f, "{layout} int{} by rows", self.bits),
        }
    }
}

/// Reads `quantization_config` of a config, if it has one.
pub(super) fn quantization(keys: &Keys, shape: &ModelShape) -> Result<Option<Quantization>, ConfigError> {
    const KEY: &str = "quantization_config";
    let Some(found) = keys.get(KEY) else { return Ok(None) };
    let map = found.as_object().ok_or_else(|| keys.refuse(KEY, found, "an object"))?.clone();
    let keys = Keys { path: keys.path, prefix: format!("{KEY}."), map };
    if keys.flag("lm_head")? {
        return Err(keys.refuse("lm_head", &true.into(), "false: a quantised head is not supported"));
    }
    let quantization = match keys.choice("quant_method", &["awq", "gptq"], None)? {
        "awq" => awq(&keys)?,
        _ => gptq(&keys)?,
    };
    fits(quantization, shape)
        .map_err(|expected| keys.refuse("bits", &quantization.bits.into(), &expected))?;
    Ok(Some(quantization))
}

fn awq(keys: &Keys) -> Result<Quantization, ConfigError> {
    keys.choice("version", &["gemm"], Some("gemm"))?;
    keys.choice("backend", &["autoawq"], Some("autoawq"))?;
    if let Some(found) = keys.get("zero_point").filter(|found| **found != true) {
        return Err(keys.refuse("zero_point", found, "true"));
    }
    let bits = keys.bits(&[4])?;
    Ok(Quantization { layout: Layout::Awq, bits, group_size: keys.group_size()?, reordered: false })
}

fn gptq(keys: &Keys) -> Result<Quantization, ConfigError> {
    if keys.flag("is_marlin_format")? {
        return Err(keys.refuse(
            "is_marlin_format",
            &true.into(),
            "false: use the checkpoint in GPTQ's format",
        ));
    }
    let format = keys.choice("checkpoint_format", &["gptq", "gptq_v2"], Some("gptq"))?;
    let layout = if format == "gptq" { Layout::Gptq } else { Layout::GptqV2 };
    let (bits, reordered) = (keys.bits(&[4, 8])?, keys.flag("desc_act")?);
    Ok(Quantization { layout, bits, group_size: keys.group_size()?, reordered })
}

/// Words hold values of one matrix alone, and units as many columns as the kernels need. Says what is expected instead.
pub(super) fn fits(quantization: Quantization, shape: &ModelShape) -> Result<(), String> {
    let per_word = quantization.per_word();
    for (name, size) in [
        ("hidden_size", shape.hidden),
        ("num_attention_heads * head_dim", shape.heads * shape.head_dim),
        ("num_key_value_heads * head_dim", shape.kv_heads * shape.head_dim),
        ("intermediate_size", shape.ffn),
    ] {
        if size % per_word != 0 {
            return Err(format!("a model whose {name} ({size}) is a multiple of {per_word}"));
        }
    }
    if shape.ffn < 2 * shape.kv_heads {
        return Err(format!(
            "a model whose intermediate_size ({}) gives each KV head two columns",
            shape.ffn
        ));
    }
    Ok(())
}

impl Keys<'_> {
    /// One of some words, in whatever case it is written.
    fn choice<'c>(
        &self,
        key: &str,
        choices: &[&'c str],
        default: Option<&'c str>,
    ) -> Result<&'c str, ConfigError> {
        let expected = format!("\"{}\"", choices.join("\" or \""));
        let Some(found) = self.get(key) else {
            return default.ok_or_else(|| self.missing(key, &expected));
        };
        let chosen =
            found.as_str().and_then(|found| choices.iter().find(|choice| found.eq_ignore_ascii_case(choice)));
        chosen.copied().ok_or_else(|| self.refuse(key, found, &expected))
    }

    fn bits(&self, supported: &[usize]) -> Result<usize, ConfigError> {
        let names: Vec<_> = supported.iter().map(usize::to_string).collect();
        let expected = names.join(" or ");
        let found = self.get("bits").ok_or_else(|| self.missing("bits", &expected))?;
        let bits = supported.iter().find(|&&bits| found.as_u64() == Some(bits as u64));
        bits.copied().ok_or_else(|| self.refuse("bits", found, &expected))
    }

    fn group_size(&self) -> Result<Option<usize>, ConfigError> {
        let Some(found) = self.get("group_size") else { return Ok(Some(DEFAULT_GROUP_SIZE)) };
        if found.as_i64() == Some(WHOLE_ROWS) {
            return Ok(None);
        }
        let size = GROUP_SIZES.into_iter().find(|&size| found.as_u64() == Some(size as u64));
        let expected = format!("one of {GROUP_SIZES:?}, or -1 for whole rows");
        size.map(Some).ok_or_else(|| self.refuse("group_size", found, &expected))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Config;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn load(quantization: &Value, ffn: usize) -> Result<Option<Quantization>, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 7168,
            "intermediate_size": ffn, "num_hidden_layers": 60, "num_attention_heads": 56,
            "num_key_value_heads": 8, "vocab_size": 64000, "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5, "quantization_config": quantization,
        });
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        Config::load(dir.path()).map(|config| config.quantization)
    }

    #[test]
    fn the_publishers_two_are_read() {
        let four = json!({
            "bits": 4, "group_size": 128, "quant_method": "awq", "version": "GEMM", "zero_point": true,
            "modules_to_not_convert": null,
        });
        let found = load(&four, 20480).unwrap().unwrap();
        let group_size = Some(128);
        assert_eq!(found, Quantization { layout: Layout::Awq, bits: 4, group_size, reordered: false });
        assert_eq!((found.per_word(), found.groups(7168)), (8, 56));
        assert_eq!(found.to_string(), "awq int4 in groups of 128");
        let eight = json!({
            "bits": 8, "group_size": 128, "damp_percent": 0.01, "desc_act": false, "static_groups": false, "sym": true,
            "true_sequential": true, "model_name_or_path": null, "quant_method": "gptq",
        });
        let found = load(&eight, 20480).unwrap().unwrap();
        assert_eq!(found, Quantization { layout: Layout::Gptq, bits: 8, group_size, reordered: false });
        assert_eq!(load(&Value::Null, 20480).unwrap(), None);
    }

    #[test]
    fn other_forms_are_read() {
        let gptq = |key: &str, value: Value| {
            let mut config = json!({"quant_method": "gptq", "bits": 4});
            config[key] = value;
            load(&config, 20480).unwrap().unwrap()
        };
        assert_eq!(gptq("sym", json!(false)).group_size, Some(128));
        assert_eq!(gptq("checkpoint_format", json!("gptq_v2")).layout, Layout::GptqV2);
        let rows = gptq("group_size", json!(-1));
        assert_eq!((rows.group_of(100), rows.groups(100)), (100, 1));
        assert_eq!(rows.to_string(), "gptq int4 by rows");
        assert!(gptq("desc_act", json!(true)).reordered);
    }

    #[test]
    fn what_is_not_supported_is_named_with_what_is() {
        let refused = [
            (json!({}), "quant_method is missing, expected \"awq\" or \"gptq\""),
            (json!({"quant_method": "bitsandbytes"}), "quant_method is \"bitsandbytes\", expected \"awq\""),
            (json!({"quant_method": 4}), "quant_method is 4"),
            (json!({"quant_method": "awq"}), "bits is missing, expected 4"),
            (json!({"quant_method": "awq", "bits": 8}), "bits is 8, expected 4"),
            (json!({"quant_method": "gptq", "bits": 3}), "bits is 3, expected 4 or 8"),
            (json!({"quant_method": "gptq", "bits": "4"}), "bits is \"4\", expected 4 or 8"),
            (
                json!({"quant_method": "awq", "bits": 4, "version": "gemv"}),
                "version is \"gemv\", expected \"gemm\"",
            ),
            (json!({"quant_method": "awq", "bits": 4, "backend": "llm-awq"}), "backend is \"llm-awq\""),
            (
                json!({"quant_method": "awq", "bits": 4, "zero_point": false}),
                "zero_point is false, expected true",
            ),
            (
                json!({"quant_method": "gptq", "bits": 4, "group_size": 0}),
                "group_size is 0, expected one of [32, 64",
            ),
            (json!({"quant_method": "gptq", "bits": 4, "group_size": 100}), "or -1 for whole rows"),
            (
                json!({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}),
                "\"gptq\" or \"gptq_v2\"",
            ),
            (
                json!({"quant_method": "gptq", "bits": 4, "is_marlin_format": true}),
                "is_marlin_format is true",
            ),
            (json!({"quant_method": "gptq", "bits": 4, "desc_act": "no"}), "desc_act is \"no\""),
            (json!({"quant_method": "gptq", "bits": 4, "lm_head": true}), "lm_head is true, expected false"),
        ];
        for (config, expected) in refused {
            let message = load(&config, 20480).unwrap_err().to_string();
            assert!(message.contains("config.json: quantization_config."), "{message}");
            assert!(message.contains(expected), "{message}");
        }
        let message = load(&json!("awq"), 20480).unwrap_err().to_string();
        assert!(message.contains("quantization_config is \"awq\", expected an object"), "{message}");
    }

    #[test]
    fn sizes_that_words_do_not_hold_are_refused() {
        for (ffn, expected) in [(20484, "intermediate_size (20484) is a multiple of 8"), (8, "two columns")] {
            let message = load(&json!({"quant_method": "awq", "bits": 4}), ffn).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }

    proptest! {
        #[test]
        fn no_content_panics(key in 0usize..6, value in "[-0-9.e\\[\\]{}\":a-z]{0,12}") {
            let keys = ["quant_method", "bits", "group_size", "version", "desc_act", "checkpoint_format"];
            if let Ok(value) = serde_json::from_str::<Value>(&value) {
                for method in ["awq", "gptq"] {
                    let mut config = json!({"quant_method": method, "bits": 4});
                    config[keys[key]] = value.clone();
                    let _ = load(&config, 20480);
                }
            }
        }
    }
}
