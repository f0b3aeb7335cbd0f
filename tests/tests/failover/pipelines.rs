//! Groups of several stages.

use std::time::Instant;

use phalanx_tests::members::{Members, number, rank_count, shape};
use phalanx_tests::process::Signal;

use super::{PHALANX, check, streams, turn};

#[tokio::test(flavor = "multi_thread")]
async fn a_rank_of_each_stage_is_killed() {
    let _turn = turn().await;
    let pipeline = ["--stages", "2", "--ranks", "2", "--min-ranks", "1"];
    for (lost_stage, left) in [(0, [1, 2]), (1, [2, 1])] {
        let mut members = Members::start(PHALANX, &pipeline, 4);
        let status = members.until("a pipeline", |status| status.serving && rank_count(status) == 4).await;
        assert_eq!(shape(&status), [[2, 2]]);
        let layers: Vec<_> =
            status.groups[0].ranks.iter().map(|rank| (rank.first_layer, rank.end_layer)).collect();
        assert!(layers[0] == layers[1] && layers[1].1 == layers[2].0 && layers[2] == layers[3], "{layers:?}");
        let mut running = streams(&members).await;
        running.until(20).await;
        let lost = Instant::now();
        members.kill(number(&status.groups[0].ranks[2 * lost_stage]));
        let after = async || {
            members.until("a narrower one", |status| status.serving && shape(status) == [left]).await
        };
        check(&format!("a rank of stage {lost_stage} of 2 killed"), running, lost, after).await;
        members.end();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rank_that_stops_is_told_from_the_stages_that_wait_for_it() {
    let _turn = turn().await;
    let pipeline = ["--stages", "3", "--ranks", "1"];
    let members = Members::start(PHALANX, &pipeline, 4);
    let status = members.until("a pipeline and a spare", |s| s.serving && s.spares.len() == 1).await;
    let mut running = streams(&members).await;
    running.until(20).await;
    let lost = Instant::now();
    let stopped = number(&status.groups[0].ranks[1]);
    members.signal(stopped, Signal::STOP);
    let after = async || members.until("the spare in its place", |s| s.serving && s.spares.is_empty()).await;
    check("the middle stage of 3 stopped, a spare there", running, lost, after).await;
    let incident = members.status().await.incidents.remove(0);
    assert_eq!((incident.losses[0].stage, incident.losses[0].rank), (Some(1), Some(0)), "{incident:?}");
    members.signal(stopped, Signal::CONT);
    members.until("a spare again", |status| status.spares.len() == 1).await;
    members.end();
}
