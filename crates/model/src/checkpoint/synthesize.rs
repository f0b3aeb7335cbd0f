//! Checkpoints of random weights in any shape: for tests, and for measuring models that one has not got.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use half::{bf16, f16};
use indicatif::ProgressBar;
use kernels::SourceType;
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::error::CheckpointError;
use super::header::{Entry, Header};
use super::output::Output;
use super::quantized::stored_shape;
use super::random::Random;
use super::rename::retarget;
use super::weights::{INDEX, SINGLE};
use crate::config::{Config, Layout, Quantization, read_json};
use crate::names::{LayerTensor, Naming, QuantizedPart, Tensor};

/// Elements that are made at a time.
const CHUNK: usize = 1 << 18;
/// Standard deviation of the norms' weights around 1.
const NORM_SPREAD: f32 = 0.05;

/// What random weights to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Synthesis {
    /// With the tensor's name, gives its numbers.
    pub seed: u64,
    /// A file of weights gets no more data than this, or a single tensor.
    pub max_shard_bytes: u64,
    /// Of every tensor that is not quantised.
    pub dtype: SourceType,
    /// The names, and the `architectures` and `model_type` of the config; the numbers do not depend on it.
    pub naming: Naming,
}

impl Default for Synthesis {
    fn default() -> Self {
        Synthesis { seed: 0, max_shard_bytes: 2_000_000_000, dtype: SourceType::Bf16, naming: Naming::Yi }
    }
}

/// Writes a checkpoint of random weights for a config file to `out`, which must not exist or be empty, and
/// returns its parameters.
///
/// Matrices are normal with a standard deviation of 1/√(columns), so that activations keep their size; an
/// untied embedding has 1; norms are near 1. Where the config has a `quantization_config`, projections are quantised
/// accordingly, with values that are all as likely. The config is copied, naming what was made, and so is a
/// `generation_config.json` beside it; there is no tokenizer. Works in pieces of 1 MiB.
pub fn synthesize(
    config_path: &Path,
    out: &Path,
    synthesis: &Synthesis,
    progress: &ProgressBar,
) -> Result<u64, CheckpointError> {
    let config = Config::from_file(config_path)?;
    let shards = shards(&config, synthesis);
    let data: u64 = shards.iter().flatten().map(|stored| stored.bytes(&config, synthesis.dtype)).sum();
    progress.set_length(data);
    let output = Output::create(out, None)?;
    let mut weight_map = Map::new();
    for (index, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => SINGLE.to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
        };
        let header = header(shard, &config, synthesis);
        weight_map.extend(header.tensors.iter().map(|entry| (entry.name.clone(), name.clone().into())));
        output.write(&name, |file, path| {
            file.write_all(&header.encode()).map_err(|source| CheckpointError::io(path, source))?;
            shard
                .iter()
                .try_for_each(|&stored| write_tensor(stored, &config, synthesis, file, path, progress))
        })?;
    }
    if shards.len() > 1 {
        let metadata = json!({ "total_size": data });
        let index = [("metadata".to_owned(), metadata), ("weight_map".to_owned(), weight_map.into())];
        output.write_json(INDEX, &index.into_iter().collect())?;
    }
    output.write_json("config.json", &config_of(read_json(config_path)?, synthesis))?;
    let generation = config_path.with_file_name("generation_config.json");
    if generation.exists() {
        output.write_json("generation_config.json", &read_json(&generation)?)?;
    }
    output.finish()?;
    progress.finish();
    let parameters = |tensor: Tensor| tensor.shape(&config.shape).iter().product::<usize>() as u64;
    Ok(Tensor::all(config.shape.layers, config.tied).map(parameters).sum())
}

/// A tensor as files store it.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Stored {
    Plain(Tensor),
    Part(Tensor, QuantizedPart, Quantization),
}

impl Stored {
    /// What a tensor of the model is stored as.
    fn of(tensor: Tensor, config: &Config) -> Vec<Stored> {
        let Some(quantization) = config.quantization.filter(|_| tensor.is_projection()) else {
            return vec![Stored::Plain(tensor)];
        };
        let has = |part: &QuantizedPart| match part {
            QuantizedPart::Values | QuantizedPart::Zeros | QuantizedPart::Scales => true,
            QuantizedPart::GroupIndex => quantization.layout != Layout::Awq,
            QuantizedPart::Bias => false,
        };
        let parts = QuantizedPart::ALL.into_iter().filter(has);
        parts.map(|part| Stored::Part(tensor, part, quantization)).collect()
    }

    fn name(self, naming: Naming) -> String {
        match self {
            Stored::Plain(tensor) => tensor.name(naming),
            Stored::Part(tensor, part, _) => tensor.part_name(part),
        }
    }

    fn shape(self, config: &Config) -> Vec<usize> {
        match self {
            Stored::Plain(tensor) => tensor.stored_shape(&config.shape),
            Stored::Part(tensor, part, quantization) => stored_shape(tensor, part, config, quantization),
        }
    }

    /// The element type; that of plain tensors is `plain`.
    fn dtype(self, plain: SourceType) -> Dtype {
        match (self, plain) {
            (Stored::Part(_, QuantizedPart::Scales | QuantizedPart::Bias, _), _) => Dtype::F16,
            (Stored::Part(..), _) => Dtype::I32,
            (Stored::Plain(_), SourceType::F32) => Dtype::F32,
            (Stored::Plain(_), SourceType::F16) => Dtype::F16,
            (Stored::Plain(_), SourceType::Bf16) => Dtype::BF16,
        }
    }

    fn bytes(self, config: &Config, plain: SourceType) -> u64 {
        let elements: usize = self.shape(config).iter().product();
        (elements * self.dtype(plain).bitsize() / 8) as u64
    }
}

fn config_of(mut config: Map<String, Value>, synthesis: &Synthesis) -> Map<String, Value> {
    // No code is copied that an auto_map could refer to.
    config.shift_remove("auto_map");
    retarget(&mut config, synthesis.naming, Path::new(""));
    let key = if config.contains_key("dtype") { "dtype" } else { "torch_dtype" };
    let dtype = match synthesis.dtype {
        SourceType::F32 => "float32",
        SourceType::F16 => "float16",
        SourceType::Bf16 => "bfloat16",
    };
    config.insert(key.to_owned(), dtype.into());
    config
}

/// The tensors of each file, in order.
fn shards(config: &Config, synthesis: &Synthesis) -> Vec<Vec<Stored>> {
    let mut shards = vec![Vec::new()];
    let mut filled = 0;
    let tensors = Tensor::all(config.shape.layers, config.tied);
    for stored in tensors.flat_map(|tensor| Stored::of(tensor, config)) {
        let bytes = stored.bytes(config, synthesis.dtype);
        if filled > 0 && filled + bytes > synthesis.max_shard_bytes {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        if let Some(shard) = shards.last_mut() {
            shard.push(stored);
        }
    }
    shards
}

fn header(shard: &[Stored], config: &Config, synthesis: &Synthesis) -> Header {
    let mut end = 0;
    let tensors = shard
        .iter()
        .map(|stored| {
            let begin = end;
            end += stored.bytes(config, synthesis.dtype);
            Entry {
                name: stored.name(synthesis.naming),
                dtype: stored.dtype(synthesis.dtype),
                shape: stored.shape(config).into_iter().map(|size| size as u64).collect(),
                begin,
                end,
            }
        })
        .collect();
    let metadata = [("format".to_owned(), Value::from("pt"))].into_iter().collect();
    Header { metadata: Some(metadata), tensors, data_start: 0 }
}

fn write_tensor(
    stored: Stored,
    config: &Config,
    synthesis: &Synthesis,
    file: &mut File,
    path: &Path,
    progress: &ProgressBar,
) -> Result<(), CheckpointError> {
    // One name for both namings, so that renaming a synthesized checkpoint gives the other one.
    let mut random = Random::new(synthesis.seed, &stored.name(Naming::Llama));
    let count = stored.shape(config).iter().product();
    let mut sink = Sink { file, path, progress };
    match stored {
        Stored::Plain(tensor) => {
            let [_, cols] = tensor.shape(&config.shape);
            let (mean, spread) = match tensor {
                Tensor::Norm | Tensor::Layer(_, LayerTensor::AttentionNorm | LayerTensor::FfnNorm) => {
                    (1.0, NORM_SPREAD)
                }
                Tensor::Embedding if !config.tied => (0.0, 1.0),
                _ => (0.0, 1.0 / (cols as f32).sqrt()),
            };
            let mut next = || mean + spread * random.normal();
            match synthesis.dtype {
                SourceType::F32 => sink.write(count, |_| next().to_le_bytes()),
                SourceType::F16 => sink.write(count, |_| f16::from_f32(next()).to_le_bytes()),
                SourceType::Bf16 => sink.write(count, |_| bf16::from_f32(next()).to_le_bytes()),
            }
        }
        Stored::Part(tensor, part, quantization) => {
            let [_, cols] = tensor.shape(&config.shape);
            match part {
                QuantizedPart::Values => sink.write(count, |_| random.word().to_le_bytes()),
                QuantizedPart::Zeros => sink.write(count, |_| middle(quantization).to_le_bytes()),
                QuantizedPart::Scales => {
                    let levels = (1 << quantization.bits) as f32;
                    let spread = ((levels * levels - 1.0) / 12.0).sqrt();
                    let scale = 1.0 / (cols as f32).sqrt() / spread;
                    sink.write(count, |_| {
                        f16::from_f32(scale * (1.0 + NORM_SPREAD * random.normal())).to_le_bytes()
                    })
                }
                QuantizedPart::GroupIndex => {
                    sink.write(count, |column| ((column / quantization.group_of(cols)) as u32).to_le_bytes())
                }
                QuantizedPart::Bias => sink.write(count, |_| f16::ZERO.to_le_bytes()),
            }
        }
    }
}

/// A word of zero points that are all in the middle of their range.
fn middle(quantization: Quantization) -> u32 {
    let less = u32::from(quantization.layout == Layout::Gptq);
    let zero = (1 << (quantization.bits - 1)) - less;
    (0..quantization.per_word()).fold(0, |word, place| word | zero << (place * quantization.bits))
}

/// A file that a tensor is written to, piece by piece.
struct Sink<'a> {
    file: &'a mut File,
    path: &'a Path,
    progress: &'a ProgressBar,
}

impl Sink<'_> {
    fn write<const N: usize>(
        &mut self,
        count: usize,
        mut element: impl FnMut(usize) -> [u8; N],
    ) -> Result<(), CheckpointError> {
        let mut chunk = Vec::with_capacity(CHUNK * N);
        for start in (0..count).step_by(CHUNK) {
            chunk.clear();
            (start..count.min(start + CHUNK)).for_each(|index| chunk.extend_from_slice(&element(index)));
            self.file.write_all(&chunk).map_err(|source| CheckpointError::io(self.path, source))?;
            self.progress.inc(chunk.len() as u64);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::testing::{Model, tiny};

    fn values(bytes: &[u8]) -> Vec<f32> {
        bytes.chunks_exact(2).map(|pair| bf16::from_le_bytes([pair[0], pair[1]]).to_f32()).collect()
    }

    #[test]
    fn numbers_depend_on_seed_and_tensor_alone() {
        let llama = Synthesis { naming: Naming::Llama, max_shard_bytes: 1, ..Synthesis::default() };
        let other = Synthesis { seed: 1, ..Synthesis::default() };
        let [one, same, other] =
            [&Synthesis::default(), &llama, &other].map(|options| Model::with(tiny(), options));
        let read = |model: &Model, tensor| {
            let checkpoint = model.open().unwrap();
            let [rows, cols] = checkpoint.shape(tensor);
            checkpoint.read(tensor, 0..rows, 0..cols).unwrap()
        };
        assert!(same.file("model-00021-of-00021.safetensors").exists());
        for tensor in Tensor::all(2, false) {
            assert_eq!(read(&one, tensor), read(&same, tensor), "{tensor:?}");
            assert_ne!(read(&one, tensor), read(&other, tensor), "{tensor:?}");
        }
    }

    #[test]
    fn weights_have_the_size_that_keeps_activations() {
        let mut config = tiny();
        config["vocab_size"] = 4000.into();
        let model = Model::new(config);
        let checkpoint = model.open().unwrap();
        let deviation = |tensor, rows, cols| {
            let values = values(&checkpoint.read(tensor, 0..rows, 0..cols).unwrap());
            let mean = values.iter().sum::<f32>() / values.len() as f32;
            let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / values.len() as f32;
            (mean, variance.sqrt())
        };
        let (mean, embedding) = deviation(Tensor::Embedding, 4000, 12);
        assert!(mean.abs() < 0.02 && (embedding - 1.0).abs() < 0.02);
        let (_, head) = deviation(Tensor::Head, 4000, 12);
        assert!((head * 12f32.sqrt() - 1.0).abs() < 0.02);
        let (mean, norm) = deviation(Tensor::Norm, 1, 12);
        assert!((mean - 1.0).abs() < 0.1 && norm > 0.0 && norm < 0.2);
    }

    #[test]
    fn files_keep_to_their_limit_and_the_config_to_what_was_made() {
        let model = Model::with(
            tiny(),
            &Synthesis { max_shard_bytes: 2000, naming: Naming::Llama, dtype: SourceType::F32, seed: 3 },
        );
        let config = read_json(&model.file("config.json")).unwrap();
        assert_eq!((&config["torch_dtype"], &config["model_type"]), (&"float32".into(), &"llama".into()));
        assert_eq!(model.open().unwrap().dtype(Tensor::Head).unwrap(), SourceType::F32);
        for entry in std::fs::read_dir(model.path()).unwrap() {
            let entry = entry.unwrap();
            if entry.path().extension().is_some_and(|extension| extension == "safetensors") {
                let (_, data) = crate::checkpoint::testing::parts(&entry.path());
                assert!(data.len() <= 2000, "{:?}", entry.path());
            }
        }
    }
}
