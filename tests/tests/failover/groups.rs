//! Several groups, and what operators order.

use std::time::Instant;

use phalanx_tests::members::{Members, number, shape};
use phalanx_tests::streams::Load;

use super::{AT_ONCE, PHALANX, TOKENS, check, say, streams, turn, undisturbed};

#[tokio::test(flavor = "multi_thread")]
async fn groups_are_lost_and_others_go_on_with_their_answers() {
    let _turn = turn().await;
    let mut members = Members::start(PHALANX, &["--ranks", "1", "--replicas", "3"], 3);
    let three = members.until("three groups", |s| s.serving && shape(s) == [[1], [1], [1]]).await;
    let mut running = streams(&members).await;
    running.until(20).await;
    let lost = Instant::now();
    members.kill(number(&three.groups[1].ranks[0]));
    members.until("two groups", |status| shape(status).len() == 2).await;
    members.kill(number(&three.groups[0].ranks[0]));
    let one = async || members.until("one group", |status| status.serving && shape(status) == [[1]]).await;
    check("two groups of 3 killed", running, lost, one).await;
    let moved: u32 = members.status().await.incidents.iter().map(|incident| incident.moved_requests).sum();
    say(&format!("{moved} requests went on in other groups"));
    members.end();
}

#[tokio::test(flavor = "multi_thread")]
async fn operators_change_everything_under_load() {
    let _turn = turn().await;
    let mut members = Members::start(PHALANX, &["--ranks", "2", "--min-ranks", "1"], 4);
    let before = members.until("two spares", |s| s.serving && s.spares.len() == 2).await;
    let expected = undisturbed().await;
    let loads = [(); 2].map(|()| Load::start(members.clients.clone(), expected, TOKENS, AT_ONCE));

    let rank = &before.groups[0].ranks[0];
    let address = rank.worker.as_ref().expect("a worker").address.clone();
    let done = members.order(&["drain", &address]);
    assert!(done.contains("has no part in any group now"), "{done}");
    // It is not missed.
    members.kill(number(rank));
    members.until("a group without it", |s| s.serving && shape(s) == [[2]] && s.spares.len() == 1).await;
    members.order(&["drain", &address, "--undo"]);
    members.restart(number(rank));
    members.until("two spares", |s| s.serving && s.spares.len() == 2).await;

    for (order, wanted) in [
        (&["--ranks", "4"][..], vec![vec![4]]),
        (&["--ranks", "2", "--stages", "2"], vec![vec![2, 2]]),
        (&["--ranks", "2", "--replicas", "2"], vec![vec![2], vec![2]]),
        (&["--ranks", "1", "--replicas", "4"], vec![vec![1]; 4]),
        (&["--ranks", "3", "--replicas", "1"], vec![vec![3]]),
    ] {
        let begun = Instant::now();
        members.order(&[&["scale"], order].concat());
        let all_serve = |s: &client::ClusterStatus| {
            s.serving && shape(s) == wanted && s.groups.iter().all(|g| g.kv_blocks > 0)
        };
        members.until(&format!("{wanted:?}"), all_serve).await;
        say(&format!("{wanted:?} ranks after {:.3} s", begun.elapsed().as_secs_f64()));
    }
    let [one, other] = loads;
    say(&format!("{} answers meanwhile, all right", one.end().await + other.end().await));
    members.end();
}
