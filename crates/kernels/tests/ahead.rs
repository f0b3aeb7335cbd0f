//! Steps that go on with what the ones before them choose, before anybody has asked for it: on every backend.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{Device, Random, block, bytes, cpus};
use kernels::{
    Backend, Batch, Choice, DType, Draw, KvShape, MAX_SLOTS, Oracle, SampledRow, Slice, SourceType, Step,
    Token,
};

/// Of the table, whose rows are the logits that follow its ids.
const VOCABULARY: usize = 50;
/// Slots of the sequences.
const SLOTS: [u32; 3] = [5, 0, MAX_SLOTS as u32 - 1];
const STEPS: usize = 16;

/// A model that chooses a token by what the one before says.
struct Chain<B: Device> {
    table: B::Table,
    embedded: B::Buffer,
    logits: B::Buffer,
    chosen: B::Buffer,
    _kv: B::KvCache,
}

impl<B: Device> Chain<B> {
    fn new(backend: &mut B, dtype: DType) -> Self {
        let mut values = Random::new(17).row(VOCABULARY * VOCABULARY);
        values.iter_mut().for_each(|value| *value *= 3.0);
        let data = bytes(&values, SourceType::Bf16);
        let rows = block(&data, SourceType::Bf16, VOCABULARY, VOCABULARY);
        let buffer = |backend: &B, cols| backend.buffer(DType::F32, 8, cols).unwrap();
        let shape = KvShape { layers: 1, units: 1, group: 1, head_dim: 16, dtype };
        Self {
            table: backend.table(rows, 0, dtype).unwrap(),
            embedded: buffer(backend, VOCABULARY),
            logits: buffer(backend, VOCABULARY),
            chosen: buffer(backend, 2),
            _kv: backend.kv_cache(shape, 8).unwrap(),
        }
    }

    fn begin(&mut self, backend: &mut B, step: &Step, record: bool) {
        let Self { table, embedded, logits, chosen, .. } = self;
        let run = backend.run::<kernels::Error>(step, record, |backend| {
            backend.embed(step, table, embedded)?;
            backend.gather_sampled(step, embedded, logits)?;
            backend.sample(step, logits, chosen)
        });
        run.unwrap();
    }
}

/// The sequences of a step: in the first all read a prompt, later one or another pauses.
fn taking_part(at: usize) -> Vec<usize> {
    (0..SLOTS.len()).filter(|sequence| at == 0 || !(at + sequence).is_multiple_of(5)).collect()
}

/// A step in which each sequence has these tokens; keeps what is chosen.
fn step<B: Backend>(backend: &B, at: usize, tokens: &[(usize, Vec<Token>)]) -> Step {
    let mut end = 0;
    let mut sampled = Vec::new();
    let mut slices = Vec::new();
    for (sequence, tokens) in tokens {
        end += tokens.len();
        let draw = Draw {
            temperature: if *sequence == 1 { 0.0 } else { 0.8 },
            seed: *sequence as u64,
            position: at as u32,
            ..Draw::GREEDY
        };
        sampled.push(SampledRow { row: end - 1, slot: Some(SLOTS[*sequence]), draw });
        slices.push(Slice { start: at * 2, len: tokens.len(), blocks: vec![*sequence as u32] });
    }
    let all = tokens.iter().flat_map(|(_, tokens)| tokens.iter().copied()).collect();
    backend.step(all, Batch { slices }, sampled)
}

fn prompts() -> Vec<(usize, Vec<Token>)> {
    vec![(0, vec![Token::Id(7), Token::Id(3)]), (1, vec![Token::Id(40)]), (2, vec![Token::Id(49); 2])]
}

/// Tokens and bits of log-probabilities of all steps, each of which is told the ids that were chosen before it.
fn told<B: Device>(backend: &mut B, dtype: DType, record: bool) -> Vec<Vec<(u32, u32)>> {
    let mut chain = Chain::new(backend, dtype);
    let mut last = [0; SLOTS.len()];
    let mut results = Vec::new();
    for at in 0..STEPS {
        let next = || taking_part(at).into_iter().map(|s| (s, vec![Token::Id(last[s])])).collect();
        let tokens: Vec<_> = if at == 0 { prompts() } else { next() };
        chain.begin(backend, &step(backend, at, &tokens), record);
        let choices = backend.choices().unwrap();
        tokens.iter().zip(&choices).for_each(|((sequence, _), choice)| last[*sequence] = choice.id);
        results.push(plain(&choices));
    }
    results
}

/// Likewise, two steps in flight, by slots alone.
fn untold<B: Device>(backend: &mut B, dtype: DType, record: bool) -> Vec<Vec<(u32, u32)>> {
    let mut chain = Chain::new(backend, dtype);
    let mut results = Vec::new();
    for at in 0..STEPS {
        let next = || taking_part(at).into_iter().map(|s| (s, vec![Token::LastSampled(SLOTS[s])])).collect();
        let tokens: Vec<_> = if at == 0 { prompts() } else { next() };
        chain.begin(backend, &step(backend, at, &tokens), record);
        if at > 0 {
            while !backend.choices_are_there().unwrap() {}
            results.push(plain(&backend.choices().unwrap()));
        }
    }
    results.push(plain(&backend.choices().unwrap()));
    results
}

fn plain(choices: &[Choice]) -> Vec<(u32, u32)> {
    choices.iter().map(|choice| (choice.id, choice.logprob.to_bits())).collect()
}

fn goes_on_unseen<B: Device>(backend: &mut B, dtype: DType) {
    let expected = told(backend, dtype, false);
    assert!(expected.iter().flatten().any(|(id, _)| *id != expected[0][0].0), "a chain of one id");
    for record in [false, true] {
        assert_eq!(untold(backend, dtype, record), expected, "{}, recorded: {record}", backend.path());
    }
}

/// What one rank chose, another keeps.
fn keeps_what_another_chose<B: Device>(one: &mut B, other: &mut B, dtype: DType) {
    let (mut chain, mut copy) = (Chain::new(one, dtype), Chain::new(other, dtype));
    let first = step(one, 0, &prompts());
    chain.begin(one, &first, false);
    for row in 0..SLOTS.len() {
        B::set_row(&mut copy.chosen, row, &B::row(&chain.chosen, row));
    }
    common::run(other, &first, |other| other.keep(&first, &copy.chosen));
    let tokens: Vec<_> = [2, 0, 1].map(|s| (s, vec![Token::LastSampled(SLOTS[s])])).into();
    let embedded = [(one, chain), (other, copy)].map(|(backend, mut chain)| {
        let step = step(backend, 1, &tokens);
        chain.begin(backend, &step, false);
        common::bits(&B::rows(&chain.embedded, SLOTS.len()))
    });
    assert_eq!(embedded[0], embedded[1]);
}

#[test]
fn the_oracle_goes_on_unseen() {
    goes_on_unseen(&mut Oracle::default(), DType::F32);
    keeps_what_another_chose(&mut Oracle::default(), &mut Oracle::default(), DType::F32);
}

#[test]
fn the_cpu_goes_on_unseen() {
    for (mut one, mut other) in cpus().into_iter().zip(cpus()) {
        goes_on_unseen(&mut one, DType::Bf16);
        keeps_what_another_chose(&mut one, &mut other, DType::Bf16);
    }
}

#[cfg(feature = "cuda")]
mod gpu {
    use super::*;
    use common::gpu;
    use kernels::Cuda;

    #[test]
    fn a_gpu_goes_on_unseen() {
        if gpu::present() {
            let mut one = gpu::open(true);
            goes_on_unseen(&mut one, DType::Bf16);
            keeps_what_another_chose(&mut one, &mut gpu::open(true), DType::Bf16);
        }
    }

    /// Steps of one size are recorded apart, where one keeps its ids and the other does not.
    #[test]
    fn what_is_not_to_be_kept_changes_nothing() {
        if !gpu::present() {
            return;
        }
        let mut gpu = gpu::open(true);
        let mut chain = Chain::new(&mut gpu, DType::Bf16);
        let decode = |gpu: &mut Cuda, chain: &mut Chain<Cuda>, token, slot| {
            let mut step = step(gpu, 1, &[(1, vec![token])]);
            step.sampled[0].slot = slot;
            chain.begin(gpu, &step, true);
            gpu.choices().unwrap()[0].id
        };
        let slot = SLOTS[1];
        for id in [3, 9, 21, 40] {
            let kept = decode(&mut gpu, &mut chain, Token::Id(id), Some(slot));
            let passing = decode(&mut gpu, &mut chain, Token::Id(id + 1), None);
            assert_ne!(kept, passing, "the test needs two ids");
            let next = decode(&mut gpu, &mut chain, Token::LastSampled(slot), None);
            assert_eq!(next, decode(&mut gpu, &mut chain, Token::Id(kept), None));
        }
    }
}
