//! How two ranks find out that they belong together: same protocol, group, epoch and secret, and the right numbers.
//!
//! ```text
//! initiator → responder   hello: magic, protocol, group, epoch, number of stages, of both ranks stage, number and the stage's width, nonce
//! responder → initiator   answer: magic, verdict, its epoch, nonce
//! initiator → responder   proof
//! responder → initiator   verdict, proof
//! ```
//! The proofs are over the hello and both nonces. The initiator proves first, so that a stranger who connects to a
//! listener gets nothing to guess at. Messages have fixed sizes: nothing is allocated for what a stranger sends.

use std::io;

use auth::{Nonce, Proof, Role};

use crate::group::{GroupSpec, Member};

/// Raised with every change of the messages of this crate.
const PROTOCOL: u32 = 3;
const MAGIC: [u8; 8] = *b"phalanx\0";
/// Bytes that a group's name has at most.
pub(crate) const MAX_NAME: usize = 64;

/// A stream that a handshake runs over; it limits the time.
pub(crate) trait Channel {
    fn send(&mut self, bytes: &[u8]) -> io::Result<()>;
    fn receive(&mut self, bytes: &mut [u8]) -> io::Result<()>;
}

/// Why a handshake came to nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error(transparent)]
    Broken(#[from] io::Error),
    #[error("it is no phalanx worker")]
    Stranger,
    #[error("it has {0}")]
    Differs(Difference),
    #[error("it says that this rank has {0}")]
    Refused(Difference),
    #[error("it is in epoch {}.{}, this rank in {}.{}", .theirs.0, .theirs.1, .ours.0, .ours.1)]
    Epoch { theirs: (u64, u64), ours: (u64, u64) },
}

impl Failure {
    /// Whether the same peer may agree later: it is not up yet, or not told yet of the epoch.
    pub(crate) fn may_pass(&self) -> bool {
        match self {
            Self::Broken(_) => true,
            Self::Epoch { theirs, ours } => theirs < ours,
            Self::Stranger | Self::Differs(_) | Self::Refused(_) => false,
        }
    }
}

/// What the two sides do not agree on; numbered as on the wire, where 0 is agreement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Difference {
    #[error("another version of the collective protocol (or byte order)")]
    Protocol = 1,
    #[error("another group")]
    Group = 2,
    #[error("another epoch")]
    Epoch = 3,
    #[error("another size of the group or of a stage, or an unexpected rank in it")]
    Rank = 4,
    #[error("another secret")]
    Secret = 5,
}

const DIFFERENCES: [Difference; 5] =
    [Difference::Protocol, Difference::Group, Difference::Epoch, Difference::Rank, Difference::Secret];

/// The connecting side.
pub(crate) fn initiate(
    channel: &mut impl Channel,
    spec: &GroupSpec,
    responder: Member,
) -> Result<(), Failure> {
    let secret = &spec.secret;
    let nonce = Nonce::random();
    let hello = hello(spec, responder, &nonce);
    channel.send(&hello)?;

    let mut answer = [0; 8 + 1 + 16 + 32];
    channel.receive(&mut answer)?;
    let mut fields = Fields(&answer);
    if fields.array() != MAGIC {
        return Err(Failure::Stranger);
    }
    let [verdict] = fields.array();
    let theirs = (fields.u64(), fields.u64());
    let their_nonce = Nonce(fields.array());
    match verdict_of(verdict)? {
        None => {}
        Some(Difference::Epoch) => return Err(Failure::Epoch { theirs, ours: spec.epoch }),
        Some(difference) => return Err(Failure::Refused(difference)),
    }

    channel.send(&secret.prove(Role::Initiator, &hello, &nonce, &their_nonce).0)?;
    let mut verdict = [0];
    channel.receive(&mut verdict)?;
    if let Some(difference) = verdict_of(verdict[0])? {
        return Err(Failure::Refused(difference));
    }
    let mut proof = Proof([0; 32]);
    channel.receive(&mut proof.0)?;
    match secret.verify(Role::Responder, &hello, &nonce, &their_nonce, &proof) {
        true => Ok(()),
        false => Err(Failure::Differs(Difference::Secret)),
    }
}

/// The accepting side, which awaits all ranks above it; returns the one that connected.
pub(crate) fn respond(channel: &mut impl Channel, spec: &GroupSpec) -> Result<Member, Failure> {
    let (epoch, secret) = (spec.epoch, &spec.secret);
    let mut hello = [0; HELLO_BYTES];
    channel.receive(&mut hello)?;
    let mut fields = Fields(&hello);
    if fields.array() != MAGIC {
        return Err(Failure::Stranger);
    }
    let protocol: [u8; 4] = fields.array();
    let their_group: [u8; 1 + MAX_NAME] = fields.array();
    let their_epoch = (fields.u64(), fields.u64());
    let stages = fields.u64();
    let (initiator, responder) = ([(); 3].map(|()| fields.u64()), [(); 3].map(|()| fields.u64()));
    let nonce = Nonce(fields.array());

    let awaited = spec.above().into_iter().find(|&member| seat(spec, member) == initiator);
    let difference = if protocol != PROTOCOL.to_ne_bytes() {
        Some(Difference::Protocol)
    } else if their_group != padded(&spec.group) {
        Some(Difference::Group)
    } else if their_epoch != epoch {
        Some(Difference::Epoch)
    } else if stages != spec.stages.len() as u64 || responder != seat(spec, spec.own()) {
        Some(Difference::Rank)
    } else {
        awaited.is_none().then_some(Difference::Rank)
    };
    let own_nonce = Nonce::random();
    let mut answer = Vec::with_capacity(64);
    answer.extend(MAGIC);
    answer.push(difference.map_or(0, |d| d as u8));
    answer.extend(epoch.0.to_le_bytes());
    answer.extend(epoch.1.to_le_bytes());
    answer.extend(own_nonce.0);
    channel.send(&answer)?;
    match difference {
        None => {}
        Some(Difference::Epoch) => return Err(Failure::Epoch { theirs: their_epoch, ours: epoch }),
        Some(difference) => return Err(Failure::Differs(difference)),
    }

    let mut proof = Proof([0; 32]);
    channel.receive(&mut proof.0)?;
    if !secret.verify(Role::Initiator, &hello, &nonce, &own_nonce, &proof) {
        channel.send(&[Difference::Secret as u8])?;
        return Err(Failure::Differs(Difference::Secret));
    }
    let mut welcome = [0; 33];
    welcome[1..].copy_from_slice(&secret.prove(Role::Responder, &hello, &nonce, &own_nonce).0);
    channel.send(&welcome)?;
    awaited.ok_or(Failure::Differs(Difference::Rank))
}

const HELLO_BYTES: usize = 8 + 4 + (1 + MAX_NAME) + 16 + 8 * (1 + 3 + 3) + 32;

/// Stage and number of a rank, and the ranks that there are in that stage.
fn seat(spec: &GroupSpec, member: Member) -> [u64; 3] {
    [member.stage, member.rank, spec.width(member.stage)].map(|number| number as u64)
}

fn hello(spec: &GroupSpec, responder: Member, nonce: &Nonce) -> [u8; HELLO_BYTES] {
    let mut bytes = [0; HELLO_BYTES];
    let mut rest = &mut bytes[..];
    let mut put = |field: &[u8]| {
        let (target, behind) = std::mem::take(&mut rest).split_at_mut(field.len());
        target.copy_from_slice(field);
        rest = behind;
    };
    put(&MAGIC);
    // In this machine's byte order, as the payloads of collectives are: machines of different orders part here.
    put(&PROTOCOL.to_ne_bytes());
    put(&padded(&spec.group));
    let stages = spec.stages.len() as u64;
    for number in [spec.epoch.0, spec.epoch.1, stages] {
        put(&number.to_le_bytes());
    }
    for number in [seat(spec, spec.own()), seat(spec, responder)].as_flattened() {
        put(&number.to_le_bytes());
    }
    put(&nonce.0);
    bytes
}

/// The name's length, the name, zeros.
fn padded(group: &str) -> [u8; 1 + MAX_NAME] {
    let mut bytes = [0; 1 + MAX_NAME];
    let name = &group.as_bytes()[..group.len().min(MAX_NAME)];
    bytes[0] = name.len() as u8;
    bytes[1..1 + name.len()].copy_from_slice(name);
    bytes
}

fn verdict_of(byte: u8) -> Result<Option<Difference>, Failure> {
    match DIFFERENCES.into_iter().find(|d| *d as u8 == byte) {
        None if byte != 0 => Err(Failure::Stranger),
        difference => Ok(difference),
    }
}

/// Reads fields of fixed sizes off a message that is long enough.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn array<const N: usize>(&mut self) -> [u8; N] {
        let (field, rest) = self.0.split_at(N);
        self.0 = rest;
        let mut array = [0; N];
        array.copy_from_slice(field);
        array
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }
}
