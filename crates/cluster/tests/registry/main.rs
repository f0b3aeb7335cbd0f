//! Registries: one suite for the one in memory and for etcd, and what only etcd can do.

mod away;
mod elections;
mod entries;
#[allow(unreachable_pub, reason = "the whole-cluster tests share it as a library")]
#[path = "../../../../tests/src/etcd.rs"]
mod etcd;
mod secured;
mod stage;

use stage::{EtcdStage, MemoryStage};

/// Makes each test of the suite one for every registry.
macro_rules! suite {
    ($($module:ident::$test:ident)*) => {
        mod in_memory {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() {
                super::$module::$test(&super::MemoryStage::default()).await;
            })*
        }

        mod in_etcd {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() {
                if let Some(stage) = super::EtcdStage::start() {
                    super::$module::$test(&stage).await;
                }
            })*
        }
    };
}

suite! {
    entries::watches_deliver_whole_snapshots
    entries::transactions_are_made_wholly_or_not_at_all
    entries::one_of_many_that_compare_and_set_wins
    entries::entries_end_with_their_lease
    entries::clusters_stay_apart
    entries::workers_are_listed_and_rubbish_is_told
    entries::orders_stand_until_they_are_replaced
    elections::one_candidate_leads_at_a_time_and_terms_rise
    elections::a_lost_lease_ends_no_term
    elections::a_leader_that_was_superseded_stops
    elections::rubbish_elects_nobody_and_stops_no_election
}
