//! The generated protobuf types and services of `proto/phalanx/v1`.
#![allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, reason = "generated code")]

tonic::include_proto!("phalanx.v1");

/// The encoded descriptors of both services, for server reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/phalanx.v1.bin"));
