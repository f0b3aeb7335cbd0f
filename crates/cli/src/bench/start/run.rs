//! One start of `phalanx serve`, with the times of its stages, and two answers.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use client::{Client, GenerateRequest, Prompt, TokenIds};
use futures_util::StreamExt;
use rustix::process::{Pid, Signal, kill_process};

use crate::stages::{self, STAGES_VARIABLE};

/// How the line begins that tells that it serves.
const READY: &str = "serving ";
/// Enough that decoding steps of each size that they take are recorded.
const ANSWER_TOKENS: u32 = 8;

/// What was measured.
pub(super) struct Start {
    /// Seconds of each stage.
    pub(super) stages: Vec<f64>,
    /// Seconds of each answer.
    pub(super) answers: [f64; 2],
}

/// Starts it on a free port, waits until it serves, asks twice, and ends it.
pub(super) fn start(options: &[String], names: &[&str]) -> Result<Start> {
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let mut command = Command::new(&program);
    command.args(["serve", "--grpc", "127.0.0.1:0"]).args(options).env(STAGES_VARIABLE, "1");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let begun = stages::now();
    let mut server = command.spawn().with_context(|| format!("cannot start {}", program.display()))?;
    let output = server.stdout.take().context("the server has no output")?;
    let told = server.stderr.take().context("the server has no error output")?;
    let listener = thread::spawn(|| listen(told));
    let ready = BufReader::new(output).lines().map_while(Result::ok).find(|line| line.starts_with(READY));
    let served = stages::now();
    let answers = ready.as_deref().map(|line| answers(line.rsplit(' ').next().unwrap_or_default()));
    end(&mut server, ready.is_some())?;
    let told = listener.join().unwrap_or_default();
    let Some(answers) = answers else { bail!("phalanx serve ended before it served") };
    Ok(Start { stages: durations(names, &told, begun, served)?, answers: answers? })
}

/// The stages that the processes tell; all else is for people.
fn listen(output: impl Read) -> Vec<(String, Duration)> {
    let mut told = Vec::new();
    for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line);
        match stages::parse(&line) {
            Some((name, at)) => told.push((name.to_owned(), at)),
            None => eprintln!("{line}"),
        }
    }
    told
}

/// Seconds of each stage: from the end of the one before it, on whatever worker that was last, to its own. The last one ends with the
/// line that it serves.
fn durations(
    names: &[&str],
    told: &[(String, Duration)],
    begun: Duration,
    served: Duration,
) -> Result<Vec<f64>> {
    let mut before = begun;
    let mut seconds = Vec::new();
    for (index, name) in names.iter().enumerate() {
        let at = if index + 1 == names.len() {
            served
        } else {
            let times = told.iter().filter(|(of, _)| of == name).map(|(_, at)| *at);
            times.max().with_context(|| format!("phalanx serve did not tell when it was at '{name}'"))?
        };
        seconds.push(at.saturating_sub(before).as_secs_f64());
        before = before.max(at);
    }
    Ok(seconds)
}

fn answers(address: &str) -> Result<[f64; 2]> {
    let runtime = tokio::runtime::Runtime::new().context("cannot start the runtime")?;
    runtime.block_on(async {
        let client = Client::connect(address).await?;
        Ok([answer(&client).await?, answer(&client).await?])
    })
}

/// Seconds of one answer.
async fn answer(client: &Client) -> Result<f64> {
    let request = GenerateRequest {
        prompt: Some(Prompt::TokenIds(TokenIds { ids: vec![0] })),
        max_tokens: Some(ANSWER_TOKENS),
        ignore_eos: true,
        ..GenerateRequest::default()
    };
    let asked = Instant::now();
    let mut events = client.generate(request).await?;
    while let Some(event) = events.next().await {
        event?;
    }
    Ok(asked.elapsed().as_secs_f64())
}

/// Ends the server if it still runs, and waits for it.
fn end(server: &mut Child, runs: bool) -> Result<()> {
    if runs {
        kill_process(Pid::from_child(server), Signal::TERM).context("cannot end the server")?;
    }
    server.wait().context("cannot wait for the server")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_lasts_until_the_last_worker_is_through() {
        let seconds = Duration::from_secs;
        let told = [("a", 3), ("a", 5), ("b", 4), ("b", 9), ("other", 90)];
        let told = told.map(|(name, at)| (name.to_owned(), seconds(at)));
        assert_eq!(durations(&["a", "b", "c"], &told, seconds(2), seconds(10)).unwrap(), [3.0, 4.0, 1.0]);
        assert!(durations(&["a", "d", "c"], &told, seconds(2), seconds(10)).is_err());
    }
}
