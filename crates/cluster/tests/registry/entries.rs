//! Entries, watches, transactions, leases and workers.

use std::collections::BTreeMap;
use std::time::Duration;

use cluster::Order;
use cluster::registry::members::{Members, Registration, WorkerEntry};
use cluster::registry::orders::{OrderBook, StandingOrders};
use cluster::registry::{Health, Listing, Registry, RegistryError, Revision, Snapshot, Transaction};
use tokio::time::timeout;

use crate::stage::{LIMIT, Stage, TTL, texts, until};

pub(crate) async fn put(registry: &dyn Registry, key: &str, value: &str) -> Revision {
    let transaction = Transaction::default().put(key, value.into(), None);
    registry.transact(transaction).await.expect("it answers").expect("no condition")
}

pub(crate) async fn watches_deliver_whole_snapshots(stage: &impl Stage) {
    let registry = stage.registry("first").await;
    assert_eq!(*registry.health().borrow(), Health::Answers);
    put(registry.as_ref(), "a/1", "one").await;
    let mut watch = registry.watch("a/").await.expect("it answers");
    assert_eq!(texts(&watch.borrow_and_update()), [("a/1", "one")]);

    // Whoever does not look misses what is between, and never the latest.
    put(registry.as_ref(), "b/1", "of no interest").await;
    put(registry.as_ref(), "a/2", "two").await;
    put(registry.as_ref(), "a/1", "three").await;
    let both = Transaction::default().delete("a/1").put("a/3", "four".into(), None);
    let last = registry.transact(both).await.expect("it answers").expect("no condition");
    let complete = |snapshot: &Snapshot| texts(snapshot) == [("a/2", "two"), ("a/3", "four")];
    let snapshot = until(&mut watch, complete).await;
    assert_eq!(snapshot.entries["a/3"].revision, last);
    assert!(snapshot.revision >= last && snapshot.entries["a/2"].revision < last);
    // A later watch, over another connection, sees the same at once.
    let other = stage.registry("first").await.watch("a/").await.expect("it answers");
    assert_eq!(other.borrow().entries, snapshot.entries);
    let all = registry.watch("").await.expect("it answers");
    assert_eq!(all.borrow().entries.len(), 3);
    let none = registry.watch("c/").await.expect("it answers");
    assert_eq!(none.borrow().entries, BTreeMap::new());
}

pub(crate) async fn transactions_are_made_wholly_or_not_at_all(stage: &impl Stage) {
    let registry = stage.registry("first").await;
    let absent = Revision(0);
    let first = Transaction::default().if_unchanged("a", absent).put("a", "1".into(), None);
    let one = registry.transact(first.clone()).await.expect("it answers").expect("it was not there");
    assert_eq!(registry.transact(first).await, Ok(None));
    let two = put(registry.as_ref(), "b", "2").await;
    assert!(two > one);

    let swap = Transaction::default().delete("a").put("b", "3".into(), None).put("c", "4".into(), None);
    for (a, b) in [(two, two), (one, one), (absent, two), (one, absent)] {
        let swap = swap.clone().if_unchanged("a", a).if_unchanged("b", b);
        assert_eq!(registry.transact(swap).await, Ok(None));
    }
    let watch = registry.watch("").await.expect("it answers");
    assert_eq!(texts(&watch.borrow()), [("a", "1"), ("b", "2")]);
    let swap = swap.if_unchanged("a", one).if_unchanged("b", two).if_unchanged("c", absent);
    let three = registry.transact(swap).await.expect("it answers").expect("nothing has changed");
    let after = registry.watch("").await.expect("it answers");
    assert_eq!(texts(&after.borrow()), [("b", "3"), ("c", "4")]);
    assert!(after.borrow().entries.values().all(|entry| entry.revision == three));
}

pub(crate) async fn one_of_many_that_compare_and_set_wins(stage: &impl Stage) {
    const TASKS: usize = 6;
    const ROUNDS: usize = 10;
    let mut tasks = Vec::new();
    for _ in 0..TASKS {
        let registry = stage.registry("first").await;
        tasks.push(tokio::spawn(async move {
            let mut watch = registry.watch("counter").await.expect("it answers");
            for _ in 0..ROUNDS {
                loop {
                    let entry = watch.borrow_and_update().entries.get("counter").cloned();
                    let (count, revision) = entry.map_or((0, Revision(0)), |entry| {
                        let text = String::from_utf8(entry.value).expect("digits");
                        (text.parse::<usize>().expect("a number"), entry.revision)
                    });
                    let next = (count + 1).to_string().into_bytes();
                    let add =
                        Transaction::default().if_unchanged("counter", revision).put("counter", next, None);
                    let made = registry.transact(add).await.expect("it answers");
                    watch.changed().await.expect("the watch goes on");
                    if made.is_some() {
                        break;
                    }
                }
            }
        }));
    }
    for task in tasks {
        timeout(LIMIT, task).await.expect("in time").expect("no panic");
    }
    let watch = stage.registry("first").await.watch("counter").await.expect("it answers");
    assert_eq!(texts(&watch.borrow()), [("counter", (TASKS * ROUNDS).to_string().as_str())]);
}

pub(crate) async fn entries_end_with_their_lease(stage: &impl Stage) {
    let registry = stage.registry("first").await;
    let mut watch = registry.watch("").await.expect("it answers");
    put(registry.as_ref(), "for good", "0").await;
    let [first, second, third] = [
        registry.lease(TTL).await.expect("it answers"),
        registry.lease(TTL).await.expect("it answers"),
        registry.lease(TTL).await.expect("it answers"),
    ];
    for (key, lease) in [("a", &first), ("b", &second), ("c", &third)] {
        let put = Transaction::default().put(key, vec![], Some(lease.id()));
        registry.transact(put).await.expect("it answers");
    }
    let snapshot = until(&mut watch, |snapshot| snapshot.entries.len() == 4).await;
    assert_eq!(snapshot.entries["a"].lease, Some(first.id()));
    assert_eq!(snapshot.entries["for good"].lease, None);

    // Kept for as long as it is held …
    tokio::time::sleep(TTL * 2).await;
    assert!(timeout(Duration::ZERO, first.lost()).await.is_err(), "it was kept");
    assert_eq!(watch.borrow().entries.len(), 4);
    // … ended by its holder, with or without waiting …
    first.end().await;
    until(&mut watch, |snapshot| !snapshot.entries.contains_key("a")).await;
    drop(second);
    until(&mut watch, |snapshot| !snapshot.entries.contains_key("b")).await;
    // … or lost, which is told.
    stage.expire(third.id()).await;
    timeout(LIMIT, third.lost()).await.expect("it is told");
    until(&mut watch, |snapshot| snapshot.entries.len() == 1).await;
    let late = Transaction::default().put("c", vec![], Some(third.id()));
    assert_eq!(registry.transact(late).await, Err(RegistryError::LeaseLost));
}

pub(crate) async fn clusters_stay_apart(stage: &impl Stage) {
    let (first, second) = (stage.registry("yi").await, stage.registry("yi.2").await);
    put(first.as_ref(), "a", "1").await;
    put(second.as_ref(), "b", "2").await;
    let conditional = Transaction::default().if_unchanged("a", Revision(0)).put("a", "3".into(), None);
    second.transact(conditional).await.expect("it answers").expect("another cluster's key is not there");
    let watch = first.watch("").await.expect("it answers");
    assert_eq!(texts(&watch.borrow()), [("a", "1")]);
    let watch = second.watch("").await.expect("it answers");
    assert_eq!(texts(&watch.borrow()), [("a", "3"), ("b", "2")]);
}

pub(crate) async fn workers_are_listed_and_rubbish_is_told(stage: &impl Stage) {
    let registry = stage.registry("first").await;
    let worker = |port: u16| WorkerEntry {
        host: "here".into(),
        collective_address: format!("127.0.0.1:{port}"),
        model: "yi".into(),
        fingerprint: "yi/bf16".into(),
    };
    let mut members = Members::watch(registry.as_ref()).await.expect("it answers");
    let mut listing = async |wanted: &[u16], rubbish: &[&str]| {
        let there = async {
            loop {
                let Listing { found, rubbish: odd } = members.now();
                let mut workers: Vec<_> = found.into_values().collect();
                workers.sort_by(|a, b| a.collective_address.cmp(&b.collective_address));
                if workers == wanted.iter().map(|port| worker(*port)).collect::<Vec<_>>()
                    && odd.keys().eq(rubbish.iter().copied())
                {
                    return odd;
                }
                members.changed().await;
            }
        };
        timeout(LIMIT, there).await.expect("in time")
    };
    listing(&[], &[]).await;
    let first = Registration::new(registry.clone(), worker(1), TTL);
    let second = Registration::new(registry.clone(), worker(2), TTL);
    listing(&[1, 2], &[]).await;
    first.end().await;
    listing(&[2], &[]).await;

    let huge = format!("{{\"host\": \"{}\"}}", "a".repeat(70_000));
    for (key, value) in [("a", "not JSON"), ("b", "{\"host\": 7}"), ("c", huge.as_str()), ("d", "")] {
        put(registry.as_ref(), &format!("workers/{key}"), value).await;
    }
    let reasons = listing(&[2], &["workers/a", "workers/b", "workers/c", "workers/d"]).await;
    assert!(reasons["workers/b"].contains("invalid type"), "{reasons:?}");
    assert!(reasons["workers/c"].contains("at most 65536 are read"), "{reasons:?}");

    // A worker whose lease was lost is back by itself.
    let entries = registry.watch("workers/").await.expect("it answers");
    let lease = entries.borrow().entries.values().find_map(|entry| entry.lease).expect("the second's");
    stage.expire(lease).await;
    let mut entries = entries;
    until(&mut entries, |snapshot| {
        snapshot.entries.values().any(|entry| entry.lease.is_some_and(|other| other != lease))
    })
    .await;
    drop(second);
    listing(&[], &["workers/a", "workers/b", "workers/c", "workers/d"]).await;
}

pub(crate) async fn orders_stand_until_they_are_replaced(stage: &impl Stage) {
    let book = OrderBook::new(stage.registry("first").await);
    assert_eq!(book.read().await, Ok(StandingOrders::default()));
    let mut orders = StandingOrders::default();
    orders.add(Order::Drain { address: "host1:1".into() });
    orders.add(Order::Scale { shape: None, replicas: Some(2) });
    book.write(&orders).await.expect("it answers");
    // Whoever asks, over whatever connection, at once; but not in another cluster.
    let other = OrderBook::new(stage.registry("first").await);
    assert_eq!(other.read().await, Ok(orders.clone()));
    assert_eq!(OrderBook::new(stage.registry("second").await).read().await, Ok(StandingOrders::default()));
    orders.add(Order::Restore { address: "host1:1".into() });
    other.write(&orders).await.expect("it answers");
    assert_eq!(book.read().await, Ok(orders.clone()));
    // What would not be read again is refused, and what stood stands.
    let mut many = orders.clone();
    (0..10_000).for_each(|n| many.add(Order::Drain { address: format!("host{n}:1") }));
    let error = book.write(&many).await.expect_err("too many").to_string();
    assert!(error.contains("10000 workers are drained"), "{error}");
    assert_eq!(book.read().await, Ok(orders));

    let registry = stage.registry("first").await;
    for rubbish in ["{", r#"{"replicas": 0}"#, r#"{"shape": {"Auto": {"max_stages": 99}}}"#] {
        put(registry.as_ref(), "orders", rubbish).await;
        assert_eq!(book.read().await, Ok(StandingOrders::default()), "{rubbish}");
    }
}
