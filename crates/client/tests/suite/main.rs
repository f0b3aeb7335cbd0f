//! The client against servers that the tests play.

mod resume;
mod service;
