//! Faults, and what they do. Each one ends: then what it stopped or ended is as before.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::sleep;

use crate::orders::Wish;
use crate::world::World;

#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    Worker {
        worker: usize,
        what: WorkerFault,
        time: Duration,
    },
    /// What an operator wants for a time.
    Ordered {
        wish: Wish,
        time: Duration,
    },
    /// The coordinator of a place, or whoever leads.
    Coordinator {
        place: Option<usize>,
        what: CoordinatorFault,
        time: Duration,
    },
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum WorkerFault {
    /// Its process ends, and its connections with it. So does one that leaves of its own accord.
    Killed,
    /// Its machine is gone: nobody is told.
    Vanished,
    /// It computes and loads no further, but says that it lives, until the coordinator sends it away. Then its process is started again.
    Hung,
    /// Its process is stopped, and goes on later.
    Stopped,
    /// Its steps take so many times as long.
    Slow(u32),
    /// Its connection with the coordinator breaks.
    Cut,
    /// Nothing passes between it and coordinators.
    Silenced,
    /// Its outputs are held up.
    Congested,
    /// Outputs of the epoch before come between its own.
    Echoes,
    /// The next load fails, and its process ends.
    FailsToLoad,
    /// The next step fails.
    FailsInStep,
    /// It says in the next step that it lost another rank.
    Accuses,
    /// Another rank gets something from it in the next step that cannot be right, and says so.
    Garbles,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum CoordinatorFault {
    /// Its process ends without a word.
    Killed,
    /// It resigns and ends.
    Stopped,
    /// The registry ends its lease, and tells it.
    LeaseLost,
    /// It does not reach the registry.
    RegistryAway,
    /// The registry answers nobody.
    RegistryAwayForAll,
}

impl Fault {
    /// Happens, from its beginning to its end.
    pub(crate) async fn happen(self, world: &Arc<World>) {
        world.journal.note(format_args!("{self:?}"));
        match self {
            Self::Worker { worker, what, time } => what.happen(world, worker, time).await,
            Self::Ordered { wish, time } => wish.happen(world, time).await,
            Self::Coordinator { place, what, time } => {
                let place = place.filter(|place| *place < world.scenario.coordinators);
                if let Some(place) = place.or_else(|| world.coordinators.leader()) {
                    what.happen(world, place, time).await;
                }
            }
        }
    }
}

impl WorkerFault {
    async fn happen(self, world: &Arc<World>, worker: usize, time: Duration) {
        let Some(control) = world.control(worker) else { return };
        let address = World::address(worker);
        world.journal.suspect(&address);
        let fails = match self {
            Self::Killed => {
                world.kill(worker);
                sleep(time).await;
                return world.start(worker);
            }
            Self::Vanished => {
                control.vanished.store(true, Ordering::Relaxed);
                world.network.silence(&address);
                world.kill(worker);
                sleep(time).await;
                world.network.cut(&address);
                world.network.heal(&address);
                return world.start(worker);
            }
            Self::Hung => {
                control.hung.shut(true);
                return world.start_when_given_up(worker, control);
            }
            Self::Stopped => {
                control.stopped.shut(true);
                sleep(time).await;
                return control.stopped.shut(false);
            }
            Self::Slow(times) => {
                control.slowness.store(times, Ordering::Relaxed);
                sleep(time).await;
                return control.slowness.store(1, Ordering::Relaxed);
            }
            Self::Cut => return world.network.cut(&address),
            Self::Silenced => {
                world.network.silence(&address);
                sleep(time).await;
                return world.network.heal(&address);
            }
            Self::Congested => {
                world.network.congest(&address, true);
                sleep(time).await;
                return world.network.congest(&address, false);
            }
            Self::FailsToLoad => &control.fails_load,
            Self::FailsInStep => &control.fails_step,
            Self::Echoes => &control.echoes,
            Self::Accuses => &control.accuses,
            Self::Garbles => &control.garbles,
        };
        fails.store(true, Ordering::Relaxed);
        sleep(time).await;
        fails.store(false, Ordering::Relaxed);
    }
}

impl CoordinatorFault {
    async fn happen(self, world: &World, place: usize, time: Duration) {
        let Some(site) = world.coordinators.at(place) else { return };
        match self {
            Self::Killed => {
                world.coordinators.kill(place);
                sleep(time).await;
                world.coordinators.start(place).await;
            }
            Self::Stopped => {
                world.coordinators.stop(place).await;
                sleep(time).await;
                world.coordinators.start(place).await;
            }
            Self::LeaseLost => site.lose_lease(),
            Self::RegistryAway => site.lose_registry(time).await,
            Self::RegistryAwayForAll => {
                let sites = world.coordinators.alive();
                let all: Vec<_> = sites
                    .into_iter()
                    .map(|site| tokio::spawn(async move { site.miss_registry(time).await }))
                    .collect();
                for one in all {
                    let _ = one.await;
                }
            }
        }
    }
}
