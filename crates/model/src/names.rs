//! The names of a model's tensors, in the two namings that Yi checkpoints come in.
//!
//! The first release calls the two norms of a layer `ln1` and `ln2`; LLaMA calls them `input_layernorm` and
//! `post_attention_layernorm`. All other names are the same. A quantised projection has several tensors (`qweight`, `qzeros`,
//! …) in the place of its `weight`.

use std::fmt;
use std::str::FromStr;

use engine::ModelShape;
use serde::Serialize;

/// Which of the two sets of names a checkpoint uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Naming {
    /// The publisher's first release: `ln1`, `ln2`.
    Yi,
    /// LLaMA's: `input_layernorm`, `post_attention_layernorm`.
    Llama,
}

impl Naming {
    /// The class that `config.json` names with it.
    pub fn architecture(self) -> &'static str {
        match self {
            Naming::Yi => "YiForCausalLM",
            Naming::Llama => "LlamaForCausalLM",
        }
    }

    /// The `model_type` that goes with it.
    pub fn model_type(self) -> &'static str {
        match self {
            Naming::Yi => "Yi",
            Naming::Llama => "llama",
        }
    }
}

impl fmt::Display for Naming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Naming::Yi => "yi",
            Naming::Llama => "llama",
        })
    }
}

/// A naming that there is not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no naming {0:?}, expected yi or llama")]
pub struct UnknownNaming(String);

impl FromStr for Naming {
    type Err = UnknownNaming;

    fn from_str(text: &str) -> Result<Self, UnknownNaming> {
        match text.to_ascii_lowercase().as_str() {
            "yi" => Ok(Naming::Yi),
            "llama" => Ok(Naming::Llama),
            _ => Err(UnknownNaming(text.to_owned())),
        }
    }
}

/// A tensor that the model needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tensor {
    /// One row for every token id.
    Embedding,
    /// One of a decoder layer's, counted from 0.
    Layer(usize, LayerTensor),
    /// The norm before the head.
    Norm,
    /// One row for every token id; absent where it is tied to the embedding.
    Head,
}

/// A tensor of a decoder layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LayerTensor {
    /// The norm before attention.
    AttentionNorm,
    /// Query projection.
    Q,
    /// Key projection.
    K,
    /// Value projection.
    V,
    /// Output projection of attention.
    O,
    /// The norm before the feed-forward network.
    FfnNorm,
    /// Gate projection.
    Gate,
    /// Up projection.
    Up,
    /// Down projection.
    Down,
}

/// A tensor that stands for a quantised projection, together with others, in the place of its `weight`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum QuantizedPart {
    /// The values, packed.
    Values,
    /// The zero points of the groups, packed.
    Zeros,
    /// The scales of the groups.
    Scales,
    /// The group of every column.
    GroupIndex,
    /// A bias, which Yi has not: all zeros.
    Bias,
}

impl QuantizedPart {
    /// All of them.
    pub const ALL: [QuantizedPart; 5] = [
        QuantizedPart::Values,
        QuantizedPart::Zeros,
        QuantizedPart::Scales,
        QuantizedPart::GroupIndex,
        QuantizedPart::Bias,
    ];

    /// Its name, which takes the place of `weight`.
    fn suffix(self) -> &'static str {
        match self {
            QuantizedPart::Values => "qweight",
            QuantizedPart::Zeros => "qzeros",
            QuantizedPart::Scales => "scales",
            QuantizedPart::GroupIndex => "g_idx",
            QuantizedPart::Bias => "bias",
        }
    }
}

impl LayerTensor {
    /// All of them, in the order of the forward pass.
    pub const ALL: [LayerTensor; 9] = [
        LayerTensor::AttentionNorm,
        LayerTensor::Q,
        LayerTensor::K,
        LayerTensor::V,
        LayerTensor::O,
        LayerTensor::FfnNorm,
        LayerTensor::Gate,
        LayerTensor::Up,
        LayerTensor::Down,
    ];

    /// The part of the name between the layer's number and `.weight`.
    fn part(self, naming: Naming) -> &'static str {
        match (self, naming) {
            (LayerTensor::AttentionNorm, Naming::Yi) => "ln1",
            (LayerTensor::AttentionNorm, Naming::Llama) => "input_layernorm",
            (LayerTensor::FfnNorm, Naming::Yi) => "ln2",
            (LayerTensor::FfnNorm, Naming::Llama) => "post_attention_layernorm",
            (LayerTensor::Q, _) => "self_attn.q_proj",
            (LayerTensor::K, _) => "self_attn.k_proj",
            (LayerTensor::V, _) => "self_attn.v_proj",
            (LayerTensor::O, _) => "self_attn.o_proj",
            (LayerTensor::Gate, _) => "mlp.gate_proj",
            (LayerTensor::Up, _) => "mlp.up_proj",
            (LayerTensor::Down, _) => "mlp.down_proj",
        }
    }
}

impl Tensor {
    /// Every tensor of a model, in the order of the forward pass; without [`Tensor::Head`] where it is tied.
    pub fn all(layers: usize, tied: bool) -> impl Iterator<Item = Tensor> {
        let of_layers = (0..layers).flat_map(|layer| LayerTensor::ALL.map(|part| Tensor::Layer(layer, part)));
        let last = if tied { &[Tensor::Norm][..] } else { &[Tensor::Norm, Tensor::Head] };
        std::iter::once(Tensor::Embedding).chain(of_layers).chain(last.iter().copied())
    }

    /// Its name in a checkpoint.
    pub fn name(self, naming: Naming) -> String {
        match self {
            Tensor::Embedding => "model.embed_tokens.weight".to_owned(),
            Tensor::Layer(layer, tensor) => format!("model.layers.{layer}.{}.weight", tensor.part(naming)),
            Tensor::Norm => "model.norm.weight".to_owned(),
            Tensor::Head => "lm_head.weight".to_owned(),
        }
    }

    /// The tensor that a name stands for, and the naming where the name tells it (the norms of layers do).
    pub fn parse(name: &str) -> Option<(Tensor, Option<Naming>)> {
        match name {
            "model.embed_tokens.weight" => return Some((Tensor::Embedding, None)),
            "model.norm.weight" => return Some((Tensor::Norm, None)),
            "lm_head.weight" => return Some((Tensor::Head, None)),
            _ => {}
        }
        let (digits, part) = name.strip_prefix("model.layers.")?.strip_suffix(".weight")?.split_once('.')?;
        let layer: usize = digits.parse().ok()?;
        // "+1" and "01" parse as numbers, but are no layer's name.
        if layer.to_string() != digits {
            return None;
        }
        let found = |naming| LayerTensor::ALL.into_iter().find(|tensor| tensor.part(naming) == part);
        match (found(Naming::Yi), found(Naming::Llama)) {
            (Some(tensor), Some(_)) => Some((Tensor::Layer(layer, tensor), None)),
            (Some(tensor), None) => Some((Tensor::Layer(layer, tensor), Some(Naming::Yi))),
            (None, Some(tensor)) => Some((Tensor::Layer(layer, tensor), Some(Naming::Llama))),
            (None, None) => None,
        }
    }

    /// Whether quantised checkpoints have it quantised: the matrices of the decoder layers.
    pub fn is_projection(self) -> bool {
        matches!(self, Tensor::Layer(..)) && !self.is_vector()
    }

    /// The name of a part of a quantised projection, which is the same in both namings.
    pub fn part_name(self, part: QuantizedPart) -> String {
        let name = self.name(Naming::Llama);
        format!("{}.{}", name.strip_suffix(".weight").unwrap_or(&name), part.suffix())
    }

    /// The part of a quantised projection that a name stands for.
    pub fn parse_part(name: &str) -> Option<(Tensor, QuantizedPart)> {
        let (module, suffix) = name.rsplit_once('.')?;
        let part = QuantizedPart::ALL.into_iter().find(|part| part.suffix() == suffix)?;
        let (tensor, _) = Tensor::parse(&format!("{module}.weight"))?;
        tensor.is_projection().then_some((tensor, part))
    }

    /// Rows and columns; a vector is one row.
    pub fn shape(self, shape: &ModelShape) -> [usize; 2] {
        let (queries, keys) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        match self {
            Tensor::Embedding | Tensor::Head => [shape.vocab, shape.hidden],
            Tensor::Layer(_, LayerTensor::Q) => [queries, shape.hidden],
            Tensor::Layer(_, LayerTensor::K | LayerTensor::V) => [keys, shape.hidden],
            Tensor::Layer(_, LayerTensor::O) => [shape.hidden, queries],
            Tensor::Layer(_, LayerTensor::Gate | LayerTensor::Up) => [shape.ffn, shape.hidden],
            Tensor::Layer(_, LayerTensor::Down) => [shape.hidden, shape.ffn],
            Tensor::Norm | Tensor::Layer(_, LayerTensor::AttentionNorm | LayerTensor::FfnNorm) => {
                [1, shape.hidden]
            }
        }
    }

    /// Whether checkpoints store it with one dimension.
    pub fn is_vector(self) -> bool {
        matches!(self, Tensor::Norm | Tensor::Layer(_, LayerTensor::AttentionNorm | LayerTensor::FfnNorm))
    }

    /// The dimensions that it is stored with.
    pub fn stored_shape(self, shape: &ModelShape) -> Vec<usize> {
        let [rows, cols] = self.shape(shape);
        if self.is_vector() { vec![cols] } else { vec![rows, cols] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_the_norms_of_layers_differ() {
        let differing: Vec<_> = Tensor::all(1, false)
            .filter(|tensor| tensor.name(Naming::Yi) != tensor.name(Naming::Llama))
            .map(|tensor| tensor.name(Naming::Yi))
            .collect();
        assert_eq!(differing, ["model.layers.0.ln1.weight", "model.layers.0.ln2.weight"]);
    }

    #[test]
    fn names_that_are_not_the_models_do_not_parse() {
        for name in [
            "model.layers.0.self_attn.rotary_emb.inv_freq",
            "model.layers.01.ln1.weight",
            "model.layers.+1.ln1.weight",
            "model.layers.99999999999999999999.ln1.weight",
            "model.layers.0.ln1.bias",
            "model.layers.0.ln3.weight",
            "",
        ] {
            assert_eq!(Tensor::parse(name), None, "{name}");
        }
    }

    #[test]
    fn only_projections_have_quantised_parts() {
        let parts: Vec<_> = Tensor::all(2, false).filter(|tensor| tensor.is_projection()).collect();
        assert_eq!(parts.len(), 2 * 7);
        for tensor in parts {
            for part in QuantizedPart::ALL {
                let name = tensor.part_name(part);
                assert_eq!(Tensor::parse_part(&name), Some((tensor, part)));
                assert_eq!(Tensor::parse(&name), None, "{name}");
            }
        }
        let down = Tensor::Layer(3, LayerTensor::Down);
        assert_eq!(down.part_name(QuantizedPart::Values), "model.layers.3.mlp.down_proj.qweight");
        for name in [
            "lm_head.qweight",
            "model.embed_tokens.scales",
            "model.layers.0.ln1.bias",
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.00.self_attn.q_proj.qweight",
            "qweight",
            "",
        ] {
            assert_eq!(Tensor::parse_part(name), None, "{name}");
        }
    }

    #[test]
    fn a_naming_reads_back_from_its_name() {
        for naming in [Naming::Yi, Naming::Llama] {
            assert_eq!(naming.to_string().parse(), Ok(naming));
            assert_eq!(naming.model_type().parse(), Ok(naming));
        }
        assert!("mistral".parse::<Naming>().is_err());
    }

    proptest! {
        #[test]
        fn every_name_parses_back(layers in 1usize..70, tied: bool) {
            for tensor in Tensor::all(layers, tied) {
                for naming in [Naming::Yi, Naming::Llama] {
                    let (parsed, told) = Tensor::parse(&tensor.name(naming)).unwrap();
                    prop_assert_eq!(parsed, tensor);
                    prop_assert!(told.is_none_or(|told| told == naming));
                }
            }
        }

        #[test]
        fn parsing_is_the_inverse_of_naming(
            name in "(model\\.layers\\.)?[0-9+]{0,3}\\.?[a-z_.0-9]{0,30}(\\.weight)?",
        ) {
            if let Some((tensor, told)) = Tensor::parse(&name) {
                prop_assert_eq!(tensor.name(told.unwrap_or(Naming::Yi)), name);
            }
        }
    }
}
