//! What an examination comes to.

use super::diagnosis::Complaint;
use super::facts::Facts;
use super::findings::{Disk, Probed, wire};
use crate::proto;

/// A worker that is examined.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Patient {
    /// Where its collectives listen.
    pub address: String,
    /// Its fast domain.
    pub zone: String,
    /// `cpu` or `cuda`.
    pub device: String,
    /// Bytes that its share may take.
    pub memory: u64,
    /// Of what it serves.
    pub fingerprint: String,
    /// What it told when it joined.
    pub facts: Facts,
    /// Empty: not known.
    pub program_hash: String,
    /// None: not measured.
    pub disk: Option<Disk>,
}

/// A link between two of the patients, by their places among these, as the first sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// The first.
    pub from: usize,
    /// The other.
    pub to: usize,
    /// What came of it.
    pub probed: Probed,
}

/// What an examination comes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Who was examined.
    pub patients: Vec<Patient>,
    /// The links that were measured.
    pub pairs: Vec<Pair>,
    /// What is odd.
    pub complaints: Vec<Complaint>,
    /// What was not measured, and why.
    pub remarks: Vec<String>,
}

impl From<Report> for proto::DoctorReport {
    fn from(report: Report) -> Self {
        let Report { patients, pairs, complaints, remarks } = report;
        Self {
            workers: patients.into_iter().map(Into::into).collect(),
            links: pairs.into_iter().map(Into::into).collect(),
            complaints: complaints.into_iter().map(Into::into).collect(),
            remarks,
        }
    }
}

impl From<Patient> for proto::ExaminedWorker {
    fn from(patient: Patient) -> Self {
        let Patient { address, zone, device, memory, fingerprint, facts, program_hash, disk } = patient;
        let (facts, disk) = (Some(facts.into()), disk.map(Into::into));
        Self { address, zone, device, memory, fingerprint, facts, program_hash, disk }
    }
}

impl From<Pair> for proto::ExaminedLink {
    fn from(Pair { from, to, probed }: Pair) -> Self {
        let (failure, measures) = wire(probed);
        Self { from: from as u32, to: to as u32, failure, measures }
    }
}

impl From<Complaint> for proto::Complaint {
    fn from(Complaint { workers, what, advice }: Complaint) -> Self {
        Self { workers, what, advice }
    }
}
