//! What a client asked for, checked: every message names the number and its limit.

use cluster::proto::generate_request::Prompt;
use cluster::proto::{GenerateRequest, SamplingOptions};
use coordinator::ModelInfo;
use engine::SamplingParams;
use tonic::Status;

use crate::chat::{Message, PromptError};
use crate::resume::Resume;
use crate::tokenizer::Tokenizer;

/// Tokens that are generated where the request does not say.
const DEFAULT_MAX_TOKENS: u32 = 256;
/// Stop strings of a request.
const MAX_STOP_STRINGS: usize = 16;
/// Bytes of a stop string.
const MAX_STOP_BYTES: usize = 256;
/// No prompt has more bytes than this for each token of the context; more is refused before it is tokenized.
const MAX_BYTES_PER_TOKEN: usize = 64;

/// Text that is still to become tokens.
#[derive(Debug)]
pub(crate) enum Text {
    /// As it stands.
    Plain(String),
    /// For the chat template.
    Conversation(Vec<Message>),
}

impl Text {
    /// Bytes of text.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Plain(text) => text.len(),
            Self::Conversation(messages) => messages.iter().map(|m| m.role.len() + m.content.len()).sum(),
        }
    }

    /// The token ids.
    pub(crate) fn encode(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>, PromptError> {
        match self {
            Self::Plain(text) => tokenizer.encode(text),
            Self::Conversation(messages) => tokenizer.encode_conversation(messages),
        }
    }
}

/// A prompt: ids, or text of a bearable length.
#[derive(Debug)]
pub(crate) enum Input {
    Ids(Vec<u32>),
    Text(Text),
}

/// Everything about a request but its prompt.
#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) max_tokens: u32,
    pub(crate) sampling: SamplingParams,
    pub(crate) stop: Vec<String>,
    pub(crate) ignore_eos: bool,
    /// The answer so far, of a request that goes on.
    pub(crate) resume: Option<Resume>,
}

/// Takes a request apart.
pub(crate) fn parse(mut request: GenerateRequest, model: &ModelInfo) -> Result<(Input, Options), Status> {
    let resume = request.resume.take().map(|resume| Resume::parse(resume, &request, model)).transpose()?;
    let max_tokens = request.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS);
    if max_tokens == 0 {
        return Err(Status::invalid_argument("max_tokens is 0, and must be at least 1"));
    }
    check_stop(&request.stop)?;
    let sampling = sampling(&request.sampling.unwrap_or_default())?;
    let input = input(request.prompt, model)?;
    Ok((input, Options { max_tokens, sampling, stop: request.stop, ignore_eos: request.ignore_eos, resume }))
}

/// Checks the ids of a prompt and gives back how many tokens the context has left.
pub(crate) fn check_prompt(
    ids: &[u32],
    model: &ModelInfo,
    tokenizer: Option<&Tokenizer>,
) -> Result<u32, Status> {
    if ids.is_empty() {
        return Err(Status::invalid_argument("the prompt is empty, and must have at least 1 token"));
    }
    if let Some(position) = ids.iter().position(|&id| id >= model.vocabulary) {
        let (id, vocabulary) = (ids[position], model.vocabulary);
        let name =
            tokenizer.and_then(|t| t.token(id)).map_or_else(String::new, |token| format!(" ({token})"));
        return Err(Status::invalid_argument(format!(
            "token {position} of the prompt has id {id}{name}, and the model's ids are below {vocabulary}"
        )));
    }
    let room = u32::try_from(ids.len()).ok().and_then(|length| model.max_context.checked_sub(length));
    room.filter(|&room| room > 0).ok_or_else(|| {
        Status::invalid_argument(format!(
            "the prompt has {} tokens, and the context of {} must hold it and at least 1 more",
            ids.len(),
            model.max_context
        ))
    })
}

fn input(prompt: Option<Prompt>, model: &ModelInfo) -> Result<Input, Status> {
    let text = match prompt {
        None => {
            return Err(Status::invalid_argument("there is no prompt: give text, token_ids or conversation"));
        }
        Some(Prompt::TokenIds(ids)) => return Ok(Input::Ids(ids.ids)),
        Some(Prompt::Text(text)) => Text::Plain(text),
        Some(Prompt::Conversation(conversation)) => {
            let messages = conversation.messages.into_iter();
            Text::Conversation(messages.map(|m| Message { role: m.role, content: m.content }).collect())
        }
    };
    let limit = (model.max_context as usize).saturating_mul(MAX_BYTES_PER_TOKEN);
    if text.len() > limit {
        let (length, context) = (text.len(), model.max_context);
        return Err(Status::invalid_argument(format!(
            "the prompt has {length} bytes, and at most {limit} can fit a context of {context} tokens"
        )));
    }
    Ok(Input::Text(text))
}

fn check_stop(stop: &[String]) -> Result<(), Status> {
    if stop.len() > MAX_STOP_STRINGS {
        let count = stop.len();
        return Err(Status::invalid_argument(format!(
            "there are {count} stop strings, and at most {MAX_STOP_STRINGS} are taken"
        )));
    }
    match stop.iter().map(String::len).enumerate().find(|&(_, length)| length == 0 || length > MAX_STOP_BYTES)
    {
        None => Ok(()),
        Some((index, length)) => Err(Status::invalid_argument(format!(
            "stop string {index} has {length} bytes, and must have 1 to {MAX_STOP_BYTES}"
        ))),
    }
}

fn sampling(options: &SamplingOptions) -> Result<SamplingParams, Status> {
    let temperature = options.temperature.unwrap_or(0.0);
    if !(temperature.is_finite() && temperature >= 0.0) {
        return Err(Status::invalid_argument(format!("temperature is {temperature}, and must be 0 or more")));
    }
    let top_p = options.top_p.unwrap_or(1.0);
    if !(top_p > 0.0 && top_p <= 1.0) {
        return Err(Status::invalid_argument(format!("top_p is {top_p}, and must be above 0 and at most 1")));
    }
    let seed = options.seed.unwrap_or_else(rand::random);
    Ok(SamplingParams { temperature, top_p, top_k: options.top_k.unwrap_or(0), seed })
}
