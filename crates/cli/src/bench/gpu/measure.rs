//! Runs the measurements, section after section: ceilings, attention, then for each format of weights a model, and the ceilings again.

mod attention;
mod runner;

use std::time::Instant;

use anyhow::Result;
use kernels::cuda::Ceilings;
use kernels::{Cuda, CudaOptions, DType, WeightFormat};
use model::{Config, ModelOptions, ModelSource};

use self::runner::Runner;
use super::counts::{Kept, kv_token_bytes, parameters, weight_bytes};
use super::report::{Decode, Load, Prefill, Report, Skipped};
use super::{DeterministicArg, FormatArg, GpuArgs, Sizes};
use crate::args::DeviceArg;

/// A context whose keys and values hardly count beside the weights: what longer ones are compared with.
const SHORT_CONTEXT: u32 = 512;
/// How often each ceiling is measured at a time.
const CEILING_SAMPLES: usize = 10;

/// Measures all that the arguments ask for. What has no room is told in the report, and so is what fails.
///
/// # Errors
/// Where the GPU cannot be used at all.
pub(super) fn run(args: &GpuArgs) -> Result<Report> {
    let DeviceArg::Cuda(number) = args.device else {
        anyhow::bail!("--device {}: this measures GPUs; `phalanx bench step` measures the CPU", args.device);
    };
    let mut session = Session {
        args,
        sizes: args.sizes(),
        options: CudaOptions {
            ordinal: number.unwrap_or(0),
            memory_utilization: args.gpu_memory_utilization,
            ..CudaOptions::default()
        },
        report: Report::default(),
        samples: Default::default(),
        started: Instant::now(),
    };
    let (name, config) = args.model(FormatArg::Bf16)?;
    for &format in &args.weights {
        args.model(format)?;
    }
    session.describe(name, parameters(&config.shape))?;
    session.ceilings()?;
    session.attention(&config);
    for &format in &args.weights {
        let measured = session.model(format);
        session.note(format.name().to_owned(), measured);
        let measured = session.ceilings();
        session.note(format!("ceilings after {}", format.name()), measured);
    }
    let Session { mut report, samples: [read, copy, gemm], .. } = session;
    report.finish(read, copy, gemm);
    Ok(report)
}

struct Session<'a> {
    args: &'a GpuArgs,
    sizes: Sizes,
    options: CudaOptions,
    report: Report,
    /// Of reading, copying and multiplying.
    samples: [Vec<f64>; 3],
    started: Instant,
}

impl Session<'_> {
    fn describe(&mut self, shape: String, parameters: u64) -> Result<()> {
        let cuda = Cuda::open(self.options.clone())?;
        if let Some(warning) = cuda.warning() {
            eprintln!("warning: {warning}");
        }
        self.report.engine = "phalanx".to_owned();
        self.report.version = env!("CARGO_PKG_VERSION").to_owned();
        self.report.device = cuda.name()?;
        self.report.path = kernels::Backend::path(&cuda).to_owned();
        self.report.memory_bytes = cuda.memory()?.1;
        self.report.shape = shape;
        self.report.parameters = parameters;
        Ok(())
    }

    /// Says what comes, for whoever waits.
    fn announce(&self, what: &str) {
        eprintln!("{:6.1} s  {what}", self.started.elapsed().as_secs_f64());
    }

    /// Puts what went wrong where it belongs.
    fn note<T>(&mut self, what: String, result: Result<T>) -> Option<T> {
        match result {
            Ok(value) => return Some(value),
            Err(error) if is_out_of_memory(&error) => self.skip(what, format!("{error:#}")),
            Err(error) => {
                eprintln!("failed: {what}: {error:#}");
                self.report.failures.push(format!("{what}: {error:#}"));
            }
        }
        None
    }

    fn skip(&mut self, what: String, why: String) {
        eprintln!("not measured: {what}: {why}");
        self.report.skipped.push(Skipped { what, why });
    }

    /// Why nothing further is begun.
    fn too_late(&self) -> Option<String> {
        let limit = self.args.seconds;
        (self.started.elapsed().as_secs() >= limit).then(|| format!("--seconds {limit} are over"))
    }

    /// Measured while no model is there, for which and whose KV there would be no room.
    fn ceilings(&mut self) -> Result<()> {
        self.announce("ceilings");
        let cuda = Cuda::open(self.options.clone())?;
        let (bytes, size) = (self.sizes.ceiling_memory, self.sizes.ceiling_matrix);
        let mut ceilings = Ceilings::new(&cuda, usize::try_from(bytes)?, size as usize)?;
        (self.report.ceilings.memory_bytes, self.report.ceilings.gemm_size) = (bytes, size);
        for sample in 0..=CEILING_SAMPLES {
            let rates = [ceilings.read()?, ceilings.copy()?, ceilings.multiply()?];
            // The first of all is for what is found out and taken then.
            if sample > 0 {
                self.samples.iter_mut().zip(rates).for_each(|(samples, rate)| samples.push(rate));
            }
        }
        Ok(())
    }

    fn attention(&mut self, config: &Config) {
        let Sizes { batch: batches, context: contexts, steps, .. } = self.sizes.clone();
        for &batch in &batches {
            for &context in &contexts {
                let what = format!("attention of batch {batch} at context {context}");
                if let Some(why) = too_long(config, context).or_else(|| self.too_late()) {
                    self.skip(what, why);
                    continue;
                }
                self.announce(&what);
                let measured = attention::measure(&self.options, &config.shape, batch, context, steps);
                if let Some(row) = self.note(what, measured) {
                    self.report.attention.push(row);
                }
            }
        }
    }

    fn model(&mut self, format: FormatArg) -> Result<()> {
        let args = self.args;
        let (name, config) = args.model(format)?;
        if let Some(why) = self.too_late() {
            self.skip(format.name().to_owned(), why);
            return Ok(());
        }
        let kept = match (format, config.quantization) {
            (FormatArg::Fp8, _) => Kept::Fp8,
            (_, Some(quantization)) => Kept::Quantized(quantization),
            (_, None) => Kept::Bf16,
        };
        self.announce(&format!("loading {name} in {}", format.name()));
        let weights = if format == FormatArg::Fp8 { WeightFormat::Fp8 } else { WeightFormat::AsStored };
        let cuda = Cuda::open(CudaOptions { weights, ..self.options.clone() })?;
        let bytes = weight_bytes(&config.shape, kept) + 2 * (config.shape.vocab * config.shape.hidden) as u64;
        let (free, _) = cuda.memory()?;
        if bytes as f64 > free as f64 * args.gpu_memory_utilization {
            self.skip(format.name().to_owned(), format!("{} of weights, {} are free", Gb(bytes), Gb(free)));
            return Ok(());
        }
        let options = ModelOptions {
            dtype: DType::Bf16,
            kv_dtype: DType::Bf16,
            max_context: None,
            // A block: each measurement takes what it needs.
            kv_memory: Some(kv_token_bytes(&config.shape) * kernels::BLOCK_TOKENS as u64),
            largest_step: None,
            steps_in_flight: 2,
            progress: false,
        };
        let source = ModelSource::random(&name, config.clone(), options)?;
        let (mut runner, seconds) = Runner::load(cuda, &source)?;
        self.report.loads.push(Load {
            weights: format.name(),
            seconds,
            weight_bytes: runner.weight_bytes(),
            memory: runner.memory()?,
        });
        let Sizes { batch: batches, context: mut contexts, prefill: prompts, .. } = self.sizes.clone();
        contexts.push(SHORT_CONTEXT);
        contexts.sort_unstable();
        contexts.dedup();
        for batch in batches {
            for &context in &contexts {
                let what = format!("{} decoding, batch {batch} at context {context}", format.name());
                self.with_room(&mut runner, what, (batch, context), &config, |session, runner, on| {
                    let row = session.decode(runner, format, on, batch, context)?;
                    session.report.decode.push(row);
                    Ok(())
                });
            }
        }
        for tokens in prompts {
            let what = format!("{} prefill of {tokens} tokens", format.name());
            self.with_room(&mut runner, what, (1, tokens), &config, |session, runner, on| {
                let row = session.prefill(runner, format, on, tokens)?;
                session.report.prefill.push(row);
                Ok(())
            });
        }
        Ok(())
    }

    /// Does `measure` for every way that was asked for, with room in the KV cache for `batch` sequences of so many tokens.
    fn with_room(
        &mut self,
        runner: &mut Runner<'_>,
        what: String,
        (batch, tokens): (u32, u32),
        config: &Config,
        mut measure: impl FnMut(&mut Self, &mut Runner<'_>, bool) -> Result<()>,
    ) {
        if let Some(why) = too_long(config, tokens).or_else(|| self.too_late()) {
            return self.skip(what, why);
        }
        self.announce(&what);
        let ways: &[bool] = match self.args.deterministic {
            DeterministicArg::Both => &[false, true],
            DeterministicArg::On => &[true],
            DeterministicArg::Off => &[false],
        };
        let measured = match runner.make_room(batch as usize, tokens as usize) {
            Ok(Some(missing)) => return self.skip(what, missing),
            Ok(None) => ways.iter().try_for_each(|&deterministic| {
                runner.set_deterministic(deterministic)?;
                measure(self, runner, deterministic)
            }),
            Err(error) => Err(error),
        };
        self.note(what, measured);
    }

    fn decode(
        &self,
        runner: &mut Runner<'_>,
        format: FormatArg,
        deterministic: bool,
        batch: u32,
        context: u32,
    ) -> Result<Decode> {
        let times = runner.decode(batch as usize, context as usize, self.sizes.steps as usize)?;
        let ms = times.steps;
        let weight_bytes = runner.weight_bytes();
        let kv_bytes = u64::from(batch) * u64::from(context) * kv_token_bytes(&runner.shape());
        Ok(Decode {
            weights: format.name(),
            deterministic,
            batch,
            context,
            ms,
            device_ms: times.by_device,
            single_ms: times.alone,
            tokens_per_second: 1e3 * f64::from(batch) / ms.median,
            weight_bytes,
            kv_bytes,
            gb_s: (weight_bytes + kv_bytes) as f64 / ms.median / 1e6,
            share: 0.0,
        })
    }

    fn prefill(
        &self,
        runner: &mut Runner<'_>,
        format: FormatArg,
        deterministic: bool,
        tokens: u32,
    ) -> Result<Prefill> {
        let chunk = self.args.max_batch_tokens;
        let ms = runner.prefill(tokens as usize, chunk as usize)?;
        let tflop = super::counts::prefill_flop(&runner.shape(), u64::from(tokens)) / 1e12;
        Ok(Prefill {
            weights: format.name(),
            deterministic,
            tokens,
            chunk,
            ms,
            tokens_per_second: 1e3 * f64::from(tokens) / ms.median,
            tflop,
            tflop_s: 1e3 * tflop / ms.median,
            share: 0.0,
        })
    }
}

fn too_long(config: &Config, tokens: u32) -> Option<String> {
    let limit = config.max_positions;
    (tokens as usize > limit).then(|| format!("the model's context is {limit} tokens"))
}

fn is_out_of_memory(error: &anyhow::Error) -> bool {
    let kernels = match error.downcast_ref() {
        Some(model::Error::Kernel(error)) => Some(error),
        Some(_) => None,
        None => error.downcast_ref(),
    };
    matches!(kernels, Some(kernels::Error::OutOfMemory { .. }))
}

/// Bytes as people read them.
struct Gb(u64);

impl std::fmt::Display for Gb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.2} GB", self.0 as f64 / 1e9)
    }
}
