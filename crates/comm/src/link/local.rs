//! Stages as threads of one process: a bounded queue for each rank that receives.

use std::io::ErrorKind;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use super::host::{HostLink, Inlet, Message, Outlet, put, take};
use crate::collective::{AbortHandle, Error, Result};
use crate::group::{receivers, sender};

/// The links of a pipeline whose stages have these widths, by stage and rank; each goes to a thread of its own. Ranks are given
/// `aborts` of their own.
///
/// # Errors
/// [`Error::Shape`] for a stage without ranks.
pub fn local_pipeline(widths: &[usize]) -> Result<Vec<Vec<HostLink>>> {
    if widths.contains(&0) {
        return Err(Error::Shape { op: "local_pipeline", detail: format!("stages of {widths:?} ranks") });
    }
    let stages = widths.len();
    let link = |stage| HostLink::new(stage, stages, AbortHandle::default());
    let links = |(stage, &width): (usize, &usize)| (0..width).map(|_| link(stage)).collect();
    let mut links: Vec<Vec<HostLink>> = widths.iter().enumerate().map(links).collect();
    let mut first = 0;
    for (stage, pair) in widths.windows(2).enumerate() {
        let [width, next] = [pair[0], pair[1]];
        for rank in 0..width {
            for to in receivers(rank, width, next) {
                let (queue, inbox) = sync_channel(stages);
                let outlet = LocalOutlet { rank: to, queue };
                links[stage][rank].outlets.push((first + width + to, Box::new(outlet)));
                let inlet = LocalInlet { rank: sender(to, width), queue: inbox };
                links[stage + 1][to].inlet = Some((first + rank, Box::new(inlet)));
            }
        }
        first += width;
    }
    Ok(links)
}

/// From a rank of the stage before.
#[derive(Debug)]
struct LocalInlet {
    rank: usize,
    queue: Receiver<Message>,
}

/// To a rank of the next stage.
#[derive(Debug)]
struct LocalOutlet {
    rank: usize,
    queue: SyncSender<Message>,
}

impl Inlet for LocalInlet {
    fn receive(&mut self, number: u64, rows: &mut [f32], abort: &AbortHandle) -> Result<()> {
        let rank = self.rank;
        let Some(message) = take(&self.queue, abort)? else { return Err(gone(rank)) };
        if message.number != number || message.rows.len() != rows.len() {
            let Message { number: found, rows: found_rows } = message;
            let what = format!(
                "{} numbers in message {found} where {} in message {number} were expected",
                found_rows.len(),
                rows.len()
            );
            return Err(Error::Protocol { rank, what });
        }
        rows.copy_from_slice(&message.rows);
        Ok(())
    }
}

impl Outlet for LocalOutlet {
    fn send(&mut self, message: Message, abort: &AbortHandle) -> Result<()> {
        if put(&self.queue, message, abort)? { Ok(()) } else { Err(gone(self.rank)) }
    }
}

fn gone(rank: usize) -> Error {
    Error::Lost { rank, source: ErrorKind::ConnectionAborted.into() }
}
