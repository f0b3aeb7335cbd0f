//! Which units each rank of a stage holds, when some of its workers hold units already.

use std::ops::Range;

/// A worker that is to hold units.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Holder {
    /// Units that fit into its memory; at least 1.
    pub(crate) capacity: usize,
    /// What it holds now.
    pub(crate) held: Option<Range<usize>>,
}

/// How good a way to share out units is: units that stay where they are first, then how even it is.
type Score = (usize, std::cmp::Reverse<usize>);

/// Shares units `0..units` out: the holders in order of their ranks, by their place in `holders`, with their units. The largest
/// share, which a step's time goes with, is as small as the capacities allow; within that, as many units as can be stay where they
/// are. Those that hold units keep their order. None if the units do not fit, or there are fewer than holders.
pub(crate) fn share_out(units: usize, holders: &[Holder]) -> Option<Vec<(usize, Range<usize>)>> {
    let fits = |largest: usize| holders.iter().map(|h| h.capacity.min(largest)).sum::<usize>() >= units;
    let largest = (1..=units).find(|&largest| fits(largest))?;
    let mut old: Vec<usize> = (0..holders.len()).filter(|&at| holders[at].held.is_some()).collect();
    old.sort_by_key(|&at| holders[at].held.as_ref().map(|held| held.start));
    let new: Vec<usize> = (0..holders.len()).filter(|&at| holders[at].held.is_none()).collect();

    // best[o][n][u]: the score and the first step (a holder, its end) of the best way to give units u.. to the holders old[o..] and new[n..].
    let mut best = vec![vec![vec![None; units + 1]; new.len() + 1]; old.len() + 1];
    best[old.len()][new.len()][units] = Some(((0, std::cmp::Reverse(0)), None));
    for o in (0..=old.len()).rev() {
        for n in (0..=new.len()).rev() {
            for start in 0..units {
                let mut found: Option<(Score, Option<(usize, usize)>)> = None;
                let next = [old.get(o).map(|at| (*at, o + 1, n)), new.get(n).map(|at| (*at, o, n + 1))];
                for (holder, next_o, next_n) in next.into_iter().flatten() {
                    let most = largest.min(holders[holder].capacity).min(units - start);
                    for end in (start + 1..=start + most).rev() {
                        let Some(((stay, spread), _)) = best[next_o][next_n][end] else { continue };
                        let held = holders[holder].held.clone().unwrap_or(0..0);
                        let stays = end.min(held.end).saturating_sub(start.max(held.start));
                        let square = (end - start) * (end - start);
                        let score = (stay + stays, std::cmp::Reverse(spread.0 + square));
                        if found.is_none_or(|(best, _)| score > best) {
                            found = Some((score, Some((holder, end))));
                        }
                    }
                }
                best[o][n][start] = found;
            }
        }
    }

    let (mut o, mut n, mut start) = (0, 0, 0);
    let mut shares = Vec::with_capacity(holders.len());
    while let (_, Some((holder, end))) = best[o][n][start]? {
        shares.push((holder, start..end));
        if holders[holder].held.is_some() {
            o += 1
        } else {
            n += 1
        }
        start = end;
    }
    Some(shares)
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::rank_ranges;
    use proptest::prelude::*;

    fn new(capacity: usize) -> Holder {
        Holder { capacity, held: None }
    }

    fn old(held: Range<usize>) -> Holder {
        Holder { capacity: 100, held: Some(held) }
    }

    #[test]
    fn a_spare_takes_the_place_of_the_lost_rank() {
        let holders = [old(0..1), old(2..3), old(3..4), new(9)];
        let expected = vec![(0, 0..1), (3, 1..2), (1, 2..3), (2, 3..4)];
        assert_eq!(share_out(4, &holders), Some(expected));
    }

    #[test]
    fn neighbours_take_what_the_lost_rank_had() {
        assert_eq!(
            share_out(4, &[old(0..1), old(1..2), old(3..4)]),
            Some(vec![(0, 0..1), (1, 1..3), (2, 3..4)])
        );
        assert_eq!(share_out(4, &[old(2..3)]), Some(vec![(0, 0..4)]));
    }

    #[test]
    fn a_wider_group_takes_from_the_largest() {
        let holders = [old(0..1), old(1..3), old(3..4), new(9)];
        assert_eq!(share_out(4, &holders), Some(vec![(0, 0..1), (1, 1..2), (3, 2..3), (2, 3..4)]));
    }

    #[test]
    fn small_memories_hold_little() {
        assert_eq!(share_out(8, &[new(1), new(5), new(3)]), Some(vec![(0, 0..1), (1, 1..5), (2, 5..8)]));
        assert_eq!(share_out(8, &[new(2), new(5)]), None);
        assert_eq!(share_out(2, &[new(9), new(9), new(9)]), None);
        assert_eq!(share_out(2, &[]), None);
    }

    proptest! {
        #[test]
        fn units_are_tiled_within_the_capacities(
            units in 1usize..13, capacities in prop::collection::vec(1usize..6, 1..8), held in any::<u8>(),
        ) {
            // Some hold a part of an even distribution.
            let even = rank_ranges(units, capacities.len().min(units)).unwrap();
            let holders: Vec<_> = capacities.iter().enumerate().map(|(at, &capacity)| Holder {
                capacity,
                held: even.get(at).filter(|_| held >> (at % 8) & 1 == 1).cloned(),
            }).collect();
            match share_out(units, &holders) {
                None => prop_assert!(
                    capacities.len() > units || capacities.iter().sum::<usize>() < units
                ),
                Some(shares) => {
                    let mut holders_seen: Vec<_> = shares.iter().map(|(at, _)| *at).collect();
                    holders_seen.sort_unstable();
                    prop_assert!(holders_seen.into_iter().eq(0..holders.len()));
                    prop_assert!(shares.iter().all(|(at, share)| (1..=capacities[*at]).contains(&share.len())));
                    prop_assert_eq!((shares[0].1.start, shares[shares.len() - 1].1.end), (0, units));
                    prop_assert!(shares.windows(2).all(|pair| pair[0].1.end == pair[1].1.start));
                }
            }
        }

        #[test]
        fn nobody_moves_without_need(units in 1usize..13, width in 1usize..13, lost in any::<u16>()) {
            let width = width.min(units);
            let even = rank_ranges(units, width).unwrap();
            // All who are there and as many newcomers as are lost: everyone stays where they are.
            let holders: Vec<_> = even.iter().enumerate().map(|(at, range)| {
                if lost >> at & 1 == 1 { new(100) } else { old(range.clone()) }
            }).collect();
            let shares = share_out(units, &holders).unwrap();
            for (rank, (at, share)) in shares.iter().enumerate() {
                prop_assert_eq!(share, &even[rank]);
                if holders[*at].held.is_some() {
                    prop_assert_eq!(*at, rank);
                }
            }
            let strangers: Vec<_> = (0..width).map(|_| new(100)).collect();
            let fresh: Vec<_> = share_out(units, &strangers).unwrap().into_iter().map(|(_, r)| r).collect();
            prop_assert_eq!(fresh, even);
        }
    }
}
