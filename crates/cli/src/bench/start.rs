//! `phalanx bench start`: how long `phalanx serve` takes from the start of its process until it serves, and with what.

mod run;

use std::fmt;
use std::path::Path;

use anyhow::{Result, anyhow};
use clap::{Args, Parser};
use serde::Serialize;

use self::run::{Start, start};
use super::files;
use super::spread::Spread;
use crate::serve::ServeArgs;

/// What a start consists of, in order. Of several workers the last one counts.
const STAGES: [(&str, &str); 6] = [
    ("worker started", "serve's process up, checkpoint opened, workers' processes started"),
    ("device opened", "device opened, kernels loaded or compiled"),
    ("joined", "checkpoint opened by each worker, all joined"),
    ("connected", "assigned, connected with the other ranks"),
    ("weights loaded", "weights read and packed, KV cache and activations taken"),
    ("serving", "told to the coordinator, plans can come"),
];
const LOADED: usize = 4;

#[derive(Debug, Args)]
pub(crate) struct StartArgs {
    /// How often it is started; the first time counts by itself, since it may fill caches
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// From the disk: the system is told to forget the checkpoint's weights before each start
    #[arg(long)]
    cold: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Options of `phalanx serve`, such as --model DIR --device cuda; they come last
    #[arg(value_name = "OPTIONS OF SERVE", trailing_var_arg = true, allow_hyphen_values = true)]
    serve: Vec<String>,
}

/// The options of `serve` by themselves.
#[derive(Debug, Parser)]
#[command(no_binary_name = true, disable_help_flag = true)]
struct Serve {
    #[command(flatten)]
    args: ServeArgs,
}

#[derive(Debug, Serialize)]
struct Figures {
    options: Vec<String>,
    cold: bool,
    /// From the start of the process to its line that it serves.
    #[serde(flatten)]
    total: Seconds,
    stages: Vec<Stage>,
    loading: Loading,
    /// Of a few tokens, once it serves: a GPU records its steps as they come, so the first answer has that in it.
    first_answer: Seconds,
    second_answer: Seconds,
}

#[derive(Debug, Serialize)]
struct Stage {
    name: &'static str,
    what: &'static str,
    #[serde(flatten)]
    seconds: Seconds,
}

/// Of the first start, and of all further ones, if there were any.
#[derive(Debug, Serialize)]
struct Seconds {
    first_seconds: f64,
    later_seconds: Option<Spread>,
}

/// The stage of loading beside plain reading of the checkpoint's files.
#[derive(Debug, Serialize)]
struct Loading {
    bytes: u64,
    read_seconds: Spread,
    /// Of the last start.
    load_gb_s: f64,
    read_gb_s: f64,
    /// The first over the second.
    share: f64,
}

impl Seconds {
    fn of(starts: &[Start], seconds: impl Fn(&Start) -> f64) -> Self {
        let later = &starts[1..];
        Self {
            first_seconds: seconds(&starts[0]),
            later_seconds: (!later.is_empty()).then(|| Spread::of(later.iter().map(&seconds))),
        }
    }

    /// As a later start is, if there was one.
    fn usual(&self) -> f64 {
        self.later_seconds.map_or(self.first_seconds, |later| later.median)
    }
}

impl StartArgs {
    pub(super) fn run(self) -> Result<()> {
        let figures = self.measure()?;
        if self.json {
            println!("{}", serde_json::to_string_pretty(&figures)?);
        } else {
            print!("{figures}");
        }
        Ok(())
    }

    fn measure(&self) -> Result<Figures> {
        let serve = Serve::try_parse_from(&self.serve).map_err(|error| {
            let why = error.to_string();
            anyhow!("of the options of serve, which come last: {}", why.trim_start_matches("error: "))
        })?;
        let dir = serve.args.cluster.model.dir()?;
        let mut starts = Vec::new();
        let mut reads = Vec::new();
        for _ in 0..self.runs {
            self.forget(&dir)?;
            starts.push(start(&self.serve, &STAGES.map(|(name, _)| name))?);
            self.forget(&dir)?;
            reads.push(files::read(&files::weights(&dir)?)?);
        }
        let stages: Vec<_> = STAGES
            .iter()
            .enumerate()
            .map(|(index, &(name, what))| Stage {
                name,
                what,
                seconds: Seconds::of(&starts, |start| start.stages[index]),
            })
            .collect();
        let bytes = files::weights(&dir)?.iter().map(|(_, bytes)| bytes).sum();
        let (load, read_seconds) = (stages[LOADED].seconds.usual(), Spread::of(reads));
        let rate = |seconds: f64| bytes as f64 / seconds.max(1e-9) / 1e9;
        Ok(Figures {
            options: self.serve.clone(),
            cold: self.cold,
            total: Seconds::of(&starts, |start| start.stages.iter().sum()),
            stages,
            loading: Loading {
                bytes,
                read_seconds,
                load_gb_s: rate(load),
                read_gb_s: rate(read_seconds.median),
                share: rate(load) / rate(read_seconds.median),
            },
            first_answer: Seconds::of(&starts, |start| start.answers[0]),
            second_answer: Seconds::of(&starts, |start| start.answers[1]),
        })
    }

    fn forget(&self, dir: &Path) -> Result<()> {
        if self.cold { files::forget(&files::weights(dir)?) } else { Ok(()) }
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "serve {}", self.options.join(" "))?;
        writeln!(f, "{:16} {:>8}  later starts, seconds", "", "first")?;
        let mut row = |name: &str, seconds: &Seconds, what: &str| {
            let later = seconds.later_seconds.map_or_else(String::new, |later| format!("{later:.3}"));
            let line = format!("{name:16} {:8.3}  {later:22} {what}", seconds.first_seconds);
            writeln!(f, "{}", line.trim_end())
        };
        for stage in &self.stages {
            row(stage.name, &stage.seconds, stage.what)?;
        }
        row("until it serves", &self.total, "")?;
        row("first answer", &self.first_answer, "of a few tokens; steps are recorded meanwhile, on a GPU")?;
        row("second answer", &self.second_answer, "the same again")?;
        let Loading { bytes, load_gb_s, read_gb_s, share, .. } = &self.loading;
        let from = if self.cold { "from the disk" } else { "from where the system keeps them" };
        writeln!(f, "weights: {:.3} GB {from}, loaded at {load_gb_s:.2} GB/s", *bytes as f64 / 1e9)?;
        writeln!(f, "         plain reading: {read_gb_s:.2} GB/s; share {share:.3}")
    }
}
