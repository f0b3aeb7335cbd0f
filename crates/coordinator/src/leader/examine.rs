//! Examinations: who is there, what they find, and what is seen of a group that is formed without measuring anything.

use cluster::doctor::{Complaint, Findings, Patient, diagnose};
use cluster::{Candidate, WorkerId};
use tokio::sync::mpsc;
use tracing::warn;

use super::Leader;
use crate::examination::{Examination, Examinee, FINDINGS_BUFFERED, Introduction};

impl Leader {
    /// An examination of everybody who has joined. Groups that work are not disturbed, unless that is asked for.
    pub(super) fn examination(&mut self, disturb: bool) -> Result<Examination, String> {
        if self.findings.as_ref().is_some_and(|findings| !findings.is_closed()) {
            return Err("another examination is under way: wait for ten seconds".into());
        }
        let (sender, findings) = mpsc::channel(FINDINGS_BUFFERED);
        self.findings = Some(sender);
        let examinee = |worker: &Candidate| {
            let connection = self.workers.get(&worker.id)?;
            Some(Examinee {
                worker: worker.id,
                patient: patient(worker, &connection.introduction),
                probe_address: connection.introduction.probe_address.clone(),
                join: connection.join.clone(),
            })
        };
        let examinees = self.groups.workers().filter_map(examinee).collect();
        let bandwidth = disturb || self.groups.standing().next().is_none();
        Ok(Examination { examinees, findings, bandwidth })
    }

    /// A worker answers an examination, if it is still under way.
    pub(super) fn found(&self, worker: WorkerId, findings: Findings) {
        if let Some(examination) = &self.findings {
            let _ = examination.try_send((worker, findings));
        }
    }

    /// Compares what the members of each group told when they joined: what is odd is logged, and told with the status.
    pub(super) fn look_over(&mut self) {
        let member = |worker: WorkerId| {
            Some(patient(self.groups.worker(worker)?, &self.workers.get(&worker)?.introduction))
        };
        let odd = |group: &cluster::GroupFormation| -> Vec<Complaint> {
            diagnose(&group.workers().filter_map(member).collect::<Vec<_>>(), &[])
        };
        let complaints = self.groups.standing().flat_map(|(group, _)| odd(group));
        let complaints: Vec<String> = complaints.map(|complaint| complaint.to_string()).collect();
        for complaint in complaints.iter().filter(|complaint| !self.complaints.contains(complaint)) {
            warn!(complaint, "the members of a group differ");
        }
        self.complaints = complaints;
    }
}

fn patient(worker: &Candidate, introduction: &Introduction) -> Patient {
    Patient {
        address: worker.address.clone(),
        zone: worker.resources.zone.clone(),
        device: worker.resources.device.clone(),
        memory: worker.resources.memory,
        fingerprint: worker.report.fingerprint.clone(),
        facts: introduction.facts.clone(),
        program_hash: String::new(),
        disk: None,
    }
}
