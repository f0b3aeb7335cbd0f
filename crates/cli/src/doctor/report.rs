//! What an examination came to, for people and for programs.

use std::fmt::Write as _;

use client::{DiskSpeed, DoctorReport, ExaminedLink, ExaminedWorker, Facts, LinkMeasures, NetworkInterface};
use serde_json::{Value, json};

/// Of more links than this, the slowest are shown.
const SHOWN_LINKS: usize = 30;

/// For people. Writing to a string does not fail.
pub(super) fn text(report: &DoctorReport) -> String {
    let mut out = match report.workers.len() {
        0 => "no worker has joined\n".to_owned(),
        1 => "1 worker\n".to_owned(),
        count => format!("{count} workers\n"),
    };
    let heads = ["", "machine", "program", "device", "memory", "interface", "disk"].map(str::to_owned);
    for row in aligned([heads].into_iter().chain(report.workers.iter().map(worker)).collect()) {
        let _ = writeln!(out, "  {row}");
    }
    let libraries = report.workers.iter().filter(|worker| !facts(worker).libraries.is_empty());
    for worker in libraries {
        let facts = facts(worker);
        let versions = facts.libraries.iter().map(|library| format!("{} {}", library.name, library.version));
        let _ = writeln!(out, "  {}: {}", worker.address, versions.collect::<Vec<_>>().join(", "));
    }
    if !report.links.is_empty() {
        out.push_str("\nlinks\n");
    }
    let mut links: Vec<&ExaminedLink> = report.links.iter().collect();
    if links.len() > SHOWN_LINKS {
        links.sort_by_key(|link| {
            link.measures
                .as_ref()
                .map_or((0, 0), |m| (m.bandwidth_back.min(m.bandwidth_there), u64::MAX - m.latency_nanos))
        });
        links.truncate(SHOWN_LINKS);
    }
    let heads = ["", "", "latency", "there", "back", "clock"].map(str::to_owned);
    let rows = links.iter().map(|found| link(report, found));
    if !links.is_empty() {
        for row in aligned([heads].into_iter().chain(rows).collect()) {
            let _ = writeln!(out, "  {row}");
        }
    }
    if report.links.len() > links.len() {
        let _ = writeln!(out, "  and {} faster ones", report.links.len() - links.len());
    }
    if !report.remarks.is_empty() {
        out.push('\n');
    }
    for remark in &report.remarks {
        let _ = writeln!(out, "{remark}");
    }
    out.push_str(if report.complaints.is_empty() { "\nno complaints\n" } else { "\ncomplaints\n" });
    for complaint in &report.complaints {
        let _ = writeln!(out, "  {}: {}", complaint.workers.join(", "), complaint.what);
        let _ = writeln!(out, "    {}", complaint.advice);
    }
    out
}

fn worker(worker: &ExaminedWorker) -> [String; 7] {
    let facts = facts(worker);
    let build =
        if worker.program_hash.is_empty() { String::new() } else { format!(" ({})", worker.program_hash) };
    let machine = match facts.kernel.as_str() {
        "" => facts.machine.clone(),
        kernel => format!("{} (kernel {kernel})", facts.machine),
    };
    [
        worker.address.clone(),
        machine,
        format!("{}{build}", facts.program),
        worker.device.clone(),
        format!("{:.1} GiB", worker.memory as f64 / f64::from(1 << 30)),
        facts.interface.as_ref().map_or("-".into(), interface),
        worker.disk.as_ref().map_or("-".into(), disk),
    ]
}

fn interface(interface: &NetworkInterface) -> String {
    let speed = interface.megabits.map_or_else(String::new, |megabits| format!(", {megabits} Mbit/s"));
    format!("{}, MTU {}{speed}", interface.name, interface.mtu)
}

fn disk(disk: &DiskSpeed) -> String {
    format!("{}{}", rate(disk_rate(disk)), if disk.cached { " (cached)" } else { "" })
}

fn disk_rate(disk: &DiskSpeed) -> u64 {
    (disk.bytes as f64 / disk.micros.max(1) as f64 * 1e6) as u64
}

fn link(report: &DoctorReport, link: &ExaminedLink) -> [String; 6] {
    let [from, to] = [link.from, link.to].map(|place| address(report, place));
    let Some(measures) = &link.measures else {
        return [from, to, format!("none: {}", link.failure), String::new(), String::new(), String::new()];
    };
    let LinkMeasures { latency_nanos, clock_offset_micros, bandwidth_there, bandwidth_back } = measures;
    let carried = |bytes: &u64| if *bytes == 0 { "-".to_owned() } else { rate(*bytes) };
    [
        from,
        to,
        format!("{:.3} ms", *latency_nanos as f64 / 1e6),
        carried(bandwidth_there),
        carried(bandwidth_back),
        format!("{:+.3} ms", *clock_offset_micros as f64 / 1e3),
    ]
}

fn rate(bytes: u64) -> String {
    format!("{:.0} MB/s", bytes as f64 / 1e6)
}

fn facts(worker: &ExaminedWorker) -> Facts {
    worker.facts.clone().unwrap_or_default()
}

fn address(report: &DoctorReport, place: u32) -> String {
    report.workers.get(place as usize).map_or_else(|| "?".into(), |worker| worker.address.clone())
}

/// Rows of a table whose columns are as wide as their widest cell.
fn aligned<const COLUMNS: usize>(rows: Vec<[String; COLUMNS]>) -> Vec<String> {
    let mut widths = [0; COLUMNS];
    for row in &rows {
        // What stands last in its row takes as much room as it likes.
        let cells = row.iter().rposition(|cell| !cell.is_empty()).unwrap_or(0);
        for (width, cell) in widths.iter_mut().zip(row).take(cells) {
            *width = cell.chars().count().max(*width);
        }
    }
    let line = |row: &[String; COLUMNS]| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

/// For programs.
pub(super) fn json(report: &DoctorReport) -> Value {
    let worker = |worker: &ExaminedWorker| {
        let facts = facts(worker);
        let libraries: serde_json::Map<String, Value> =
            facts.libraries.into_iter().map(|library| (library.name, library.version.into())).collect();
        json!({
            "address": worker.address,
            "zone": worker.zone,
            "device": worker.device,
            "memory": worker.memory,
            "fingerprint": worker.fingerprint,
            "machine": facts.machine,
            "boot": facts.boot,
            "kernel": facts.kernel,
            "program": { "version": facts.program, "hash": worker.program_hash },
            "libraries": libraries,
            "interface": facts.interface.map(|found| json!({
                "name": found.name,
                "mtu": found.mtu,
                "megabits": found.megabits,
                "loopback": found.loopback,
            })),
            "disk": worker.disk.as_ref().map(|disk| json!({
                "bytes_per_second": disk_rate(disk),
                "cached": disk.cached,
            })),
        })
    };
    let link = |link: &ExaminedLink| {
        let measured = |bytes: u64| (bytes > 0).then_some(bytes);
        let measures = link.measures.as_ref();
        json!({
            "from": address(report, link.from),
            "to": address(report, link.to),
            "failure": measures.is_none().then_some(&link.failure),
            "latency_ms": measures.map(|measures| measures.latency_nanos as f64 / 1e6),
            "clock_offset_ms": measures.map(|measures| measures.clock_offset_micros as f64 / 1e3),
            "bytes_per_second_there": measures.and_then(|measures| measured(measures.bandwidth_there)),
            "bytes_per_second_back": measures.and_then(|measures| measured(measures.bandwidth_back)),
        })
    };
    let complaint = |complaint: &client::Complaint| json!({ "workers": complaint.workers, "what": complaint.what, "advice": complaint.advice });
    json!({
        "workers": report.workers.iter().map(worker).collect::<Vec<_>>(),
        "links": report.links.iter().map(link).collect::<Vec<_>>(),
        "complaints": report.complaints.iter().map(complaint).collect::<Vec<_>>(),
        "remarks": report.remarks,
    })
}

#[cfg(test)]
mod tests {
    use client::{Complaint, Library};

    use super::*;

    fn report() -> DoctorReport {
        let worker = |number: usize| ExaminedWorker {
            address: format!("10.0.0.{number}:4000"),
            zone: String::new(),
            device: "cuda".into(),
            memory: 3 << 30,
            fingerprint: "yi".into(),
            facts: Some(Facts {
                program: "0.1.0".into(),
                machine: format!("node-{number}"),
                boot: "b".into(),
                kernel: "6.1".into(),
                libraries: vec![Library { name: "NCCL".into(), version: "2.28.9".into() }],
                interface: Some(NetworkInterface {
                    name: "eth0".into(),
                    mtu: 1500,
                    megabits: Some(10_000),
                    loopback: false,
                }),
            }),
            program_hash: "abc".into(),
            disk: (number == 1).then_some(DiskSpeed { bytes: 64_000_000, micros: 100_000, cached: true }),
        };
        let measures = LinkMeasures {
            latency_nanos: 123_456,
            clock_offset_micros: -1500,
            bandwidth_there: 1_100_000_000,
            bandwidth_back: 0,
        };
        let links = vec![
            ExaminedLink { from: 0, to: 1, failure: String::new(), measures: Some(measures) },
            ExaminedLink { from: 0, to: 2, failure: "refused".into(), measures: None },
        ];
        let complaint = Complaint {
            workers: vec!["10.0.0.3:4000".into()],
            what: "no connection".into(),
            advice: "look at firewalls".into(),
        };
        let workers = (1..4).map(worker).collect();
        DoctorReport { workers, links, complaints: vec![complaint], remarks: vec!["not all".into()] }
    }

    #[test]
    fn people_see_workers_links_and_complaints() {
        let text = text(&report());
        for part in [
            "3 workers\n",
            "10.0.0.1:4000  node-1 (kernel 6.1)  0.1.0 (abc)  cuda    3.0 GiB  eth0, MTU 1500, 10000 Mbit/s  640 MB/s (cached)\n",
            "10.0.0.2:4000: NCCL 2.28.9\n",
            "10.0.0.1:4000  10.0.0.2:4000  0.123 ms  1100 MB/s  -     -1.500 ms\n",
            "10.0.0.1:4000  10.0.0.3:4000  none: refused\n",
            "\nnot all\n",
            "complaints\n  10.0.0.3:4000: no connection\n    look at firewalls\n",
        ] {
            assert!(text.contains(part), "no '{part}' in:\n{text}");
        }
        let empty = super::text(&DoctorReport::default());
        assert!(empty.starts_with("no worker has joined\n") && empty.ends_with("no complaints\n"), "{empty}");
    }

    #[test]
    fn of_many_links_the_slowest_are_shown() {
        let link = |bandwidth: u64| ExaminedLink {
            measures: Some(LinkMeasures {
                bandwidth_there: bandwidth,
                bandwidth_back: bandwidth,
                ..LinkMeasures::default()
            }),
            ..ExaminedLink::default()
        };
        let links = (1..=100).rev().map(|rate| link(rate * 1_000_000)).collect();
        let text = text(&DoctorReport { links, ..report() });
        assert!(text.contains("  1 MB/s") && !text.contains("  31 MB/s"), "{text}");
        assert!(text.contains("  and 70 faster ones\n"), "{text}");
    }

    #[test]
    fn json_has_it_all() {
        let json = json(&report());
        assert_eq!(json["workers"][0]["libraries"]["NCCL"], "2.28.9");
        assert_eq!(json["workers"][0]["disk"]["bytes_per_second"], 640_000_000);
        assert_eq!(json["links"][0]["latency_ms"], 0.123_456);
        assert_eq!(json["links"][0]["bytes_per_second_back"], Value::Null);
        assert_eq!(json["links"][1]["failure"], "refused");
        assert_eq!(json["complaints"][0]["workers"][0], "10.0.0.3:4000");
        // A place that is not there does no harm.
        let links = vec![ExaminedLink { from: 9, ..ExaminedLink::default() }];
        assert_eq!(super::json(&DoctorReport { links, ..DoctorReport::default() })["links"][0]["from"], "?");
    }
}
