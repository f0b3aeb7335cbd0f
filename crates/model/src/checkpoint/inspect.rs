//! What a checkpoint is, and what each rank of a group would hold of it.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;

use engine::{ModelShape, Unit, rank_ranges, units};
use kernels::DType;
use serde::Serialize;

use super::Checkpoint;
use super::error::CheckpointError;
use crate::config::{Config, Quantization};
use crate::names::{Naming, Tensor};

/// The facts of a checkpoint; the sums over ranks assume bf16 KV, and bf16 weights where not said otherwise.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Inspection {
    /// The class that the config names.
    pub architecture: String,
    /// The names of the tensors.
    pub naming: Naming,
    /// Tensors of the model by element type, or by how they are quantised; a quantised projection counts as one.
    pub dtypes: BTreeMap<String, usize>,
    /// Elements of the model's tensors; a tied head counts once.
    pub parameters: u64,
    /// Bytes of the weight files.
    pub bytes: u64,
    /// Number of weight files.
    pub files: usize,
    /// Tensors in them, with those that the model does not use.
    pub tensors: usize,
    /// Tokens of context that the model was made for.
    pub context: usize,
    /// Base frequency of the rotary embedding.
    pub rope_theta: f64,
    /// The head is the embedding.
    pub tied: bool,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Columns of the feed-forward network.
    pub ffn: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Shard units (KV heads): the largest width.
    pub units: usize,
    /// What each rank holds, for every width from 1 to the number of units.
    pub widths: Vec<WidthBytes>,
}

/// A group of a certain width.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WidthBytes {
    /// Its ranks, in order.
    pub ranks: Vec<RankBytes>,
}

/// One rank's share.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RankBytes {
    /// The units that it holds.
    pub units: Range<usize>,
    /// Bytes of its weights: its units', and the norms, which every rank holds.
    pub weight_bytes: u64,
    /// The same with projections as quantised as in the checkpoint, and their scales in 16 bits; `None` where they are plain.
    pub quantized_weight_bytes: Option<u64>,
    /// Bytes of KV for each token of context.
    pub kv_bytes_per_token: u64,
}

/// Opens the checkpoint of a model directory, with all checks of [`Checkpoint::open`], and describes it.
pub fn inspect(dir: &Path) -> Result<Inspection, CheckpointError> {
    let config = Config::load(dir)?;
    let checkpoint = Checkpoint::open(dir, &config)?;
    let shape = config.shape;
    let mut dtypes = BTreeMap::new();
    let mut parameters = 0;
    for tensor in Tensor::all(shape.layers, config.tied) {
        let [rows, cols] = checkpoint.shape(tensor);
        parameters += (rows * cols) as u64;
        let kind = match checkpoint.quantization(tensor) {
            Some(quantization) => quantization.to_string(),
            None => format!("{:?}", checkpoint.dtype(tensor)?).to_lowercase(),
        };
        *dtypes.entry(kind).or_default() += 1;
    }
    let files = &checkpoint.weights.files;
    Ok(Inspection {
        naming: checkpoint.naming(),
        dtypes,
        parameters,
        bytes: files.iter().map(|file| file.header.file_bytes()).sum(),
        files: files.len(),
        tensors: files.iter().map(|file| file.header.tensors.len()).sum(),
        context: config.max_positions,
        rope_theta: config.rope_theta,
        tied: config.tied,
        hidden: shape.hidden,
        layers: shape.layers,
        heads: shape.heads,
        head_dim: shape.head_dim,
        ffn: shape.ffn,
        vocab: shape.vocab,
        units: shape.kv_heads,
        widths: widths(&shape, config.quantization),
        architecture: config.architecture,
    })
}

fn widths(shape: &ModelShape, quantization: Option<Quantization>) -> Vec<WidthBytes> {
    let size = DType::Bf16.size();
    let norms = ((2 * shape.layers + 1) * shape.hidden * size) as u64;
    let of_units = |quantization| -> Vec<u64> {
        units(shape).iter().map(|unit| unit_bytes(unit, shape, quantization) as u64).collect()
    };
    let (plain, quantized) = (of_units(None), quantization.map(|how| of_units(Some(how))));
    let kv_of_unit = (2 * shape.layers * shape.head_dim * size) as u64;
    let rank = |units: Range<usize>| RankBytes {
        weight_bytes: norms + plain[units.clone()].iter().sum::<u64>(),
        quantized_weight_bytes: quantized.as_ref().map(|of| norms + of[units.clone()].iter().sum::<u64>()),
        kv_bytes_per_token: kv_of_unit * units.len() as u64,
        units,
    };
    // Widths outside 1..=units are refused, so that the sequence ends by itself.
    (1..)
        .map_while(|width| rank_ranges(shape.kv_heads, width).ok())
        .map(|ranges| WidthBytes { ranks: ranges.into_iter().map(rank).collect() })
        .collect()
}

/// Bytes of the weights that a unit has of its own. A head is held apart from the embedding even where they are tied: one
/// is a table of rows, the other a matrix in the kernels' layout.
fn unit_bytes(unit: &Unit, shape: &ModelShape, quantization: Option<Quantization>) -> usize {
    let size = DType::Bf16.size();
    let (queries, ffn) = (unit.heads.len() * shape.head_dim, unit.ffn.len());
    let projections = [
        (queries + 2 * shape.head_dim, shape.hidden),
        (shape.hidden, queries),
        (2 * ffn, shape.hidden),
        (shape.hidden, ffn),
    ];
    let bytes = projections.map(|(rows, cols)| match quantization {
        None => rows * cols * size,
        Some(how) => {
            let scales = rows * how.groups(cols) * DType::Bf16.size();
            (rows * cols + rows * how.groups(cols)) * how.bits / 8 + scales
        }
    });
    shape.layers * bytes.iter().sum::<usize>() + 2 * unit.vocab.len() * shape.hidden * size
}

impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dtypes: Vec<_> = self.dtypes.keys().map(String::as_str).collect();
        writeln!(f, "{} ({} names), {}", self.architecture, self.naming, dtypes.join(" and "))?;
        let (parameters, bytes) = (decimal(self.parameters), decimal(self.bytes));
        writeln!(f, "{parameters} parameters, {bytes}B in {} tensors, {} files", self.tensors, self.files)?;
        writeln!(
            f,
            "{} layers, hidden {}, {} heads on {} KV heads of {}, FFN {}, vocabulary {}{}",
            self.layers,
            self.hidden,
            self.heads,
            self.units,
            self.head_dim,
            self.ffn,
            self.vocab,
            if self.tied { ", tied" } else { "" },
        )?;
        writeln!(f, "context {} tokens, rope theta {}", self.context, self.rope_theta)?;
        let is_quantized =
            self.widths.iter().flat_map(|w| &w.ranks).any(|r| r.quantized_weight_bytes.is_some());
        let quantized = if is_quantized { "quantised               " } else { "" };
        writeln!(f, "width  units a rank  weights a rank, bf16    {quantized}KV a token and rank")?;
        for width in &self.widths {
            let units = spread(width, |rank| rank.units.len().to_string());
            let weights = spread(width, |rank| decimal(rank.weight_bytes) + "B");
            let kv = spread(width, |rank| decimal(rank.kv_bytes_per_token) + "B");
            write!(f, "{:>5}  {units:<12}  {weights:<22}  ", width.ranks.len())?;
            if is_quantized {
                let weights = spread(width, |rank| decimal(rank.quantized_weight_bytes.unwrap_or(0)) + "B");
                write!(f, "{weights:<22}  ")?;
            }
            writeln!(f, "{kv}")?;
        }
        Ok(())
    }
}

/// Something of the least and of the fullest rank: weights and KV grow with the number of units.
fn spread(width: &WidthBytes, show: impl Fn(&RankBytes) -> String) -> String {
    let least = width.ranks.iter().min_by_key(|rank| rank.weight_bytes).map(&show);
    let most = width.ranks.iter().max_by_key(|rank| rank.weight_bytes).map(&show);
    match (least, most) {
        (Some(least), Some(most)) if least != most => format!("{least} to {most}"),
        (_, most) => most.unwrap_or_default(),
    }
}

/// A count with a decimal prefix: `34.39 G`.
fn decimal(count: u64) -> String {
    let prefixes = [("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)];
    match prefixes.into_iter().find(|(_, scale)| count as f64 >= *scale) {
        Some((prefix, scale)) => format!("{:.2} {prefix}", count as f64 / scale),
        None => format!("{count} "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::testing::{Model, tiny};

    /// Published numbers: 34.39 B parameters, 245,760 bytes of KV a token.
    #[test]
    fn yi_34b_comes_out_as_published() {
        let shape = ModelShape {
            hidden: 7168,
            layers: 60,
            heads: 56,
            kv_heads: 8,
            head_dim: 128,
            ffn: 20480,
            vocab: 64000,
        };
        let widths = widths(&shape, None);
        assert_eq!(widths.len(), 8);
        let whole = &widths[0].ranks[0];
        assert_eq!((whole.weight_bytes / 2, whole.kv_bytes_per_token), (34_388_917_248, 245_760));
        let norms = 2 * 7168 * (2 * 60 + 1);
        for width in &widths {
            let copies = width.ranks.len() as u64 - 1;
            let sum: u64 = width.ranks.iter().map(|rank| rank.weight_bytes).sum();
            assert_eq!(sum, whole.weight_bytes + copies * norms);
            assert_eq!(width.ranks.iter().map(|rank| rank.kv_bytes_per_token).sum::<u64>(), 245_760);
        }
    }

    #[test]
    fn a_checkpoint_is_described_for_programs_and_for_people() {
        let model = Model::new(tiny());
        let inspection = inspect(&model.path()).unwrap();
        assert_eq!((inspection.files, inspection.tensors, inspection.units), (1, 2 * 9 + 3, 2));
        assert_eq!(inspection.widths[0].ranks[0].weight_bytes, 2 * inspection.parameters);
        assert_eq!(inspection.bytes, std::fs::metadata(model.file("model.safetensors")).unwrap().len());
        let text = inspection.to_string();
        assert!(text.starts_with("YiForCausalLM (yi names), bf16\n"), "{text}");
        assert!(text.contains("    2  1 "), "{text}");
        let json = serde_json::to_value(&inspection).unwrap();
        assert_eq!(
            (&json["naming"], &json["widths"][1]["ranks"][1]["units"]["end"]),
            (&"yi".into(), &2.into())
        );
    }
}
