//! Which groups are wanted, and when a worker counts as lost.

use std::str::FromStr;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;
use cluster::{MAX_STAGES, Policy, Shape};
use coordinator::CoordinatorConfig;

/// Groups, at most.
pub(crate) const MAX_REPLICAS: i64 = 4096;

/// The groups of a coordinator.
#[derive(Debug, Clone, Args)]
pub(crate) struct PolicyArgs {
    /// Tensor ranks of each stage of a group, which forms as soon as so many workers have joined. 'auto': as many as join, as long as weights and one context fit
    #[arg(long, alias = "workers", value_name = "N|auto")]
    ranks: Ranks,
    /// How few ranks will do while workers are missing, as long as weights and one context fit [default: no fewer than --ranks]
    #[arg(long, value_name = "N")]
    min_ranks: Option<usize>,
    /// Stages of a group's pipeline, each of which holds a part of the layers; with '--ranks auto', at most. Ranks of a stage are of one zone, stages need not be
    #[arg(long, value_name = "N", default_value_t = 1)]
    stages: usize,
    /// Groups, at most: each holds the whole model, and requests go to the one that suits them best
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=MAX_REPLICAS))]
    replicas: u32,
}

/// When a worker counts as lost.
#[derive(Debug, Clone, Args)]
pub(crate) struct LivenessArgs {
    /// Seconds from one heartbeat of a worker to the next
    #[arg(long, value_name = "SECONDS", default_value = "0.25", value_parser = parse_seconds)]
    heartbeat_interval: Duration,
    /// Seconds without a heartbeat after which a worker is lost
    #[arg(long, value_name = "SECONDS", default_value = "1.5", value_parser = parse_seconds)]
    heartbeat_timeout: Duration,
    /// Seconds without progress in a step after which the rank that hangs is lost; large steps may take longer, by what smaller ones took
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = parse_seconds)]
    progress_timeout: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ranks {
    Auto,
    Fixed(usize),
}

impl FromStr for Ranks {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            Ok(ranks) if ranks > 0 => Ok(Self::Fixed(ranks)),
            _ if text == "auto" => Ok(Self::Auto),
            _ => Err(format!("'{text}' is neither a number from 1 nor 'auto'")),
        }
    }
}

impl PolicyArgs {
    /// The policy, for contexts of at most `context` tokens.
    pub(crate) fn policy(&self, context: Option<u32>) -> Result<Policy> {
        let Self { ranks, min_ranks, stages, replicas } = *self;
        Ok(Policy { shape: shape(ranks, min_ranks, stages)?, replicas: replicas as usize, context })
    }
}

/// How a group is cut: while workers are missing, into as few ranks as `min_ranks`.
pub(crate) fn shape(ranks: Ranks, min_ranks: Option<usize>, stages: usize) -> Result<Shape> {
    if !(1..=MAX_STAGES).contains(&stages) {
        bail!("--stages {stages}: use 1 to {MAX_STAGES}");
    }
    match (ranks, min_ranks) {
        (Ranks::Fixed(ranks), Some(min_ranks)) if min_ranks == 0 || min_ranks > ranks => {
            bail!("--min-ranks {min_ranks}: use 1 to {ranks}, the number of ranks")
        }
        (Ranks::Fixed(ranks), min_ranks) => {
            Ok(Shape::Fixed { stages, ranks, min_ranks: min_ranks.unwrap_or(ranks) })
        }
        (Ranks::Auto, None) => Ok(Shape::Auto { max_stages: stages }),
        (Ranks::Auto, Some(_)) => bail!("--min-ranks goes with a number of --ranks, not with 'auto'"),
    }
}

impl LivenessArgs {
    /// The configuration with these limits.
    pub(crate) fn apply(&self, config: CoordinatorConfig) -> Result<CoordinatorConfig> {
        let Self { heartbeat_interval, heartbeat_timeout, progress_timeout } = *self;
        if heartbeat_timeout < heartbeat_interval * 2 {
            bail!(
                "--heartbeat-timeout {heartbeat_timeout:?}: it must be at least twice --heartbeat-interval {heartbeat_interval:?}"
            );
        }
        Ok(CoordinatorConfig { heartbeat_interval, heartbeat_timeout, progress_timeout, ..config })
    }
}

/// A duration of at least a hundredth of a second.
fn parse_seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.01..=1e6).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err(format!("'{text}' is not a number of seconds from 0.01 to 1000000")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(ranks: &str, min_ranks: Option<usize>) -> Result<Shape> {
        let ranks = ranks.parse().map_err(anyhow::Error::msg)?;
        Ok(PolicyArgs { ranks, min_ranks, stages: 1, replicas: 1 }.policy(None)?.shape)
    }

    #[test]
    fn shapes() {
        let fixed = |ranks, min_ranks| Shape::Fixed { stages: 1, ranks, min_ranks };
        assert_eq!(policy("3", None).unwrap(), fixed(3, 3));
        assert_eq!(policy("3", Some(1)).unwrap(), fixed(3, 1));
        assert_eq!(policy("auto", None).unwrap(), Shape::Auto { max_stages: 1 });
        for (ranks, min_ranks) in
            [("0", None), ("many", None), ("3", Some(4)), ("3", Some(0)), ("auto", Some(1))]
        {
            assert!(policy(ranks, min_ranks).is_err(), "{ranks} {min_ranks:?}");
        }
        assert_eq!(shape(Ranks::Auto, None, 3).unwrap(), Shape::Auto { max_stages: 3 });
        assert!([0, 17].into_iter().all(|stages| shape(Ranks::Auto, None, stages).is_err()));
        assert!(["0", "-1", "x", "1e9"].into_iter().all(|text| parse_seconds(text).is_err()));
        assert_eq!(parse_seconds("1.5"), Ok(Duration::from_millis(1500)));
    }
}
