//! What a worker is asked to measure, and what it found.

use std::time::Duration;

use crate::convert::{self, Malformed};
use crate::{WorkerId, proto};

/// Peers of one examination, and links of its findings.
pub const MAX_PEERS: usize = 4096;

/// What a worker is to measure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Examine {
    /// Told back.
    pub number: u64,
    /// What was found is told within this time, complete or not.
    pub limit: Duration,
    /// Probed one after the other.
    pub peers: Vec<Peer>,
    /// How much these links carry, too.
    pub bandwidth: bool,
    /// Hash the program.
    pub program: bool,
    /// How fast the checkpoint's folder is read.
    pub disk: bool,
}

/// Another worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its number.
    pub worker: WorkerId,
    /// Where it answers probes.
    pub address: String,
}

/// What a worker found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Findings {
    /// Of the question.
    pub number: u64,
    /// As far as there was time.
    pub links: Vec<(WorkerId, Probed)>,
    /// Empty: not asked for.
    pub program_hash: String,
    /// Absent: not asked for, or nothing could be read.
    pub disk: Option<Disk>,
}

/// A link, or why there is none.
pub type Probed = Result<Link, String>;

/// What was measured of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Link {
    /// There and back, the median.
    pub latency: Duration,
    /// The other one's clock less this one's.
    pub clock_offset_micros: i64,
    /// How much it carries.
    pub bandwidth: Option<Bandwidth>,
}

/// Bytes in a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bandwidth {
    /// To the other one.
    pub there: u64,
    /// From it.
    pub back: u64,
}

/// How fast a folder was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Disk {
    /// So many bytes,
    pub bytes: u64,
    /// in this time.
    pub time: Duration,
    /// They came from the page cache, which tells nothing of the disk.
    pub cached: bool,
}

impl Link {
    /// The same link, as the other one would have measured it.
    pub fn reversed(self) -> Self {
        let bandwidth =
            self.bandwidth.map(|Bandwidth { there, back }| Bandwidth { there: back, back: there });
        Self { clock_offset_micros: self.clock_offset_micros.saturating_neg(), bandwidth, ..self }
    }

    /// What two measurements of one link tell together: the better of each.
    pub fn better(self, other: Self) -> Self {
        let bandwidth = match (self.bandwidth, other.bandwidth) {
            (Some(a), Some(b)) => Some(Bandwidth { there: a.there.max(b.there), back: a.back.max(b.back) }),
            (a, b) => a.or(b),
        };
        let nearer = if self.latency <= other.latency { self } else { other };
        Self { bandwidth, ..nearer }
    }
}

impl Bandwidth {
    /// Of the slower direction.
    pub fn least(self) -> u64 {
        self.there.min(self.back)
    }
}

impl Disk {
    /// Bytes in a second.
    pub fn rate(&self) -> u64 {
        let rate = u128::from(self.bytes) * 1_000_000 / self.time.as_micros().max(1);
        u64::try_from(rate).unwrap_or(u64::MAX)
    }
}

impl From<Examine> for proto::Examine {
    fn from(examine: Examine) -> Self {
        let Examine { number, limit, peers, bandwidth, program, disk } = examine;
        let limit_millis = u32::try_from(limit.as_millis()).unwrap_or(u32::MAX);
        let peer = |Peer { worker, address }: Peer| proto::Peer { worker: worker.0, probe_address: address };
        let peers = peers.into_iter().map(peer).collect();
        Self { number, limit_millis, peers, bandwidth, program, disk }
    }
}

impl TryFrom<proto::Examine> for Examine {
    type Error = Malformed;

    fn try_from(examine: proto::Examine) -> Result<Self, Malformed> {
        let proto::Examine { number, limit_millis, peers, bandwidth, program, disk } = examine;
        convert::check("examine.peers", peers.len() <= MAX_PEERS, "has too many")?;
        let peer = |proto::Peer { worker, probe_address }| {
            let address = convert::text("examine.peers.probe_address", probe_address)?;
            Ok(Peer { worker: WorkerId(worker), address })
        };
        let peers = peers.into_iter().map(peer).collect::<Result<_, _>>()?;
        let limit = Duration::from_millis(limit_millis.into());
        Ok(Self { number, limit, peers, bandwidth, program, disk })
    }
}

impl From<Findings> for proto::Findings {
    fn from(findings: Findings) -> Self {
        let Findings { number, links, program_hash, disk } = findings;
        let link = |(worker, probed): (WorkerId, Probed)| {
            let (failure, measures) = wire(probed);
            proto::LinkFindings { worker: worker.0, failure, measures }
        };
        let links = links.into_iter().map(link).collect();
        Self { number, links, program_hash, disk: disk.map(Into::into) }
    }
}

impl TryFrom<proto::Findings> for Findings {
    type Error = Malformed;

    fn try_from(findings: proto::Findings) -> Result<Self, Malformed> {
        let proto::Findings { number, links, program_hash, disk } = findings;
        convert::check("findings.links", links.len() <= MAX_PEERS, "has too many")?;
        let link = |proto::LinkFindings { worker, failure, measures }| {
            let probed = match failure.is_empty() {
                true => Ok(convert::present("findings.links.measures", measures)?.into()),
                false => Err(convert::text("findings.links.failure", failure)?),
            };
            Ok((WorkerId(worker), probed))
        };
        Ok(Self {
            number,
            links: links.into_iter().map(link).collect::<Result<_, _>>()?,
            program_hash: convert::text("findings.program_hash", program_hash)?,
            disk: disk.map(Into::into),
        })
    }
}

/// A failure, or measures.
pub(super) fn wire(probed: Probed) -> (String, Option<proto::LinkMeasures>) {
    match probed {
        Ok(link) => (String::new(), Some(link.into())),
        Err(failure) => (failure, None),
    }
}

impl From<Link> for proto::LinkMeasures {
    fn from(link: Link) -> Self {
        let Link { latency, clock_offset_micros, bandwidth } = link;
        Self {
            latency_nanos: u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX),
            clock_offset_micros,
            bandwidth_there: bandwidth.map_or(0, |bandwidth| bandwidth.there),
            bandwidth_back: bandwidth.map_or(0, |bandwidth| bandwidth.back),
        }
    }
}

impl From<proto::LinkMeasures> for Link {
    fn from(measures: proto::LinkMeasures) -> Self {
        let proto::LinkMeasures { latency_nanos, clock_offset_micros, bandwidth_there, bandwidth_back } =
            measures;
        let measured = bandwidth_there > 0 || bandwidth_back > 0;
        Self {
            latency: Duration::from_nanos(latency_nanos),
            clock_offset_micros,
            bandwidth: measured.then_some(Bandwidth { there: bandwidth_there, back: bandwidth_back }),
        }
    }
}

impl From<Disk> for proto::DiskSpeed {
    fn from(disk: Disk) -> Self {
        let Disk { bytes, time, cached } = disk;
        Self { bytes, micros: u64::try_from(time.as_micros()).unwrap_or(u64::MAX), cached }
    }
}

impl From<proto::DiskSpeed> for Disk {
    fn from(disk: proto::DiskSpeed) -> Self {
        let proto::DiskSpeed { bytes, micros, cached } = disk;
        Self { bytes, time: Duration::from_micros(micros), cached }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::{Facts, Interface, Library};

    #[test]
    fn what_is_asked_and_found_survives_the_wire() {
        let peer = Peer { worker: WorkerId(3), address: "there:1".into() };
        let examine = Examine {
            number: 7,
            limit: Duration::from_millis(1500),
            peers: vec![peer],
            bandwidth: true,
            program: true,
            disk: true,
        };
        assert_eq!(Examine::try_from(proto::Examine::from(examine.clone())), Ok(examine));

        let link = Link {
            latency: Duration::from_nanos(12_345),
            clock_offset_micros: -3,
            bandwidth: Some(Bandwidth { there: 5, back: 6 }),
        };
        let disk = Disk { bytes: 1 << 20, time: Duration::from_micros(77), cached: true };
        let findings = Findings {
            number: 7,
            links: vec![
                (WorkerId(3), Ok(link)),
                (WorkerId(4), Ok(Link::default())),
                (WorkerId(5), Err("refused".into())),
            ],
            program_hash: "abc".into(),
            disk: Some(disk),
        };
        assert_eq!(Findings::try_from(proto::Findings::from(findings.clone())), Ok(findings));
    }

    #[test]
    fn facts_survive_the_wire() {
        let facts = Facts {
            program: "1".into(),
            machine: "here".into(),
            boot: "b".into(),
            kernel: "6".into(),
            libraries: vec![Library { name: "NCCL".into(), version: "2".into() }],
            interface: Some(Interface { name: "lo".into(), mtu: 9, megabits: Some(10), loopback: true }),
        };
        assert_eq!(Facts::try_from(proto::Facts::from(facts.clone())), Ok(facts));
        let libraries = vec![proto::Library::default(); 1000];
        let malformed = Facts::try_from(proto::Facts { libraries, ..Default::default() }).unwrap_err();
        assert_eq!(malformed.to_string(), "malformed message: facts.libraries has too many");
    }

    #[test]
    fn the_better_of_two_measurements_counts() {
        let link = |latency, bandwidth| Link { latency, clock_offset_micros: 0, bandwidth };
        let one = link(Duration::from_millis(1), Some(Bandwidth { there: 1, back: 4 }));
        let two = link(Duration::from_millis(2), Some(Bandwidth { there: 3, back: 2 }));
        let both = link(Duration::from_millis(1), Some(Bandwidth { there: 3, back: 4 }));
        assert_eq!((one.better(two), two.better(one)), (both, both));
        let ahead = Link { clock_offset_micros: 7, ..one };
        assert_eq!(ahead.reversed().clock_offset_micros, -7);
        assert_eq!(ahead.reversed().bandwidth, Some(Bandwidth { there: 4, back: 1 }));
        assert_eq!(ahead.reversed().reversed(), ahead);
        assert_eq!(link(Duration::ZERO, None).better(one).bandwidth, one.bandwidth);
        assert_eq!(Disk { bytes: 1000, time: Duration::ZERO, cached: false }.rate(), 1_000_000_000);
        assert_eq!(Disk { bytes: u64::MAX, time: Duration::from_micros(1), cached: false }.rate(), u64::MAX);
    }
}
