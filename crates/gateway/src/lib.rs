//! Text in front of a cluster that knows token ids only: tokenizer, chat template, stop strings, and the public
//! gRPC service over any [`coordinator::Engine`].

mod answer;
pub mod chat;
pub mod detokenize;
mod files;
mod health;
mod monitor;
mod pieces;
mod request;
mod resume;
pub mod server;
pub mod service;
pub mod stop;
pub mod tokenizer;

pub use chat::{ChatTemplate, Message, PromptError};
pub use detokenize::Detokenizer;
pub use files::TokenizerError;
pub use server::{ServeError, router, serve};
pub use service::GenerationService;
pub use stop::StopFilter;
pub use tokenizer::Tokenizer;
