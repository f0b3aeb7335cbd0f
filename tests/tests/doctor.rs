//! `phalanx doctor` on real processes: it measures every pair before weights load, and names who does not answer.

use phalanx_tests::members::Members;
use phalanx_tests::process::{Program, Signal};
use serde_json::Value;

const PHALANX: Program = Program(env!("CARGO_BIN_EXE_phalanx-under-test"));

/// Three workers that wait for a fourth.
async fn gathered() -> Members {
    let members = Members::start(PHALANX, &["--ranks", "4"], 3);
    members.until("three workers", |status| status.spares.len() == 3).await;
    members
}

fn list<'a>(report: &'a Value, name: &str) -> &'a [Value] {
    report[name].as_array().unwrap_or_else(|| panic!("no {name} in {report}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn every_pair_is_measured_before_weights_load() {
    let members = gathered().await;
    // What it complains of is for this machine to answer for: its disk, say. All of it is in one report.
    let report: Value = serde_json::from_str(&members.examine().stdout).expect("JSON");
    assert_eq!((list(&report, "workers").len(), list(&report, "links").len()), (3, 3), "{report}");
    for link in list(&report, "links") {
        let positive = |name: &str| link[name].as_f64().is_some_and(|value| value > 0.0);
        assert!(
            positive("latency_ms") && positive("bytes_per_second_there") && positive("bytes_per_second_back"),
            "{link}"
        );
    }
    for worker in list(&report, "workers") {
        assert_eq!(worker["program"]["version"], env!("CARGO_PKG_VERSION"), "{worker}");
    }
    members.end();
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_does_not_answer_is_named() {
    let members = gathered().await;
    members.signal(1, Signal::STOP);
    let ended = members.examine();
    assert!(!ended.status.success() && ended.stderr.contains("complaint"), "{ended:?}");
    let report: Value = serde_json::from_str(&ended.stdout).expect("JSON");
    let host = members.host(1);
    let named = |complaint: &Value| complaint["workers"].to_string().contains(&format!("{host}:"));
    assert!(list(&report, "complaints").iter().any(named), "{report}");
    members.signal(1, Signal::CONT);
    members.until("all three again", |status| status.spares.len() == 3).await;
    members.end();
}
