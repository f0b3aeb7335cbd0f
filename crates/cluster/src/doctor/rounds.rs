//! Who measures with whom, and which measurements may run at the same time.

use std::collections::BTreeSet;

/// All pairs of `count` workers, the lower number first, in the order of a tournament: [`rounds`] puts them into as few rounds as there can be.
pub fn every_pair(count: usize) -> Vec<(usize, usize)> {
    // The last place stays, and the others go round it. With an odd number it is empty.
    let places = count + count % 2;
    let circle = places.saturating_sub(1);
    let round = |turn: usize| {
        let seat = move |place: usize| if place == circle { place } else { (place + turn) % circle };
        (0..places / 2).map(move |place| (seat(place), seat(circle - place)))
    };
    let pairs = (0..circle).flat_map(round).filter(|(a, b)| *a < count && *b < count);
    pairs.map(|(a, b)| (a.min(b), a.max(b))).collect()
}

/// Each of `count` workers with the one that follows it.
pub fn ring(count: usize) -> Vec<(usize, usize)> {
    match count {
        0 | 1 => Vec::new(),
        2 => vec![(0, 1)],
        _ => (1..count).map(|to| (to - 1, to)).chain([(0, count - 1)]).collect(),
    }
}

/// Pairs that measure at the same time.
pub type Round = Vec<(usize, usize)>;

/// Puts pairs into rounds in which nothing that the workers of two pairs share is measured twice: `place` is what a worker shares
/// with others, for instance its machine with the network interface of that.
pub fn rounds<P: Ord>(
    pairs: impl IntoIterator<Item = (usize, usize)>,
    place: impl Fn(usize) -> P,
) -> Vec<Round> {
    let mut rounds: Vec<(BTreeSet<P>, Round)> = Vec::new();
    for (a, b) in pairs {
        let free =
            |(taken, _): &&mut (BTreeSet<P>, Round)| !taken.contains(&place(a)) && !taken.contains(&place(b));
        let (taken, round) = match rounds.iter_mut().find(free) {
            Some(round) => round,
            None => rounds.push_mut((BTreeSet::new(), Vec::new())),
        };
        taken.extend([place(a), place(b)]);
        round.push((a, b));
    }
    rounds.into_iter().map(|(_, round)| round).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn unordered(pairs: impl IntoIterator<Item = (usize, usize)>) -> BTreeMap<(usize, usize), usize> {
        pairs.into_iter().fold(BTreeMap::new(), |mut counts, (a, b)| {
            *counts.entry((a.min(b), a.max(b))).or_default() += 1;
            counts
        })
    }

    fn all(count: usize) -> BTreeMap<(usize, usize), usize> {
        (0..count).flat_map(|a| (a + 1..count).map(move |b| ((a, b), 1))).collect()
    }

    #[test]
    fn a_tournament_takes_as_few_rounds_as_there_can_be() {
        for count in 0..40 {
            let pairs = every_pair(count);
            assert_eq!(unordered(pairs.clone()), all(count), "{count}");
            let rounds = rounds(pairs, |worker| worker).len();
            let fewest = if count < 2 { 0 } else { count - 1 + count % 2 };
            assert_eq!(rounds, fewest, "{count}");
        }
    }

    #[test]
    fn a_ring_has_every_worker_twice() {
        assert_eq!(ring(1), []);
        assert_eq!(ring(2), [(0, 1)]);
        assert_eq!(ring(4), [(0, 1), (1, 2), (2, 3), (0, 3)]);
    }

    proptest! {
        #[test]
        fn no_machine_is_in_two_pairs_of_a_round(machines in prop::collection::vec(0usize..5, 0..14)) {
            let pairs = every_pair(machines.len());
            let rounds = rounds(pairs.clone(), |worker| machines[worker]);
            prop_assert_eq!(unordered(rounds.iter().flatten().copied()), unordered(pairs));
            for round in rounds {
                let ends = round.iter().map(|(a, b)| BTreeSet::from([machines[*a], machines[*b]]));
                let count: usize = ends.clone().map(|ends| ends.len()).sum();
                let distinct: BTreeSet<_> = ends.flatten().collect();
                prop_assert_eq!(count, distinct.len());
            }
        }
    }
}
