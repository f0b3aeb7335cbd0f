//! Pipelines of stages: the answers of one rank, bit for bit, at any number of stages and any widths.

use std::ops::Range;
use std::time::Instant;

use anyhow::Result;
use comm::{
    AbortHandle, Collective, GroupSpec, HostLink, Listener, MeshCollective, Neighbours, TcpTransport,
    Transport, local_group, local_pipeline,
};
use engine::{Epoch, Request, SamplingParams, Scheduler, SchedulerConfig, SeqSlice, StepPlan, Tokens};
use kernels::{BLOCK_TOKENS, Cpu, DType};
use model::{Executor, ModelOptions};
use phalanx_tests::golden;
use phalanx_tests::ranks::{each_rank, logits, options, plan, slice};
use phalanx_tests::stages::{Joined, LIMIT, Pipeline, Seat, Served, on_seats, serve};

/// More than slots, of which the first has a prompt that is read in chunks beside answers.
fn requests() -> Vec<Request> {
    [(70, 9), (1, 12), (20, 6), (9, 10), (33, 5), (2, 11)]
        .into_iter()
        .zip(1..)
        .map(|((prompt, max_tokens), seed)| Request {
            prompt: (0..prompt).map(|i| (i * 37 + prompt) % 97).collect(),
            max_tokens,
            sampling: SamplingParams { temperature: 0.9, top_k: 40, top_p: 0.95, seed },
            stop_ids: Vec::new(),
            resume: None,
        })
        .collect()
}

fn scheduler(stages: usize, steps_in_flight: u32, vocabulary: usize) -> Scheduler {
    let config = SchedulerConfig {
        blocks: 16,
        block_size: BLOCK_TOKENS as u32,
        max_context: 200,
        vocabulary: vocabulary as u32,
        max_batch_tokens: 24,
        max_sequences: 5,
        steps_in_flight,
        stages: stages as u32,
    };
    Scheduler::new(config, Epoch::default())
}

fn cpu<T: Transport>(
    (transport, link): (T, HostLink),
    ranges: &[Range<usize>],
) -> Result<Joined<Cpu, MeshCollective<T>>> {
    Ok((Cpu::new(1)?, MeshCollective::new(transport, ranges.to_vec())?, Box::new(link)))
}

/// The layers cut at these borders, each stage of its own width.
fn pipeline(layers: usize, borders: &[usize], widths: &[usize]) -> Pipeline {
    let starts = std::iter::once(&0).chain(borders);
    let ends = borders.iter().chain(std::iter::once(&layers));
    Pipeline { layers: starts.zip(ends).map(|(&start, &end)| start..end).collect(), widths: widths.to_vec() }
}

/// Layers and units of a model.
fn shape(name: &str) -> (usize, usize) {
    let shape = model::Config::load(&golden::load(name).dir).expect("config").shape;
    (shape.layers, shape.kv_heads)
}

fn on_cpus(name: &str, options: &ModelOptions, pipeline: &Pipeline, requests: Vec<Request>) -> Served {
    let dir = golden::load(name).dir;
    let vocabulary = model::Config::load(&dir).expect("config").shape.vocab;
    let seats = pipeline.seats(local_pipeline(&pipeline.widths).expect("stages"), local_group);
    let work = (scheduler(pipeline.widths.len(), 1, vocabulary), requests);
    serve(&dir, options, seats, cpu, |_| Ok(()), work).expect("answers")
}

#[test]
fn any_number_of_stages_gives_the_same_bits() {
    for (name, dtype) in [
        ("yi-nano", DType::F32),
        ("yi-nano", DType::Bf16),
        ("gqa7", DType::Bf16),
        ("mha", DType::F32),
        ("tied", DType::Bf16),
        ("awq4", DType::Bf16),
    ] {
        let (layers, units) = shape(name);
        let run = |borders: &[usize], widths: &[usize]| {
            let pipeline = pipeline(layers, borders, widths);
            (on_cpus(name, &options(dtype), &pipeline, requests()), pipeline)
        };
        let (one, _) = run(&[], &[1]);
        assert_eq!(one.answers.iter().map(Vec::len).collect::<Vec<_>>(), [9, 12, 6, 10, 5, 11]);
        for stages in 1..=layers {
            // As even as can be, or all but one layer in one stage.
            let even: Vec<usize> = (1..stages).map(|stage| layers * stage / stages).collect();
            let late: Vec<usize> = (1..stages).collect();
            let early: Vec<usize> = (1..stages).map(|stage| layers - stages + stage).collect();
            let width = |stage: usize| [1, units, 2, 3][stage % 4].min(units);
            let rising: Vec<usize> = (0..stages).map(width).collect();
            let falling: Vec<usize> = (0..stages).map(|stage| width(stages - stage)).collect();
            for (borders, widths) in [(&even, vec![1; stages]), (&late, rising), (&early, falling)] {
                let (found, pipeline) = run(borders, &widths);
                assert!(found.answers == one.answers, "{name}, {dtype:?}, {pipeline:?}: other bits");
                assert_eq!(found.in_flight, stages, "{name}: {pipeline:?}");
            }
        }
    }
}

/// Slices of two sequences, of which one is read in chunks while the other decodes.
fn mixed_plans(ids: &[u32]) -> Vec<StepPlan> {
    let part = |seq: usize, start: usize, end: usize| {
        let params = SamplingParams::GREEDY;
        let blocks: Vec<u32> = (0..4).map(|block| 2 * block + seq as u32).collect();
        slice(seq, &ids[..end], start, &blocks, params)
    };
    let unsampled = |slice: SeqSlice| SeqSlice { sampling: None, ..slice };
    vec![
        plan(0, vec![part(0, 0, 5)]),
        plan(1, vec![part(0, 5, 6), unsampled(part(1, 0, 100))]),
        plan(2, vec![unsampled(part(1, 100, 101))]),
        plan(3, vec![part(0, 6, 7), part(1, 101, 180)]),
        plan(4, vec![part(0, 7, 8), part(1, 180, 181)]),
    ]
}

#[test]
fn logits_are_the_same_bits() {
    for (name, borders, widths) in
        [("yi-nano", &[2, 3][..], &[3, 1, 4][..]), ("tied", &[1], &[2, 1]), ("gqa7", &[1], &[1, 2])]
    {
        let golden = golden::load(name);
        let plans = mixed_plans(&golden.prompt);
        let expected =
            logits(&golden.dir, &options(DType::F32), 1, || Ok(Cpu::new(2)?), &plans).expect("one rank");
        assert_eq!(expected.len(), 6);
        let pipeline = pipeline(shape(name).0, borders, widths);
        let seats = pipeline.seats(local_pipeline(widths).expect("stages"), local_group);
        let found = on_seats(&golden.dir, &options(DType::F32), seats, cpu, |_, executor| {
            let logits = plans.iter().map(|plan| executor.logits(plan));
            Ok(logits.collect::<model::Result<Vec<_>>>()?.concat())
        });
        let found = found.expect("a pipeline");
        let sampling = widths[..widths.len() - 1].iter().sum::<usize>();
        for (index, logits) in found.into_iter().enumerate() {
            let expected = if index == sampling { &expected[..] } else { &[] };
            assert!(logits == expected, "{name}: rank {index} has other logits");
        }
    }
}

/// Connections of stages whose ranks are processes, as a worker forms them, by stage and rank.
fn formed(widths: &[usize]) -> (Vec<TcpTransport>, Vec<Vec<Neighbours>>) {
    let listener = |_| Listener::bind("127.0.0.1:0").expect("a port");
    let listeners: Vec<Listener> = (0..widths.iter().sum()).map(listener).collect();
    let mut addresses = listeners.iter().map(|it| it.address().to_string());
    let stages: Vec<Vec<String>> =
        widths.iter().map(|&width| addresses.by_ref().take(width).collect()).collect();
    let secret = auth::Secret::random();
    let seats =
        widths.iter().enumerate().flat_map(|(stage, &width)| (0..width).map(move |rank| (stage, rank)));
    let spec = |(stage, rank)| {
        let (stages, secret) = (stages.clone(), secret.clone());
        GroupSpec { group: "a".into(), epoch: (1, 1), stage, rank, stages, secret }
    };
    let specs: Vec<GroupSpec> = seats.map(spec).collect();
    let formed =
        each_rank(specs.into_iter().zip(&listeners).collect(), |(spec, listener): (_, &Listener)| {
            Ok(listener.form(&spec, AbortHandle::default(), LIMIT)?)
        });
    let formed = formed.expect("a pipeline");
    let (transports, mut neighbours): (Vec<_>, Vec<Neighbours>) = formed.into_iter().unzip();
    (transports, widths.iter().map(|&width| neighbours.drain(..width).collect()).collect())
}

#[test]
fn a_pipeline_over_tcp_gives_the_same_bits() {
    let pipeline = pipeline(5, &[2], &[2, 3]);
    let dir = golden::load("yi-nano").dir;
    let one = self::pipeline(5, &[], &[1]);
    let expected = on_cpus("yi-nano", &options(DType::F32), &one, requests()).answers;
    let (mut transports, neighbours) = formed(&pipeline.widths);
    let seats = pipeline.seats(neighbours, |width| transports.drain(..width).collect());
    let join = |(transport, neighbours): (TcpTransport, Neighbours), ranges: &[Range<usize>]| {
        cpu((transport, neighbours.by_host()?), ranges)
    };
    let work = (scheduler(2, 1, 4608), requests());
    let found = serve(&dir, &options(DType::F32), seats, join, |_| Ok(()), work).expect("answers");
    assert!(found.answers == expected);
}

/// Only the last stage knows what was sampled last; whoever is asked to go on with it says so, and goes on.
#[test]
fn plans_that_look_ahead_are_refused_in_a_pipeline() {
    let pipeline = pipeline(2, &[1], &[1, 1]);
    let dir = golden::load("gqa7").dir;
    let seats = pipeline.seats(local_pipeline(&[1, 1]).expect("stages"), local_group);
    let part = |start: usize, end: usize| slice(1, &[5, 6, 7][..end], start, &[0], SamplingParams::GREEDY);
    let outputs = on_seats(&dir, &options(DType::F32), seats, cpu, |_, executor| {
        executor.launch(&StepPlan { keep_sampled: true, ..plan(0, vec![part(0, 2)]) })?;
        let first = executor.poll()?;
        let ahead = SeqSlice { tokens: Tokens::LastSampled, ..part(2, 3) };
        let error = executor.launch(&plan(1, vec![ahead])).expect_err("it is refused").to_string();
        assert!(
            error.starts_with("step 1 cannot be run: sequence 1: its token is to be the last sampled"),
            "{error}"
        );
        assert!(error.ends_with("of 2 stages only the last knows: plans of a pipeline carry ids"), "{error}");
        executor.launch(&plan(1, vec![part(2, 3)]))?;
        Ok([first, executor.poll()?])
    })
    .expect("both stages");
    assert_eq!(outputs[0], [None, None]);
    assert!(outputs[1].iter().flatten().all(|output| output.tokens.len() == 1));
}

#[test]
fn stages_hold_their_own_layers_alone() {
    let dir = golden::load("yi-nano").dir;
    let measure = |borders: &[usize], widths: &[usize]| {
        let seats = pipeline(5, borders, widths).seats(local_pipeline(widths).expect("stages"), local_group);
        let kv = ModelOptions { kv_memory: Some(8 << 20), ..options(DType::F32) };
        on_seats(&dir, &kv, seats, cpu, |_, executor| Ok((executor.weight_bytes(), executor.kv_blocks())))
            .expect("executors")
    };
    let whole = measure(&[], &[1])[0];
    let parts = measure(&[2], &[1, 1]);
    assert_eq!(parts.iter().map(|(bytes, _)| bytes).sum::<u64>(), whole.0);
    // Keys and values of fewer layers: more blocks in the same memory.
    for ((_, blocks), layers) in parts.iter().zip([2, 3]) {
        assert!((5 * whole.1..5 * (whole.1 + 1)).contains(&(blocks * layers)), "{parts:?}, {whole:?}");
    }
}

/// Not a test of speed: prints what a second stage brings on this machine, where each rank has one thread. Loading counts too.
#[test]
#[ignore = "measures"]
fn overlap() {
    let layers = shape("yi-nano").0;
    let long = |(seed, request): (u64, Request)| {
        let sampling = SamplingParams { seed, ..request.sampling };
        Request { prompt: request.prompt[..1].to_vec(), max_tokens: 150, sampling, ..request }
    };
    for round in 0..3 {
        for (what, pipeline) in [
            ("1 stage", pipeline(layers, &[], &[1])),
            ("2 stages", pipeline(layers, &[3], &[1, 1])),
            ("2 ranks", pipeline(layers, &[], &[2])),
        ] {
            let requests = (0..).zip(requests().into_iter().cycle().take(40)).map(long).collect();
            let started = Instant::now();
            let served = on_cpus("yi-nano", &options(DType::Bf16), &pipeline, requests);
            let tokens: usize = served.answers.iter().map(Vec::len).sum();
            let rate = tokens as f64 / started.elapsed().as_secs_f64();
            println!("{round}: {what}: {tokens} tokens, {rate:.0} a second");
        }
    }
}

#[cfg(feature = "cuda")]
mod gpu {
    use comm::CollectiveChoice;
    use comm::cuda::{ConnectOptions, connect, connect_stages, local_gpu_group, staged_link};
    use kernels::Cuda;
    use kernels::cuda::{Buffer, Store};
    use kernels::{Backend, CudaOptions};

    use super::*;

    fn open(ordinal: usize) -> Result<Cuda> {
        let options = CudaOptions { ordinal, deterministic: true, ..CudaOptions::default() };
        Ok(Cuda::with_kernels(options, &Store::none())?)
    }

    /// Serves on emulated GPUs; steps are recorded and replayed where they decode.
    fn on_gpus<P: Send, C: Collective<Buffer>>(
        name: &str,
        stages: usize,
        seats: Vec<Seat<P>>,
        join: impl Fn(P, &[Range<usize>]) -> Result<Joined<Cuda, C>> + Sync,
    ) -> Served {
        let dir = golden::load(name).dir;
        let vocabulary = model::Config::load(&dir).expect("config").shape.vocab;
        let options = ModelOptions { steps_in_flight: 2, ..options(DType::Bf16) };
        let work = (scheduler(stages, 2, vocabulary), requests());
        serve(&dir, &options, seats, join, |gpu| Ok(gpu.wait()?), work).expect("answers")
    }

    /// One GPU for each stage, whose ranks share it; stages exchange by the host's memory.
    fn by_host(name: &str, pipeline: &Pipeline) -> Served {
        let mut ordinals = 0..;
        let group = |width| {
            let ordinal = ordinals.next().expect("endless");
            local_gpu_group(width).into_iter().map(|seat| (ordinal, seat)).collect()
        };
        let seats = pipeline.seats(local_pipeline(&pipeline.widths).expect("stages"), group);
        on_gpus(name, pipeline.widths.len(), seats, |((ordinal, seat), link), ranges| {
            let gpu = open(ordinal)?;
            let collective = seat.join(&gpu, ranges.to_vec(), AbortHandle::default(), LIMIT)?;
            let link = staged_link(&gpu, link);
            Ok((gpu, collective, link))
        })
    }

    /// A GPU for each rank; they exchange by NCCL, within stages and between them.
    fn by_nccl(name: &str, pipeline: &Pipeline) -> Served {
        let (transports, neighbours) = formed(&pipeline.widths);
        let mut transports = transports.into_iter().enumerate();
        let seats = pipeline.seats(neighbours, |width| transports.by_ref().take(width).collect());
        let options = ConnectOptions { choice: CollectiveChoice::Nccl, deterministic: true, limit: LIMIT };
        on_gpus(name, pipeline.widths.len(), seats, |((ordinal, transport), neighbours), ranges| {
            let gpu = open(ordinal)?;
            let collective = connect(&gpu, transport, ranges.to_vec(), options)?;
            let link = connect_stages(&gpu, neighbours, options)?;
            Ok((gpu, collective, link))
        })
    }

    #[test]
    fn stages_on_gpus_give_the_same_bits() {
        if !emulator::open_with(4, true) {
            return;
        }
        for (name, borders, widths) in
            [("gqa7", &[1][..], vec![[1, 1], [2, 1], [1, 2]]), ("yi-nano", &[3], vec![[1, 2]])]
        {
            let layers = shape(name).0;
            let one = by_host(name, &pipeline(layers, &[], &[1]));
            // GPUs that leave work until somebody waits for it do not run while ranks meet on the host.
            let late = std::env::var("PHALANX_EMULATOR_LATE").is_ok_and(|late| late == "1");
            for widths in widths {
                let pipeline = pipeline(layers, borders, &widths);
                let mut found = Vec::new();
                if !late || widths == [1, 1] {
                    found.push(("host", by_host(name, &pipeline)));
                }
                if !late {
                    found.push(("NCCL", by_nccl(name, &pipeline)));
                }
                for (way, found) in found {
                    assert!(
                        found.answers == one.answers,
                        "{name}, {widths:?} by {way}: other bits than one GPU"
                    );
                    assert!(found.in_flight >= 2);
                }
            }
        }
    }
}
