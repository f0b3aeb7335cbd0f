//! Two steps in flight: ranks that begin a step before the one in front of it has told what it chose give the same answers, bit for
//! bit, as ranks that wait.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Barrier, Mutex};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use comm::{Collective, LocalTransport, MeshCollective, local_group};
use engine::{
    BlockId, Epoch, Event, Request, Sampling, SamplingParams, Scheduler, SchedulerConfig, SeqId, SeqSlice,
    SlotId, StepId, StepOutput, StepPlan, Tokens,
};
use kernels::{BLOCK_TOKENS, Backend, Cpu, DType};
use model::Executor;
use phalanx_tests::golden;
use phalanx_tests::ranks::{on_ranks, options};

/// How long ranks wait for each other, and the test for them.
const LIMIT: Duration = Duration::from_secs(60);

/// Ids and bits of log-probabilities.
type Answer = Vec<(u32, u32)>;

/// Two of three run at once, so that a slot is used again; one prompt is read in chunks.
fn requests(stop: Option<u32>) -> Vec<Request> {
    [(40, 9), (1, 12), (20, 6)]
        .into_iter()
        .zip(1..)
        .map(|((prompt, max_tokens), seed)| Request {
            prompt: (0..prompt).map(|i| (i * 37 + prompt) % 200).collect(),
            max_tokens,
            sampling: SamplingParams { temperature: 0.9, top_k: 40, top_p: 0.95, seed },
            stop_ids: stop.into_iter().collect(),
            resume: None,
        })
        .collect()
}

fn scheduler(steps_in_flight: u32, vocabulary: u32) -> Scheduler {
    let config = SchedulerConfig {
        blocks: 8,
        block_size: BLOCK_TOKENS as u32,
        max_context: 200,
        vocabulary,
        max_batch_tokens: 24,
        max_sequences: 2,
        steps_in_flight,
        stages: 1,
    };
    Scheduler::new(config, Epoch::default())
}

/// Plans as the coordinator does: all that may be in flight go out together, then the oldest output is waited for.
fn drive(
    mut scheduler: Scheduler,
    requests: Vec<Request>,
    ranks: &[Sender<Vec<StepPlan>>],
    outputs: &Receiver<StepOutput>,
) -> Result<Vec<Answer>> {
    let mut answers = BTreeMap::new();
    for request in requests {
        answers.insert(scheduler.submit(request)?, Answer::new());
    }
    let (mut in_flight, mut ahead) = (0, 0);
    loop {
        let plans: Vec<StepPlan> = std::iter::from_fn(|| scheduler.plan()).collect();
        in_flight += plans.len();
        let slices = plans.iter().flat_map(|plan| &plan.slices);
        ahead += slices.filter(|slice| slice.tokens == Tokens::LastSampled).count();
        if in_flight == 0 {
            break;
        }
        for rank in ranks {
            rank.send(plans.clone()).context("a rank has ended")?;
        }
        let output = outputs.recv_timeout(LIMIT).context("no output")?;
        in_flight -= 1;
        for event in scheduler.apply(&output)? {
            if let Event::Token { seq, id, logprob, .. } = event {
                answers.entry(seq).or_default().push((id, logprob.to_bits()));
            }
        }
    }
    println!("{ahead} tokens were computed unseen");
    Ok(answers.into_values().collect())
}

/// Answers by a group whose ranks take their places by `join`. A rank that does not sample waits by `settle` for what it began: the
/// emulator may leave it until then.
fn answers<P: Send, B: Backend, C: Collective<B::Buffer>>(
    dir: &Path,
    dtype: DType,
    places: Vec<P>,
    join: impl Fn(P, &[Range<usize>]) -> Result<(B, C)> + Sync,
    settle: fn(&mut B) -> Result<()>,
    steps_in_flight: usize,
    stop: Option<u32>,
) -> Vec<Answer> {
    let options = model::ModelOptions { steps_in_flight, ..options(dtype) };
    let vocabulary = model::Config::load(dir).expect("config").shape.vocab as u32;
    let (senders, inboxes): (Vec<_>, Vec<_>) = places.iter().map(|_| channel()).unzip();
    let inboxes: Vec<_> = inboxes.into_iter().map(Mutex::new).collect();
    let (told, outputs) = channel();
    let all_loaded = Barrier::new(places.len());
    thread::scope(|scope| {
        let driver = scope.spawn(move || {
            let scheduler = scheduler(steps_in_flight as u32, vocabulary);
            drive(scheduler, requests(stop), &senders, &outputs)
        });
        let ran = on_ranks(dir, &options, places, join, |rank, executor| {
            let inbox = inboxes[rank].lock().expect("one thread");
            all_loaded.wait();
            while let Ok(plans) = inbox.recv() {
                for plan in &plans {
                    executor.launch(plan)?;
                }
                while !executor.is_ready()? {
                    thread::yield_now();
                }
                match executor.poll()? {
                    Some(output) => told.send(output)?,
                    None => settle(executor.backend_mut())?,
                }
            }
            Ok(())
        });
        ran.expect("all ranks run to the end");
        driver.join().expect("no panic").expect("answers")
    })
}

/// Compares one and two steps in flight at these widths, until lengths and until a stop id that comes in the middle.
fn are_alike<P: Send, B: Backend, C: Collective<B::Buffer>>(
    name: &str,
    dtype: DType,
    widths: Range<usize>,
    group: impl Fn(usize) -> Vec<P>,
    join: impl Fn(P, &[Range<usize>]) -> Result<(B, C)> + Sync,
    settle: fn(&mut B) -> Result<()>,
) {
    let dir = golden::load(name).dir;
    let run = |width, steps, stop| answers(&dir, dtype, group(width), &join, settle, steps, stop);
    let first = widths.start;
    let whole = run(first, 1, None);
    assert_eq!(whole.iter().map(Vec::len).collect::<Vec<_>>(), [9, 12, 6]);
    let stop = Some(whole[0][4].0);
    let stopped = run(first, 1, stop);
    assert!(stopped[0].len() <= 5 && stopped[0][..] == whole[0][..stopped[0].len()]);
    for width in widths {
        assert!(run(width, 2, None) == whole, "{name}, {width} ranks");
        assert!(run(width, 2, stop) == stopped, "{name}, {width} ranks, until a stop id");
    }
}

fn cpu(transport: LocalTransport, ranges: &[Range<usize>]) -> Result<(Cpu, MeshCollective<LocalTransport>)> {
    Ok((Cpu::new(1)?, MeshCollective::new(transport, ranges.to_vec())?))
}

#[test]
fn the_cpu_answers_alike() {
    are_alike("yi-nano", DType::F32, 1..5, local_group, cpu, |_| Ok(()));
    are_alike("gqa7", DType::Bf16, 2..3, local_group, cpu, |_| Ok(()));
}

fn slice(seq: u64, slot: u32, start: u32, tokens: Tokens) -> SeqSlice {
    let position = start + tokens.len() as u32;
    SeqSlice {
        seq: SeqId(seq),
        slot: SlotId(slot),
        start,
        tokens,
        blocks: vec![BlockId(seq as u32)],
        sampling: Some(Sampling { params: SamplingParams::GREEDY, position }),
    }
}

/// A plan is refused where a rank has not sampled what it asks for; the rank goes on.
#[test]
fn tokens_that_nobody_sampled_are_refused() {
    let plan = |slices: &[SeqSlice]| StepPlan {
        epoch: Epoch::default(),
        step: StepId(7),
        keep_sampled: true,
        slices: slices.to_vec(),
    };
    let dir = golden::load("gqa7").dir;
    let refusals = on_ranks(&dir, &options(DType::F32), local_group(1), cpu, |_, rank| {
        let mut refuse = |slices: &[SeqSlice]| {
            let error = rank.launch(&plan(slices)).expect_err("it is refused").to_string();
            error.strip_prefix("step 7 cannot be run: sequence 1: ").expect(&error).to_owned()
        };
        let none = refuse(&[slice(1, 3, 2, Tokens::LastSampled)]);
        let far = refuse(&[slice(1, 9999, 2, Tokens::LastSampled)]);
        rank.launch(&plan(&[slice(1, 3, 0, Tokens::Ids(vec![5, 6]))]))?;
        let mut refuse = |slices: &[SeqSlice]| rank.launch(&plan(slices)).expect_err("refused").to_string();
        let late = refuse(&[slice(1, 3, 3, Tokens::LastSampled)]);
        let other = refuse(&[slice(2, 3, 2, Tokens::LastSampled)]);
        rank.launch(&plan(&[slice(1, 3, 2, Tokens::LastSampled)]))?;
        let outputs = [rank.poll()?, rank.poll()?];
        assert!(outputs.iter().flatten().all(|output| output.tokens.len() == 1));
        Ok([none, far, late, other])
    })
    .expect("a rank");
    assert!(refusals[0].ends_with("there none is kept"), "{}", refusals[0]);
    assert!(refusals[1].ends_with("slot 9999, the limit is 4095"), "{}", refusals[1]);
    assert!(refusals[2].ends_with("there it is that of sequence 1 at 2"), "{}", refusals[2]);
    assert!(refusals[3].ends_with("there it is that of sequence 1 at 2"), "{}", refusals[3]);
}

#[cfg(feature = "cuda")]
mod gpu {
    use comm::cuda::{ConnectOptions, connect, local_gpu_group};
    use comm::{AbortHandle, CollectiveChoice, Transport};
    use kernels::cuda::Store;
    use kernels::{Cuda, CudaOptions};

    use super::*;

    /// Whether there is an emulator: GPUs that run beside the host.
    fn present() -> bool {
        emulator::open_with(4, true)
    }

    fn open(ordinal: usize) -> Result<Cuda> {
        let options = CudaOptions { ordinal, deterministic: true, ..CudaOptions::default() };
        Ok(Cuda::with_kernels(options, &Store::none())?)
    }

    /// Whether the emulator leaves work until somebody waits for it: then ranks that meet on the host, a step ahead of their GPUs, would
    /// wait for each other for ever.
    fn runs_late() -> bool {
        std::env::var("PHALANX_EMULATOR_LATE").is_ok_and(|late| late == "1")
    }

    fn settle(gpu: &mut Cuda) -> Result<()> {
        Ok(gpu.synchronize()?)
    }

    #[test]
    fn gpus_that_see_each_other_answer_alike() {
        if present() {
            are_alike(
                "yi-nano",
                DType::Bf16,
                if runs_late() { 1..2 } else { 1..4 },
                local_gpu_group,
                |seat, ranges| {
                    let gpu = open(0)?;
                    let collective = seat.join(&gpu, ranges.to_vec(), AbortHandle::default(), LIMIT)?;
                    Ok((gpu, collective))
                },
                settle,
            );
        }
    }

    /// Ranks as processes are, each with a GPU of its own.
    fn connected_are_alike(choice: CollectiveChoice, widths: Range<usize>) {
        if !present() {
            return;
        }
        are_alike(
            "gqa7",
            DType::Bf16,
            widths,
            local_group,
            |transport, ranges| {
                let gpu = open(transport.rank())?;
                let options = ConnectOptions { choice, deterministic: true, limit: LIMIT };
                let collective = connect(&gpu, transport, ranges.to_vec(), options)?;
                Ok((gpu, collective))
            },
            settle,
        );
    }

    #[test]
    fn gpus_that_share_memory_answer_alike() {
        connected_are_alike(CollectiveChoice::Peer, 2..3);
    }

    #[test]
    fn gpus_over_nccl_answer_alike() {
        connected_are_alike(CollectiveChoice::Nccl, 2..3);
    }

    #[test]
    fn gpus_over_the_host_answer_alike() {
        connected_are_alike(CollectiveChoice::Host, 1..3);
    }
}
