//! What a rank has to connect GPUs with, as it tells the others, and what follows for a group of such ranks.

use std::fmt::Write;

use kernels::cuda::MAX_RANKS;

use super::agree::Obstacle;
use crate::choice::CollectiveChoice;

/// What one rank has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Offer {
    /// What it was asked to use.
    pub(super) wanted: CollectiveChoice,
    /// Its GPU, or part of one.
    pub(super) gpu: [u8; 16],
    /// The version of NCCL, or why there is none.
    pub(super) nccl: Result<u32, String>,
    /// Where ranks of its machine reach it, or why it cannot share memory.
    pub(super) place: Result<Place, String>,
}

/// Where ranks of one machine reach a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// The machine, since it was started.
    pub(super) machine: [u8; 16],
    /// Of a socket.
    pub(super) name: [u8; 32],
    /// Known to the group alone: whoever sends it there is of the group.
    pub(super) nonce: [u8; 32],
}

impl Offer {
    /// One line for each part.
    pub(super) fn to_text(&self) -> String {
        let part = |outcome: Result<String, &String>| match outcome {
            Ok(text) => format!("+{text}"),
            Err(why) => format!("-{}", why.replace('\n', " ")),
        };
        let nccl = self.nccl.as_ref().map(u32::to_string);
        let place = self
            .place
            .as_ref()
            .map(|place| format!("{} {} {}", hex(&place.machine), hex(&place.name), hex(&place.nonce)));
        format!("{}\n{}\n{}\n{}", self.wanted, hex(&self.gpu), part(nccl), part(place))
    }

    /// None if it is not such a text.
    pub(super) fn from_text(text: &str) -> Option<Self> {
        let mut lines = text.split('\n');
        let wanted = lines.next()?.parse().ok()?;
        let gpu = from_hex(lines.next()?)?;
        let nccl = match lines.next()?.split_at_checked(1)? {
            ("+", version) => Ok(version.parse().ok()?),
            (_, why) => Err(why.to_owned()),
        };
        let place = match lines.next()?.split_at_checked(1)? {
            ("+", place) => {
                let mut words = place.split(' ');
                let (machine, name, nonce) = (words.next()?, words.next()?, words.next()?);
                Ok(Place { machine: from_hex(machine)?, name: from_hex(name)?, nonce: from_hex(nonce)? })
            }
            (_, why) => Err(why.to_owned()),
        };
        Some(Self { wanted, gpu, nccl, place })
    }
}

/// What the group was asked to use. Ranks that leave it open follow those that do not.
///
/// # Errors
/// A rank that was asked for something else than one before it.
pub(super) fn wanted(offers: &[Offer]) -> Result<CollectiveChoice, Obstacle> {
    let asked = || offers.iter().enumerate().filter(|(_, offer)| offer.wanted != CollectiveChoice::Auto);
    let Some((first, Offer { wanted, .. })) = asked().next() else { return Ok(CollectiveChoice::Auto) };
    match asked().find(|(_, offer)| offer.wanted != *wanted) {
        None => Ok(*wanted),
        Some((rank, other)) => {
            let why =
                format!("it has --collective {}, rank {first} has {wanted}: use one for all", other.wanted);
            Err(Obstacle { rank, why })
        }
    }
}

/// Why these ranks cannot use NCCL, as far as can be known before it is tried.
pub(super) fn without_nccl(offers: &[Offer]) -> Option<Obstacle> {
    let lacks = |(rank, offer): (usize, &Offer)| {
        let why = match (&offer.nccl, &offers[0].nccl) {
            (Err(why), _) => why.clone(),
            (Ok(version), Ok(first)) if version != first => {
                format!("its NCCL is {}, that of rank 0 {}: install the same", shown(*version), shown(*first))
            }
            _ => return None,
        };
        Some(Obstacle { rank, why })
    };
    offers.iter().enumerate().find_map(lacks).or_else(|| same_gpu(offers))
}

/// Why these ranks cannot share memory, as far as can be known before it is tried.
pub(super) fn without_peers(offers: &[Offer]) -> Option<Obstacle> {
    if offers.len() > MAX_RANKS {
        let why = format!("{} ranks: at most {MAX_RANKS} can share memory", offers.len());
        return Some(Obstacle { rank: MAX_RANKS, why });
    }
    let lacks = |(rank, offer): (usize, &Offer)| {
        let why = match (&offer.place, &offers[0].place) {
            (Err(why), _) => why.clone(),
            (Ok(own), Ok(first)) if own.machine != first.machine => {
                "it is on another machine than rank 0".into()
            }
            _ => return None,
        };
        Some(Obstacle { rank, why })
    };
    offers.iter().enumerate().find_map(lacks).or_else(|| same_gpu(offers))
}

/// NCCL refuses two processes on one GPU; kernels of two processes do not run on it at the same time, and ours wait for each other.
fn same_gpu(offers: &[Offer]) -> Option<Obstacle> {
    offers.iter().enumerate().find_map(|(rank, offer)| {
        let first = offers[..rank].iter().position(|before| before.gpu == offer.gpu)?;
        let why = format!("its GPU is that of rank {first}, and each rank needs one of its own");
        Some(Obstacle { rank, why })
    })
}

/// A version of NCCL, as people write it.
fn shown(version: u32) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Of exactly so many bytes.
pub(super) fn from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits: Vec<u8> = text.chars().map(|c| Some(c.to_digit(16)? as u8)).collect::<Option<_>>()?;
    let bytes: Vec<u8> = digits.as_chunks::<2>().0.iter().map(|[high, low]| high << 4 | low).collect();
    if digits.len() == 2 * N { bytes.try_into().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn offers(count: u8) -> Vec<Offer> {
        let place = |nonce| Place { machine: [7; 16], name: [nonce; 32], nonce: [nonce; 32] };
        let offer = |rank| Offer {
            wanted: CollectiveChoice::Auto,
            gpu: [rank; 16],
            nccl: Ok(22_809),
            place: Ok(place(rank)),
        };
        (0..count).map(offer).collect()
    }

    fn obstacle(rank: usize, words: &str) -> impl Fn(Option<Obstacle>) -> bool {
        move |found| found.is_some_and(|found| found.rank == rank && found.why.contains(words))
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(nccl in any::<Result<u32, String>>(), gpu in any::<[u8; 16]>(), bytes in any::<[[u8; 32]; 2]>(), why in ".*") {
            let [name, nonce] = bytes;
            for place in [Ok(Place { machine: gpu, name, nonce }), Err(why.clone())] {
                for wanted in [CollectiveChoice::Auto, CollectiveChoice::Peer] {
                    let offer = Offer { wanted, gpu, nccl: nccl.clone(), place: place.clone() };
                    let one_line = |why: String| why.replace('\n', " ");
                    let expected = Offer { nccl: offer.nccl.clone().map_err(one_line), place: offer.place.clone().map_err(one_line), ..offer.clone() };
                    prop_assert_eq!(Offer::from_text(&offer.to_text()), Some(expected));
                }
            }
        }

        #[test]
        fn anything_else_is_none_or_whole(text in "(auto|nccl|x)?\n?[0-9a-fä]{0,40}\n?[+-]?.{0,9}\n?[+-]?.*") {
            if let Some(offer) = Offer::from_text(&text) {
                prop_assert_eq!(Offer::from_text(&offer.to_text()), Some(offer));
            }
        }
    }

    #[test]
    fn ranks_with_the_same_may_use_it() {
        assert_eq!(without_nccl(&offers(3)), None);
        assert_eq!(without_peers(&offers(3)), None);
    }

    #[test]
    fn what_one_rank_lacks_nobody_uses() {
        let mut lacking = offers(3);
        lacking[2].nccl = Err("NCCL is missing".into());
        lacking[1].place = Err("no memory".into());
        assert!(obstacle(2, "missing")(without_nccl(&lacking)));
        assert!(obstacle(1, "no memory")(without_peers(&lacking)));
        let mut differing = offers(2);
        differing[1].nccl = Ok(22_703);
        assert!(obstacle(1, "2.27.3, that of rank 0 2.28.9")(without_nccl(&differing)));
        let mut apart = offers(2);
        apart[1].place.as_mut().unwrap().machine = [8; 16];
        assert!(obstacle(1, "another machine")(without_peers(&apart)));
        assert_eq!(without_nccl(&apart), None);
    }

    #[test]
    fn two_ranks_on_one_gpu_use_neither() {
        let mut shared = offers(3);
        shared[2].gpu = shared[1].gpu;
        assert!(obstacle(2, "rank 1")(without_nccl(&shared)));
        assert!(obstacle(2, "rank 1")(without_peers(&shared)));
    }

    #[test]
    fn more_ranks_than_can_share_memory() {
        assert!(obstacle(MAX_RANKS, "at most")(without_peers(&offers(MAX_RANKS as u8 + 1))));
    }

    #[test]
    fn choices_must_agree_and_auto_follows() {
        let choose = |choices: &[CollectiveChoice]| {
            let mut all = offers(choices.len() as u8);
            all.iter_mut().zip(choices).for_each(|(offer, &choice)| offer.wanted = choice);
            wanted(&all)
        };
        use CollectiveChoice::{Auto, Host, Nccl};
        assert_eq!(choose(&[Auto, Auto]), Ok(Auto));
        assert_eq!(choose(&[Auto, Nccl, Auto]), Ok(Nccl));
        let differ = choose(&[Auto, Nccl, Host]).unwrap_err();
        assert_eq!(differ.rank, 2);
        assert!(differ.why.contains("--collective host, rank 1 has nccl"), "{}", differ.why);
    }
}
