//! Streams that broke off and go on: the same tokens, text and end as if they had not, wherever they were cut.

use cluster::proto::generate_request::Prompt;
use cluster::proto::{self, FinishReason as Reason, Finished, GenerateRequest, Resume, SamplingOptions};
use coordinator::ModelInfo;
use engine::FinishReason;
use tonic::Code;

use crate::fake::{CACHED, Gateway, Responses, finished, model, token};
use crate::samples::nano;

const PROMPT: [u32; 2] = [300, 301];
const FINGERPRINT: &str = "nano/bf16";

/// The token that stands for a byte.
fn byte(byte: u8) -> u32 {
    8 + u32::from(byte)
}

fn request(stop: &str, max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        prompt: Some(Prompt::TokenIds(proto::TokenIds { ids: PROMPT.to_vec() })),
        sampling: Some(SamplingOptions { seed: Some(5), ..Default::default() }),
        max_tokens: Some(max_tokens),
        stop: vec![stop.into()],
        ..Default::default()
    }
}

fn resumed(request: &GenerateRequest, tokens: &[u32]) -> GenerateRequest {
    let resume =
        Resume { request_id: "r-1".into(), fingerprint: FINGERPRINT.into(), token_ids: tokens.to_vec() };
    GenerateRequest { resume: Some(resume), ..request.clone() }
}

/// An answer as the engine gives it.
struct Script {
    request: GenerateRequest,
    tokens: Vec<u32>,
    /// How the engine ends it; none where the gateway does.
    end: Option<FinishReason>,
}

impl Script {
    /// Reads the tokens from `start` on: the text of each, and the end. The engine says what is left of the script.
    async fn read(
        &self,
        start: usize,
        responses: &mut Responses,
        engine: &tokio::sync::mpsc::UnboundedSender<coordinator::EngineEvent>,
    ) -> (Vec<String>, Finished) {
        let mut texts = Vec::new();
        for &id in &self.tokens[start..] {
            engine.send(token(id)).unwrap();
            let token = responses.token().await;
            assert_eq!(token.id, id);
            texts.push(token.text);
        }
        if let Some(reason) = self.end {
            let prompt = PROMPT.len() as u32;
            engine.send(finished(reason, prompt, self.tokens.len() as u32)).unwrap();
        }
        (texts, responses.finished().await)
    }

    /// Cuts the answer behind every token, the first and the last included.
    async fn cut_everywhere(&self) -> (String, Finished) {
        let mut gateway = Gateway::start(nano(), Ok(model())).await;
        let (mut responses, (asked, engine)) = gateway.generate(self.request.clone()).await;
        assert_eq!(asked.resume, None);
        let started = responses.started().await;
        assert_eq!((started.resumed_tokens, started.previous_fingerprint), (0, None));
        let (texts, end) = self.read(0, &mut responses, &engine).await;
        for cut in 0..=self.tokens.len() {
            let request = resumed(&self.request, &self.tokens[..cut]);
            let over = cut == self.tokens.len();
            let (mut responses, submitted) = if over {
                (Responses(gateway.client.generate(request).await.unwrap().into_inner()), None)
            } else {
                let (responses, submitted) = gateway.generate(request).await;
                (responses, Some(submitted))
            };
            let again = responses.started().await;
            assert_eq!((again.request_id.as_str(), again.seed), ("r-1", 5));
            assert_eq!(again.prompt_token_ids, PROMPT);
            assert_eq!((again.resumed_tokens, again.previous_fingerprint), (cut as u32, None));
            let (rest, ended) = match submitted {
                None => {
                    let ended = responses.finished().await;
                    let usage = ended.usage.unwrap();
                    assert_eq!(usage.cached_tokens, 0, "nobody was asked");
                    let usage = Some(proto::Usage { cached_tokens: CACHED, ..usage });
                    (Vec::new(), Finished { usage, ..ended })
                }
                Some((resumed, engine)) => {
                    assert_eq!(resumed.resume.as_deref(), Some(&self.tokens[..cut]));
                    assert_eq!(engine::Request { resume: None, ..resumed }, asked);
                    self.read(cut, &mut responses, &engine).await
                }
            };
            assert_eq!((rest.as_slice(), &ended), (&texts[cut..], &end), "cut after {cut}");
            assert!(gateway.submitted.try_recv().is_err(), "an answer that is over asks for nothing");
        }
        (texts.concat(), end)
    }
}

#[tokio::test]
async fn in_the_middle_of_characters_and_of_a_stop_string() {
    let text = "a光\nUs🏳\nUser";
    let script =
        Script { request: request("\nUser", 50), tokens: text.bytes().map(byte).collect(), end: None };
    let (text, end) = script.cut_everywhere().await;
    assert_eq!(text + &end.text, "a光\nUs🏳");
    assert_eq!(end.reason(), Reason::Stop);
    assert_eq!(
        end.usage,
        Some(proto::Usage { prompt_tokens: 2, completion_tokens: 16, cached_tokens: CACHED })
    );
}

#[tokio::test]
async fn up_to_max_tokens_with_a_cut_character_and_held_text_at_the_end() {
    let tokens: Vec<u32> = b"xy\nUs\xe5\x85".iter().copied().map(byte).collect();
    let script = Script { request: request("\nUser", 7), tokens, end: Some(FinishReason::Length) };
    let (text, end) = script.cut_everywhere().await;
    assert_eq!((text.as_str(), end.text.as_str()), ("xy", "\nUs\u{fffd}"));
    assert_eq!(end.reason(), Reason::Length);

    let tokens: Vec<u32> = b"xy\nUs".iter().copied().map(byte).collect();
    let script = Script { request: request("\nUser", 5), tokens, end: Some(FinishReason::Length) };
    let (text, end) = script.cut_everywhere().await;
    assert_eq!((text.as_str(), end.text.as_str()), ("xy", "\nUs"));
}

#[tokio::test]
async fn up_to_the_models_own_end() {
    let tokens = vec![byte(b'a'), 400, 401, 7];
    let script = Script { request: request("\nUser", 50), tokens, end: Some(FinishReason::Stop) };
    let (text, end) = script.cut_everywhere().await;
    assert_eq!(text, format!("a{}", nano().decode(&[400, 401], true)));
    assert_eq!((end.reason(), end.text.as_str()), (Reason::Stop, ""));
}

#[tokio::test]
async fn long_answers_go_on_too() {
    let mut gateway = Gateway::start(nano(), Ok(ModelInfo { max_context: 9000, ..model() })).await;
    let mut tokens: Vec<u32> = "光".bytes().cycle().take(6001).map(byte).collect();
    let (mut responses, (asked, engine)) = gateway.generate(resumed(&request("end", 7000), &tokens)).await;
    assert_eq!((asked.max_tokens, asked.resume.as_ref()), (7000, Some(&tokens)));
    assert_eq!(responses.started().await.resumed_tokens, 6001);
    for (byte, text) in "光".bytes().skip(1).zip(["", "光"]) {
        engine.send(token(self::byte(byte))).unwrap();
        assert_eq!(responses.token().await.text, text);
    }
    // The same with the end of the answer in it.
    tokens.splice(5000.., b"end".iter().copied().map(byte));
    let response = gateway.client.generate(resumed(&request("end", 7000), &tokens)).await.unwrap();
    let mut responses = Responses(response.into_inner());
    responses.started().await;
    assert_eq!(responses.finished().await.usage.unwrap().completion_tokens, 5003);
}

#[tokio::test]
async fn another_fingerprint_is_told() {
    let fingerprint = "nano/f32";
    let mut gateway =
        Gateway::start(nano(), Ok(ModelInfo { fingerprint: fingerprint.into(), ..model() })).await;
    let (mut responses, _) = gateway.generate(resumed(&request("x", 9), &[400])).await;
    let started = responses.started().await;
    assert_eq!(started.fingerprint, fingerprint);
    assert_eq!(started.previous_fingerprint.as_deref(), Some(FINGERPRINT));
}

#[tokio::test]
async fn refuses_what_no_answer_can_be_and_names_what_is_wrong() {
    let mut gateway = Gateway::start(nano(), Ok(model())).await;
    let good = resumed(&request("end", 4), &[400, 401]);
    let change = |change: &dyn Fn(&mut GenerateRequest, &mut Resume)| {
        let mut request = good.clone();
        let mut resume = request.resume.take().unwrap();
        change(&mut request, &mut resume);
        request.resume = Some(resume);
        request
    };
    let end: Vec<u32> = b"end.".iter().copied().map(byte).collect();
    let cases: Vec<(GenerateRequest, &str)> = vec![
        (
            change(&|request, _| request.prompt = Some(Prompt::Text("a".into()))),
            "resume takes the prompt as token_ids: started.prompt_token_ids",
        ),
        (change(&|request, _| request.sampling = None), "resume takes sampling.seed: started.seed"),
        (change(&|_, resume| resume.request_id.clear()), "resume.request_id has 0 bytes"),
        (change(&|_, resume| resume.request_id = "a b".into()), "resume.request_id has 3 bytes"),
        (change(&|_, resume| resume.request_id = "a".repeat(65)), "resume.request_id has 65 bytes"),
        (
            change(&|_, resume| resume.fingerprint = "f".repeat(4097)),
            "resume.fingerprint has 4097 bytes, and may have 4096",
        ),
        (
            change(&|_, resume| resume.token_ids[1] = 4608),
            "resume.token_ids[1] is 4608, and the model's ids are below 4608",
        ),
        (
            change(&|_, resume| resume.token_ids = vec![400; 5]),
            "resume.token_ids has 5 tokens, and the answer ended after 4",
        ),
        (
            change(&|_, resume| resume.token_ids = end.clone()),
            "resume.token_ids has 4 tokens, and the answer ended after 3",
        ),
        (
            change(&|_, resume| resume.token_ids = vec![400, 7, 400]),
            "resume.token_ids has 3 tokens, and the answer ended after 2",
        ),
        (
            GenerateRequest {
                max_tokens: Some(1000),
                ..change(&|_, resume| resume.token_ids = vec![400; 99])
            },
            "resume.token_ids has 99 tokens, and the answer ended after 98",
        ),
    ];
    for (request, expected) in cases {
        let status = gateway.refusal(request).await;
        assert_eq!(status.code(), Code::InvalidArgument, "{expected}");
        assert!(status.message().contains(expected), "{:?} should contain {expected:?}", status.message());
    }
}
