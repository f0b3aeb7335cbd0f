//! Which units each rank of a stage holds, when some of its workers hold units already.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::ops::Range;

/// A worker that is to hold units.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Holder {
    /// Units that fit into its memory; at least 1.
    pub(crate) capacity: usize,
    /// What it holds now.
    pub(crate) held: Option<Range<usize>>,
}

/// Shares units `0..units` out: the holders in order of their ranks, by their place in `holders`, with their units. The largest
/// share, which a step's time goes with, is as small as the capacities allow. Of all orders and cuts of which that is true, this one
/// leaves the most units where they are, and none that does is more even. None if the units do not fit, or are fewer than holders.
/// What is held must not overlap.
pub(crate) fn share_out(units: usize, holders: &[Holder]) -> Option<Vec<(usize, Range<usize>)>> {
    let fits = |largest: usize| holders.iter().map(|h| h.capacity.min(largest)).sum::<usize>() >= units;
    let largest = (1..=units).find(|&largest| fits(largest))?;
    let mut search = Search::new(units, largest, holders);
    let mut cut = Vec::with_capacity(holders.len());
    let mut state = State::default();
    while let Some(step) = search.best(state)?.1 {
        if let Some(share) = step.share {
            cut.push((share, state.start..step.next.start));
        }
        state = step.next;
    }
    let kept = |at: usize| cut.iter().any(|(share, _)| *share == Share::Keeps(at));
    let mut strangers: Vec<usize> = (0..holders.len()).filter(|&at| !kept(at)).collect();
    let mut who = |share| match share {
        Share::Keeps(at) => Some(at),
        Share::Fits(most) => {
            let fitting = strangers.iter().position(|&at| holders[at].capacity.min(largest) == most)?;
            Some(strangers.remove(fitting))
        }
    };
    cut.into_iter().map(|(share, units)| Some((who(share)?, units))).collect()
}

/// The search for the best cut, from unit 0 on. Those that keep something of what they hold follow each other as they did before; who
/// keeps nothing is a stranger like newcomers are, may come anywhere, and differs from others by how much fits at most. So there
/// are few states.
struct Search<'a> {
    units: usize,
    largest: usize,
    holders: &'a [Holder],
    /// Those that hold units, in the order of these.
    old: Vec<usize>,
    kinds: Vec<Kind>,
    known: HashMap<State, Option<Best>>,
}

/// Holders of which the same number of units fits, at most.
struct Kind {
    most: usize,
    count: usize,
    /// What one of them adds to `State::given`, of which each kind has a digit.
    weight: usize,
}

impl Kind {
    /// Those who have no share yet.
    fn left(&self, state: State) -> usize {
        self.count - state.given / self.weight % (self.count + 1)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
struct State {
    /// Holders among the old who have kept something, or will not.
    passed: usize,
    /// Shares that were given, by kind.
    given: usize,
    /// Units that were given.
    start: usize,
}

/// How good the best way is to share out the rest, and how it begins; with nothing, at the end.
type Best = (Score, Option<Step>);
/// Units that stay, then how even it is.
type Score = (usize, Reverse<usize>);

#[derive(Clone, Copy)]
struct Step {
    /// Whose share comes next; none: the next of the old keeps nothing.
    share: Option<Share>,
    next: State,
}

#[derive(Clone, Copy, PartialEq)]
enum Share {
    /// That of this holder, who keeps some of it.
    Keeps(usize),
    /// That of a stranger for whom so much fits.
    Fits(usize),
}

impl<'a> Search<'a> {
    fn new(units: usize, largest: usize, holders: &'a [Holder]) -> Self {
        let mut old: Vec<usize> = (0..holders.len()).filter(|&at| holders[at].held.is_some()).collect();
        old.sort_by_key(|&at| holders[at].held.as_ref().map(|held| held.start));
        let mut kinds: Vec<Kind> = Vec::new();
        for most in holders.iter().map(|holder| holder.capacity.min(largest)) {
            match kinds.iter_mut().find(|kind| kind.most == most) {
                Some(kind) => kind.count += 1,
                None => kinds.push(Kind { most, count: 1, weight: 0 }),
            }
        }
        let mut weight = 1;
        for kind in &mut kinds {
            kind.weight = weight;
            weight *= kind.count + 1;
        }
        Self { units, largest, holders, old, kinds, known: HashMap::new() }
    }

    fn best(&mut self, state: State) -> Option<Best> {
        if let Some(known) = self.known.get(&state) {
            return *known;
        }
        let best = self.find(state);
        self.known.insert(state, best);
        best
    }

    fn find(&mut self, state: State) -> Option<Best> {
        let rest = self.units - state.start;
        let left = self.kinds.iter().map(|kind| (kind.left(state), kind.most));
        let (fewest, most) =
            left.fold((0, 0), |(fewest, all), (left, most)| (fewest + left, all + left * most));
        if !(fewest..=most).contains(&rest) {
            return None;
        }
        if rest == 0 {
            return Some(((0, Reverse(0)), None));
        }
        let mut best: Option<Best> = None;
        for (step, stays) in self.steps(state) {
            let Some(((stay, Reverse(squares)), _)) = self.best(step.next) else { continue };
            let length = step.next.start - state.start;
            let score = (stay + stays, Reverse(squares + length * length));
            if best.is_none_or(|(best, _)| score > best) {
                best = Some((score, Some(step)));
            }
        }
        best
    }

    /// What may come next, and how many units stay with it.
    fn steps(&self, state: State) -> Vec<(Step, usize)> {
        let mut steps = Vec::new();
        let State { passed, start, .. } = state;
        let free = |kind: &&Kind| kind.left(state) > 0;
        let ends = |kind: &Kind| (start + 1..=self.units.min(start + kind.most)).rev();
        if let Some(&at) = self.old.get(passed) {
            let Holder { capacity, held } = &self.holders[at];
            let most = self.largest.min(*capacity);
            let held = held.clone().unwrap_or_default();
            for kind in self.kinds.iter().filter(|kind| kind.most == most).filter(free) {
                let next = |end| State { passed: passed + 1, given: state.given + kind.weight, start: end };
                let step = |end| Step { share: Some(Share::Keeps(at)), next: next(end) };
                let stays = |end: usize| end.min(held.end).saturating_sub(start.max(held.start));
                steps.extend(ends(kind).map(|end| (step(end), stays(end))).filter(|(_, stays)| *stays > 0));
            }
        }
        for kind in self.kinds.iter().filter(free) {
            let next = |end| State { given: state.given + kind.weight, start: end, ..state };
            let step = |end| Step { share: Some(Share::Fits(kind.most)), next: next(end) };
            steps.extend(ends(kind).map(|end| (step(end), 0)));
        }
        if passed < self.old.len() {
            steps.push((Step { share: None, next: State { passed: passed + 1, ..state } }, 0));
        }
        steps
    }
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
    fn who_would_keep_nothing_goes_where_units_are_missing() {
        let holders = [old(2..4), old(4..6), old(6..7), old(7..8)];
        let expected = vec![(3, 0..2), (0, 2..4), (1, 4..6), (2, 6..8)];
        assert_eq!(share_out(8, &holders), Some(expected));
    }

    #[test]
    fn small_memories_hold_little() {
        assert_eq!(share_out(8, &[new(1), new(5), new(3)]), Some(vec![(0, 0..1), (1, 1..5), (2, 5..8)]));
        assert_eq!(share_out(8, &[new(2), new(5)]), None);
        assert_eq!(share_out(2, &[new(9), new(9), new(9)]), None);
        assert_eq!(share_out(2, &[]), None);
    }

    /// How good shares in the order of `holders` are: the largest, what stays, the squares.
    fn worth(holders: &[&Holder], shares: &[Range<usize>]) -> (Reverse<usize>, usize, Reverse<usize>) {
        let stays = |(holder, share): (&&Holder, &Range<usize>)| {
            let held = holder.held.clone().unwrap_or_default();
            held.end.min(share.end).saturating_sub(held.start.max(share.start))
        };
        let lengths = shares.iter().map(Range::len);
        let largest = lengths.clone().max().unwrap_or_default();
        let squares = lengths.map(|length| length * length).sum();
        (Reverse(largest), holders.iter().zip(shares).map(stays).sum(), Reverse(squares))
    }

    /// The worth of the best of all orders and cuts, by trying them.
    fn best_of_all(
        units: usize,
        left: &[&Holder],
        placed: &mut Vec<(Holder, Range<usize>)>,
    ) -> Option<(Reverse<usize>, usize, Reverse<usize>)> {
        let start = placed.last().map_or(0, |(_, share)| share.end);
        if left.is_empty() {
            let (holders, shares): (Vec<_>, Vec<_>) = placed.iter().map(|(h, s)| (h, s.clone())).unzip();
            return (start == units).then(|| worth(&holders, &shares));
        }
        let mut best = None;
        for at in 0..left.len() {
            let mut others = left.to_vec();
            let next = others.remove(at);
            for end in start + 1..=units.min(start + next.capacity) {
                placed.push((next.clone(), start..end));
                best = best.max(best_of_all(units, &others, placed));
                placed.pop();
            }
        }
        best
    }

    proptest! {
        #[test]
        fn no_order_and_no_cut_leaves_more_where_it_is(
            cut in prop::collection::vec(1usize..4, 1..6),
            fates in prop::collection::vec((any::<bool>(), 1usize..6), 6),
            newcomers in prop::collection::vec(1usize..6, 0..3),
        ) {
            let mut units = 0;
            let mut holders = Vec::new();
            for (length, (lost, capacity)) in cut.into_iter().zip(fates) {
                let held = units..units + length;
                units = held.end;
                if !lost {
                    holders.push(Holder { capacity, held: Some(held) });
                }
            }
            holders.extend(newcomers.into_iter().map(new));
            holders.truncate(5);
            let shares = share_out(units, &holders);
            let found = shares.map(|shares| {
                let (order, shares): (Vec<_>, Vec<_>) =
                    shares.into_iter().map(|(at, share)| (&holders[at], share)).unzip();
                worth(&order, &shares)
            });
            let best = if holders.is_empty() { None } else {
                best_of_all(units, &holders.iter().collect::<Vec<_>>(), &mut Vec::new())
            };
            prop_assert_eq!(found, best);
        }

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
