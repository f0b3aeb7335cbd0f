//! What a start consists of, told by the processes that take part: one line for each stage that one has passed, with the time.
//!
//! `phalanx bench start` asks for the lines and reads them. All processes of an embedded cluster have one clock.

use std::fmt::Debug;
use std::io::Write;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;
use worker::STAGE;

/// Has a process tell its stages, on its standard error.
pub(crate) const STAGES_VARIABLE: &str = "PHALANX_STAGES";
const PREFIX: &str = "stage ";

/// What writes the lines, if it was asked for.
pub(crate) fn layer<S: Subscriber + for<'a> LookupSpan<'a>>() -> Option<impl Layer<S>> {
    std::env::var_os(STAGES_VARIABLE)
        .map(|_| Lines.with_filter(Targets::new().with_target(STAGE, LevelFilter::INFO)))
}

/// Time since 1970.
pub(crate) fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// The stage that a line tells, and when it was passed.
pub(crate) fn parse(line: &str) -> Option<(&str, Duration)> {
    let (micros, name) = line.strip_prefix(PREFIX)?.split_once(' ')?;
    Some((name, Duration::from_micros(micros.parse().ok()?)))
}

struct Lines;

impl<S: Subscriber> Layer<S> for Lines {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut name = Name::default();
        event.record(&mut name);
        tell(&line(&name.0, now()));
    }
}

/// Writes a line to the standard error at once, so that it does not mix with those of other processes.
pub(crate) fn tell(line: &str) {
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}

fn line(name: &str, at: Duration) -> String {
    format!("{PREFIX}{} {name}", at.as_micros())
}

/// An event's message.
#[derive(Default)]
struct Name(String);

impl Visit for Name {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == "message" {
            self.0 = format!("{value:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_as_they_were_written() {
        let at = Duration::from_micros(1_790_000_000_123_456);
        assert_eq!(parse(&line("weights loaded", at)), Some(("weights loaded", at)));
        for other in ["", "stage", "stage x y", "a stage 12 joined", "rank 0 on cuda:0: weights"] {
            assert_eq!(parse(other), None);
        }
    }
}
