//! Links that are not there, slow, or between clocks that differ.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use super::blame::blame;
use super::{Complaint, Pair, Patient, addresses, listed, median, megabytes};
use crate::doctor::{Bandwidth, Link};

/// So many times slower than others of its kind, a link is slow.
const FAR_SLOWER: u64 = 3;
const LARGEST_CLOCK_OFFSET_MICROS: u64 = 100_000;

const REACH: &str = "look at firewalls, and that --host is an address at which others reach it";
const NETWORK: &str =
    "look at cable, port and switch, and at what else uses them; or drain the worker that is slow";
const CLOCK: &str = "set clocks by NTP";

/// What a link is judged by: a time, since all that is slow takes long.
struct Measure {
    name: &'static str,
    nanos: fn(&Link) -> Option<u64>,
    /// Less than this is well, whatever others take.
    well: u64,
    /// More than this, between workers of one zone, is slow, whatever others take.
    longest: u64,
    shown: fn(u64) -> String,
}

/// Every token waits for it twice in each layer.
const LATENCY: Measure = Measure {
    name: "latency",
    nanos: |link| u64::try_from(link.latency.as_nanos()).ok(),
    well: 1_000_000,
    longest: 2_000_000,
    shown: |nanos| format!("{:.2} ms", nanos as f64 / 1e6),
};
/// As the time that a gigabyte takes; a network of 1 Gbit/s carries a little more than the least.
const BANDWIDTH: Measure = Measure {
    name: "bandwidth",
    nanos: |link| Some(GIGABYTE_NANOS / link.bandwidth.map(Bandwidth::least)?.max(1)),
    well: 0,
    longest: GIGABYTE_NANOS / 100_000_000,
    shown: |nanos| format!("{}/s", megabytes(GIGABYTE_NANOS / nanos.max(1))),
};
const GIGABYTE_NANOS: u64 = 1_000_000_000 * 1_000_000_000;

/// All that is wrong with links.
pub(super) fn complaints(patients: &[Patient], pairs: &[Pair]) -> Vec<Complaint> {
    let mut complaints = unreachable_complaints(patients, pairs);
    for kind in kinds(patients, pairs) {
        for measure in [&LATENCY, &BANDWIDTH] {
            complaints.extend(kind.slow_complaints(measure, patients));
        }
    }
    complaints.extend(clock_complaints(patients, pairs));
    complaints
}

/// The places of pairs with which something is wrong.
pub(super) fn bad(patients: &[Patient], pairs: &[Pair]) -> Vec<usize> {
    let mut bad: BTreeSet<usize> = (0..pairs.len()).filter(|&place| pairs[place].probed.is_err()).collect();
    for kind in kinds(patients, pairs) {
        for measure in [&LATENCY, &BANDWIDTH] {
            let Some(usual) = kind.usual(measure) else { continue };
            let slow = kind.links.iter().filter(|(_, _, link)| kind.is_slow(measure, link, usual));
            bad.extend(slow.map(|(place, ..)| *place));
        }
    }
    bad.extend(skewed(pairs).map(|(place, ..)| place));
    bad.into_iter().collect()
}

/// Links that can be held against each other: inside of machines, or between them; inside of zones, or between them.
struct Kind<'a> {
    one_zone: bool,
    /// By the places of their pairs.
    links: Vec<(usize, (usize, usize), &'a Link)>,
}

fn kinds<'a>(patients: &[Patient], pairs: &'a [Pair]) -> Vec<Kind<'a>> {
    let mut kinds: BTreeMap<(bool, bool), Vec<_>> = BTreeMap::new();
    for (place, pair) in pairs.iter().enumerate() {
        let Ok(link) = &pair.probed else { continue };
        let (a, b) = (&patients[pair.from], &patients[pair.to]);
        let one_machine = a.facts.boot == b.facts.boot && !a.facts.boot.is_empty();
        let links = kinds.entry((one_machine, a.zone == b.zone)).or_default();
        links.push((place, (pair.from, pair.to), link));
    }
    kinds.into_iter().map(|((_, one_zone), links)| Kind { one_zone, links }).collect()
}

impl Kind<'_> {
    /// What links between workers with which nothing is wrong take: each has one to another such worker, so it is what the best
    /// links take, each worker's, in the middle.
    fn usual(&self, measure: &Measure) -> Option<u64> {
        let mut best: BTreeMap<usize, u64> = BTreeMap::new();
        for (_, (a, b), link) in &self.links {
            let Some(nanos) = (measure.nanos)(link) else { continue };
            for worker in [a, b] {
                best.entry(*worker).and_modify(|best| *best = nanos.min(*best)).or_insert(nanos);
            }
        }
        median(best.into_values().map(Reverse).collect()).map(|Reverse(nanos)| nanos)
    }

    /// Whether all of its links are slow.
    fn is_all_slow(&self, measure: &Measure, usual: u64) -> bool {
        self.one_zone && usual > measure.longest
    }

    fn is_slow(&self, measure: &Measure, link: &Link, usual: u64) -> bool {
        (measure.nanos)(link).is_some_and(|nanos| {
            let slower = nanos > measure.well && nanos / FAR_SLOWER >= usual.max(1);
            slower || (self.one_zone && nanos > measure.longest)
        })
    }

    fn slow_complaints(&self, measure: &Measure, patients: &[Patient]) -> Vec<Complaint> {
        let Some(usual) = self.usual(measure) else { return Vec::new() };
        let complaint = |workers: &[usize], what| Complaint {
            workers: addresses(patients, workers),
            what,
            advice: NETWORK.to_owned(),
        };
        let Measure { name, shown, .. } = measure;
        if self.is_all_slow(measure, usual) {
            let workers: BTreeSet<usize> = self.links.iter().flat_map(|(_, (a, b), _)| [*a, *b]).collect();
            let workers: Vec<usize> = workers.into_iter().collect();
            return vec![complaint(&workers, format!("the {name} between them is {}", shown(usual)))];
        }
        let ends =
            |links: Vec<&(usize, (usize, usize), &Link)>| links.iter().map(|(_, ends, _)| *ends).collect();
        let measured: Vec<_> =
            self.links.iter().filter(|(.., link)| (measure.nanos)(link).is_some()).collect();
        let slow: Vec<_> =
            measured.iter().copied().filter(|(.., link)| self.is_slow(measure, link, usual)).collect();
        let (all, bad): (Vec<_>, Vec<_>) = (ends(measured), ends(slow.clone()));
        // What those of them take that are in the middle.
        let typical = |with: &dyn Fn(&(usize, usize)) -> bool| {
            let of = slow.iter().filter(|(_, ends, _)| with(ends));
            median(of.filter_map(|(.., link)| (measure.nanos)(link)).collect()).unwrap_or_default()
        };
        let blame = blame(&bad, &all);
        let of_workers = blame.workers.iter().map(|(worker, peers)| {
            let nanos = typical(&|(a, b)| a == worker || b == worker);
            let peers = listed(&addresses(patients, peers));
            let (slow, usual) = (shown(nanos), shown(usual));
            complaint(&[*worker], format!("the {name} of its links with {peers} is {slow}, usual is {usual}"))
        });
        let of_links = blame.links.iter().map(|&(a, b)| {
            let (slow, usual) = (shown(typical(&|ends| *ends == (a, b))), shown(usual));
            complaint(&[a, b], format!("the {name} of the link between them is {slow}, usual is {usual}"))
        });
        of_workers.chain(of_links).collect()
    }
}

fn ends(pair: &Pair) -> (usize, usize) {
    (pair.from, pair.to)
}

fn unreachable_complaints(patients: &[Patient], pairs: &[Pair]) -> Vec<Complaint> {
    let failed: Vec<_> = pairs
        .iter()
        .filter_map(|pair| pair.probed.as_ref().err().map(|failure| (ends(pair), failure)))
        .collect();
    let bad: Vec<_> = failed.iter().map(|(ends, _)| *ends).collect();
    let all: Vec<_> = pairs.iter().map(ends).collect();
    let why = |with: &dyn Fn(&(usize, usize)) -> bool| {
        failed.iter().find(|(ends, _)| with(ends)).map_or("", |(_, failure)| failure.as_str())
    };
    let complaint = |workers: &[usize], what| Complaint {
        workers: addresses(patients, workers),
        what,
        advice: REACH.to_owned(),
    };
    let blame = blame(&bad, &all);
    let of_workers = blame.workers.iter().map(|(worker, peers)| {
        let why = why(&|(a, b)| a == worker || b == worker);
        complaint(&[*worker], format!("no connection with {}: {why}", listed(&addresses(patients, peers))))
    });
    let of_links = blame.links.iter().map(|&(a, b)| {
        complaint(&[a, b], format!("no connection between them: {}", why(&|ends| *ends == (a, b))))
    });
    of_workers.chain(of_links).collect()
}

/// Pairs whose clocks differ too much, by their places.
fn skewed(pairs: &[Pair]) -> impl Iterator<Item = (usize, (usize, usize), i64)> {
    let offset = |(place, pair): (usize, &Pair)| {
        let link = pair.probed.as_ref().ok()?;
        Some((place, ends(pair), link.clock_offset_micros))
    };
    let found = pairs.iter().enumerate().filter_map(offset);
    found.filter(|(.., offset)| offset.unsigned_abs() > LARGEST_CLOCK_OFFSET_MICROS)
}

fn clock_complaints(patients: &[Patient], pairs: &[Pair]) -> Vec<Complaint> {
    let skewed: Vec<_> = skewed(pairs).map(|(_, ends, offset)| (ends, offset)).collect();
    let bad: Vec<_> = skewed.iter().map(|(ends, _)| *ends).collect();
    let all: Vec<_> = pairs.iter().filter(|pair| pair.probed.is_ok()).map(ends).collect();
    let complaint = |workers: &[usize], what| Complaint {
        workers: addresses(patients, workers),
        what,
        advice: CLOCK.to_owned(),
    };
    let seconds = |micros: u64| format!("{:.1} s", micros as f64 / 1e6);
    let blame = blame(&bad, &all);
    let of_workers = blame.workers.iter().map(|(worker, _)| {
        // Ahead of the others: by which it is measured, it is the other one or the one that measures.
        let ahead = skewed.iter().filter_map(|((from, to), offset)| match (from == worker, to == worker) {
            (true, _) => Some(offset.saturating_neg()),
            (_, true) => Some(*offset),
            _ => None,
        });
        let ahead = median(ahead.collect()).unwrap_or_default();
        let way = if ahead > 0 { "ahead of" } else { "behind" };
        complaint(&[*worker], format!("its clock is {} {way} the others", seconds(ahead.unsigned_abs())))
    });
    let of_links = blame.links.iter().map(|&(a, b)| {
        let offset = skewed.iter().find(|(ends, _)| *ends == (a, b)).map_or(0, |(_, offset)| *offset);
        complaint(&[a, b], format!("their clocks are {} apart", seconds(offset.unsigned_abs())))
    });
    of_workers.chain(of_links).collect()
}
