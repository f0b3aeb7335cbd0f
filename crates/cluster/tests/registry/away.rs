//! etcd that is away: stopped, restarted, or cut off from one of its clients.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use cluster::registry::election::Election;
use cluster::registry::{EtcdOptions, EtcdRegistry, Health, RegistryError, Snapshot, Transaction};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::elections::{candidate, elected, led_by};
use crate::entries::put;
use crate::stage::{EtcdStage, LIMIT, Stage, TTL, connect, name, texts, until};

/// A way to etcd that can be cut.
struct Way {
    url: String,
    open: watch::Sender<bool>,
}

impl Way {
    async fn to(url: &str) -> Self {
        let etcd: SocketAddr = url.trim_start_matches("http://").parse().expect("an address");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let open = watch::Sender::new(true);
        let mut passage = open.subscribe();
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                if !*passage.borrow_and_update() {
                    continue;
                }
                let mut passage = passage.clone();
                tokio::spawn(async move {
                    let Ok(mut etcd) = TcpStream::connect(etcd).await else { return };
                    tokio::select! {
                        _ = copy_bidirectional(&mut client, &mut etcd) => {}
                        _ = passage.changed() => {}
                    }
                });
            }
        });
        Self { url, open }
    }
}

fn is_away(health: &Health) -> bool {
    matches!(health, Health::Away(_))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn operations_fail_in_time_and_health_tells() {
    let Some(stage) = EtcdStage::start() else { return };
    let registry = stage.registry("first").await;
    let mut health = registry.health();
    stage.0.lock().expect("no panic").pause();
    let begun = Instant::now();
    let error = registry.transact(Transaction::default().delete("a")).await.expect_err("it is stopped");
    let RegistryError::Away(reason) = &error else { panic!("{error:?}") };
    assert!(reason.contains(&stage.url()) && reason.contains("no answer within 3s"), "{reason}");
    assert!(matches!(registry.lease(TTL).await, Err(RegistryError::Away(_))));
    assert!(matches!(registry.watch("").await, Err(RegistryError::Away(_))));
    assert!(begun.elapsed() < Duration::from_secs(20), "bounded");
    until(&mut health, is_away).await;
    let options = EtcdOptions { endpoints: vec![stage.url()], ..EtcdOptions::default() };
    let refused = EtcdRegistry::connect(&options, &name("first")).await.expect_err("it is stopped");
    assert!(matches!(refused, RegistryError::Away(_)), "{refused}");

    stage.0.lock().expect("no panic").resume();
    let answered = async {
        while registry.transact(Transaction::default().delete("a")).await.is_err() {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(LIMIT, answered).await.expect("it answers again");
    until(&mut health, |health| !is_away(health)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_that_was_cut_resumes_with_a_full_snapshot() {
    let Some(stage) = EtcdStage::start() else { return };
    let way = Way::to(&stage.url()).await;
    let (near, far) = (stage.registry("first").await, connect(&way.url, "first").await);
    put(near.as_ref(), "a", "1").await;
    put(near.as_ref(), "b", "2").await;
    let mut watch = far.watch("").await.expect("it answers");
    let mut health = far.health();
    way.open.send_replace(false);
    until(&mut health, is_away).await;

    // So much happens meanwhile that etcd forgets how it was when the watch was cut.
    near.transact(Transaction::default().delete("a")).await.expect("it answers");
    let last = put(near.as_ref(), "c", "3").await;
    let compacted = i64::try_from(last.0).expect("a revision");
    stage.client().await.compact(compacted, None).await.expect("it is compacted");
    sleep(Duration::from_millis(200)).await;
    assert_eq!(texts(&watch.borrow()), [("a", "1"), ("b", "2")], "what was known is still known");

    way.open.send_replace(true);
    let full = |snapshot: &Snapshot| texts(snapshot) == [("b", "2"), ("c", "3")];
    assert!(until(&mut watch, full).await.revision >= last);
    until(&mut health, |health| !is_away(health)).await;
    // And goes on.
    put(near.as_ref(), "d", "4").await;
    until(&mut watch, |snapshot| snapshot.entries.contains_key("d")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_that_was_lost_meanwhile_is_told_afterwards() {
    let Some(stage) = EtcdStage::start() else { return };
    let way = Way::to(&stage.url()).await;
    let (near, far) = (stage.registry("first").await, connect(&way.url, "first").await);
    let lease = far.lease(TTL).await.expect("it answers");
    far.transact(Transaction::default().put("a", vec![], Some(lease.id()))).await.expect("it answers");
    let mut watch = near.watch("").await.expect("it answers");
    way.open.send_replace(false);
    until(&mut watch, |snapshot| snapshot.entries.is_empty()).await;
    assert!(timeout(Duration::ZERO, lease.lost()).await.is_err(), "nobody has told its holder");
    way.open.send_replace(true);
    timeout(LIMIT, lease.lost()).await.expect("now somebody has");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_cut_off_is_superseded_and_hears_of_it() {
    let Some(stage) = EtcdStage::start() else { return };
    let way = Way::to(&stage.url()).await;
    let (near, far) = (stage.registry("first").await, connect(&way.url, "first").await);
    let old = elected(&candidate(&far, 1)).await;
    let mut election = Election::watch(near.as_ref()).await.expect("it answers");
    led_by(&mut election, 1).await;
    way.open.send_replace(false);
    let new = elected(&candidate(&near, 2)).await;
    assert!(new.term() > old.term());
    assert!(!old.over().is_cancelled(), "as long as it can't know, it goes on");
    way.open.send_replace(true);
    timeout(LIMIT, old.over().cancelled()).await.expect("it is told");
    assert_eq!(led_by(&mut election, 2).await, new.term());
    assert!(!new.over().is_cancelled());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_dies_is_followed_after_its_lease() {
    let Some(stage) = EtcdStage::start() else { return };
    let url = stage.url();
    let dying = std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let term = runtime.block_on(async {
            let leadership = elected(&candidate(&connect(&url, "first").await, 1)).await;
            let term = leadership.term();
            std::mem::forget(leadership);
            term
        });
        // All that keeps the lease ends here, and nothing takes it back.
        runtime.shutdown_background();
        term
    });
    let term = tokio::task::spawn_blocking(|| dying.join().expect("no panic")).await.expect("no panic");
    let begun = Instant::now();
    let next = elected(&candidate(&stage.registry("first").await, 2)).await;
    assert!(next.term() > term);
    assert!(begun.elapsed() > TTL / 2, "it might have lived");
}

/// An etcd that stumbles, or is started anew, changes no leader.
async fn leads_on(stage: &EtcdStage, away: impl AsyncFnOnce()) {
    let (one, two) = (stage.registry("first").await, stage.registry("first").await);
    let leadership = elected(&candidate(&one, 1)).await;
    let standby = candidate(&two, 2);
    let waiting = tokio::spawn(async move { elected(&standby).await });
    away().await;
    // Both have heard of it again …
    for registry in [&one, &two] {
        until(&mut registry.health(), |health| !is_away(health)).await;
    }
    // … and the lead is where it was, also after the time in which it could have changed.
    sleep(TTL * 2).await;
    let mut election = Election::watch(two.as_ref()).await.expect("it answers");
    assert_eq!(led_by(&mut election, 1).await, leadership.term());
    assert!(!leadership.over().is_cancelled() && !waiting.is_finished());
    // Nothing was lost of what makes elections work.
    let term = leadership.term();
    leadership.resign().await;
    assert!(timeout(LIMIT, waiting).await.expect("in time").expect("no panic").term() > term);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_that_is_restarted_changes_no_leader() {
    let Some(stage) = EtcdStage::start() else { return };
    leads_on(&stage, async || {
        stage.0.lock().expect("no panic").kill();
        sleep(TTL * 2).await;
        tokio::task::block_in_place(|| stage.0.lock().expect("no panic").restart());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_that_is_stopped_for_a_while_changes_no_leader() {
    let Some(stage) = EtcdStage::start() else { return };
    leads_on(&stage, async || {
        stage.0.lock().expect("no panic").pause();
        sleep(TTL * 5).await;
        stage.0.lock().expect("no panic").resume();
    })
    .await;
}
