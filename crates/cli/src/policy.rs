//! Which group is wanted, and when a worker counts as lost.

use std::str::FromStr;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;
use cluster::{Policy, Shape};
use coordinator::CoordinatorConfig;

/// The group of a coordinator.
#[derive(Debug, Clone, Args)]
pub(crate) struct PolicyArgs {
    /// Tensor ranks of the group; it forms as soon as so many workers have joined. 'auto': as many as join, as long as weights and one context fit
    #[arg(long, alias = "workers", value_name = "N|auto")]
    ranks: Ranks,
    /// How few ranks will do while workers are missing, as long as weights and one context fit [default: no fewer than --ranks]
    #[arg(long, value_name = "N")]
    min_ranks: Option<usize>,
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
enum Ranks {
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
        let Self { ranks, min_ranks } = *self;
        let shape = match (ranks, min_ranks) {
            (Ranks::Fixed(ranks), None) => Shape::Fixed { stages: 1, ranks, min_ranks: ranks },
            (Ranks::Fixed(ranks), Some(min_ranks)) => fixed(ranks, min_ranks)?,
            (Ranks::Auto, None) => Shape::Auto { max_stages: 1 },
            (Ranks::Auto, Some(_)) => bail!("--min-ranks goes with a number of --ranks, not with 'auto'"),
        };
        Ok(Policy { shape, replicas: 1, context })
    }
}

/// `ranks` ranks, while workers are missing as few as `min_ranks`.
pub(crate) fn fixed(ranks: usize, min_ranks: usize) -> Result<Shape> {
    if min_ranks == 0 || min_ranks > ranks {
        bail!("--min-ranks {min_ranks}: use 1 to {ranks}, the number of ranks");
    }
    Ok(Shape::Fixed { stages: 1, ranks, min_ranks })
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
        Ok(PolicyArgs { ranks, min_ranks }.policy(None)?.shape)
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
        assert!(["0", "-1", "x", "1e9"].into_iter().all(|text| parse_seconds(text).is_err()));
        assert_eq!(parse_seconds("1.5"), Ok(Duration::from_millis(1500)));
    }
}
