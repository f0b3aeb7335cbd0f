//! `phalanx generate`: one prompt, one answer.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use client::{Client, Event, FinishReason, GenerateRequest, Prompt, Started, TokenIds, Usage};
use futures_util::StreamExt;
use serde_json::json;

use crate::sampling::SamplingArgs;
use crate::target::TargetArgs;

#[derive(Debug, Args)]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    target: TargetArgs,
    #[command(flatten)]
    prompt: PromptArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Print one JSON object at the end instead of text as it comes
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct PromptArgs {
    /// Text to continue
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// File with the text to continue
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// Token ids to continue, such as 1,2,3
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    prompt_ids: Option<Vec<u32>>,
}

impl PromptArgs {
    fn prompt(self) -> Result<Prompt> {
        if let Some(ids) = self.prompt_ids {
            return Ok(Prompt::TokenIds(TokenIds { ids }));
        }
        let text = match (self.prompt, self.prompt_file) {
            (Some(text), _) => text,
            (None, Some(path)) => {
                std::fs::read_to_string(&path).with_context(|| format!("--prompt-file {}", path.display()))?
            }
            (None, None) => bail!("give one of --prompt, --prompt-file and --prompt-ids"),
        };
        Ok(Prompt::Text(text))
    }
}

impl GenerateArgs {
    pub(crate) async fn run(self) -> Result<()> {
        let request = self.sampling.request(self.prompt.prompt()?);
        let json = self.json;
        self.target
            .with_client(async |client| {
                if json { print_json(&client, request).await } else { print_text(&client, request).await }
            })
            .await
    }
}

async fn print_text(client: &Client, request: GenerateRequest) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let started = Instant::now();
    let mut first = None;
    let mut answer = client.generate(request).await?;
    while let Some(event) = answer.next().await {
        match event? {
            Event::Started(started) => tell_change(&started),
            Event::Token(token) => {
                first.get_or_insert_with(Instant::now);
                out.write_all(token.text.as_bytes())?;
                out.flush()?;
            }
            Event::Finished(finished) => {
                writeln!(out, "{}", finished.text)?;
                if let (Some(first), Some(usage), true) =
                    (first, finished.usage, std::io::stderr().is_terminal())
                {
                    summary(usage, first - started, first.elapsed());
                }
                return Ok(());
            }
        }
    }
    bail!("the answer ended without its last message")
}

/// Says so where an answer had to go on with something that may compute other bits.
pub(crate) fn tell_change(started: &Started) {
    if let Some(previous) = &started.previous_fingerprint {
        let now = &started.fingerprint;
        eprintln!("note: the answer goes on under fingerprint {now}, not {previous}: its words may differ");
    }
}

fn summary(usage: Usage, prefill: std::time::Duration, decode: std::time::Duration) {
    let rate = f64::from(usage.completion_tokens.saturating_sub(1)) / decode.as_secs_f64().max(1e-9);
    eprintln!(
        "[{} prompt tokens, {} of them cached, first token after {:.0} ms, then {} at {rate:.1} tokens/s]",
        usage.prompt_tokens,
        usage.cached_tokens,
        prefill.as_secs_f64() * 1e3,
        usage.completion_tokens,
    );
}

async fn print_json(client: &Client, request: GenerateRequest) -> Result<()> {
    let mut answer = client.generate(request).await?;
    let (mut ids, mut logprobs, mut text) = (Vec::new(), Vec::new(), String::new());
    let mut start = None;
    while let Some(event) = answer.next().await {
        match event? {
            Event::Started(started) => {
                tell_change(&started);
                start = Some(started);
            }
            Event::Token(token) => {
                ids.push(token.id);
                logprobs.push(token.logprob);
                text.push_str(&token.text);
            }
            Event::Finished(finished) => {
                text.push_str(&finished.text);
                let start = start.unwrap_or_default();
                let usage = finished.usage.unwrap_or_default();
                let answer = json!({
                    "prompt_token_ids": start.prompt_token_ids,
                    "token_ids": ids,
                    "text": text,
                    "finish_reason": reason(finished.reason()),
                    "logprobs": logprobs,
                    "usage": {
                        "prompt_tokens": usage.prompt_tokens,
                        "completion_tokens": usage.completion_tokens,
                        "cached_tokens": usage.cached_tokens,
                    },
                    "seed": start.seed,
                    "fingerprint": start.fingerprint,
                    "previous_fingerprint": start.previous_fingerprint,
                });
                println!("{}", serde_json::to_string_pretty(&answer)?);
                return Ok(());
            }
        }
    }
    bail!("the answer ended without its last message")
}

fn reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::Unspecified => "unspecified",
    }
}
