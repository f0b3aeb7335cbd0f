//! Proofs between a worker and its coordinator: both know the cluster's secret, neither sends it.

use auth::{Nonce, Proof, Role, Secret};
use bytes::Bytes;
use engine::Epoch;

use crate::convert::Malformed;
use crate::{PROTOCOL, WorkerId};

/// The proofs of one Join stream, bound to its two nonces: a proof recorded on one stream is of no use on another.
/// The worker is the initiator.
#[derive(Debug, Clone)]
pub struct Session {
    secret: Secret,
    worker: Nonce,
    coordinator: Nonce,
}

impl Session {
    /// A stream with these nonces.
    pub fn new(secret: Secret, worker: Nonce, coordinator: Nonce) -> Self {
        Self { secret, worker, coordinator }
    }

    /// The coordinator's answer to `Hello`.
    pub fn coordinator_proof(&self) -> Bytes {
        self.prove(Role::Responder, &join_context())
    }

    /// Whether the coordinator knows the secret.
    pub fn verify_coordinator(&self, proof: &[u8]) -> bool {
        self.verify(Role::Responder, &join_context(), proof)
    }

    /// The worker's answer to `Challenge`.
    pub fn worker_proof(&self) -> Bytes {
        self.prove(Role::Initiator, &join_context())
    }

    /// Whether the worker knows the secret.
    pub fn verify_worker(&self, proof: &[u8]) -> bool {
        self.verify(Role::Initiator, &join_context(), proof)
    }

    /// What opens the Steps stream of one epoch.
    pub fn attach_proof(&self, worker: WorkerId, epoch: Epoch) -> Bytes {
        self.prove(Role::Initiator, &attach_context(worker, epoch))
    }

    /// Whether a Steps stream is opened by the worker of this Join stream.
    pub fn verify_attach(&self, worker: WorkerId, epoch: Epoch, proof: &[u8]) -> bool {
        self.verify(Role::Initiator, &attach_context(worker, epoch), proof)
    }

    /// What goes with an operator's order, who is the initiator in place of a worker.
    pub fn order_proof(&self, order: &[u8]) -> Bytes {
        self.prove(Role::Initiator, &order_context(order))
    }

    /// Whether an order comes from somebody who knows the secret.
    pub fn verify_order(&self, order: &[u8], proof: &[u8]) -> bool {
        self.verify(Role::Initiator, &order_context(order), proof)
    }

    fn prove(&self, role: Role, context: &str) -> Bytes {
        let proof = self.secret.prove(role, context.as_bytes(), &self.worker, &self.coordinator);
        Bytes::copy_from_slice(&proof.0)
    }

    fn verify(&self, role: Role, context: &str, proof: &[u8]) -> bool {
        proof.try_into().is_ok_and(|proof| {
            self.secret.verify(role, context.as_bytes(), &self.worker, &self.coordinator, &Proof(proof))
        })
    }
}

/// A nonce as it came in `field`.
pub fn nonce(field: &'static str, bytes: &[u8]) -> Result<Nonce, Malformed> {
    bytes.try_into().map(Nonce).map_err(|_| Malformed { field, problem: "is not a nonce".into() })
}

fn join_context() -> String {
    format!("phalanx join, protocol {PROTOCOL}")
}

fn attach_context(worker: WorkerId, epoch: Epoch) -> String {
    format!("phalanx steps, protocol {PROTOCOL}, worker {worker}, epoch {epoch}")
}

fn order_context(order: &[u8]) -> String {
    format!("phalanx order, protocol {PROTOCOL}, {order:02x?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proofs_hold_for_their_purpose_only() {
        let secret = Secret::random();
        let session = Session::new(secret.clone(), Nonce::random(), Nonce::random());
        assert!(session.verify_worker(&session.worker_proof()));
        assert!(session.verify_coordinator(&session.coordinator_proof()));
        assert!(!session.verify_worker(&session.coordinator_proof()));
        assert!(!session.verify_worker(b"short"));

        let epoch = Epoch { term: 1, counter: 2 };
        let attach = session.attach_proof(WorkerId(3), epoch);
        assert!(session.verify_attach(WorkerId(3), epoch, &attach));
        assert!(!session.verify_attach(WorkerId(4), epoch, &attach));
        assert!(!session.verify_attach(WorkerId(3), Epoch { term: 1, counter: 3 }, &attach));
        let order = session.order_proof(b"drain");
        assert!(session.verify_order(b"drain", &order));
        assert!(!session.verify_order(b"scale", &order));
        assert!(!session.verify_worker(&order));
        let later = Session::new(secret, Nonce::random(), Nonce::random());
        assert!(!later.verify_attach(WorkerId(3), epoch, &attach));
    }
}
