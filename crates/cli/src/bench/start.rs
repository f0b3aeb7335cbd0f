//! `phalanx bench start`: how long `phalanx serve` takes from the start of its process until it serves.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use rustix::process::{Pid, Signal, kill_process};
use serde::Serialize;

use super::spread::Spread;

/// How the line begins that tells that it serves.
const READY: &str = "serving ";

#[derive(Debug, Args)]
pub(crate) struct StartArgs {
    /// How often it is started; the first time counts by itself, since it may fill caches
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Options of `phalanx serve`, such as --model DIR --device cuda; they come last
    #[arg(value_name = "OPTIONS OF SERVE", trailing_var_arg = true, allow_hyphen_values = true)]
    serve: Vec<String>,
}

/// Seconds from the start of the process to its line that it serves.
#[derive(Debug, Serialize)]
struct Figures {
    options: Vec<String>,
    first_seconds: f64,
    /// Of all further starts; absent where there was one.
    later_seconds: Option<Spread>,
}

impl StartArgs {
    pub(super) fn run(self) -> Result<()> {
        let seconds = (0..self.runs).map(|_| start(&self.serve)).collect::<Result<Vec<_>>>()?;
        let later = &seconds[1..];
        let figures = Figures {
            options: self.serve,
            first_seconds: seconds[0],
            later_seconds: (!later.is_empty()).then(|| Spread::of(later.iter().copied())),
        };
        if self.json {
            println!("{}", serde_json::to_string_pretty(&figures)?);
            return Ok(());
        }
        println!("serve {}", figures.options.join(" "));
        println!("first start  {:8.2} s until it serves", figures.first_seconds);
        if let Some(later) = figures.later_seconds {
            println!("later        {later:8.2} s");
        }
        Ok(())
    }
}

/// Starts it on a free port, waits until it serves, and ends it.
fn start(options: &[String]) -> Result<f64> {
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let mut command = Command::new(&program);
    command.args(["serve", "--grpc", "127.0.0.1:0"]).args(options);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let started = Instant::now();
    let mut server = command.spawn().with_context(|| format!("cannot start {}", program.display()))?;
    let output = server.stdout.take().context("the server has no output")?;
    let ready = BufReader::new(output).lines().map_while(Result::ok).any(|line| line.starts_with(READY));
    let seconds = started.elapsed().as_secs_f64();
    if ready {
        kill_process(Pid::from_child(&server), Signal::TERM).context("cannot end the server")?;
    }
    let status = server.wait().context("cannot wait for the server")?;
    if !ready {
        bail!("phalanx serve ended ({status}) before it served; what it had to say is above");
    }
    Ok(seconds)
}
