//! Which requests can be served at all: whatever is wrong with one is said before it waits.

use crate::Request;
use crate::config::SchedulerConfig;

/// Why a request is refused. The messages go to the client.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum AdmitError {
    /// Nothing to continue.
    #[error("the prompt is empty: at least one token is needed")]
    EmptyPrompt,
    /// The embedding has no row for it.
    #[error("token id {id} at position {position} is outside the vocabulary of {vocabulary}")]
    UnknownToken {
        /// The id.
        id: u32,
        /// Where.
        position: usize,
        /// Ids are below this.
        vocabulary: u32,
    },
    /// No room for a single new token.
    #[error(
        "the prompt has {prompt} tokens, but the context is {max_context} with at least one for the answer: \
         shorten the prompt"
    )]
    PromptTooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// The limit.
        max_context: u32,
    },
    /// It would never get enough blocks.
    #[error(
        "prompt and answer of up to {tokens} tokens need {needed} KV blocks, but there are {blocks} in all: \
         shorten the prompt, lower max_tokens, or give the workers more memory for KV"
    )]
    TooLarge {
        /// Tokens whose keys and values are kept at the end.
        tokens: usize,
        /// Blocks that they need.
        needed: usize,
        /// Blocks that there are.
        blocks: usize,
    },
    /// Nothing asked for.
    #[error("max_tokens is 0: at least 1 is needed")]
    NoTokens,
    /// Nothing left to generate.
    #[error("the answer has {answered} tokens already, and max_tokens is {max_tokens}: it is over")]
    Answered {
        /// Tokens of the answer to go on with.
        answered: usize,
        /// The limit.
        max_tokens: u32,
    },
    /// Not a temperature.
    #[error("temperature is {0}: use a number from 0 (greedy) upwards")]
    Temperature(f32),
    /// Not a probability.
    #[error("top_p is {0}: use a number above 0 and up to 1 (which keeps all tokens)")]
    TopP(f32),
}

/// Checks a request; returns the number of tokens that it may generate, which the context may clip.
pub(crate) fn admit(request: &Request, config: &SchedulerConfig) -> Result<u32, AdmitError> {
    let sampling = &request.sampling;
    if request.prompt.is_empty() {
        return Err(AdmitError::EmptyPrompt);
    }
    if request.max_tokens == 0 {
        return Err(AdmitError::NoTokens);
    }
    if !(sampling.temperature >= 0.0 && sampling.temperature.is_finite()) {
        return Err(AdmitError::Temperature(sampling.temperature));
    }
    if !(sampling.top_p > 0.0 && sampling.top_p <= 1.0) {
        return Err(AdmitError::TopP(sampling.top_p));
    }
    let (answered, max_tokens) = (request.answered(), request.max_tokens);
    match u32::try_from(answered.len()) {
        Ok(0) => room(&request.prompt, max_tokens, config),
        Ok(count) if count < max_tokens => {
            Ok(count + room(&[&request.prompt, answered].concat(), max_tokens - count, config)?)
        }
        _ => Err(AdmitError::Answered { answered: answered.len(), max_tokens }),
    }
}

/// How many of `max_tokens` more tokens a sequence of `tokens` may generate; fails if a group of these limits can
/// never compute it.
pub(crate) fn room(tokens: &[u32], max_tokens: u32, config: &SchedulerConfig) -> Result<u32, AdmitError> {
    let prompt = tokens.len();
    let SchedulerConfig { vocabulary, max_context, .. } = *config;
    if prompt >= max_context as usize {
        return Err(AdmitError::PromptTooLong { prompt, max_context });
    }
    if let Some(position) = tokens.iter().position(|&id| id >= vocabulary) {
        return Err(AdmitError::UnknownToken { id: tokens[position], position, vocabulary });
    }
    let max_tokens = max_tokens.min(max_context - prompt as u32);
    // The last token is generated, but its keys and values are never computed.
    let tokens = prompt + max_tokens as usize - 1;
    let (needed, blocks) = (config.blocks_for(tokens), config.blocks as usize);
    if needed > blocks { Err(AdmitError::TooLarge { tokens, needed, blocks }) } else { Ok(max_tokens) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SamplingParams;

    const CONFIG: SchedulerConfig = SchedulerConfig {
        blocks: 4,
        block_size: 8,
        max_context: 100,
        vocabulary: 50,
        max_batch_tokens: 16,
        max_sequences: 4,
        steps_in_flight: 1,
        stages: 1,
    };

    fn request(prompt: usize, max_tokens: u32) -> Request {
        Request {
            prompt: vec![49; prompt],
            max_tokens,
            sampling: SamplingParams::GREEDY,
            stop_ids: vec![],
            resume: None,
        }
    }

    #[test]
    fn the_pool_bounds_prompt_and_answer() {
        assert_eq!(admit(&request(30, 3), &CONFIG), Ok(3));
        let too_large = AdmitError::TooLarge { tokens: 33, needed: 5, blocks: 4 };
        assert_eq!(admit(&request(30, 4), &CONFIG), Err(too_large));
        assert!(too_large.to_string().contains("33 tokens need 5 KV blocks, but there are 4"));
    }

    #[test]
    fn the_context_clips_the_answer() {
        let config = SchedulerConfig { blocks: 100, ..CONFIG };
        assert_eq!(admit(&request(90, u32::MAX), &config), Ok(10));
        assert_eq!(admit(&request(99, u32::MAX), &config), Ok(1));
        let too_long = AdmitError::PromptTooLong { prompt: 100, max_context: 100 };
        assert_eq!(admit(&request(100, 1), &config), Err(too_long));
    }

    #[test]
    fn an_answer_that_goes_on_has_the_limits_of_one_from_the_start() {
        let going_on = |answered, max_tokens| {
            let request = Request { resume: Some(vec![49; answered]), ..request(30, max_tokens) };
            admit(&request, &CONFIG)
        };
        for answered in 0..3 {
            assert_eq!(going_on(answered, 3), Ok(3));
            let too_large = AdmitError::TooLarge { tokens: 33, needed: 5, blocks: 4 };
            assert_eq!(going_on(answered, 4), Err(too_large));
        }
        assert_eq!(going_on(3, 3), Err(AdmitError::Answered { answered: 3, max_tokens: 3 }));
        let clipped = Request { resume: Some(vec![49; 5]), ..request(90, u32::MAX) };
        assert_eq!(admit(&clipped, &SchedulerConfig { blocks: 100, ..CONFIG }), Ok(10));
        let unknown = Request { resume: Some(vec![1, 50]), ..request(3, 9) };
        let error = AdmitError::UnknownToken { id: 50, position: 4, vocabulary: 50 };
        assert_eq!(admit(&unknown, &CONFIG), Err(error));
    }

    #[test]
    fn false_values_are_refused() {
        assert_eq!(admit(&request(0, 1), &CONFIG), Err(AdmitError::EmptyPrompt));
        assert_eq!(admit(&request(1, 0), &CONFIG), Err(AdmitError::NoTokens));
        let mut unknown = request(3, 1);
        unknown.prompt[2] = 50;
        let error = AdmitError::UnknownToken { id: 50, position: 2, vocabulary: 50 };
        assert_eq!(admit(&unknown, &CONFIG), Err(error));

        let sampled = |temperature, top_p| {
            let mut request = request(1, 1);
            request.sampling = SamplingParams { temperature, top_p, ..SamplingParams::GREEDY };
            admit(&request, &CONFIG)
        };
        assert_eq!(sampled(2.0, 0.5), Ok(1));
        for temperature in [-0.1, f32::NAN, f32::INFINITY] {
            assert!(matches!(sampled(temperature, 1.0), Err(AdmitError::Temperature(_))));
        }
        for top_p in [0.0, -1.0, 1.1, f32::NAN] {
            assert!(matches!(sampled(1.0, top_p), Err(AdmitError::TopP(_))));
        }
    }
}
