//! Which group a request goes to. Pure.

use std::cmp::Reverse;

/// What a running or waiting request counts for, in rows that are to be computed before those of another: a block's worth of answer.
const REQUEST_ROWS: usize = 64;

/// What speaks for a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Offer {
    /// Its number.
    pub(crate) group: u32,
    /// It runs steps, and does not only intend to.
    pub(crate) serving: bool,
    /// The request goes on with the fingerprint that it began with.
    pub(crate) same_fingerprint: bool,
    /// Rows that were asked for before and are not computed yet.
    pub(crate) pending_rows: usize,
    /// Requests that run or wait.
    pub(crate) requests: usize,
    /// Rows of the request itself: its tokens but for those that are cached there.
    pub(crate) own_rows: usize,
}

impl Offer {
    /// What is computed before the request's first token, and beside its later ones.
    fn cost(&self) -> usize {
        self.pending_rows + self.requests * REQUEST_ROWS + self.own_rows
    }
}

/// The groups in the order in which they are to be asked: those with the fingerprint that a request began with first, of them those that
/// serve, and of them the one that has least to do before it, where the longest cached prefix counts for what it saves.
pub(crate) fn ranked(mut offers: Vec<Offer>) -> Vec<u32> {
    offers.sort_by_key(|offer| {
        (Reverse(offer.same_fingerprint), Reverse(offer.serving), offer.cost(), offer.group)
    });
    offers.into_iter().map(|offer| offer.group).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OFFER: Offer = Offer {
        group: 0,
        serving: true,
        same_fingerprint: true,
        pending_rows: 0,
        requests: 0,
        own_rows: 100,
    };

    #[test]
    fn the_prefix_and_the_load_are_weighed() {
        let idle = Offer { group: 1, ..OFFER };
        let cached = Offer { group: 2, own_rows: 20, requests: 1, ..OFFER };
        assert_eq!(ranked(vec![idle, cached, OFFER]), [2, 0, 1]);
        let busy = Offer { requests: 2, ..cached };
        assert_eq!(ranked(vec![idle, busy, OFFER]), [0, 1, 2]);
        let reads = Offer { group: 3, pending_rows: 5000, own_rows: 0, ..OFFER };
        assert_eq!(ranked(vec![reads, busy]), [2, 3]);
    }

    #[test]
    fn an_answer_stays_on_its_fingerprint_and_does_not_wait_where_it_need_not() {
        let loading = Offer { group: 1, serving: false, ..OFFER };
        let other = Offer { group: 2, same_fingerprint: false, ..OFFER };
        let busy = Offer { group: 3, requests: 100, ..OFFER };
        assert_eq!(ranked(vec![other, loading, busy]), [3, 1, 2]);
    }
}
