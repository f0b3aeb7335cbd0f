//! The coordinator with fake workers over real gRPC: serving, refusals, and the loss of workers.

use std::time::Duration;

use auth::Secret;
use cluster::proto::ClusterStatus;
use cluster::{PROTOCOL, Policy, Shape, Shortage};
use coordinator::{CoordinatorConfig, Engine, EngineError, EngineEvent, State, Submission};
use engine::{FinishReason, Request, SeqId, StepPlan, Tokens, Usage};
use tokio::sync::mpsc;
use tonic::Code;

use crate::fake::{Fake, VOCABULARY, continuation};
use crate::harness::{Cluster, request};

const PROMPT: &[u32] = &[11, 22, 33, 44, 55];

fn waiting(joined: usize, wanted: usize) -> State {
    State::Waiting(Shortage::Workers { joined, wanted })
}

async fn token(submission: &mut Submission) -> u32 {
    match submission.events.recv().await {
        Some(EngineEvent::Token { id, .. }) => id,
        other => panic!("a token was expected, not {other:?}"),
    }
}

/// All tokens until the end.
async fn tokens(submission: &mut Submission) -> Vec<u32> {
    let mut tokens = Vec::new();
    loop {
        match submission.events.recv().await {
            Some(EngineEvent::Token { id, .. }) => tokens.push(id),
            Some(EngineEvent::Finished { reason, .. }) => {
                assert_eq!(reason, FinishReason::Length);
                assert_eq!(submission.events.recv().await, None);
                return tokens;
            }
            other => panic!("{other:?} after {} tokens", tokens.len()),
        }
    }
}

#[tokio::test]
async fn requests_are_served_by_all_ranks() {
    let cluster = Cluster::start(2, |_| {}).await;
    let (sender, mut plans) = mpsc::unbounded_channel();
    let _first = cluster.fake(1).start(cluster.address);
    cluster.until(|state| *state == waiting(1, 2)).await;
    let waiting = EngineError::Unavailable("waiting for workers: 1 of 2 joined".into());
    assert_eq!(cluster.handle.model(), Err(waiting.clone()));
    assert_eq!(cluster.handle.submit(request(PROMPT, 1)).await.expect_err("nobody serves"), waiting);

    let _second = Fake { plans: Some(sender), ..cluster.fake(2) }.start(cluster.address);
    cluster.serving().await;
    let model = cluster.handle.model().expect("it serves");
    assert_eq!((model.name.as_str(), model.ranks, model.max_context), ("fake", 2, 400));

    let mut one = cluster.submit(PROMPT, 9).await;
    let mut two = cluster.submit(&[1, 2, 3], 30).await;
    assert_eq!(tokens(&mut two).await, continuation(&[1, 2, 3], 30));
    assert_eq!(tokens(&mut one).await, continuation(PROMPT, 9));
    assert_eq!(plans.recv().await.expect("plans reach every rank").step.0, 0);

    let refused = cluster.handle.submit(request(&[], 1)).await.expect_err("it is empty");
    assert_eq!(refused, EngineError::Invalid("the prompt is empty: at least one token is needed".into()));
}

#[tokio::test]
async fn usage_counts_both_sides() {
    let cluster = Cluster::start(1, |_| {}).await;
    let _worker = cluster.fake(1).start(cluster.address);
    cluster.serving().await;
    let mut submission = cluster.submit(PROMPT, 1).await;
    token(&mut submission).await;
    let usage = Usage { prompt_tokens: 5, completion_tokens: 1, cached_tokens: 0 };
    let finished = EngineEvent::Finished { reason: FinishReason::Length, usage };
    assert_eq!(submission.events.recv().await, Some(finished));
}

#[tokio::test]
async fn dropping_a_submission_cancels_it() {
    let cluster = Cluster::start(1, |_| {}).await;
    let (sender, mut plans) = mpsc::unbounded_channel();
    // All steps after the third wait for the group to be replaced: nothing ends before it is dropped.
    let _worker = Fake { plans: Some(sender), hold_from: Some(3), ..cluster.fake(1) }.start(cluster.address);
    cluster.serving().await;
    let mut dropped = cluster.submit(PROMPT, 300).await;
    for _ in 0..3 {
        token(&mut dropped).await;
    }
    drop(dropped);
    let mut kept = cluster.submit(&[9, 8, 7], 10).await;
    let _again = cluster.fake(1).start(cluster.address);
    assert_eq!(tokens(&mut kept).await, continuation(&[9, 8, 7], 10));
    let of = |plan: &StepPlan, seq| plan.slices.iter().any(|slice| slice.seq == SeqId(seq));
    while let Ok(plan) = plans.try_recv() {
        assert!(!(of(&plan, 0) && of(&plan, 1)), "the dropped request runs on: {plan:?}");
    }
}

#[tokio::test]
async fn a_wrong_secret_is_refused() {
    let cluster = Cluster::start(1, |_| {}).await;
    let stranger = Fake { secret: Secret::random(), ..cluster.fake(1) };
    let end = stranger.start(cluster.address).end().await;
    assert_eq!(end.code(), Code::Unauthenticated);
    assert_eq!(end.message(), "the worker on here does not know the cluster's secret");
    assert_eq!(*cluster.handle.state().borrow(), waiting(0, 1));
}

#[tokio::test]
async fn another_protocol_is_refused_naming_both() {
    let cluster = Cluster::start(1, |_| {}).await;
    let end = Fake { protocol: 99, ..cluster.fake(1) }.start(cluster.address).end().await;
    assert_eq!(end.code(), Code::FailedPrecondition);
    let expected = format!(
        "the coordinator speaks protocol {PROTOCOL}, the worker protocol 99: run the same version on both"
    );
    assert_eq!(end.message(), expected);
}

#[tokio::test]
async fn another_model_is_refused_by_name() {
    let cluster = Cluster::start(2, |_| {}).await;
    let _first = cluster.fake(1).start(cluster.address);
    cluster.until(|state| *state == waiting(1, 2)).await;
    let mut other = cluster.fake(2);
    other.report.units = 8;
    let end = other.start(cluster.address).end().await;
    assert_eq!(end.code(), Code::FailedPrecondition);
    assert_eq!(end.message(), "worker at 127.0.0.1:2 serves units 8, the group 4");
}

#[tokio::test]
async fn the_next_step_is_sent_before_the_last_is_answered() {
    let cluster = Cluster::start(2, |_| {}).await;
    let (sender, mut plans) = mpsc::unbounded_channel();
    let ahead = |port| Fake { steps_in_flight: 3, ..cluster.fake(port) };
    let _first = Fake { plans: Some(sender), hold_from: Some(0), ..ahead(1) }.start(cluster.address);
    cluster.until(|state| *state == waiting(1, 2)).await;
    let _second = Fake { steps_in_flight: 2, ..ahead(2) }.start(cluster.address);
    cluster.serving().await;
    let mut submission = cluster.submit(PROMPT, 9).await;
    let mut tokens = async || plans.recv().await.expect("a plan").slices.remove(0).tokens;
    assert_eq!(tokens().await, Tokens::Ids(PROMPT.to_vec()));
    assert_eq!(tokens().await, Tokens::LastSampled);
    // The rank that takes fewest decides: nothing more comes.
    assert!(plans.is_empty() && submission.events.try_recv().is_err());
}

#[tokio::test]
async fn answers_do_not_depend_on_the_steps_in_flight() {
    for steps_in_flight in 1..=3 {
        let cluster = Cluster::start(2, |config| config.max_batch_tokens = Some(8)).await;
        let ahead = |port| Fake { steps_in_flight, ..cluster.fake(port) };
        let _workers = [ahead(1).start(cluster.address), ahead(2).start(cluster.address)];
        cluster.serving().await;
        let prompts: Vec<Vec<u32>> = (0..12).map(|i| (i..2 * i + 3).collect()).collect();
        let mut submissions = Vec::new();
        for (prompt, count) in prompts.iter().zip(1..) {
            submissions.push(cluster.submit(prompt, 3 * count).await);
        }
        // One hangs up in the middle.
        let mut dropped = submissions.remove(7);
        token(&mut dropped).await;
        drop(dropped);
        for ((prompt, count), submission) in
            prompts.iter().zip(1..).filter(|(_, count)| *count != 8).zip(&mut submissions)
        {
            let expected = continuation(prompt, 3 * count);
            assert_eq!(tokens(submission).await, expected, "{steps_in_flight} steps in flight");
        }
    }
}

#[tokio::test]
async fn streams_go_on_when_a_lost_worker_comes_back() {
    for (lost, steps_in_flight) in [(1, 1), (2, 1), (1, 2), (2, 2)] {
        let cluster = Cluster::start(2, |_| {}).await;
        let (sender, mut plans) = mpsc::unbounded_channel();
        let holding = |port| Fake {
            hold_from: Some(12),
            steps_in_flight,
            plans: Some(sender.clone()),
            ..cluster.fake(port)
        };
        let mut workers = vec![(1, holding(1).start(cluster.address))];
        cluster.until(|state| *state == waiting(1, 2)).await;
        workers.push((2, holding(2).start(cluster.address)));
        cluster.serving().await;

        let mut submission = cluster.submit(PROMPT, 40).await;
        let mut seen = Vec::new();
        for _ in 0..12 {
            seen.push(token(&mut submission).await);
        }
        // All that is in flight has reached both ranks, and none of it is answered.
        for _ in 0..2 * (12 + steps_in_flight) {
            plans.recv().await.expect("a plan");
        }
        workers.retain(|(port, _)| *port != lost);
        cluster.until(|state| *state == waiting(1, 2)).await;
        // New requests wait with the old ones, and what is served is known.
        let mut waiting = cluster.submit(&[5], 3).await;
        assert!(cluster.handle.model().is_ok());
        let down = EngineError::Unavailable("waiting for workers: 1 of 2 joined".into());
        assert_eq!(cluster.handle.health(), Err(down), "but nobody serves it");

        workers.push((lost, Fake { steps_in_flight, ..cluster.fake(lost) }.start(cluster.address)));
        seen.extend(tokens(&mut submission).await);
        assert_eq!(seen, continuation(PROMPT, 40), "worker {lost} was lost");
        assert_eq!(tokens(&mut waiting).await, continuation(&[5], 3));
    }
}

/// A cluster of two ranks that may also be one.
async fn narrowing(change: impl FnOnce(&mut CoordinatorConfig)) -> Cluster {
    Cluster::start(2, |config| {
        let shape = Shape::Fixed { stages: 1, ranks: 2, min_ranks: 1 };
        config.policy = Policy { shape, ..config.policy };
        config.heartbeat_interval = Duration::from_millis(50);
        change(config);
    })
    .await
}

async fn status(cluster: &Cluster) -> ClusterStatus {
    cluster.handle.status().await.expect("the coordinator runs")
}

#[tokio::test]
async fn a_group_closes_ranks_and_takes_in_who_comes_back() {
    let cluster = narrowing(|_| {}).await;
    let _first = cluster.fake(1).start(cluster.address);
    cluster.until(|state| *state == waiting(1, 2)).await;
    let second = Fake { hold_from: Some(5), ..cluster.fake(2) }.start(cluster.address);
    cluster.serving().await;
    let mut submission = cluster.submit(PROMPT, 40).await;
    let mut seen = vec![token(&mut submission).await];
    drop(second);
    seen.extend(tokens(&mut submission).await);
    assert_eq!(seen, continuation(PROMPT, 40));
    assert_eq!(cluster.handle.model().expect("it serves").ranks, 1);

    // Nothing runs: another rank costs nobody anything.
    let _third = cluster.fake(3).start(cluster.address);
    cluster.until(|state| matches!(state, State::Serving(model) if model.ranks == 2)).await;
    let status = status(&cluster).await;
    let [wider, lost] = &status.incidents[..] else { panic!("two incidents: {status:?}") };
    assert_eq!(wider.losses[0].cause, "wider: from 1 to 2 ranks");
    assert_eq!((wider.losses[0].rank, wider.recompute_micros), (None, None));
    assert_eq!((wider.ranks_before, wider.ranks_after, wider.counter_after), (1, 2, 3));
    assert_eq!((lost.losses[0].rank, lost.losses[0].address.as_str()), (Some(1), "127.0.0.1:2"));
    assert_eq!((lost.ranks_before, lost.ranks_after), (2, 1));
    assert!(lost.recompute_micros.is_some() && lost.load_micros.is_some(), "{lost:?}");
}

#[tokio::test]
async fn a_rank_that_hangs_is_dismissed_and_those_that_wait_for_it_stay() {
    for culprit in [0, 1] {
        let cluster = narrowing(|config| config.progress_timeout = Duration::from_millis(400)).await;
        let hanging = |port| Fake { hangs: Some((culprit, 3)), ..cluster.fake(port) }.start(cluster.address);
        let first = hanging(1);
        cluster.until(|state| *state == waiting(1, 2)).await;
        let second = hanging(2);
        cluster.serving().await;
        let mut submission = cluster.submit(PROMPT, 20).await;
        assert_eq!(tokens(&mut submission).await, continuation(PROMPT, 20));
        let end = if culprit == 0 { first } else { second }.end().await;
        assert_eq!(end.code(), Code::Aborted);
        assert!(end.message().starts_with("makes no progress in step 3 for "), "{end}");
        let lost = status(&cluster).await.incidents[0].losses[0].clone();
        assert_eq!((lost.rank, lost.cause.as_str()), (Some(culprit as u32), end.message()));
    }
}

#[tokio::test]
async fn a_rank_that_is_lost_to_another_is_replaced_and_not_the_one_that_says_so() {
    let cluster = narrowing(|_| {}).await;
    let _first = Fake { accuses: Some((3, 1)), ..cluster.fake(1) }.start(cluster.address);
    cluster.until(|state| *state == waiting(1, 2)).await;
    let second = Fake { hold_from: Some(3), ..cluster.fake(2) }.start(cluster.address);
    cluster.serving().await;
    let mut submission = cluster.submit(PROMPT, 20).await;
    assert_eq!(tokens(&mut submission).await, continuation(PROMPT, 20));
    let end = second.end().await;
    assert_eq!((end.code(), end.message()), (Code::Aborted, "lost rank 1"));
}

#[tokio::test]
async fn status_tells_who_does_what() {
    let cluster = Cluster::start(2, |_| {}).await;
    let nobody = status(&cluster).await;
    assert_eq!((nobody.serving, nobody.state.as_str()), (false, "waiting for workers: 0 of 2 joined"));
    assert_eq!((nobody.groups, nobody.spares), (vec![], vec![]));
    let _workers: Vec<_> = (1..=3)
        .map(|port| Fake { hold_from: Some(2), ..cluster.fake(port) }.start(cluster.address))
        .collect();
    cluster.serving().await;
    let mut submission = cluster.submit(PROMPT, 20).await;
    token(&mut submission).await;
    let _waiting = cluster.submit(&[1], 1).await;
    let status = loop {
        let status = status(&cluster).await;
        if status.spares.len() == 1 {
            break status;
        }
        tokio::task::yield_now().await;
    };
    assert_eq!((status.serving, status.running + status.waiting), (true, 2));
    let group = &status.groups[0];
    assert_eq!((group.model.as_str(), group.counter, group.kv_blocks), ("fake", 1, 100));
    assert!(group.kv_blocks_used >= 2, "{group:?}");
    let units: Vec<_> = group.ranks.iter().map(|rank| (rank.rank, rank.first_unit, rank.end_unit)).collect();
    assert_eq!(units, [(0, 0, 2), (1, 2, 4)]);
    let mut ports: Vec<_> =
        group.ranks.iter().flat_map(|rank| &rank.worker).chain(&status.spares).map(|w| &w.address).collect();
    ports.sort();
    assert_eq!(ports, ["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"]);
}

#[tokio::test]
async fn a_silent_worker_is_lost() {
    let cluster = Cluster::start(1, |config| config.heartbeat_timeout = Duration::from_millis(300)).await;
    let end = Fake { heartbeats: false, ..cluster.fake(1) }.start(cluster.address).end().await;
    assert_eq!(end.code(), Code::Aborted);
    assert_eq!(end.message(), "no heartbeat for 300ms");
}

#[tokio::test]
async fn outputs_of_another_epoch_are_dropped() {
    let cluster = Cluster::start(1, |_| {}).await;
    let _worker = Fake { stale_outputs: true, ..cluster.fake(1) }.start(cluster.address);
    cluster.serving().await;
    let mut submission = cluster.submit(PROMPT, 20).await;
    assert_eq!(tokens(&mut submission).await, continuation(PROMPT, 20));
}

#[tokio::test]
async fn a_worker_that_sends_nonsense_is_replaced() {
    let cluster = Cluster::start(1, |_| {}).await;
    let distorted = Fake { distort: VOCABULARY, ..cluster.fake(1) }.start(cluster.address);
    cluster.serving().await;
    let mut submission = cluster.submit(PROMPT, 20).await;
    let end = distorted.end().await;
    assert_eq!(end.code(), Code::Aborted);
    assert!(end.message().contains("outside the vocabulary"), "{end}");
    let _worker = cluster.fake(2).start(cluster.address);
    assert_eq!(tokens(&mut submission).await, continuation(PROMPT, 20));
}

#[tokio::test]
async fn a_failed_load_is_reported_and_not_tried_again_unasked() {
    let cluster = Cluster::start(1, |_| {}).await;
    let failing = Fake { load_failure: Some("no memory".into()), ..cluster.fake(1) };
    let end = failing.start(cluster.address).end().await;
    assert_eq!((end.code(), end.message()), (Code::Aborted, "no memory"));
    let state = cluster.until(|state| matches!(state, State::Failed(_))).await;
    assert_eq!(state, State::Failed("worker at 127.0.0.1:1: no memory".into()));
    let _worker = cluster.fake(1).start(cluster.address);
    cluster.serving().await;
}

#[tokio::test]
async fn more_requests_than_may_wait_are_turned_away() {
    let cluster = Cluster::start(1, |config| {
        config.max_sequences = Some(1);
        config.max_waiting = 1;
    })
    .await;
    let _worker = Fake { hold_from: Some(1), ..cluster.fake(1) }.start(cluster.address);
    cluster.serving().await;
    let mut running = cluster.submit(PROMPT, 20).await;
    token(&mut running).await;
    let _waiting = cluster.submit(PROMPT, 20).await;
    let refused = cluster.handle.submit(request(PROMPT, 20)).await.expect_err("one waits already");
    assert_eq!(
        refused,
        EngineError::Unavailable("the queue is full (1 requests wait): try again later".into())
    );
    // An answer that goes on was let in before.
    let answered = continuation(PROMPT, 20)[..5].to_vec();
    let resumed = Request { resume: Some(answered), ..request(PROMPT, 20) };
    let mut resumed = cluster.handle.submit(resumed).await.expect("it is let in");
    let begun = Request { resume: Some(vec![]), ..request(PROMPT, 20) };
    let _begun = cluster.handle.submit(begun).await.expect("it is let in");
    let _again = cluster.fake(1).start(cluster.address);
    assert_eq!(tokens(&mut resumed).await, continuation(PROMPT, 20)[5..]);
}
