//! How the GPUs of a group come to exchange: ranks tell each other what they have, and all choose the same.

use std::ops::Range;
use std::time::{Duration, Instant};

use kernels::cuda::{Buffer, Communicator, NcclId, OneShot, nccl_version};
use kernels::{Backend, Cuda, DType};
use tracing::info;

use super::agree::{Agreed, Obstacle, agree, tell};
use super::direct::{DirectCollective, Ways};
use super::guard::Guard;
use super::offer::{Offer, Place, from_hex, hex, wanted, without_nccl, without_peers};
use super::peers::{self, Berth};
use super::staged::StagedCollective;
use crate::choice::CollectiveChoice;
use crate::collective::{Collective, Error, Result};
use crate::ranges::Ranges;
use crate::transport::Transport;

/// Numbers of the first message by NCCL.
const FIRST_MESSAGE: usize = 1024;

/// How GPUs are to exchange.
#[derive(Debug, Clone, Copy)]
pub struct ConnectOptions {
    /// Which way; ranks that were told [`CollectiveChoice::Auto`] follow those that were not.
    pub choice: CollectiveChoice,
    /// The bits of every sum are those of every other collective; else NCCL adds in its own order, which moves fewer bytes.
    pub deterministic: bool,
    /// How long a rank waits for the others: here, and later a kernel for those of others.
    pub limit: Duration,
}

/// Connects the GPUs of the ranks of `transport`, each of which calls this with the same arguments but its own choice. `ranges`: the
/// units of every rank, in order. A rank that is alone needs nobody, whatever it was told.
///
/// The best that all ranks have is used: memory that they share for short messages and NCCL for long ones, or the one that they have, or
/// the host's memory and the network. What is missing is logged with its reason.
///
/// # Errors
/// [`Error::Unavailable`] on all ranks where a way was asked for that one of them does not have; [`Error::Aborted`] and [`Error::Lost`]
/// as the transport's; [`Error::Shape`] for false ranges; [`Error::Device`] where the GPU fails.
pub fn connect<T: Transport + 'static>(
    cuda: &Cuda,
    transport: T,
    ranges: Vec<Range<usize>>,
    options: ConnectOptions,
) -> Result<Box<dyn Collective<Buffer>>> {
    let checked = Ranges::new(ranges.clone(), transport.size())?;
    if transport.size() == 1 {
        return Ok(Box::new(StagedCollective::new(cuda, transport, ranges)?));
    }
    let mut guard = Guard::new(transport);
    let berth = match options.choice {
        CollectiveChoice::Auto | CollectiveChoice::Peer => Berth::new(cuda, guard.transport.rank()),
        other => Err(not_asked(other)),
    };
    let place = berth.as_ref().map(Berth::place).map_err(Clone::clone);
    let mut connecting = Connecting::begin(cuda, &mut guard, place, options)?;
    let choice = connecting.choice;
    let peers = connecting.peers(berth)?;
    let nccl = connecting.nccl()?;
    let ways = Ways { peers, nccl };
    let used = match (&ways.peers, &ways.nccl) {
        (Some(_), Some(_)) => "memory that they share, and NCCL for long messages",
        (Some(_), None) => "memory that they share",
        (None, Some(_)) => "NCCL",
        (None, None) => "the host's memory",
    };
    info!(asked = %choice, used, "the GPUs exchange by");
    if ways.peers.is_none() && ways.nccl.is_none() {
        return Ok(Box::new(StagedCollective::new(cuda, guard.transport, ranges)?));
    }
    Ok(Box::new(DirectCollective::new(cuda, guard, ways, checked, options.deterministic)))
}

/// Ranks that know what all of them have.
pub(super) struct Connecting<'a, T> {
    cuda: &'a Cuda,
    guard: &'a mut Guard<T>,
    offers: Vec<Offer>,
    /// What the group was asked to use.
    choice: CollectiveChoice,
    limit: Duration,
}

impl<'a, T: Transport> Connecting<'a, T> {
    /// Tells all ranks what this one has, `place` where its memory can be shared, and hears what they have.
    pub(super) fn begin(
        cuda: &'a Cuda,
        guard: &'a mut Guard<T>,
        place: std::result::Result<Place, String>,
        options: ConnectOptions,
    ) -> Result<Self> {
        let wants = options.choice;
        let nccl = match wants {
            CollectiveChoice::Auto | CollectiveChoice::Nccl => {
                nccl_version().map_err(|error| error.to_string())
            }
            other => Err(not_asked(other)),
        };
        let own = Offer { wanted: wants, gpu: cuda.uuid()?, nccl, place };
        let mut offers = Vec::with_capacity(guard.transport.size());
        for (rank, text) in tell(&mut guard.transport, &own.to_text())?.into_iter().enumerate() {
            let what = || "what it has in words that this rank does not know".to_owned();
            offers.push(Offer::from_text(&text).ok_or_else(|| Error::Protocol { rank, what: what() })?);
        }
        let choice = wanted(&offers).map_err(|obstacle| unavailable(wants, obstacle))?;
        Ok(Self { cuda, guard, offers, choice, limit: options.limit })
    }

    /// Shares memory, where that was asked for or left open.
    fn peers(&mut self, berth: std::result::Result<Berth, String>) -> Result<Option<OneShot>> {
        let asked = self.choice == CollectiveChoice::Peer;
        if !asked && self.choice != CollectiveChoice::Auto {
            return Ok(None);
        }
        let places: Vec<_> = self.offers.iter().filter_map(|offer| offer.place.clone().ok()).collect();
        let connected = match (without_peers(&self.offers), berth) {
            (Some(obstacle), _) => Err(obstacle),
            (None, Ok(berth)) => peers::connect(self.cuda, self.guard, berth, &places, self.limit)?,
            (None, Err(why)) => Err(Obstacle { rank: self.guard.transport.rank(), why }),
        };
        self.decide(connected, asked, "memory that they share")
    }

    /// Connects by NCCL, likewise.
    pub(super) fn nccl(&mut self) -> Result<Option<Communicator>> {
        let asked = self.choice == CollectiveChoice::Nccl;
        if !asked && self.choice != CollectiveChoice::Auto {
            return Ok(None);
        }
        let connected = match without_nccl(&self.offers) {
            Some(obstacle) => Err(obstacle),
            None => self.connect_nccl()?,
        };
        self.decide(connected, asked, "NCCL")
    }

    fn connect_nccl(&mut self) -> Result<Agreed<Communicator>> {
        // Rank 0 makes the communicator's id and sends it to all.
        let id = if self.guard.transport.rank() == 0 { NcclId::new().map(Some) } else { Ok(None) };
        let id = match agree(&mut self.guard.transport, id.map_err(|error| error.to_string()))? {
            Ok(id) => id,
            Err(obstacle) => return Ok(Err(obstacle)),
        };
        let told = tell(&mut self.guard.transport, &id.map_or(String::new(), |id| hex(&id.0)))?;
        let connected = match told.first().and_then(|text| from_hex(text)) {
            Some(id) => self.join_nccl(NcclId(id)),
            None => Err("rank 0 sent no id for NCCL".into()),
        };
        // Whoever is gone, or was told to stop, is why it failed.
        self.guard.trouble()?;
        agree(&mut self.guard.transport, connected)
    }

    fn join_nccl(&mut self, id: NcclId) -> std::result::Result<Communicator, String> {
        let (rank, size) = (self.guard.transport.rank(), self.guard.transport.size());
        let deadline = Instant::now() + self.limit;
        let mut go_on = || self.guard.trouble().is_ok() && Instant::now() < deadline;
        let words = |error: kernels::Error| error.to_string();
        let mut communicator = Communicator::connect(self.cuda, id, rank, size, &mut go_on).map_err(words)?;
        let mut message = first_message(self.cuda, rank).map_err(words)?;
        let heard = communicator
            .broadcast(0, FIRST_MESSAGE, &mut message, &mut go_on)
            .and_then(|()| communicator.wait(&mut go_on))
            .and_then(|()| message.read(FIRST_MESSAGE));
        match heard {
            Ok(heard) if heard == numbers() => Ok(communicator),
            Ok(_) => Err("a first message by NCCL came with other numbers than were sent".into()),
            Err(error) => {
                // Before the message's memory is freed, which waits for what uses it.
                communicator.abort();
                Err(words(error))
            }
        }
    }

    /// What is to be said of a way that is not open.
    fn decide<V>(&self, connected: Agreed<V>, asked: bool, way: &str) -> Result<Option<V>> {
        match connected {
            Ok(value) => Ok(Some(value)),
            Err(obstacle) if asked => Err(unavailable(self.choice, obstacle)),
            Err(Obstacle { rank, why }) => {
                info!(rank, why, "the GPUs do not exchange by {way}");
                Ok(None)
            }
        }
    }
}

/// What rank 0 sends to all: NCCL connects two GPUs when they first have to do with each other, and a network that does not carry its
/// messages shows here, where there is another way.
fn first_message(cuda: &Cuda, rank: usize) -> kernels::Result<Buffer> {
    let mut message = cuda.buffer(DType::F32, 1, FIRST_MESSAGE)?;
    if rank == 0 {
        message.write(&numbers())?;
    }
    Ok(message)
}

fn numbers() -> Vec<f32> {
    (1..=FIRST_MESSAGE).map(|number| number as f32).collect()
}

fn not_asked(choice: CollectiveChoice) -> String {
    format!("it was started with --collective {choice}")
}

fn unavailable(choice: CollectiveChoice, Obstacle { rank, why }: Obstacle) -> Error {
    Error::Unavailable { choice, rank, why }
}
