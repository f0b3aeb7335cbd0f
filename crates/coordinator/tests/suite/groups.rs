//! Several groups: requests go where they are served best, and go on elsewhere when their group is lost.

use std::time::Duration;

use auth::Secret;
use cluster::{Order, Policy, Shape};
use coordinator::{Engine, EngineEvent, State, Submission};

use crate::fake::{Fake, Running, continuation, report};
use crate::harness::Cluster;

impl Cluster {
    /// Groups of one stage, of `ranks` ranks or fewer.
    async fn of_groups(replicas: usize, ranks: usize) -> Self {
        let shape = Shape::Fixed { stages: 1, ranks, min_ranks: 1 };
        Self::start(ranks, |config| {
            config.policy = Policy { shape, replicas, context: None };
            config.heartbeat_interval = Duration::from_millis(50);
            config.gather = Duration::from_millis(200);
        })
        .await
    }

    fn worker(&self, port: u16) -> Running {
        self.fake(port).start(self.address)
    }

    /// Waits for so many groups that serve, with so many ranks in all.
    async fn serving_by(&self, groups: u32, ranks: u32) {
        self.until(
            |state| matches!(state, State::Serving(model) if (model.groups, model.ranks) == (groups, ranks)),
        )
        .await;
    }

    async fn order(&self, order: Order) -> Result<String, client::Error> {
        client::operate(&self.address.to_string(), &self.secret, &order).await
    }

    /// How many ranks each group has, by its number.
    async fn widths(&self) -> Vec<(u32, usize)> {
        let status = self.handle.status().await.expect("the coordinator runs");
        status.groups.iter().map(|group| (group.number, group.ranks.len())).collect()
    }
}

/// All tokens until the end, with the fingerprints that the answer went over to.
async fn tokens(submission: &mut Submission) -> (Vec<u32>, Vec<String>) {
    let (mut tokens, mut moved) = (Vec::new(), Vec::new());
    loop {
        match submission.events.recv().await {
            Some(EngineEvent::Token { id, .. }) => tokens.push(id),
            Some(EngineEvent::Moved { fingerprint }) => moved.push(fingerprint),
            Some(EngineEvent::Finished { .. }) => return (tokens, moved),
            other => panic!("{other:?} after {} tokens", tokens.len()),
        }
    }
}

#[tokio::test]
async fn requests_of_a_lost_group_go_on_in_another() {
    let cluster = Cluster::of_groups(2, 1).await;
    let stuck = |port| Fake { hold_from: Some(3), ..cluster.fake(port) };
    let first = stuck(1).start(cluster.address);
    let second = Fake { holds_always: true, ..stuck(2) }.start(cluster.address);
    cluster.serving_by(2, 2).await;
    let mut submissions = Vec::new();
    for id in 0..8 {
        submissions.push((id, cluster.submit(&[id, 7], 20).await));
    }
    // Both hold their answers back, so all of them are still there.
    drop(first);
    cluster.serving_by(1, 1).await;
    let status = cluster.handle.status().await.unwrap();
    assert_eq!(status.running + status.waiting, 8);
    assert_eq!(status.incidents[0].moved_requests, 4, "{status:?}");
    // Nobody is left who would take them over: they wait.
    drop(second);
    let (third, _fourth) = (cluster.worker(3), cluster.worker(4));
    for (id, submission) in &mut submissions {
        assert_eq!(tokens(submission).await, (continuation(&[*id, 7], 20), vec![]));
    }
    drop(third);
    assert_eq!(tokens(&mut cluster.submit(&[1], 5).await).await.0, continuation(&[1], 5));
}

#[tokio::test]
async fn a_prompt_goes_where_its_beginning_is_cached_unless_there_is_much_to_do() {
    let cluster = Cluster::of_groups(2, 1).await;
    let _workers = [cluster.worker(1), cluster.worker(2)];
    cluster.serving_by(2, 2).await;
    let prompt: Vec<u32> = (0..300).collect();
    let cached = async |id: u32| {
        let mut submission = cluster.submit(&[&prompt[..], &[id]].concat(), 2).await;
        loop {
            if let Some(EngineEvent::Finished { usage, .. }) = submission.events.recv().await {
                return usage.cached_tokens;
            }
        }
    };
    assert_eq!(cached(0).await, 0);
    for id in 1..5 {
        assert_eq!(cached(id).await, 300, "it is in one of the groups, and that one was asked");
    }
}

#[tokio::test]
async fn another_fingerprint_has_groups_of_its_own_and_answers_tell() {
    let cluster = Cluster::of_groups(2, 1).await;
    let old = Fake { hold_from: Some(3), ..cluster.fake(1) }.start(cluster.address);
    cluster.serving_by(1, 1).await;
    let mut submission = cluster.submit(&[5, 6], 10).await;
    assert_eq!(submission.fingerprint, report().fingerprint);
    let mut upgraded = cluster.fake(2);
    upgraded.report.fingerprint = "fake-v2".into();
    let _new = upgraded.start(cluster.address);
    cluster.serving_by(2, 2).await;
    drop(old);
    let (tokens, moved) = tokens(&mut submission).await;
    assert_eq!((tokens, moved), (continuation(&[5, 6], 10), vec!["fake-v2".to_owned()]));
}

#[tokio::test]
async fn operators_drain_and_scale() {
    let cluster = Cluster::of_groups(1, 2).await;
    let _workers = [cluster.worker(1), cluster.worker(2), cluster.worker(3), cluster.worker(4)];
    cluster.serving_by(1, 2).await;
    let drain = |port: u16| Order::Drain { address: format!("127.0.0.1:{port}") };
    let status = cluster.handle.status().await.unwrap();
    let member = status.groups[0].ranks[0].worker.clone().unwrap().address;
    let done = cluster.order(Order::Drain { address: member.clone() }).await.unwrap();
    assert_eq!(done, format!("the worker at {member} has no part in any group now; group 0 has 2 ranks"));
    let status = cluster.handle.status().await.unwrap();
    assert!(status.groups[0].ranks.iter().all(|rank| rank.worker.as_ref().unwrap().address != member));
    assert!(status.spares.iter().any(|spare| spare.drained && spare.address == member));
    cluster.order(Order::Restore { address: member }).await.unwrap();

    let fixed = |ranks| Some(Shape::Fixed { stages: 1, ranks, min_ranks: ranks });
    let done = cluster.order(Order::Scale { shape: fixed(1), replicas: Some(3) }).await.unwrap();
    assert!(
        done.starts_with("asked for: up to 3 groups of 1 stages of 1 ranks; group 0 has 1 ranks"),
        "{done}"
    );
    cluster.serving_by(3, 3).await;
    cluster.order(Order::Scale { shape: fixed(4), replicas: Some(1) }).await.unwrap();
    cluster.serving_by(1, 4).await;
    assert_eq!(cluster.widths().await, [(0, 4)]);

    for (order, reason) in [
        (drain(9), "no worker has joined at 127.0.0.1:9"),
        (drain(1), "the worker at 127.0.0.1:1 cannot be spared: waiting for workers: 3 of 4 joined"),
        (
            Order::Scale { shape: Some(Shape::Fixed { stages: 2, ranks: 4, min_ranks: 4 }), replicas: None },
            "2 stages asked for, but the model has 1 layers: use 1 to 1",
        ),
    ] {
        assert_eq!(cluster.order(order).await.unwrap_err().to_string(), reason);
    }
    assert_eq!(cluster.widths().await, [(0, 4)]);
    let stranger = client::operate(&cluster.address.to_string(), &Secret::random(), &drain(1)).await;
    assert!(matches!(stranger, Err(client::Error::Secret(_))), "{stranger:?}");
}
