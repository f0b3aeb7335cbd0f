//! Memory, disks, and addresses that lead nowhere.

use std::collections::{BTreeMap, BTreeSet};

use super::{Complaint, Patient, median, megabytes};
use crate::doctor::Disk;

/// Loading a model of 68 GB in five minutes reads so much in a second.
const LEAST_DISK_RATE: u64 = 200_000_000;
/// Less than this, of what others read, is far less.
const FAR_LESS: u64 = 3;
/// Shorter reads tell little of a disk.
const TELLING_BYTES: u64 = 16 << 20;
const TELLING_MICROS: u128 = 400_000;

/// What is odd about single workers.
pub(super) fn complaints(patients: &[Patient]) -> Vec<Complaint> {
    let mut complaints = loopback(patients);
    complaints.extend(memory(patients));
    complaints.extend(disk(patients));
    complaints
}

/// Workers that tell others an address on which only their own machine reaches them.
fn loopback(patients: &[Patient]) -> Vec<Complaint> {
    let boots = patients.iter().map(|patient| &patient.facts.boot).filter(|boot| !boot.is_empty());
    if boots.collect::<BTreeSet<_>>().len() < 2 {
        return Vec::new();
    }
    let by_loopback =
        |patient: &Patient| patient.facts.interface.as_ref().is_some_and(|found| found.loopback);
    let lost = patients.iter().filter(|patient| by_loopback(patient) && !patient.facts.boot.is_empty());
    let complaint = |patient: &Patient| Complaint {
        workers: vec![patient.address.clone()],
        what: "its address is one of the loopback interface, and others are on other machines".into(),
        advice: "give --host an address at which they reach it".into(),
    };
    lost.map(complaint).collect()
}

/// What one rank lacks, the others leave unused.
fn memory(patients: &[Patient]) -> Vec<Complaint> {
    let mut of_device: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    for patient in patients {
        of_device.entry(&patient.device).or_default().push(patient.memory);
    }
    let usual: BTreeMap<&str, Option<u64>> =
        of_device.into_iter().map(|(device, memory)| (device, median(memory))).collect();
    let complaint = |patient: &Patient| {
        // What is taken of a GPU stays taken; what is free of a machine comes and goes.
        let enough = if patient.device == "cuda" { 0.8 } else { 0.5 };
        let usual = usual.get(patient.device.as_str()).copied().flatten()?;
        ((patient.memory as f64) < usual as f64 * enough).then(|| Complaint {
            workers: vec![patient.address.clone()],
            what: format!("it has {} of memory, others {}", gibibytes(patient.memory), gibibytes(usual)),
            advice: "all ranks take what the least has: see what else is on its device, or drain it".into(),
        })
    };
    patients.iter().filter_map(complaint).collect()
}

/// Disks that are slow, or far slower than others.
fn disk(patients: &[Patient]) -> Vec<Complaint> {
    let telling = |disk: &Disk| {
        !disk.cached && (disk.bytes >= TELLING_BYTES || disk.time.as_micros() >= TELLING_MICROS)
    };
    let rate = |patient: &Patient| patient.disk.filter(telling).map(|disk| disk.rate());
    let Some(usual) = median(patients.iter().filter_map(rate).collect()) else { return Vec::new() };
    let least = LEAST_DISK_RATE.max(usual / FAR_LESS);
    let complaint = |patient: &Patient| {
        let rate = rate(patient).filter(|rate| *rate < least)?;
        let others =
            if usual < least { String::new() } else { format!(", others at {}/s", megabytes(usual)) };
        Some(Complaint {
            workers: vec![patient.address.clone()],
            what: format!("it reads its checkpoint at {}/s{others}", megabytes(rate)),
            advice: "loading takes as long: put the checkpoint on a faster disk".into(),
        })
    };
    patients.iter().filter_map(complaint).collect()
}

fn gibibytes(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}
