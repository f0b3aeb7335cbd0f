//! How answers are drawn and when they end, as `generate` and `chat` are told.

use clap::Args;
use client::{GenerateRequest, Prompt, SamplingOptions};

#[derive(Debug, Clone, Args)]
pub(crate) struct SamplingArgs {
    /// Tokens to generate at most
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub(crate) max_tokens: u32,
    /// Randomness: 0 always takes the likeliest token
    #[arg(long, value_name = "T")]
    pub(crate) temperature: Option<f32>,
    /// Keep the likeliest tokens that together have this probability [default: 1, all]
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Keep this many of the likeliest tokens [default: 0, all]
    #[arg(long, value_name = "K")]
    top_k: Option<u32>,
    /// Same seed, same text [default: a random one]
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// End before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Go on past the model's end-of-sequence tokens
    #[arg(long)]
    ignore_eos: bool,
}

impl SamplingArgs {
    /// A request for a prompt.
    pub(crate) fn request(&self, prompt: Prompt) -> GenerateRequest {
        GenerateRequest {
            prompt: Some(prompt),
            max_tokens: Some(self.max_tokens),
            sampling: Some(SamplingOptions {
                temperature: self.temperature,
                top_p: self.top_p,
                top_k: self.top_k,
                seed: self.seed,
            }),
            stop: self.stop.clone(),
            ignore_eos: self.ignore_eos,
            resume: None,
        }
    }
}
