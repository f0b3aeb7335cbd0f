//! A model with its options: what a worker opens before it is assigned a share, and loads from after.

use std::path::Path;
use std::slice;

use engine::Unit;
use kernels::{BLOCK_TOKENS, Backend, DType, KvShape, MAX_STEPS_IN_FLIGHT};
use sha2::{Digest, Sha256};

use crate::checkpoint::Checkpoint;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::names::{LayerTensor, Tensor};
use crate::weights::{Cut, Origin, RandomWeights};

/// Raised with every change of a kernel or of the forward pass that changes bits.
const KERNEL_VERSION: u32 = 1;
/// On a device that is shared with other programs, a KV cache has room for this many full contexts, memory allowing.
const DEFAULT_CONTEXTS: usize = 4;

/// How a model is to be run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelOptions {
    /// Of activations and weights (bf16 weights stay bf16 under f32, which is exact).
    pub dtype: DType,
    /// Of cached keys and values.
    pub kv_dtype: DType,
    /// Tokens of context; `None`: what the model was made for.
    pub max_context: Option<usize>,
    /// Bytes of this rank's KV cache; `None`: on a GPU all that is left, else four contexts, as far as there is room.
    pub kv_memory: Option<u64>,
    /// Activations for such a step are taken while loading, so that memory cannot run out later. `None`: as steps come.
    pub largest_step: Option<StepSize>,
    /// Steps that are taken before the first of them has ended, 1 to [`MAX_STEPS_IN_FLIGHT`]. With more than one, a GPU need not wait
    /// for the coordinator in between.
    pub steps_in_flight: usize,
    /// Draw a progress bar while loading.
    pub progress: bool,
}

/// How much a step does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepSize {
    /// Tokens that run.
    pub rows: usize,
    /// Rows that are sampled from, each of which takes logits over the vocabulary.
    pub sampled: usize,
}

/// What a worker tells of its model before it loads weights. Equal on all workers of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The folder's name.
    pub name: String,
    /// Ids are below this.
    pub vocabulary: u32,
    /// Tokens of context.
    pub max_context: u32,
    /// Shard units: the largest width.
    pub units: u32,
    /// Tokens of a KV block.
    pub block_size: u32,
    /// Ids that end a text.
    pub eos: Vec<u32>,
    /// Model, data types, instruction path, kernel version.
    pub fingerprint: String,
}

/// A model whose config and headers have been read and checked.
#[derive(Debug)]
pub struct ModelSource {
    name: String,
    pub(crate) options: ModelOptions,
    pub(crate) config: Config,
    pub(crate) origin: Origin,
    /// Hash of what tells this model from others.
    identity: String,
}

impl ModelSource {
    /// Opens a model directory; reads no more than the config, the headers and the norm weights.
    pub fn open(dir: &Path, options: ModelOptions) -> Result<Self> {
        let config = Config::load(dir)?;
        check_options(&options, &config)?;
        let checkpoint = Checkpoint::open(dir, &config)?;
        let identity = identity(&config, &checkpoint)?;
        let dir = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
        let name = dir.file_name().map_or("model".into(), |name| name.to_string_lossy().into_owned());
        Ok(Self { name, options, config, origin: Origin::Checkpoint(checkpoint), identity })
    }

    /// A model of random weights, of which there are no files: for measuring shapes. Projections are quantised as the config says.
    pub fn random(name: &str, config: Config, options: ModelOptions) -> Result<Self> {
        check_options(&options, &config)?;
        let origin = Origin::Random(RandomWeights::new(&config));
        Ok(Self { name: name.to_owned(), options, config, origin, identity: "random".to_owned() })
    }

    /// The config.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What a rank serves whose backend has this instruction path.
    pub fn report(&self, path: &str) -> Report {
        let dtype = |dtype| if dtype == DType::F32 { "f32" } else { "bf16" };
        Report {
            name: self.name.clone(),
            vocabulary: self.config.shape.vocab as u32,
            max_context: self.max_context() as u32,
            units: self.config.shape.kv_heads as u32,
            block_size: BLOCK_TOKENS as u32,
            eos: self.config.eos.clone(),
            fingerprint: format!(
                "{}-{}-kv_{}-{}-v{KERNEL_VERSION}",
                self.identity,
                dtype(self.options.dtype),
                dtype(self.options.kv_dtype),
                path,
            ),
        }
    }

    /// Bytes of KV cache that hold `tokens` tokens on a rank with all units: enough on any rank.
    pub fn kv_bytes<B: Backend>(&self, backend: &B, tokens: usize) -> u64 {
        let block =
            backend.kv_block_bytes(self.kv_shape(self.config.shape.layers, self.config.shape.kv_heads));
        (tokens.div_ceil(BLOCK_TOKENS) * block) as u64
    }

    pub(crate) fn max_context(&self) -> usize {
        self.options.max_context.unwrap_or(self.config.max_positions)
    }

    pub(crate) fn kv_shape(&self, layers: usize, units: usize) -> KvShape {
        let (group, head_dim) = (self.config.shape.group(), self.config.shape.head_dim);
        KvShape { layers, units, group, head_dim, dtype: self.options.kv_dtype }
    }

    pub(crate) fn cut<'a>(&'a self, units: &'a [Unit]) -> Cut<'a> {
        Cut { config: &self.config, origin: &self.origin, units }
    }

    /// Blocks of KV cache that this rank can hold.
    pub(crate) fn kv_blocks<B: Backend>(&self, backend: &B, shape: KvShape) -> Result<usize> {
        let block_bytes = backend.kv_block_bytes(shape) as u64;
        let blocks = match self.options.kv_memory {
            Some(bytes) => bytes / block_bytes,
            None => {
                let enough = DEFAULT_CONTEXTS * self.max_context().div_ceil(BLOCK_TOKENS);
                backend.kv_budget(block_bytes.saturating_mul(enough as u64))? / block_bytes
            }
        };
        match u32::try_from(blocks) {
            Ok(0) => Err(Error::Option(format!(
                "no room for the KV cache: one block of {} tokens takes {block_bytes} bytes on this rank; raise --kv-memory",
                BLOCK_TOKENS,
            ))),
            Ok(blocks) => Ok(blocks as usize),
            Err(_) => {
                Err(Error::Option(format!("--kv-memory: {blocks} blocks are more than can be numbered")))
            }
        }
    }
}

fn check_options(options: &ModelOptions, config: &Config) -> Result<()> {
    let steps = options.steps_in_flight;
    if !(1..=MAX_STEPS_IN_FLIGHT).contains(&steps) {
        return Err(Error::Option(format!(
            "--steps-in-flight {steps}: allowed are 1 to {MAX_STEPS_IN_FLIGHT}"
        )));
    }
    let limit = config.max_positions;
    match options.max_context {
        Some(asked) if asked == 0 || asked > limit => {
            Err(Error::Option(format!("--max-context {asked}: this model allows 1 to {limit}")))
        }
        _ => Ok(()),
    }
}

/// A hash over the config and all norm weights: what two models of one shape differ in, without reading gigabytes.
fn identity(config: &Config, checkpoint: &Checkpoint) -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(format!("{:?} {} {}", config.shape, config.rms_norm_eps, config.rope_theta));
    let layers = (0..config.shape.layers)
        .flat_map(|l| [LayerTensor::AttentionNorm, LayerTensor::FfnNorm].map(|part| Tensor::Layer(l, part)));
    for tensor in layers.chain([Tensor::Norm]) {
        hash.update(format!("{:?}", checkpoint.dtype(tensor)?));
        hash.update(checkpoint.read(tensor, 0..1, 0..config.shape.hidden)?);
    }
    if let Some(quantization) = config.quantization {
        // Quantised models may have the norms of the plain one.
        hash.update(format!("{quantization}"));
        let tensor = Tensor::Layer(0, LayerTensor::Q);
        let [_, cols] = checkpoint.shape(tensor);
        for slice in checkpoint.read_quantized(tensor, slice::from_ref(&(0..1)), 0..cols)? {
            hash.update(slice.unpack(slice.group_size()).block().values);
        }
    }
    // One row of the embedding, for models whose norms are all ones.
    hash.update(checkpoint.read(Tensor::Embedding, 0..1, 0..config.shape.hidden)?);
    Ok(hash.finalize().iter().take(6).map(|byte| format!("{byte:02x}")).collect())
}
