//! Examinations by a coordinator with fake workers over real gRPC: who is asked for what, and who is named.

use std::time::Duration;

use auth::Secret;
use client::DoctorReport;
use cluster::ModelReport;
use cluster::doctor::{Bandwidth, Examine, Facts, Findings, Link};
use coordinator::{Engine, State};

use crate::fake::{Fake, Running, report};
use crate::harness::Cluster;

const GB: u64 = 1_000_000_000;

impl Cluster {
    /// Where nobody is lost because the machine is busy.
    async fn patient(ranks: usize) -> Self {
        Self::start(ranks, |config| config.heartbeat_timeout = Duration::from_secs(60)).await
    }

    /// A worker on a machine of its own, whose links are well.
    fn healthy(&self, port: u16) -> Fake {
        let boot = format!("boot {port}");
        // More than there are workers: most of these clusters wait for a group that never forms.
        let report = ModelReport { units: 16, ..report() };
        Fake {
            report,
            facts: Facts { program: "1.0".into(), boot, ..Facts::default() },
            probe_address: format!("127.0.0.1:{}", port + 1000),
            finds: Some(|examine| findings(examine, |_| {})),
            ..self.fake(port)
        }
    }

    /// Starts workers and waits until they have joined.
    async fn join(&self, fakes: Vec<Fake>) -> Vec<Running> {
        let mut wanted: Vec<_> = fakes.iter().map(|fake| fake.address.clone()).collect();
        wanted.sort();
        let running = fakes.into_iter().map(|fake| fake.start(self.address)).collect();
        loop {
            let status = self.handle.status().await.expect("it runs");
            let ranks = status.groups.into_iter().flat_map(|group| group.ranks);
            let workers = ranks.filter_map(|rank| rank.worker).chain(status.spares);
            let mut joined: Vec<_> = workers.map(|worker| worker.address).collect();
            joined.sort();
            if joined == wanted {
                return running;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn examine(&self, disturb: bool) -> DoctorReport {
        client::examine(&self.address.to_string(), &self.secret, disturb).await.expect("a report")
    }
}

fn address(port: u16) -> String {
    format!("127.0.0.1:{port}")
}

/// Links that are well, but for what `change` does to those to the peer at an address.
fn findings(examine: Examine, change: impl Fn((&str, &mut Link))) -> Findings {
    let link = |address: &str| {
        let bandwidth = examine.bandwidth.then_some(Bandwidth { there: GB, back: GB });
        let mut link = Link { latency: Duration::from_micros(100), clock_offset_micros: 0, bandwidth };
        change((address, &mut link));
        link
    };
    let links = examine.peers.iter().map(|peer| (peer.worker, Ok(link(&peer.address)))).collect();
    let program_hash = if examine.program { "abc".into() } else { String::new() };
    Findings { number: examine.number, links, program_hash, disk: None }
}

#[tokio::test]
async fn a_healthy_cluster_has_no_complaints() {
    let cluster = Cluster::patient(9).await;
    let _workers = cluster.join((1..6).map(|port| cluster.healthy(port)).collect()).await;
    let report = cluster.examine(false).await;
    assert_eq!(report.complaints, []);
    assert_eq!(report.remarks, Vec::<String>::new());
    assert_eq!((report.workers.len(), report.links.len()), (5, 10));
    assert!(report.workers.iter().all(|worker| worker.program_hash == "abc"), "{report:?}");
    let carries = |link: &client::ExaminedLink| link.measures.is_some_and(|m| m.bandwidth_there == GB);
    assert!(report.links.iter().all(carries), "{report:?}");
}

#[tokio::test]
async fn the_culprit_is_named() {
    let cluster = Cluster::patient(9).await;
    let mut fakes: Vec<_> = (1..5).map(|port| cluster.healthy(port)).collect();
    // All measure that those from and to the second are slow.
    fakes.iter_mut().for_each(|fake| {
        fake.finds = Some(|examine| {
            findings(examine, |(address, link)| {
                if address == "127.0.0.1:1002" {
                    link.bandwidth = link.bandwidth.map(|_| Bandwidth { there: GB / 100, back: GB });
                }
            })
        });
    });
    fakes[1].finds = Some(|examine| {
        findings(examine, |(_, link)| {
            link.bandwidth = link.bandwidth.map(|_| Bandwidth { there: GB, back: GB / 100 });
        })
    });
    fakes[2].facts.program = "0.9".into();
    let _workers = cluster.join(fakes).await;
    let report = cluster.examine(false).await;
    let [version, slow] = &report.complaints[..] else { panic!("{report:?}") };
    assert_eq!(
        (version.workers.clone(), version.what.as_str()),
        (vec![address(3)], "version 0.9, most others have 1.0")
    );
    assert_eq!(slow.workers, [address(2)]);
    assert!(slow.what.ends_with("10 MB/s, usual is 1000 MB/s"), "{slow:?}");
}

#[tokio::test]
async fn who_cannot_be_reached_is_named_though_it_reaches_others() {
    let cluster = Cluster::patient(9).await;
    let mut fakes: Vec<_> = (1..5).map(|port| cluster.healthy(port)).collect();
    fakes.iter_mut().for_each(|fake| {
        fake.finds = Some(|examine| {
            let peers = examine.peers.clone();
            let mut findings = findings(examine, |_| {});
            for (peer, (_, probed)) in peers.iter().zip(&mut findings.links) {
                if peer.address == "127.0.0.1:1002" {
                    *probed = Err("it does not answer".into());
                }
            }
            findings
        });
    });
    let _workers = cluster.join(fakes).await;
    let report = cluster.examine(false).await;
    let [complaint] = &report.complaints[..] else { panic!("{report:?}") };
    assert_eq!(complaint.workers, [address(2)]);
    assert!(complaint.what.ends_with(": it does not answer"), "{complaint:?}");
    let failed = report.links.iter().filter(|link| !link.failure.is_empty());
    assert_eq!((report.links.len(), failed.count()), (6, 3));
}

#[tokio::test]
async fn who_does_not_answer_is_named_and_holds_up_nobody() {
    let cluster = Cluster::patient(9).await;
    let silent = Fake { finds: None, ..cluster.healthy(1) };
    // What is answered to no question, or to an earlier one, is not listened to.
    let confused: fn(Examine) -> Findings =
        |examine| findings(Examine { number: examine.number + 7, ..examine }, |_| {});
    let confused = Fake { finds: Some(confused), ..cluster.healthy(2) };
    let _workers = cluster.join(vec![silent, confused, cluster.healthy(3), cluster.healthy(4)]).await;
    let report = tokio::time::timeout(Duration::from_secs(60), cluster.examine(false)).await.expect("an end");
    let [complaint] = &report.complaints[..] else { panic!("{report:?}") };
    let mut named = complaint.workers.clone();
    named.sort();
    assert_eq!(named, [address(1), address(2)]);
    assert!(complaint.what.starts_with("no answer to the coordinator"), "{complaint:?}");
}

#[tokio::test]
async fn a_group_is_looked_over_when_it_is_formed_and_not_disturbed() {
    let cluster = Cluster::patient(3).await;
    let mut fakes: Vec<_> = (1..4).map(|port| cluster.healthy(port)).collect();
    fakes[0].facts.program = "0.9".into();
    let _workers = cluster.join(fakes).await;
    let serving = |state: &State| matches!(state, State::Serving(_));
    cluster.handle.state().wait_for(serving).await.expect("it serves");
    let status = cluster.handle.status().await.expect("it runs");
    let expected =
        format!("worker {}: version 0.9, most others have 1.0 (run the same build everywhere)", address(1));
    assert_eq!(status.complaints, [expected]);

    let report = cluster.examine(false).await;
    assert!(report.remarks[0].starts_with("a group works"), "{report:?}");
    let carried = |report: &DoctorReport| {
        report.links.iter().filter(|link| link.measures.is_some_and(|m| m.bandwidth_there > 0)).count()
    };
    assert_eq!((report.links.len(), carried(&report)), (3, 0));
    assert_eq!(carried(&cluster.examine(true).await), 3);
}

#[tokio::test]
async fn strangers_examine_nobody() {
    let cluster = Cluster::patient(3).await;
    let error = client::examine(&cluster.address.to_string(), &Secret::random(), false).await;
    assert!(matches!(error, Err(client::Error::Secret(_))), "{error:?}");
}

#[tokio::test]
async fn there_may_be_nobody_to_examine() {
    let cluster = Cluster::patient(3).await;
    assert_eq!(cluster.examine(true).await, DoctorReport::default());
    // Of workers that tell nothing, nothing is said.
    let _workers = cluster.join(vec![cluster.fake(1)]).await;
    let alone = Fake { finds: Some(|examine| findings(examine, |_| {})), ..cluster.fake(2) };
    drop(_workers);
    let _workers = cluster.join(vec![alone]).await;
    let report = cluster.examine(true).await;
    assert_eq!((report.workers.len(), report.links.len()), (1, 0));
    assert_eq!(report.complaints, []);
    assert_eq!(report.remarks, ["1 workers do not answer probes"]);
}
