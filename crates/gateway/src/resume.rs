//! What a client has of an answer whose stream broke off, checked.

use cluster::proto;
use cluster::proto::generate_request::Prompt;
use coordinator::ModelInfo;
use tonic::Status;

/// Bytes of a request's name.
const MAX_REQUEST_ID_BYTES: usize = 64;
/// Bytes of a fingerprint.
const MAX_FINGERPRINT_BYTES: usize = 4096;

/// An answer to go on with.
#[derive(Debug)]
pub(crate) struct Resume {
    /// The name that the request got when it began.
    pub(crate) request_id: String,
    /// What it began under.
    pub(crate) fingerprint: String,
    /// Its tokens, all within the vocabulary.
    pub(crate) tokens: Vec<u32>,
}

impl Resume {
    /// Takes what a client sent; the rest of its request must be the one that the answer began with, as `started` told it.
    pub(crate) fn parse(
        resume: proto::Resume,
        request: &proto::GenerateRequest,
        model: &ModelInfo,
    ) -> Result<Self, Status> {
        let proto::Resume { request_id, fingerprint, token_ids } = resume;
        if !matches!(request.prompt, Some(Prompt::TokenIds(_))) {
            return Err(invalid("resume takes the prompt as token_ids: started.prompt_token_ids".into()));
        }
        if request.sampling.and_then(|sampling| sampling.seed).is_none() {
            return Err(invalid("resume takes sampling.seed: started.seed".into()));
        }
        let named = (1..=MAX_REQUEST_ID_BYTES).contains(&request_id.len())
            && request_id.bytes().all(|byte| byte.is_ascii_graphic());
        if !named {
            return Err(invalid(format!(
                "resume.request_id has {} bytes, and must be started.request_id, of 1 to {MAX_REQUEST_ID_BYTES} letters",
                request_id.len()
            )));
        }
        if fingerprint.len() > MAX_FINGERPRINT_BYTES {
            return Err(invalid(format!(
                "resume.fingerprint has {} bytes, and may have {MAX_FINGERPRINT_BYTES}",
                fingerprint.len()
            )));
        }
        if let Some(position) = token_ids.iter().position(|&id| id >= model.vocabulary) {
            let (id, vocabulary) = (token_ids[position], model.vocabulary);
            return Err(invalid(format!(
                "resume.token_ids[{position}] is {id}, and the model's ids are below {vocabulary}"
            )));
        }
        Ok(Self { request_id, fingerprint, tokens: token_ids })
    }
}

fn invalid(reason: String) -> Status {
    Status::invalid_argument(reason)
}
