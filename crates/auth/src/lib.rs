//! Proof of the cluster's secret without sending it: HMAC challenges, both ways.
//!
//! Each side sends a random nonce and answers the other's with HMAC-SHA256 over a role, a context (what the
//! connection is for: cluster, epoch, ranks, protocol version) and both nonces. A recorded answer is of no use for
//! another nonce, and one role's answer cannot be reflected as the other's.

use std::fmt;
use std::sync::Arc;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// Bytes that a secret has at least: whoever records a proof can try guesses at leisure.
pub const MIN_SECRET_BYTES: usize = 16;

/// Separates these proofs from any other use of the same secret.
const DOMAIN: &[u8] = b"phalanx-auth-v1";

/// A secret that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SecretError {
    /// Too easy to guess.
    #[error("the cluster's secret has {bytes} bytes, it needs at least {MIN_SECRET_BYTES}")]
    TooShort {
        /// Bytes that it has.
        bytes: usize,
    },
}

/// What all processes of a cluster know and nobody else does. Cheap to clone; never printed.
#[derive(Clone)]
pub struct Secret(Arc<[u8]>);

impl Secret {
    /// Takes the bytes (or the text) as they are; fails below [`MIN_SECRET_BYTES`].
    pub fn new(bytes: impl AsRef<[u8]>) -> Result<Self, SecretError> {
        let bytes = bytes.as_ref();
        if bytes.len() < MIN_SECRET_BYTES {
            return Err(SecretError::TooShort { bytes: bytes.len() });
        }
        Ok(Self(bytes.into()))
    }

    /// 32 random bytes, for a cluster that lives in one process.
    pub fn random() -> Self {
        Self(Arc::new(rand::random::<[u8; 32]>()))
    }

    /// This side's answer to a challenge: it knows the secret, plays `role`, and means `context`.
    pub fn prove(&self, role: Role, context: &[u8], initiator: &Nonce, responder: &Nonce) -> Proof {
        Proof(self.mac(role, context, initiator, responder).finalize().into_bytes().into())
    }

    /// Whether `proof` is the answer of the side that plays `role`, compared in constant time.
    pub fn verify(
        &self,
        role: Role,
        context: &[u8],
        initiator: &Nonce,
        responder: &Nonce,
        proof: &Proof,
    ) -> bool {
        self.mac(role, context, initiator, responder).verify_slice(&proof.0).is_ok()
    }

    /// Every part but the last has a fixed length, so no two inputs give the same bytes.
    fn mac(&self, role: Role, context: &[u8], initiator: &Nonce, responder: &Nonce) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes keys of any length");
        mac.update(DOMAIN);
        mac.update(&[match role {
            Role::Initiator => 0,
            Role::Responder => 1,
        }]);
        mac.update(&initiator.0);
        mac.update(&responder.0);
        mac.update(context);
        mac
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Which side of a connection proves something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The side that connected.
    Initiator,
    /// The side that listened.
    Responder,
}

/// A challenge: random, used once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nonce(pub [u8; 32]);

impl Nonce {
    /// A fresh one, from a cryptographic generator.
    pub fn random() -> Self {
        Self(rand::random())
    }
}

/// The answer to a challenge. Not comparable: [`Secret::verify`] does that in constant time.
#[derive(Debug, Clone, Copy)]
pub struct Proof(pub [u8; 32]);

#[cfg(test)]
mod tests {
    use super::*;

    const A: Nonce = Nonce([1; 32]);
    const B: Nonce = Nonce([2; 32]);

    fn secret(text: &str) -> Secret {
        Secret::new(text).unwrap()
    }

    #[test]
    fn a_proof_holds_for_its_own_inputs_only() {
        let ours = secret("a secret of the cluster");
        let proof = ours.prove(Role::Initiator, b"context", &A, &B);
        assert!(ours.verify(Role::Initiator, b"context", &A, &B, &proof));

        assert!(!ours.verify(Role::Responder, b"context", &A, &B, &proof), "reflected");
        assert!(!ours.verify(Role::Initiator, b"contexts", &A, &B, &proof), "another purpose");
        assert!(!ours.verify(Role::Initiator, b"context", &B, &A, &proof), "nonces swapped");
        assert!(!ours.verify(Role::Initiator, b"context", &A, &A, &proof), "replayed");
        let theirs = secret("a secret of another one");
        assert!(!theirs.verify(Role::Initiator, b"context", &A, &B, &proof), "another secret");
    }

    #[test]
    fn every_changed_bit_is_noticed() {
        let ours = Secret::random();
        let proof = ours.prove(Role::Responder, b"", &A, &B);
        for bit in 0..256 {
            let mut changed = proof;
            changed.0[bit / 8] ^= 1 << (bit % 8);
            assert!(!ours.verify(Role::Responder, b"", &A, &B, &changed));
        }
    }

    #[test]
    fn short_secrets_are_refused() {
        assert_eq!(Secret::new("fifteen bytes..").err(), Some(SecretError::TooShort { bytes: 15 }));
        assert!(Secret::new([0u8; MIN_SECRET_BYTES]).is_ok());
    }

    #[test]
    fn debug_does_not_tell() {
        let text = format!("{:?}", secret("a secret of the cluster"));
        assert_eq!(text, "Secret(..)");
    }

    #[test]
    fn random_values_differ() {
        assert_ne!(Nonce::random(), Nonce::random());
        let proof = Secret::random().prove(Role::Initiator, b"", &A, &B);
        assert!(!Secret::random().verify(Role::Initiator, b"", &A, &B, &proof));
    }

    /// Pins the bytes that are hashed: a change here needs a new protocol version.
    #[test]
    fn the_layout_is_pinned() {
        let proof = secret("0123456789abcdef").prove(Role::Initiator, b"context", &A, &B);
        let hex: String = proof.0.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, "ecf427a68052929deebc25e60ad5d024ed9d79f4ad8cb36efa567a0f2e6305bd");
    }
}
