//! `phalanx status`: how a running cluster stands.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use clap::Args;
use client::{Client, ClusterStatus, Incident, WorkerStatus};
use futures_util::StreamExt;
use indicatif::HumanBytes;

use crate::signals::Signals;

/// From one look to the next.
const INTERVAL: Duration = Duration::from_secs(1);
/// Clears a terminal.
const CLEAR: &str = "\x1b[H\x1b[2J";

#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    /// The server's address, the one that clients use
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:7070")]
    server: String,
    /// Go on until Ctrl-C, once a second
    #[arg(long)]
    watch: bool,
    /// Print JSON, one object a line, with the fields of monitor.proto
    #[arg(long)]
    json: bool,
}

impl StatusArgs {
    pub(crate) async fn run(self) -> Result<()> {
        let mut signals = Signals::listen()?;
        let client = Client::connect(&self.server).await?;
        if !self.watch {
            return self.print(&client.status().await?);
        }
        let mut statuses = std::pin::pin!(client.watch_status(INTERVAL).await?);
        loop {
            tokio::select! {
                biased;
                () = signals.shutdown() => return Ok(()),
                status = statuses.next() => match status {
                    Some(status) => self.print(&status?)?,
                    None => return Ok(()),
                }
            }
        }
    }

    fn print(&self, status: &ClusterStatus) -> Result<()> {
        let mut out = std::io::stdout().lock();
        if self.json {
            writeln!(out, "{}", serde_json::to_string(status)?)?;
        } else if self.watch && out.is_terminal() {
            write!(out, "{CLEAR}{}", text(status, SystemTime::now()))?;
        } else if self.watch {
            writeln!(out, "{}", text(status, SystemTime::now()))?;
        } else {
            write!(out, "{}", text(status, SystemTime::now()))?;
        }
        Ok(out.flush()?)
    }
}

/// For people. Writing to a string does not fail.
fn text(status: &ClusterStatus, now: SystemTime) -> String {
    let mut out = format!("{}: {} running, {} waiting\n", status.state, status.running, status.waiting);
    let _ = writeln!(out, "asked for: {}", status.policy);
    for group in &status.groups {
        let _ = writeln!(
            out,
            "\ngroup {}  epoch {}.{}  {}  {}",
            group.number, group.term, group.counter, group.model, group.fingerprint
        );
        let _ = writeln!(
            out,
            "  {:.1} tokens/s, {:.1} rows/s, KV {} of {} blocks of {} tokens",
            group.tokens_per_second,
            group.rows_per_second,
            group.kv_blocks_used,
            group.kv_blocks,
            group.kv_block_tokens
        );
        for rank in &group.ranks {
            let units = format!("units {}..{}", rank.first_unit, rank.end_unit);
            let worker = rank.worker.as_ref().map_or_else(String::new, describe);
            let layers = format!("layers {}..{}", rank.first_layer, rank.end_layer);
            let _ = writeln!(
                out,
                "  stage {} rank {:<3} {layers:<13} {units:<12} {worker}",
                rank.stage, rank.rank
            );
        }
    }
    for spare in &status.spares {
        let kind = if spare.drained { "drained" } else { "spare" };
        let _ = writeln!(out, "{kind:<7} {}", describe(spare));
    }
    if !status.complaints.is_empty() {
        let _ = writeln!(out, "\ncomplaints");
    }
    for complaint in &status.complaints {
        let _ = writeln!(out, "  {complaint}");
    }
    if !status.incidents.is_empty() {
        let _ = writeln!(out, "\nlast incidents");
    }
    for incident in &status.incidents {
        let _ = writeln!(out, "  {}", history(incident, now));
    }
    out
}

fn describe(worker: &WorkerStatus) -> String {
    let WorkerStatus { worker: id, address, host, zone, device, activity, heartbeat_millis, .. } = worker;
    let zone = if zone.is_empty() { String::new() } else { format!(" zone {zone}") };
    let [memory, held] = [worker.memory, worker.held_bytes].map(HumanBytes);
    format!(
        "worker {id} at {address} ({host}{zone}, {device}, {memory}): {activity}, holds {held}, heard {heartbeat_millis} ms ago"
    )
}

fn history(incident: &Incident, now: SystemTime) -> String {
    let at = UNIX_EPOCH + Duration::from_millis(incident.at_millis);
    let ago = now.duration_since(at).unwrap_or_default().as_secs();
    let loss = |loss: &client::Loss| match (loss.worker, loss.rank) {
        (Some(worker), Some(rank)) => {
            let stage = loss.stage.unwrap_or_default();
            format!("rank {rank} of stage {stage} (worker {worker} at {}): {}", loss.address, loss.cause)
        }
        _ => loss.cause.clone(),
    };
    let losses: Vec<_> = incident.losses.iter().map(loss).collect();
    let after = match incident.ranks_after {
        0 => "none yet".to_owned(),
        ranks => format!("{ranks} in epoch {}", incident.counter_after),
    };
    let term = |name: &str, micros: Option<u64>| {
        micros.map_or_else(String::new, |micros| format!(", {name} {:.0} ms", micros as f64 / 1e3))
    };
    let load = match incident.load_micros {
        Some(_) => term("load", incident.load_micros) + &format!(" ({})", HumanBytes(incident.loaded_bytes)),
        None => String::new(),
    };
    format!(
        "{ago} s ago  group {}  {}  ranks {} -> {after}  detect {:.0} ms{}{}{}{}",
        incident.group,
        losses.join("; "),
        incident.ranks_before,
        incident.detect_micros as f64 / 1e3,
        term("form", incident.form_micros),
        load,
        term("recompute", incident.recompute_micros),
        match incident.moved_requests {
            0 => String::new(),
            moved => format!(", {moved} requests went on in other groups"),
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use client::{GroupStatus, Loss, RankStatus};
    use serde_json::{Value, json};

    fn status() -> ClusterStatus {
        let worker = WorkerStatus {
            worker: 3,
            address: "here:1".into(),
            host: "here".into(),
            zone: "a".into(),
            device: "cpu".into(),
            memory: 3 << 30,
            activity: "computing step 7".into(),
            heartbeat_millis: 12,
            drained: false,
            held_bytes: 5 << 20,
        };
        let rank =
            RankStatus { end_unit: 4, end_layer: 5, worker: Some(worker.clone()), ..RankStatus::default() };
        let group = GroupStatus {
            model: "yi".into(),
            term: 9,
            counter: 2,
            ranks: vec![rank],
            kv_blocks_used: 3,
            kv_blocks: 10,
            kv_block_tokens: 64,
            tokens_per_second: 12.34,
            ..GroupStatus::default()
        };
        let loss = Loss {
            cause: "no heartbeat".into(),
            worker: Some(2),
            stage: Some(0),
            rank: Some(1),
            address: "there:1".into(),
        };
        let incident = Incident {
            at_millis: 1000,
            losses: vec![loss],
            ranks_before: 2,
            ranks_after: 1,
            counter_before: 1,
            counter_after: 2,
            detect_micros: 40_000,
            form_micros: Some(5000),
            load_micros: Some(70_000),
            recompute_micros: None,
            group: 1,
            moved_requests: 2,
            loaded_bytes: 3 << 20,
        };
        ClusterStatus {
            serving: true,
            state: "serving yi on 1 ranks".into(),
            policy: "one group".into(),
            groups: vec![group],
            spares: vec![worker.clone(), WorkerStatus { drained: true, ..worker }],
            running: 4,
            waiting: 1,
            incidents: vec![incident],
            complaints: vec!["worker here:1: MTU 1500".into()],
        }
    }

    #[test]
    fn people_read_everything() {
        let text = text(&status(), UNIX_EPOCH + Duration::from_secs(6));
        for line in [
            "serving yi on 1 ranks: 4 running, 1 waiting",
            "12.3 tokens/s, 0.0 rows/s, KV 3 of 10 blocks of 64 tokens",
            "asked for: one group",
            "stage 0 rank 0   layers 0..5   units 0..4   worker 3 at here:1 (here zone a, cpu, 3.00 GiB): computing step 7, holds 5.00 MiB, heard 12 ms ago",
            "spare   worker 3 at here:1",
            "drained worker 3 at here:1",
            "complaints\n  worker here:1: MTU 1500\n",
            "5 s ago  group 1  rank 1 of stage 0 (worker 2 at there:1): no heartbeat  ranks 2 -> 1 in epoch 2  \
             detect 40 ms, form 5 ms, load 70 ms (3.00 MiB), 2 requests went on in other groups\n",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    }

    #[test]
    fn programs_read_everything() {
        let status = serde_json::to_value(status()).unwrap();
        let (group, incident) = (&status["groups"][0], &status["incidents"][0]);
        let rank = &group["ranks"][0];
        assert_eq!(rank["worker"]["address"], "here:1");
        assert_eq!(rank["worker"]["heartbeat_millis"], 12);
        assert_eq!([&rank["first_layer"], &rank["end_layer"]], [0, 5]);
        assert_eq!([&rank["first_unit"], &rank["end_unit"]], [0, 4]);
        assert_eq!([&group["term"], &group["counter"]], [9, 2]);
        assert_eq!([&group["kv_blocks_used"], &group["kv_blocks"], &group["kv_block_tokens"]], [3, 10, 64]);
        assert_eq!(status["spares"][0]["worker"], 3);
        assert_eq!(status["complaints"], json!(["worker here:1: MTU 1500"]));
        assert_eq!(incident["at_millis"], 1000);
        assert_eq!([&incident["ranks_before"], &incident["ranks_after"]], [2, 1]);
        assert_eq!([&incident["counter_before"], &incident["counter_after"]], [1, 2]);
        assert_eq!([&incident["load_micros"], &incident["recompute_micros"]], [&json!(70_000), &Value::Null]);
        assert_eq!(incident["losses"][0]["rank"], 1);
    }
}
