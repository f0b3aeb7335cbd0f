//! Tells a rank that hangs while it loads. Pure.

use std::time::Duration;

use cluster::{Activity, WorkerId};

use super::Hang;
use crate::heartbeats::{Heartbeats, Seen};

/// A rank may make no progress in loading for so many times as long as in a step: opening a device and taking the memory of a KV
/// cache are one act each, and so is a request to a slow disk.
const SLACK: u32 = 3;

/// The rank of a group that has made no progress in loading for too long and waits for nobody, whichever epoch it loads for: it leaves
/// an earlier one no sooner. Only what it said itself counts, so that a coordinator that stood still blames nobody.
pub(crate) fn hangs_in_loading(
    heartbeats: &Heartbeats,
    ranks: &[WorkerId],
    shortest: Duration,
) -> Option<Hang> {
    let hangs = |(rank, worker): (usize, &WorkerId)| {
        let Seen { progress, changed, heard, .. } = heartbeats.last(*worker)?;
        let time = heard.saturating_duration_since(changed);
        let alone = progress.activity == Activity::Loading && progress.waits_for.is_none();
        let reason = || format!("makes no progress in loading for {:.1} s", time.as_secs_f64());
        (alone && time >= shortest * SLACK).then(|| Hang { rank, reason: reason() })
    };
    ranks.iter().enumerate().find_map(hangs)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use cluster::Progress;
    use engine::Epoch;

    use super::*;

    const RANKS: [WorkerId; 2] = [WorkerId(3), WorkerId(4)];
    const SECOND: Duration = Duration::from_secs(1);

    /// What is said of these ranks, who told the same from second 0 to second `last` on.
    fn hang(told: [Progress; 2], last: u32) -> Option<(usize, String)> {
        let (mut heartbeats, start) = (Heartbeats::default(), Instant::now());
        for second in 0..=last {
            for (worker, progress) in RANKS.into_iter().zip(told) {
                heartbeats.heard(worker, progress, start + SECOND * second);
            }
        }
        hangs_in_loading(&heartbeats, &RANKS, 2 * SECOND).map(|hang| (hang.rank, hang.reason))
    }

    #[test]
    fn whoever_loads_no_further_is_named() {
        let epoch = Some(Epoch { term: 1, counter: 2 });
        let loads = Progress { epoch, activity: Activity::Loading, ..Progress::default() };
        let waits = Progress { waits_for: Some(1), ..loads };
        let idle = Progress { activity: Activity::Idle, ..loads };
        let named = |rank| Some((rank, "makes no progress in loading for 6.0 s".to_owned()));
        assert_eq!(hang([waits, loads], 5), None);
        assert_eq!(hang([waits, loads], 6), named(1));
        assert_eq!(hang([loads, idle], 6), named(0));
        // Forming has a limit of its own.
        assert_eq!(hang([waits, waits], 100), None);
        assert_eq!(hang([idle, idle], 100), None);
        assert_eq!(hang([Progress { activity: Activity::Computing, ..loads }; 2], 100), None);
    }

    #[test]
    fn whoever_gets_on_is_left_alone() {
        let (mut heartbeats, start) = (Heartbeats::default(), Instant::now());
        for second in 0..100 {
            let calls = u64::from(second / 5);
            let progress = Progress { activity: Activity::Loading, calls, ..Progress::default() };
            heartbeats.heard(RANKS[0], progress, start + SECOND * second);
            assert_eq!(hangs_in_loading(&heartbeats, &RANKS, 2 * SECOND), None);
        }
    }
}
