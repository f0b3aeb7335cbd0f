//! Faults that a worker is asked for (`phalanx worker --fault`): it breaks on purpose, at a moment that is known beforehand.

mod strike;
#[cfg(test)]
mod tests;

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

pub(crate) use strike::{Faults, FaultyLoad};

/// Longer faults are typing errors.
const LONGEST: Duration = Duration::from_secs(1_000_000);

/// What breaks, and when. It happens once, but for [`What::Slow`], which lasts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    what: What,
    at: Moment,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    /// The process ends without a word.
    Kill,
    /// The executor thread gets no further, for so long or for ever. Heartbeats go on.
    Hang(Option<Duration>),
    /// The process is stopped: no heartbeat.
    Stop,
    /// This step and all later ones take longer by so much.
    Slow(Duration),
    /// The connections with the other ranks are shut down.
    Cut,
    /// The next message to another rank is lost, and all after it on that connection.
    Drop,
    /// A bit of the next message to another rank is flipped.
    Corrupt,
    /// The executor thread panics.
    Panic,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    /// When the process takes up this step, counted from 1 over all epochs.
    Step(u64),
    /// When it first loads.
    Load,
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        parse(text).ok_or_else(|| {
            format!(
                "'{text}' is none of kill@STEP, hang@STEP[:SECONDS], stop@STEP, slow@STEP:MILLIS, cut@STEP, drop@STEP, \
                 corrupt@STEP, panic@STEP, where STEP counts from 1 and may be 'load' for kill, hang, stop and panic"
            )
        })
    }
}

fn parse(text: &str) -> Option<Fault> {
    let (name, rest) = text.split_once('@')?;
    let (at, time) = rest.split_once(':').map_or((rest, None), |(at, time)| (at, Some(time)));
    let at = match at {
        "load" => Moment::Load,
        step => Moment::Step(step.parse().ok().filter(|step| *step > 0)?),
    };
    let what = match (name, time) {
        ("kill", None) => What::Kill,
        ("hang", None) => What::Hang(None),
        ("hang", Some(seconds)) => {
            What::Hang(Some(sensible(Duration::try_from_secs_f64(seconds.parse().ok()?).ok()?)?))
        }
        ("stop", None) => What::Stop,
        ("slow", Some(millis)) => What::Slow(sensible(Duration::from_millis(millis.parse().ok()?))?),
        ("cut", None) => What::Cut,
        ("drop", None) => What::Drop,
        ("corrupt", None) => What::Corrupt,
        ("panic", None) => What::Panic,
        _ => return None,
    };
    let of_steps = matches!(what, What::Slow(_) | What::Cut | What::Drop | What::Corrupt);
    (at != Moment::Load || !of_steps).then_some(Fault { what, at })
}

fn sensible(time: Duration) -> Option<Duration> {
    (time <= LONGEST).then_some(time)
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.what {
            What::Kill => "kill",
            What::Hang(_) => "hang",
            What::Stop => "stop",
            What::Slow(_) => "slow",
            What::Cut => "cut",
            What::Drop => "drop",
            What::Corrupt => "corrupt",
            What::Panic => "panic",
        };
        match self.at {
            Moment::Step(step) => write!(f, "{name}@{step}")?,
            Moment::Load => write!(f, "{name}@load")?,
        }
        match self.what {
            What::Hang(Some(time)) => write!(f, ":{}", time.as_secs_f64()),
            What::Slow(time) => write!(f, ":{}", time.as_millis()),
            _ => Ok(()),
        }
    }
}
