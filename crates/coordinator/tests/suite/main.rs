//! Coordinators with fake workers over real gRPC.

mod contenders;
mod examinations;
mod fake;
mod groups;
mod harness;
mod service;
