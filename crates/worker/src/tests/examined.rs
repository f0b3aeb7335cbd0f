//! An examination while the worker computes.

use cluster::doctor::{Examine, Findings, Peer};

use super::*;

#[tokio::test]
async fn a_worker_is_examined_whatever_its_thread_does() {
    let mut scene = Scene::start(FakeLoad { stuck: true, ..FakeLoad::default() }).await;
    let secret = scene.secret.clone();
    let (mut wire, session) = scene.welcome().await;
    wire.assign(1).await;
    wire.ready(1).await;
    let steps = scene.attached(&session, 1).await;
    steps.plan(1, 1).await;
    wire.beat(|progress| progress.activity == Activity::Computing).await;

    let other = Examinee::of_test(&secret).await;
    let examine = Examine {
        number: 3,
        limit: Duration::from_secs(20),
        peers: vec![Peer { worker: WorkerId(8), address: other.probe_address.clone() }],
        bandwidth: true,
        program: false,
        disk: false,
    };
    wire.say(Down::Examine(examine.into())).await;
    let Up::Findings(findings) = wire.hear().await else { panic!("no findings") };
    let findings = Findings::try_from(findings).expect("findings");
    assert_eq!(findings.number, 3);
    let [(WorkerId(8), Ok(link))] = &findings.links[..] else { panic!("{findings:?}") };
    assert!(link.bandwidth.is_some_and(|bandwidth| bandwidth.least() > 0), "{link:?}");
}
