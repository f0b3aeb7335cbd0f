//! What should be alike on all workers and is not.

use std::collections::{BTreeMap, BTreeSet};

use super::{Complaint, Patient, listed};

const SAME_PROGRAM: &str = "run the same build everywhere";
const SAME_FINGERPRINT: &str =
    "a group has one: give them the same checkpoint and types, and processors of one kind";
const SAME_LIBRARY: &str = "install the same version everywhere";
const SAME_MTU: &str = "set the same MTU on all machines and switches, or large messages stall";
const SAME_SPEED: &str = "look at cable, port and switch, or give --host an address on a faster network";

/// Compares program, model, libraries and network interfaces.
pub(super) fn complaints(patients: &[Patient]) -> Vec<Complaint> {
    let told = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let mut complaints = odd(patients, "version", SAME_PROGRAM, |patient| told(&patient.facts.program));
    if complaints.is_empty() {
        complaints = odd(patients, "build", SAME_PROGRAM, |patient| told(&patient.program_hash));
    }
    complaints.extend(odd(patients, "fingerprint", SAME_FINGERPRINT, |patient| told(&patient.fingerprint)));
    let libraries = || patients.iter().flat_map(|patient| &patient.facts.libraries);
    for name in libraries().map(|library| &library.name).collect::<BTreeSet<_>>() {
        complaints.extend(odd(patients, name, SAME_LIBRARY, |patient| {
            let libraries = &patient.facts.libraries;
            let version = libraries.iter().find(|library| library.name == *name);
            // A worker without a GPU has none of them.
            let missing = (!libraries.is_empty()).then(|| "none".to_owned());
            version.map(|library| library.version.clone()).or(missing)
        }));
    }
    let interface = |patient: &Patient| patient.facts.interface.clone().filter(|found| !found.loopback);
    complaints.extend(odd(patients, "MTU", SAME_MTU, |patient| Some(interface(patient)?.mtu.to_string())));
    complaints.extend(odd(patients, "network speed", SAME_SPEED, |patient| {
        Some(format!("{} Mbit/s", interface(patient)?.megabits?))
    }));
    complaints
}

/// Names those that have another value than most, or all if there is no such value.
fn odd(
    patients: &[Patient],
    what: &str,
    advice: &str,
    value: impl Fn(&Patient) -> Option<String>,
) -> Vec<Complaint> {
    let mut holders: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for patient in patients {
        if let Some(value) = value(patient) {
            holders.entry(value).or_default().push(patient.address.clone());
        }
    }
    if holders.len() < 2 {
        return Vec::new();
    }
    let told: usize = holders.values().map(Vec::len).sum();
    let complaint =
        |workers: Vec<String>, what: String| Complaint { workers, what, advice: advice.to_owned() };
    let usual = holders.iter().find(|(_, workers)| workers.len() * 2 > told).map(|(value, _)| value.clone());
    match usual {
        Some(usual) => {
            holders.remove(&usual);
            let odd =
                |(value, workers)| complaint(workers, format!("{what} {value}, most others have {usual}"));
            holders.into_iter().map(odd).collect()
        }
        None => {
            let has = |(value, workers): (&String, &Vec<String>)| format!("{} {value}", listed(workers));
            let values: Vec<_> = holders.iter().map(has).collect();
            let what = format!("differ in their {what}: {}", values.join("; "));
            vec![complaint(holders.into_values().flatten().collect(), what)]
        }
    }
}
