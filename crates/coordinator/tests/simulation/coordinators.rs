//! Processes of coordinators: started, stopped, killed, and cut off from the registry.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cluster::registry::election::{Addresses, Candidate, Election};
use cluster::registry::orders::OrderBook;
use cluster::registry::{MemoryRegistry, Registry};
use coordinator::{Contender, CoordinatorConfig};
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::journal::Journal;
use crate::network::Network;
use crate::reach::Reach;
use crate::worker::line::Directory;

/// A process that is not heard of loses its lease after this.
const TTL: Duration = Duration::from_secs(5);

/// One process.
pub(crate) struct Site {
    pub(crate) name: String,
    pub(crate) contender: Contender,
    /// It is gone: whoever talks to it hears nothing more.
    pub(crate) dead: CancellationToken,
    /// Something happened for which it may lose the lead.
    pub(crate) may_lose_lead: AtomicBool,
    reach: Reach,
    stop: CancellationToken,
    task: Mutex<Option<JoinHandle<()>>>,
}

/// All of them. Clones are the same.
#[derive(Clone)]
pub(crate) struct Coordinators(Arc<Inner>);

struct Inner {
    config: CoordinatorConfig,
    registry: MemoryRegistry,
    network: Network,
    journal: Journal,
    directory: Directory,
    /// By place; a process that is started again has the place of the one before.
    sites: Mutex<Vec<Option<Arc<Site>>>>,
    started: AtomicU64,
}

impl Coordinators {
    pub(crate) fn new(
        config: CoordinatorConfig,
        places: usize,
        registry: MemoryRegistry,
        network: Network,
        journal: Journal,
        directory: Directory,
    ) -> Self {
        let (sites, started) = (Mutex::new(vec![None; places]), AtomicU64::new(0));
        Self(Arc::new(Inner { config, registry, network, journal, directory, sites, started }))
    }

    /// Starts the process of a place, unless it runs.
    pub(crate) async fn start(&self, place: usize) {
        if self.sites()[place].is_some() {
            return;
        }
        let number = self.0.started.fetch_add(1, Ordering::Relaxed);
        let name = format!("coordinator{place}-{number}");
        let reach = Reach::new(&self.0.registry);
        let Ok(election) = Election::watch(&reach).await else { return };
        let addresses = Addresses { clients: name.clone(), workers: name.clone() };
        let registry: Arc<dyn Registry> = Arc::new(reach.clone());
        let book = OrderBook::new(registry.clone());
        let candidate = Candidate::new(registry, addresses, TTL);
        let stop = CancellationToken::new();
        let (contender, service, task) =
            Contender::start(self.0.config.clone(), candidate, election, book, stop.clone());
        self.0.network.listen(&name, service.into_server());
        self.0.journal.note(format_args!("{name} starts"));
        let (dead, may_lose_lead) = (CancellationToken::new(), AtomicBool::new(false));
        let task = Mutex::new(Some(task));
        let site = Site { name, contender, dead, may_lose_lead, reach, stop, task };
        self.sites()[place] = Some(Arc::new(site));
    }

    /// The place of whoever leads, as the registry has it.
    pub(crate) fn leader(&self) -> Option<usize> {
        let leader = self.0.directory.leader()?.addresses.clients;
        self.sites().iter().position(|site| site.as_ref().is_some_and(|site| site.name == leader))
    }

    /// All that run.
    pub(crate) fn alive(&self) -> Vec<Arc<Site>> {
        self.sites().iter().flatten().cloned().collect()
    }

    /// The process of a place.
    pub(crate) fn at(&self, place: usize) -> Option<Arc<Site>> {
        self.sites()[place].clone()
    }

    /// Ends a process without a word. What is left of it reaches nobody.
    pub(crate) fn kill(&self, place: usize) {
        let Some(site) = self.sites()[place].take() else { return };
        site.may_lose_lead.store(true, Ordering::Relaxed);
        site.dead.cancel();
        site.reach.set_away(true);
        self.0.network.close(&site.name);
        tokio::spawn(async move {
            sleep(TTL).await;
            site.reach.expire();
        });
    }

    /// Has a process end as it is meant to: it resigns, and its workers and clients are told.
    pub(crate) async fn stop(&self, place: usize) {
        let Some(site) = self.sites()[place].take() else { return };
        site.may_lose_lead.store(true, Ordering::Relaxed);
        site.stop.cancel();
        let task = site.task.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(task) = task
            && task.await.is_err()
        {
            self.0.journal.violation(format_args!("{} panicked", site.name));
        }
        // Its last words are on their way.
        sleep(Duration::from_millis(100)).await;
        self.0.network.close(&site.name);
        site.dead.cancel();
    }

    fn sites(&self) -> MutexGuard<'_, Vec<Option<Arc<Site>>>> {
        self.0.sites.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Site {
    /// The registry says that the lease has ended, though the process lives and reaches it.
    pub(crate) fn lose_lease(&self) {
        if self.reach.is_away() {
            // It cannot take its place again.
            self.may_lose_lead.store(true, Ordering::Relaxed);
        }
        self.reach.expire();
    }

    /// The registry is out of reach for so long; the lease ends if that is too long.
    pub(crate) async fn lose_registry(&self, time: Duration) {
        self.reach.set_away(true);
        sleep(time.min(TTL)).await;
        if time > TTL {
            self.may_lose_lead.store(true, Ordering::Relaxed);
            self.reach.expire();
            sleep(time - TTL).await;
        }
        if !self.dead.is_cancelled() {
            self.reach.set_away(false);
        }
    }

    /// The registry answers nobody for so long, and ends no lease.
    pub(crate) async fn miss_registry(&self, time: Duration) {
        self.reach.set_away(true);
        sleep(time).await;
        if !self.dead.is_cancelled() {
            self.reach.set_away(false);
        }
    }
}
