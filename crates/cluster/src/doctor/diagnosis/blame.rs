//! Whose fault bad links are: a worker's, if many of its links are bad, else the link's own.

use std::collections::BTreeSet;

/// Where faults lie.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Blame {
    /// Workers, each with those with which its links are bad.
    pub(super) workers: Vec<(usize, Vec<usize>)>,
    /// Links between workers with which nothing else is wrong.
    pub(super) links: Vec<(usize, usize)>,
}

/// Explains the `bad` ones among `all` links with as few faults as there can be, or nearly.
///
/// A worker is at fault with at least two bad links, half of its own.
pub(super) fn blame(bad: &[(usize, usize)], all: &[(usize, usize)]) -> Blame {
    let of = |pairs: &[(usize, usize)], worker: usize| -> Vec<usize> {
        let other = |&(a, b): &(usize, usize)| match (a == worker, b == worker) {
            (true, _) => Some(b),
            (_, true) => Some(a),
            _ => None,
        };
        pairs.iter().filter_map(other).collect()
    };
    let mut left = bad.to_vec();
    let mut blame = Blame::default();
    loop {
        let workers: BTreeSet<usize> = left.iter().flat_map(|(a, b)| [*a, *b]).collect();
        let counts = workers.into_iter().map(|worker| (of(&left, worker).len(), worker));
        let at_fault = counts.filter(|(count, worker)| *count >= 2 && count * 2 >= of(all, *worker).len());
        let Some((_, worst)) = at_fault.max_by_key(|(count, worker)| (*count, std::cmp::Reverse(*worker)))
        else {
            blame.links = left;
            return blame;
        };
        blame.workers.push((worst, of(bad, worst)));
        left.retain(|(a, b)| *a != worst && *b != worst);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::doctor::every_pair;

    #[test]
    fn a_worker_whose_links_are_all_bad_is_at_fault() {
        for count in 3..9 {
            for culprit in 0..count {
                let all = every_pair(count);
                let bad: Vec<_> = all.iter().copied().filter(|(a, b)| [*a, *b].contains(&culprit)).collect();
                let Blame { workers, links } = blame(&bad, &all);
                assert_eq!((workers.len(), workers[0].0, links), (1, culprit, vec![]));
                assert_eq!(workers[0].1.len(), count - 1);
            }
        }
    }

    #[test]
    fn a_single_link_is_at_fault_itself() {
        for count in 2..9 {
            let all = every_pair(count);
            for &pair in &all {
                assert_eq!(blame(&[pair], &all), Blame { workers: vec![], links: vec![pair] });
            }
        }
    }

    #[test]
    fn a_worker_and_a_link_elsewhere() {
        let all = every_pair(6);
        let bad: Vec<_> = all.iter().copied().filter(|(a, b)| *a == 2 || *b == 2 || a + b == 9).collect();
        let Blame { workers, links } = blame(&bad, &all);
        assert_eq!((workers.len(), workers[0].0), (1, 2));
        assert!(matches!(links[..], [(4, 5) | (5, 4)]), "{links:?}");
    }

    proptest! {
        #[test]
        fn every_bad_link_is_explained(count in 2usize..9, chosen in prop::collection::vec(any::<bool>(), 36)) {
            let all = every_pair(count);
            let bad: Vec<_> = all.iter().copied().zip(chosen).filter(|(_, bad)| *bad).map(|(pair, _)| pair).collect();
            let Blame { workers, links } = blame(&bad, &all);
            for (a, b) in bad {
                let by_worker = workers.iter().any(|(worker, _)| [a, b].contains(worker));
                prop_assert!(by_worker || links.contains(&(a, b)));
            }
        }
    }
}
