//! The gateway: what it makes of texts by itself, and of requests in front of an engine that the tests drive by hand.
#![allow(clippy::unwrap_used, reason = "a test that can not go on fails")]

mod fake;
mod resume;
mod samples;
mod service;
mod tokenizer;
