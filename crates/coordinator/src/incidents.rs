//! What happened to the groups, and how long each part of getting over it took. Pure.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant, SystemTime};

use engine::Epoch;

use crate::groups::Loss;

/// Incidents that are kept.
const KEPT: usize = 16;

/// From the loss of a group to the next token, or a planned change.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Incident {
    /// When it began.
    pub(crate) at: SystemTime,
    /// Why; several where more was lost before the group served again.
    pub(crate) losses: Vec<(Loss, Duration)>,
    /// The epoch that came after.
    pub(crate) epoch: Option<Epoch>,
    /// Its ranks.
    pub(crate) ranks: usize,
    /// From the loss until the last rank was connected, including any wait for workers.
    pub(crate) form: Option<Duration>,
    /// What the slowest rank took to load its share.
    pub(crate) load: Option<Duration>,
    /// From then to the first token; none if nothing ran.
    pub(crate) recompute: Option<Duration>,
    /// Requests that other groups took over.
    pub(crate) moved: usize,
    /// Bytes of weights that all ranks read to load.
    pub(crate) bytes: u64,
}

impl Incident {
    /// From the last sign of life of the first that was lost to when the coordinator knew.
    pub(crate) fn detect(&self) -> Duration {
        self.losses.first().map_or(Duration::ZERO, |(_, detect)| *detect)
    }
}

/// The last incidents, and those that are going on.
#[derive(Debug, Default)]
pub(crate) struct Incidents {
    past: VecDeque<Incident>,
    /// By group.
    open: BTreeMap<u32, Open>,
}

#[derive(Debug)]
struct Open {
    incident: Incident,
    began: Instant,
    /// What the slowest rank took to load, in the epoch that loads.
    loading: Duration,
    served: Option<Instant>,
}

impl Incidents {
    /// An epoch is over; `detect`: how long that went unnoticed.
    pub(crate) fn lost(&mut self, loss: Loss, detect: Duration, now: Instant) {
        let open = self.open.entry(loss.group).or_insert_with(|| Open {
            incident: Incident {
                at: SystemTime::now(),
                losses: Vec::new(),
                epoch: None,
                ranks: 0,
                form: None,
                load: None,
                recompute: None,
                moved: 0,
                bytes: 0,
            },
            began: now,
            loading: Duration::ZERO,
            served: None,
        });
        open.incident.losses.push((loss, detect));
        (open.loading, open.served, open.incident.bytes) = (Duration::ZERO, None, 0);
    }

    /// So many requests go on in other groups.
    pub(crate) fn moved(&mut self, group: u32, requests: usize) {
        if let Some(open) = self.open.get_mut(&group) {
            open.incident.moved += requests;
        }
    }

    /// A rank of a group has loaded.
    pub(crate) fn loaded(&mut self, group: u32, took: Duration, bytes: u64) {
        if let Some(open) = self.open.get_mut(&group) {
            open.loading = open.loading.max(took);
            open.incident.bytes += bytes;
        }
    }

    /// A group stands again; with requests that wait for it the incident goes on to the first token.
    pub(crate) fn served(
        &mut self,
        group: u32,
        epoch: Epoch,
        ranks: usize,
        requests: usize,
        now: Instant,
    ) -> Option<&Incident> {
        let open = self.open.get_mut(&group)?;
        let whole = now.saturating_duration_since(open.began);
        (open.incident.epoch, open.incident.ranks) = (Some(epoch), ranks);
        open.incident.load = Some(open.loading.min(whole));
        open.incident.form = Some(whole.saturating_sub(open.loading));
        open.served = Some(now);
        if requests == 0 { self.close(group) } else { None }
    }

    /// A token came of a group.
    pub(crate) fn token(&mut self, group: u32, now: Instant) -> Option<&Incident> {
        let open = self.open.get_mut(&group)?;
        open.incident.recompute = Some(now.saturating_duration_since(open.served?));
        self.close(group)
    }

    /// The last incidents, newest first, those that are going on before all.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Incident> {
        self.open.values().map(|open| &open.incident).chain(self.past.iter().rev())
    }

    fn close(&mut self, group: u32) -> Option<&Incident> {
        let open = self.open.remove(&group)?;
        if self.past.len() == KEPT {
            self.past.pop_front();
        }
        self.past.push_back(open.incident);
        self.past.back()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loss(counter: u64) -> Loss {
        Loss {
            group: 5,
            epoch: Epoch { term: 1, counter },
            ranks: 2,
            member: None,
            cause: "it is a test".into(),
        }
    }

    fn millis(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn every_part_is_timed() {
        let (mut incidents, start) = (Incidents::default(), Instant::now());
        incidents.loaded(5, millis(900), 1);
        assert_eq!(incidents.token(5, start), None);
        incidents.lost(loss(1), millis(40), start);
        assert_eq!(incidents.token(5, start), None, "a token of before");
        incidents.loaded(5, millis(70), 20);
        incidents.loaded(5, millis(30), 4);
        let served = start + millis(100);
        assert_eq!(incidents.served(5, Epoch { term: 1, counter: 2 }, 1, 3, served), None);
        let incident = incidents.token(5, served + millis(25)).expect("it is over").clone();
        assert_eq!(
            (incident.detect(), incident.form, incident.load),
            (millis(40), Some(millis(30)), Some(millis(70)))
        );
        assert_eq!((incident.recompute, incident.ranks, incident.bytes), (Some(millis(25)), 1, 24));
        assert_eq!(incidents.token(5, served + millis(50)), None);
    }

    #[test]
    fn what_is_lost_meanwhile_belongs_to_it() {
        let (mut incidents, start) = (Incidents::default(), Instant::now());
        incidents.lost(loss(1), millis(1), start);
        incidents.loaded(5, millis(80), 9);
        incidents.served(5, Epoch { term: 1, counter: 2 }, 2, 1, start + millis(100));
        incidents.lost(loss(2), millis(9), start + millis(110));
        assert_eq!(incidents.token(5, start + millis(111)), None, "a token of before");
        let incident = incidents.served(5, Epoch { term: 1, counter: 3 }, 2, 0, start + millis(500));
        let incident = incident.expect("nothing runs, so it is over");
        assert_eq!(
            (incident.losses.len(), incident.form, incident.load),
            (2, Some(millis(500)), Some(millis(0)))
        );
        assert_eq!((incident.detect(), incident.recompute), (millis(1), None));
    }

    #[test]
    fn the_last_ones_are_kept() {
        let (mut incidents, start) = (Incidents::default(), Instant::now());
        for counter in 0..20 {
            incidents.lost(loss(counter), millis(0), start);
            incidents.served(5, Epoch::default(), 1, 0, start);
        }
        incidents.lost(loss(20), millis(0), start);
        let epochs: Vec<_> = incidents.iter().map(|incident| incident.losses[0].0.epoch.counter).collect();
        assert_eq!(epochs, (4..=20).rev().collect::<Vec<_>>());
    }
}
