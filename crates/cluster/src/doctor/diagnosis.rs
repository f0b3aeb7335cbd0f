//! What is odd about workers and the links between them, and whose fault it most likely is.
//!
//! Nothing here has a scale of its own where workers can be held against each other: what is alike everywhere is only complained of where
//! no serving goes well with it.

mod blame;
mod links;
mod odd;
mod resources;
#[cfg(test)]
mod tests;

use std::fmt;

use super::report::{Pair, Patient};

/// Something that is odd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Complaint {
    /// Addresses of the workers that it is about.
    pub workers: Vec<String>,
    /// What is odd about them.
    pub what: String,
    /// What can be done about it.
    pub advice: String,
}

/// All that is odd. Without pairs: what is known without measuring.
pub fn diagnose(patients: &[Patient], pairs: &[Pair]) -> Vec<Complaint> {
    let mut complaints = odd::complaints(patients);
    complaints.extend(resources::complaints(patients));
    complaints.extend(links::complaints(patients, pairs));
    complaints
}

/// The pairs, by their places, that would be complained of: to be measured again before anybody is told.
pub fn doubtful(patients: &[Patient], pairs: &[Pair]) -> Vec<usize> {
    links::bad(patients, pairs)
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { workers, what, advice } = self;
        let noun = if workers.len() == 1 { "worker" } else { "workers" };
        write!(f, "{noun} {}: {what} ({advice})", listed(workers))
    }
}

/// "a", "a and b", "a, b and c".
fn listed<T: AsRef<str>>(names: &[T]) -> String {
    let names: Vec<&str> = names.iter().map(AsRef::as_ref).collect();
    match names.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} and {last}", rest.join(", ")),
        _ => names.join(", "),
    }
}

fn addresses(patients: &[Patient], places: &[usize]) -> Vec<String> {
    places.iter().map(|&place| patients[place].address.clone()).collect()
}

/// The one in the middle; of two, the better one, by an order in which better ones are greater.
fn median<T: Ord + Copy>(mut values: Vec<T>) -> Option<T> {
    values.sort_unstable();
    values.get(values.len() / 2).copied()
}

/// For people, who count in powers of 1000.
fn megabytes(bytes: u64) -> String {
    let megabytes = bytes as f64 / 1e6;
    if megabytes < 10.0 { format!("{megabytes:.1} MB") } else { format!("{megabytes:.0} MB") }
}
