//! The public service: checks requests, turns text into ids, and ids into text.

use std::sync::Arc;

use cluster::proto;
use cluster::proto::generation_server::Generation;
use coordinator::{Engine, ModelInfo};
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status};

use crate::answer::{Answer, engine_status};
use crate::request::{self, Input, Text};
use crate::stop::StopFilter;
use crate::tokenizer::Tokenizer;

/// Shorter texts are tokenized on the spot, in two milliseconds at most.
const SHORT_TEXT_BYTES: usize = 16 << 10;
/// Long texts that are tokenized at the same time: the longest take ten seconds and two gigabytes each.
const LONG_TEXTS: usize = 2;

/// Shorter answers are replayed on the spot, in two milliseconds at most.
const SHORT_ANSWER_TOKENS: usize = 1024;

/// Implements `phalanx.v1.Generation` over an engine.
#[derive(Clone)]
pub struct GenerationService {
    engine: Arc<dyn Engine>,
    tokenizer: Option<Arc<Tokenizer>>,
    long_texts: Arc<Semaphore>,
}

impl GenerationService {
    /// Serves what `engine` generates, with the tokenizer of the same checkpoint; without one, in token ids alone.
    pub fn new(engine: Arc<dyn Engine>, tokenizer: Option<Arc<Tokenizer>>) -> Self {
        Self { engine, tokenizer, long_texts: Arc::new(Semaphore::new(LONG_TEXTS)) }
    }

    /// The model, if there is one and the tokenizer is its own.
    fn model(&self) -> Result<ModelInfo, Status> {
        let model = self.engine.model().map_err(engine_status)?;
        if let Some(tokenizer) = &self.tokenizer {
            tokenizer
                .check(model.vocabulary)
                .map_err(|error| Status::failed_precondition(error.to_string()))?;
        }
        Ok(model)
    }

    /// The tokenizer, for what cannot do without.
    fn tokenizer(&self) -> Result<&Arc<Tokenizer>, Status> {
        let missing = || {
            Status::failed_precondition("the checkpoint has no tokenizer.json: give the prompt as token ids")
        };
        self.tokenizer.as_ref().ok_or_else(missing)
    }

    fn stop_ids(&self, model: &ModelInfo) -> Vec<u32> {
        let of_tokenizer = self.tokenizer.as_ref().map_or(&[][..], |tokenizer| tokenizer.stop_ids());
        let mut ids = [model.eos.as_slice(), of_tokenizer].concat();
        ids.retain(|&id| id < model.vocabulary);
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// Tokenizes, away from the threads that serve connections where it takes long.
    async fn encode(&self, text: Text) -> Result<Vec<u32>, Status> {
        let encoded = if text.len() <= SHORT_TEXT_BYTES {
            text.encode(self.tokenizer()?)
        } else {
            let permit = Arc::clone(&self.long_texts).acquire_owned().await.map_err(broken)?;
            let tokenizer = Arc::clone(self.tokenizer()?);
            let task = move || {
                let ids = text.encode(&tokenizer);
                drop(permit);
                ids
            };
            tokio::task::spawn_blocking(task).await.map_err(broken)?
        };
        encoded.map_err(|error| Status::invalid_argument(error.to_string()))
    }
}

#[tonic::async_trait]
impl Generation for GenerationService {
    type GenerateStream = Answer;

    async fn generate(
        &self,
        request: Request<proto::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let model = self.model()?;
        let (input, options) = request::parse(request.into_inner(), &model)?;
        let prompt = match input {
            Input::Ids(ids) => ids,
            Input::Text(text) => self.encode(text).await?,
        };
        let room = request::check_prompt(&prompt, &model, self.tokenizer.as_deref())?;
        let stop_ids = if options.ignore_eos { Vec::new() } else { self.stop_ids(&model) };
        let max_tokens = options.max_tokens.min(room);
        let started = started(&model, &options, &prompt);
        let stop = StopFilter::new(&options.stop);
        let mut answer = Answer::new(self.tokenizer.clone(), started, stop, stop_ids.clone());
        let (mut tokens, fingerprint) =
            options.resume.map(|resume| (resume.tokens, resume.fingerprint)).unzip();
        if let Some(tokens) = &mut tokens {
            answer = replay(answer, tokens, max_tokens).await?;
        }
        if !answer.is_over() {
            let sampling = options.sampling;
            let request = engine::Request { prompt, max_tokens, sampling, stop_ids, resume: tokens };
            answer.follow(self.engine.submit_under(request, fingerprint).await.map_err(engine_status)?);
        }
        Ok(Response::new(answer))
    }

    async fn tokenize(
        &self,
        request: Request<proto::TokenizeRequest>,
    ) -> Result<Response<proto::TokenizeResponse>, Status> {
        let token_ids = self.encode(Text::Plain(request.into_inner().text)).await?;
        Ok(Response::new(proto::TokenizeResponse { token_ids }))
    }

    async fn detokenize(
        &self,
        request: Request<proto::DetokenizeRequest>,
    ) -> Result<Response<proto::DetokenizeResponse>, Status> {
        let request = request.into_inner();
        let tokenizer = Arc::clone(self.tokenizer()?);
        let size = tokenizer.size();
        if let Some(position) = request.token_ids.iter().position(|&id| id >= size) {
            let id = request.token_ids[position];
            return Err(Status::invalid_argument(format!(
                "token_ids[{position}] is {id}, and the tokenizer's ids are below {size}"
            )));
        }
        let decode = move || tokenizer.decode(&request.token_ids, request.skip_special_tokens);
        let text = tokio::task::spawn_blocking(decode).await.map_err(broken)?;
        Ok(Response::new(proto::DetokenizeResponse { text }))
    }

    async fn get_model(&self, _: Request<proto::GetModelRequest>) -> Result<Response<proto::Model>, Status> {
        let model = self.model()?;
        Ok(Response::new(proto::Model {
            eos_token_ids: self.stop_ids(&model),
            name: model.name,
            vocabulary: model.vocabulary,
            max_context: model.max_context,
            ranks: model.ranks,
            fingerprint: model.fingerprint,
            has_chat_template: self.tokenizer.as_ref().is_some_and(|tokenizer| tokenizer.has_chat_template()),
        }))
    }
}

/// What a stream opens with.
fn started(model: &ModelInfo, options: &request::Options, prompt: &[u32]) -> proto::Started {
    let resume = options.resume.as_ref();
    let previous_fingerprint = resume
        .filter(|resume| resume.fingerprint != model.fingerprint)
        .map(|resume| resume.fingerprint.clone());
    proto::Started {
        request_id: resume
            .map_or_else(|| format!("{:016x}", rand::random::<u64>()), |resume| resume.request_id.clone()),
        seed: options.sampling.seed,
        prompt_token_ids: prompt.to_vec(),
        fingerprint: model.fingerprint.clone(),
        resumed_tokens: resume.map_or(0, |resume| resume.tokens.len() as u32),
        previous_fingerprint,
    }
}

/// [`Answer::replay`], away from the threads that serve connections where it takes long.
async fn replay(mut answer: Answer, tokens: &mut Vec<u32>, max_tokens: u32) -> Result<Answer, Status> {
    if tokens.len() <= SHORT_ANSWER_TOKENS {
        answer.replay(tokens, max_tokens)?;
        return Ok(answer);
    }
    let long = std::mem::take(tokens);
    let task = move || {
        let replayed = answer.replay(&long, max_tokens);
        (replayed, answer, long)
    };
    let (replayed, answer, long) = tokio::task::spawn_blocking(task).await.map_err(broken)?;
    *tokens = long;
    replayed.map(|()| answer)
}

fn broken(error: impl std::fmt::Display) -> Status {
    Status::internal(format!("the tokenizer broke: {error}"))
}
