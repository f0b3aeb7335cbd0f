//! A pipeline whose ranks are threads of the test, and what a coordinator does for it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use comm::{Collective, StageLink};
use engine::{Event, Request, Scheduler, StepOutput, StepPlan, rank_ranges};
use kernels::Backend;
use model::{Executor, ModelExecutor, ModelOptions, ModelSource, Stage};

use crate::ranks::each_rank;

/// How long ranks wait for each other, and the test for them.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Ids and bits of log-probabilities.
pub type Answer = Vec<(u32, u32)>;

/// The layers and the number of ranks of every stage.
#[derive(Debug, Clone)]
pub struct Pipeline {
    /// In order.
    pub layers: Vec<Range<usize>>,
    /// Likewise.
    pub widths: Vec<usize>,
}

/// What a rank has before it loads.
pub struct Seat<P> {
    /// Ranks of its stage.
    pub width: usize,
    /// The stage's layers.
    pub layers: Range<usize>,
    /// What becomes the stage's collective, and the link between stages.
    pub place: P,
}

/// A rank's device, with what connects it.
pub type Joined<B, C> = (B, C, Box<dyn StageLink<<B as Backend>::Buffer>>);

impl Pipeline {
    /// The places of all ranks, stage after stage, of the links of each stage's ranks and what `group` gives a stage of so many.
    pub fn seats<P, L>(
        &self,
        links: Vec<Vec<L>>,
        mut group: impl FnMut(usize) -> Vec<P>,
    ) -> Vec<Seat<(P, L)>> {
        let stages = self.layers.iter().zip(&self.widths).zip(links);
        stages
            .flat_map(|((layers, &width), links)| {
                let places = group(width).into_iter().zip(links);
                places.map(move |place| Seat { width, layers: layers.clone(), place })
            })
            .collect()
    }
}

/// Loads every rank on a thread of its own and runs `body` there; returns what came of it, stage after stage.
pub fn on_seats<P: Send, B: Backend, C: Collective<B::Buffer>, R: Send>(
    dir: &Path,
    options: &ModelOptions,
    seats: Vec<Seat<P>>,
    join: impl Fn(P, &[Range<usize>]) -> Result<Joined<B, C>> + Sync,
    body: impl Fn(usize, &mut ModelExecutor<B, C>) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    each_rank(seats.into_iter().enumerate().collect(), |(index, Seat { width, layers, place })| {
        let source = ModelSource::open(dir, options.clone())?;
        let ranges = rank_ranges(source.config().shape.kv_heads, width)?;
        let (backend, collective, link) = join(place, &ranges)?;
        let stage = Stage { layers, link };
        body(index, &mut source.stage_executor(backend, stage, &ranges, collective)?)
    })
}

/// What came of requests.
#[derive(Debug, PartialEq, Eq)]
pub struct Served {
    /// One for each request.
    pub answers: Vec<Answer>,
    /// Steps in flight, at most.
    pub in_flight: usize,
}

/// Serves requests on ranks that take their seats by `join`. What a rank began and does not answer for, it waits for by `settle`.
pub fn serve<P: Send, B: Backend, C: Collective<B::Buffer>>(
    dir: &Path,
    options: &ModelOptions,
    seats: Vec<Seat<P>>,
    join: impl Fn(P, &[Range<usize>]) -> Result<Joined<B, C>> + Sync,
    settle: fn(&mut B) -> Result<()>,
    (scheduler, requests): (Scheduler, Vec<Request>),
) -> Result<Served> {
    let (senders, inboxes): (Vec<Sender<StepPlan>>, Vec<_>) = seats.iter().map(|_| channel()).unzip();
    let inboxes: Vec<_> = inboxes.into_iter().map(Mutex::new).collect();
    let (told, outputs) = channel();
    thread::scope(|scope| {
        let leader = scope.spawn(move || lead(scheduler, requests, &senders, &outputs));
        let ran = on_seats(dir, options, seats, join, |index, executor| {
            let inbox = inboxes[index].lock().expect("one thread");
            while let Ok(plan) = inbox.recv() {
                executor.launch(&plan)?;
                while !executor.is_ready()? {
                    thread::yield_now();
                }
                match executor.poll()? {
                    Some(output) => told.send(output)?,
                    None => settle(executor.backend_mut())?,
                }
            }
            Ok(())
        });
        // The leader hears of it if nobody answers any more. Why ranks ended says more than that they did.
        drop(told);
        ran?;
        leader.join().expect("no panic")
    })
}

/// Plans all that may be in flight, then waits for the oldest output.
fn lead(
    mut scheduler: Scheduler,
    requests: Vec<Request>,
    ranks: &[Sender<StepPlan>],
    outputs: &Receiver<StepOutput>,
) -> Result<Served> {
    let mut answers = BTreeMap::new();
    for request in requests {
        answers.insert(scheduler.submit(request)?, Answer::new());
    }
    let (mut in_flight, mut most) = (0, 0);
    loop {
        while let Some(plan) = scheduler.plan() {
            in_flight += 1;
            for rank in ranks {
                rank.send(plan.clone()).context("a rank has ended")?;
            }
        }
        most = most.max(in_flight);
        if in_flight == 0 {
            return Ok(Served { answers: answers.into_values().collect(), in_flight: most });
        }
        let output = outputs.recv_timeout(LIMIT).context("no output")?;
        in_flight -= 1;
        for event in scheduler.apply(&output)? {
            if let Event::Token { seq, id, logprob, .. } = event {
                answers.entry(seq).or_default().push((id, logprob.to_bits()));
            }
        }
    }
}
