//! Ranks tell each other what they have and what they managed, so that all draw the same conclusion.

use crate::collective::{Error, Result};
use crate::transport::Transport;

/// Bytes of one message at most.
const LIMIT: usize = 4096;
/// Begins the message of a rank that failed.
const FAILED: char = '!';

/// What keeps a group from a way of summing: a rank, and what it lacks, in a sentence for users.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Obstacle {
    pub(super) rank: usize,
    pub(super) why: String,
}

/// What came of something that every rank tried, told to all: what this rank has, or the first rank that failed and why.
pub(super) type Agreed<V> = std::result::Result<V, Obstacle>;

/// Gives every rank's text (of which the first [`LIMIT`] bytes count) to all, in order of ranks.
pub(super) fn tell(transport: &mut impl Transport, own: &str) -> Result<Vec<String>> {
    let own = &own.as_bytes()[..own.floor_char_boundary(LIMIT)];
    let (rank, size) = (transport.rank(), transport.size());
    let others: Vec<usize> = (0..size).filter(|other| *other != rank).collect();
    let mut exchange = |own: &[u8], lengths: &[usize]| {
        let mut inboxes: Vec<Vec<u8>> = lengths.iter().map(|&length| vec![0; length]).collect();
        let outgoing: Vec<(usize, &[u8])> = others.iter().map(|&to| (to, own)).collect();
        let mut incoming: Vec<(usize, &mut [u8])> =
            others.iter().copied().zip(inboxes.iter_mut().map(Vec::as_mut_slice)).collect();
        transport.exchange(&outgoing, &mut incoming)?;
        Ok::<_, Error>(inboxes)
    };
    let headers = exchange(&(own.len() as u32).to_le_bytes(), &vec![size_of::<u32>(); others.len()])?;
    let mut lengths = Vec::with_capacity(others.len());
    for (&rank, header) in others.iter().zip(&headers) {
        let length = u32::from_le_bytes(header.as_slice().try_into().unwrap_or_default()) as usize;
        if length > LIMIT {
            return Err(Error::Protocol { rank, what: format!("{length} bytes of what it has") });
        }
        lengths.push(length);
    }
    let texts = exchange(own, &lengths)?;
    let mut all = Vec::with_capacity(size);
    for (&rank, text) in others.iter().zip(texts) {
        let text = String::from_utf8(text)
            .map_err(|_| Error::Protocol { rank, what: "a text that is not UTF-8".into() })?;
        all.push(text);
    }
    all.insert(rank, String::from_utf8_lossy(own).into_owned());
    Ok(all)
}

/// Tells all what came of something: `Ok` on every rank, or the same obstacle on every rank.
pub(super) fn agree<V>(
    transport: &mut impl Transport,
    outcome: std::result::Result<V, String>,
) -> Result<Agreed<V>> {
    let own = outcome.as_ref().err().map_or(String::new(), |why| format!("{FAILED}{why}"));
    let told = tell(transport, &own)?;
    let failed = told.iter().enumerate().find_map(|(rank, text)| Some((rank, text.strip_prefix(FAILED)?)));
    Ok(match (failed, outcome) {
        (None, Ok(value)) => Ok(value),
        (None, Err(why)) => Err(Obstacle { rank: transport.rank(), why }),
        (Some((rank, why)), _) => Err(Obstacle { rank, why: why.to_owned() }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::local::local_group;

    fn each<V: Send>(size: usize, body: impl Fn(usize, &mut crate::LocalTransport) -> V + Sync) -> Vec<V> {
        std::thread::scope(|scope| {
            let ranks = local_group(size).into_iter().enumerate();
            let body = &body;
            let threads: Vec<_> =
                ranks.map(|(rank, mut end)| scope.spawn(move || body(rank, &mut end))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn everybody_hears_everybody() {
        let heard = each(3, |rank, end| tell(end, &"ä".repeat(rank * 3)).unwrap());
        assert!(heard.iter().all(|texts| *texts == ["", "äää", "ääääää"]), "{heard:?}");
        let long = each(2, |rank, end| tell(end, &"a".repeat(rank * 2 * LIMIT)).unwrap());
        assert!(long.iter().all(|texts| texts[1].len() == LIMIT), "more than the limit is cut off");
    }

    #[test]
    fn one_that_fails_is_named_to_all() {
        let outcome = |rank, failing| if rank >= failing { Err(format!("no {rank}")) } else { Ok(rank) };
        let agreed = each(4, |rank, end| agree(end, outcome(rank, 2)).unwrap());
        let expected = Obstacle { rank: 2, why: "no 2".into() };
        assert!(agreed.into_iter().all(|agreed| agreed == Err(expected.clone())));
        assert_eq!(each(2, |rank, end| agree(end, outcome(rank, 2)).unwrap()), [Ok(0), Ok(1)]);
    }
}
