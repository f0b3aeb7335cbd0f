//! One thing is made odd at a time, and named; nothing else is.

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::doctor::{Bandwidth, Disk, Facts, Interface, Library, Link, every_pair};

const GB: u64 = 1_000_000_000;

/// Workers on machines of their own, with which nothing is wrong.
fn patients(count: usize) -> Vec<Patient> {
    let library = |name: &str, version: &str| Library { name: name.into(), version: version.into() };
    let patient = |number: usize| Patient {
        address: format!("host{number}:1"),
        zone: String::new(),
        device: "cuda".into(),
        memory: 80 << 30,
        fingerprint: "model-bf16".into(),
        facts: Facts {
            program: "1.0".into(),
            machine: format!("host{number}"),
            boot: format!("boot{number}"),
            kernel: "6.1".into(),
            libraries: vec![library("NCCL", "2.28"), library("driver", "13.0")],
            interface: Some(Interface {
                name: format!("eth{number}"),
                mtu: 9000,
                megabits: Some(10_000),
                loopback: false,
            }),
        },
        program_hash: "abc".into(),
        disk: Some(Disk { bytes: 64 << 20, time: Duration::from_millis(64), cached: false }),
    };
    (0..count).map(patient).collect()
}

fn pairs(count: usize) -> Vec<Pair> {
    let link = Link {
        latency: Duration::from_micros(100),
        clock_offset_micros: 50,
        bandwidth: Some(Bandwidth { there: GB, back: GB }),
    };
    every_pair(count).into_iter().map(|(from, to)| Pair { from, to, probed: Ok(link) }).collect()
}

/// Changes the links of pairs.
fn with(mut pairs: Vec<Pair>, of: impl Fn(usize, usize) -> bool, change: impl Fn(&mut Link)) -> Vec<Pair> {
    for pair in pairs.iter_mut().filter(|pair| of(pair.from, pair.to)) {
        change(pair.probed.as_mut().expect("a link"));
    }
    pairs
}

/// The only complaint there is, of which the address is as expected; what it says.
#[track_caller]
fn only(complaints: &[Complaint], workers: &[usize]) -> String {
    let [complaint] = complaints else { panic!("not one complaint: {complaints:#?}") };
    let mut expected: Vec<_> = workers.iter().map(|worker| format!("host{worker}:1")).collect();
    let mut named = complaint.workers.clone();
    expected.sort();
    named.sort();
    assert_eq!(named, expected, "{complaint}");
    assert!(!complaint.advice.is_empty());
    complaint.what.clone()
}

/// What is complained of about one worker that was changed, whichever it is, in clusters of several sizes.
fn of_one(from: usize, change: impl Fn(&mut Patient)) -> String {
    let mut said = String::new();
    for count in from..7 {
        for culprit in 0..count {
            let mut patients = patients(count);
            change(&mut patients[culprit]);
            said = only(&diagnose(&patients, &pairs(count)), &[culprit]);
        }
    }
    said
}

/// Likewise about one whose links were changed. `change` is told whether it measures.
fn of_links_of_one(change: impl Fn(&mut Link, bool)) -> String {
    let mut said = String::new();
    for count in 3..9 {
        for culprit in 0..count {
            let pairs = with(pairs(count), |_, to| to == culprit, |link| change(link, false));
            let pairs = with(pairs, |from, _| from == culprit, |link| change(link, true));
            said = only(&diagnose(&patients(count), &pairs), &[culprit]);
            assert_eq!(doubtful(&patients(count), &pairs).len(), count - 1);
        }
    }
    said
}

#[test]
fn another_version_is_named() {
    let said = of_one(3, |patient| patient.facts.program = "0.9".into());
    assert_eq!(said, "version 0.9, most others have 1.0");
    // Where that is said, another build is no news.
    let said = of_one(3, |patient| {
        patient.facts.program = "0.9".into();
        patient.program_hash = "def".into();
    });
    assert_eq!(said, "version 0.9, most others have 1.0");
    assert_eq!(of_one(3, |patient| patient.program_hash = "def".into()), "build def, most others have abc");
}

#[test]
fn two_that_differ_are_both_named() {
    let mut patients = patients(2);
    patients[1].facts.program = "0.9".into();
    let said = only(&diagnose(&patients, &pairs(2)), &[0, 1]);
    assert_eq!(said, "differ in their version: host1:1 0.9; host0:1 1.0");
}

#[test]
fn another_model_library_mtu_or_network_is_named() {
    let said = of_one(3, |patient| patient.fingerprint = "other".into());
    assert_eq!(said, "fingerprint other, most others have model-bf16");
    let said = of_one(3, |patient| patient.facts.libraries[0].version = "2.18".into());
    assert_eq!(said, "NCCL 2.18, most others have 2.28");
    let said = of_one(3, |patient| drop(patient.facts.libraries.remove(0)));
    assert_eq!(said, "NCCL none, most others have 2.28");
    let interface = |patient: &mut Patient| patient.facts.interface.take().expect("one");
    let said = of_one(3, |patient| {
        patient.facts.interface = Some(Interface { mtu: 1500, ..interface(patient) });
    });
    assert_eq!(said, "MTU 1500, most others have 9000");
    let said = of_one(3, |patient| {
        patient.facts.interface = Some(Interface { megabits: Some(100), ..interface(patient) });
    });
    assert_eq!(said, "network speed 100 Mbit/s, most others have 10000 Mbit/s");
}

#[test]
fn an_address_that_leads_nowhere_is_named() {
    let lo = Interface { name: "lo".into(), mtu: 65_536, megabits: None, loopback: true };
    let said = of_one(2, |patient| patient.facts.interface = Some(lo.clone()));
    assert!(said.contains("loopback"), "{said}");
    // On one machine it is as good as any.
    let mut patients = patients(3);
    for patient in &mut patients {
        patient.facts.interface = Some(lo.clone());
        patient.facts.boot = "one".into();
    }
    assert_eq!(diagnose(&patients, &pairs(3)), []);
}

#[test]
fn less_memory_is_named() {
    let said = of_one(2, |patient| patient.memory = 60 << 30);
    assert_eq!(said, "it has 60.0 GiB of memory, others 80.0 GiB");
    let mut cpus = patients(3);
    cpus.iter_mut().for_each(|patient| patient.device = "cpu".into());
    cpus[1].memory = 60 << 30;
    assert_eq!(diagnose(&cpus, &pairs(3)), [], "what is free of a machine comes and goes");
    cpus[1].memory = 30 << 30;
    only(&diagnose(&cpus, &pairs(3)), &[1]);
}

#[test]
fn slow_disks_are_named() {
    let disk = |megabytes: u64, cached| {
        let time = Duration::from_micros((64 << 20) / megabytes);
        Some(Disk { bytes: 64 << 20, time, cached })
    };
    let said = of_one(2, |patient| patient.disk = disk(300, false));
    assert_eq!(said, "it reads its checkpoint at 300 MB/s, others at 1049 MB/s");
    let mut patients = patients(3);
    patients.iter_mut().for_each(|patient| patient.disk = disk(50, false));
    assert_eq!(diagnose(&patients, &[]).len(), 3, "too slow for anybody");
    patients.iter_mut().for_each(|patient| patient.disk = disk(50, true));
    assert_eq!(diagnose(&patients, &[]), [], "the page cache tells nothing");
    let short = Disk { bytes: 1000, time: Duration::from_millis(1), cached: false };
    patients.iter_mut().for_each(|patient| patient.disk = Some(short));
    assert_eq!(diagnose(&patients, &[]), [], "nor does a short read");
}

#[test]
fn the_worker_behind_a_slow_network_is_named() {
    let said = of_links_of_one(|link, _| link.bandwidth = Some(Bandwidth { there: GB, back: GB / 500 }));
    assert!(said.ends_with("is 2.0 MB/s, usual is 1000 MB/s"), "{said}");
    let said = of_links_of_one(|link, _| link.latency = Duration::from_micros(1500));
    assert!(said.ends_with("is 1.50 ms, usual is 0.10 ms"), "{said}");
}

#[test]
fn one_slow_link_is_named_itself() {
    for count in 3..7 {
        for pair in every_pair(count) {
            let pairs = with(
                pairs(count),
                |from, to| (from, to) == pair,
                |link| {
                    link.bandwidth = Some(Bandwidth { there: GB / 4, back: GB });
                },
            );
            let said = only(&diagnose(&patients(count), &pairs), &[pair.0, pair.1]);
            assert_eq!(said, "the bandwidth of the link between them is 250 MB/s, usual is 1000 MB/s");
            assert_eq!(doubtful(&patients(count), &pairs).len(), 1);
        }
    }
}

#[test]
fn a_network_that_is_slow_everywhere_is_complained_of_once() {
    for count in 2..6 {
        let all: Vec<_> = (0..count).collect();
        let slow = with(
            pairs(count),
            |_, _| true,
            |link| {
                link.bandwidth = Some(Bandwidth { there: GB / 100, back: GB / 100 });
            },
        );
        let said = only(&diagnose(&patients(count), &slow), &all);
        assert_eq!(said, "the bandwidth between them is 10 MB/s");
        let far = with(pairs(count), |_, _| true, |link| link.latency = Duration::from_millis(9));
        assert_eq!(only(&diagnose(&patients(count), &far), &all), "the latency between them is 9.00 ms");
        let mut zones = patients(count);
        zones.iter_mut().enumerate().for_each(|(number, patient)| patient.zone = number.to_string());
        assert_eq!(diagnose(&zones, &far), [], "zones may be far from each other");
    }
}

#[test]
fn links_inside_of_a_machine_are_no_measure_for_others() {
    let mut patients = patients(6);
    patients.iter_mut().enumerate().for_each(|(number, patient)| {
        patient.facts.boot = (number / 3).to_string();
    });
    let inside = |from: usize, to: usize| from / 3 == to / 3;
    let pairs = with(pairs(6), inside, |link| {
        link.bandwidth = Some(Bandwidth { there: 50 * GB, back: 50 * GB });
        link.latency = Duration::from_micros(5);
    });
    assert_eq!(diagnose(&patients, &pairs), []);
}

#[test]
fn who_cannot_be_reached_is_named() {
    for count in 3..8 {
        for culprit in 0..count {
            let mut pairs = pairs(count);
            for pair in pairs.iter_mut().filter(|pair| pair.from == culprit || pair.to == culprit) {
                pair.probed = Err("timed out".into());
            }
            let said = only(&diagnose(&patients(count), &pairs), &[culprit]);
            assert!(said.starts_with("no connection with ") && said.ends_with(": timed out"), "{said}");
            assert_eq!(doubtful(&patients(count), &pairs).len(), count - 1);
        }
    }
    let pairs = [Pair { from: 0, to: 1, probed: Err("refused".into()) }];
    assert_eq!(only(&diagnose(&patients(2), &pairs), &[0, 1]), "no connection between them: refused");
}

#[test]
fn a_clock_that_is_wrong_is_named() {
    let sign = |measures: bool| if measures { -1 } else { 1 };
    let said = of_links_of_one(|link, measures| link.clock_offset_micros = sign(measures) * 1_500_000);
    assert_eq!(said, "its clock is 1.5 s ahead of the others");
    let said = of_links_of_one(|link, measures| link.clock_offset_micros = sign(measures) * -200_000);
    assert_eq!(said, "its clock is 0.2 s behind the others");
    let pairs = with(pairs(2), |_, _| true, |link| link.clock_offset_micros = i64::MIN);
    let said = only(&diagnose(&patients(2), &pairs), &[0, 1]);
    assert!(said.ends_with(" apart"), "{said}");
}

#[test]
fn complaints_are_said_in_a_line() {
    let complaint = |workers: &[&str]| Complaint {
        workers: workers.iter().map(|worker| (*worker).to_owned()).collect(),
        what: "slow".into(),
        advice: "hurry".into(),
    };
    assert_eq!(complaint(&["a:1"]).to_string(), "worker a:1: slow (hurry)");
    assert_eq!(complaint(&["a:1", "b:1", "c:1"]).to_string(), "workers a:1, b:1 and c:1: slow (hurry)");
}

proptest! {
    #[test]
    fn nothing_is_odd_where_all_are_alike(
        count in 0usize..9,
        bandwidth in 100_000_000u64..100 * GB,
        micros in 0u64..2000,
        offset in -100_000i64..=100_000,
        memory: u64,
        libraries: bool,
        rate in 200u64..20_000,
    ) {
        let mut patients = patients(count);
        for patient in &mut patients {
            patient.memory = memory;
            patient.disk = Some(Disk { bytes: rate << 20, time: Duration::from_secs(1), cached: false });
            if !libraries {
                patient.facts = Facts { interface: None, libraries: vec![], ..patient.facts.clone() };
            }
        }
        let pairs = with(pairs(count), |_, _| true, |link| *link = Link {
            latency: Duration::from_micros(micros),
            clock_offset_micros: offset,
            bandwidth: Some(Bandwidth { there: bandwidth, back: bandwidth }),
        });
        prop_assert_eq!(diagnose(&patients, &pairs), vec![]);
        prop_assert_eq!(doubtful(&patients, &pairs), Vec::<usize>::new());
    }

    #[test]
    fn whatever_is_found_is_judged(
        count in 1usize..7,
        found in prop::collection::vec((any::<u64>(), any::<i64>(), any::<u64>(), any::<bool>()), 36),
    ) {
        let pairs: Vec<_> = every_pair(count).into_iter().zip(found).map(|((from, to), (nanos, offset, rate, lost))| {
            let link = Link {
                latency: Duration::from_nanos(nanos),
                clock_offset_micros: offset,
                bandwidth: Some(Bandwidth { there: rate, back: rate }),
            };
            Pair { from, to, probed: if lost { Err("lost".into()) } else { Ok(link) } }
        }).collect();
        let complaints = diagnose(&patients(count), &pairs);
        prop_assert_eq!(complaints.is_empty(), doubtful(&patients(count), &pairs).is_empty());
    }
}
