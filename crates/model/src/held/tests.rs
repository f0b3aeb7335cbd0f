//! Shares that become other shares: with the bits of fresh ones, and nothing read twice.

use std::collections::HashSet;
use std::path::Path;
use std::thread;

use comm::{LocalTransport, MeshCollective, Transport, local_group, local_pipeline};
use engine::{BlockId, Epoch, Sampling, SamplingParams, SeqId, SeqSlice, SlotId, StepId, StepPlan, Tokens};
use kernels::{Cpu, DType};
use proptest::prelude::*;

use super::*;
use crate::config::{Config, Preset};
use crate::source::ModelOptions;
use crate::weights::{Cut, Part, Reading, readings};

/// Of yi-nano.
const UNITS: usize = 4;
const LAYERS: usize = 5;
const IDS: [u32; 9] = [5, 17, 3, 99, 42, 7, 8, 61, 2];

fn options(dtype: DType) -> ModelOptions {
    ModelOptions {
        dtype,
        kv_dtype: dtype,
        max_context: None,
        kv_memory: Some(4 << 20),
        largest_step: None,
        steps_in_flight: 1,
        progress: false,
    }
}

fn nano(dtype: DType) -> ModelSource {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/yi-nano");
    ModelSource::open(&dir, options(dtype)).unwrap()
}

fn empty() -> Held<Cpu> {
    Held::new(Cpu::new(1).unwrap())
}

fn plan() -> StepPlan {
    let slice = SeqSlice {
        seq: SeqId(0),
        slot: SlotId(0),
        start: 0,
        tokens: Tokens::Ids(IDS.to_vec()),
        blocks: vec![BlockId(0)],
        sampling: Some(Sampling { params: SamplingParams::GREEDY, position: IDS.len() as u32 }),
    };
    StepPlan { epoch: Epoch::default(), step: StepId(0), keep_sampled: false, slices: vec![slice] }
}

fn parts(readings: &[Reading]) -> Vec<Part> {
    readings.iter().flat_map(|reading| reading.parts.clone()).collect()
}

/// What is read for the share by one that has some of it: whether each missing part comes once, and how many bytes that is, part by
/// part.
fn missing_bytes(cut: Cut<'_>, share: &Share, had: &HashSet<Part>) -> u64 {
    let whole = parts(&readings(cut, share, &|_| false));
    let lacking: Vec<_> = whole.iter().filter(|part| !had.contains(part)).cloned().collect();
    assert_eq!(parts(&readings(cut, share, &|part| had.contains(part))), lacking);
    assert_eq!(lacking.iter().collect::<HashSet<_>>().len(), lacking.len());
    let alone = |part: &Part| cut.origin.bytes_of(&readings(cut, share, &|other| other != part));
    lacking.iter().map(alone).sum()
}

fn held_parts<B: Backend>(held: &Held<B>) -> HashSet<Part> {
    held.parts.0.keys().cloned().collect()
}

/// Loads, and checks that what is read is what is missing.
fn load(source: &ModelSource, held: &mut Held<Cpu>, share: &Share) -> Loaded {
    let units = units(&source.config.shape);
    let cut = source.cut(&units);
    let expected = missing_bytes(cut, share, &held_parts(held));
    let loaded = source.load(held, share, &mut || Ok(())).unwrap();
    let whole = readings(cut, share, &|_| false);
    assert_eq!(loaded.read, expected, "{share:?}");
    assert_eq!(loaded.kept + loaded.read, cut.origin.bytes_of(&whole));
    assert_eq!(held_parts(held), parts(&whole).into_iter().collect());
    loaded
}

/// A group: of each stage the layers, and of each of its ranks the units.
#[derive(Debug, Clone)]
struct Shape(Vec<(Range<usize>, Vec<Range<usize>>)>);

/// Runs of `0..end` between borders.
fn runs(end: usize, borders: &[usize]) -> Vec<Range<usize>> {
    let mut borders: Vec<_> = borders.iter().map(|border| border % end).chain([0, end]).collect();
    borders.sort_unstable();
    borders.dedup();
    borders.windows(2).map(|pair| pair[0]..pair[1]).collect()
}

/// One or two stages of up to three ranks.
fn shape() -> impl Strategy<Value = Shape> {
    let ranks = || prop::collection::vec(0..UNITS, 0..3);
    (prop::collection::vec(0..LAYERS, 0..2), ranks(), ranks()).prop_map(|(layers, first, second)| {
        let stages = runs(LAYERS, &layers).into_iter().zip([first, second]);
        Shape(stages.map(|(layers, borders)| (layers, runs(UNITS, &borders))).collect())
    })
}

/// Has the first of `held` be a group of this shape, run a step, and leave: the logits.
fn serve(source: &ModelSource, held: &mut Vec<Held<Cpu>>, Shape(stages): &Shape) -> Vec<f32> {
    let widths: Vec<_> = stages.iter().map(|(_, ranges)| ranges.len()).collect();
    let links = local_pipeline(&widths).unwrap();
    thread::scope(|scope| {
        let mut ranks = Vec::new();
        for ((layers, ranges), links) in stages.iter().zip(links) {
            for (transport, link) in local_group(ranges.len()).into_iter().zip(links) {
                let held = held.remove(0);
                ranks.push(scope.spawn(move || {
                    let stage = Stage { layers: layers.clone(), link: Box::new(link) };
                    rank(source, held, stage, ranges, transport)
                }));
            }
        }
        let ended = ranks.into_iter().map(|rank| rank.join().unwrap());
        ended.fold(Vec::new(), |found, (kept, logits)| {
            held.push(kept);
            [found, logits].concat()
        })
    })
}

fn rank(
    source: &ModelSource,
    mut held: Held<Cpu>,
    stage: Stage<<Cpu as Backend>::Buffer>,
    ranges: &[Range<usize>],
    transport: LocalTransport,
) -> (Held<Cpu>, Vec<f32>) {
    let rank = transport.rank();
    let collective = MeshCollective::new(transport, ranges.to_vec()).unwrap();
    let share = source.share(&stage, ranges, rank).unwrap();
    load(source, &mut held, &share);
    let mut executor = source.start(held, stage, ranges, collective).unwrap();
    let logits = executor.logits(&plan()).unwrap().concat();
    (executor.leave().unwrap(), logits)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn what_was_kept_gives_the_bits_of_what_is_loaded(
        shapes in prop::collection::vec((shape(), 0usize..6), 2..5),
        f32 in any::<bool>(),
    ) {
        let source = nano(if f32 { DType::F32 } else { DType::Bf16 });
        let one = Shape(vec![(0..LAYERS, runs(UNITS, &[]))]);
        let fresh = serve(&source, &mut vec![empty()], &one);
        prop_assert_eq!(fresh.len(), source.config.shape.vocab);
        let mut held: Vec<_> = (0..6).map(|_| empty()).collect();
        for (shape, turn) in shapes {
            // Another rank gets the first place, and those who have none wait with what they hold.
            held.rotate_left(turn);
            let found = serve(&source, &mut held, &shape);
            prop_assert!(found == fresh, "{:?}: other bits", shape);
        }
    }
}

#[test]
fn a_wider_share_reads_the_rest_and_a_narrower_one_nothing() {
    let source = nano(DType::Bf16);
    let mut held = empty();
    let share = |layers, units| Share { layers, units };
    let whole = load(&source, &mut held, &share(0..LAYERS, 0..UNITS));
    assert_eq!(whole.kept, 0);
    // Tables are cut by sub-tree: half of the units is one of its own.
    let table = (source.config.shape.vocab / 2 * source.config.shape.hidden * 2) as u64;
    assert_eq!(load(&source, &mut held, &share(0..LAYERS, 2..4)).read, table);
    assert_eq!(load(&source, &mut held, &share(1..LAYERS, 2..4)).read, 0);
    assert_eq!(load(&source, &mut held, &share(1..2, 3..4)).read, 0);
    let back = load(&source, &mut held, &share(0..LAYERS, 0..UNITS));
    assert!(back.kept > 0 && back.read < whole.read);
}

#[test]
fn a_load_that_is_cut_short_keeps_what_has_come() {
    let source = nano(DType::Bf16);
    let share = Share { layers: 0..LAYERS, units: 1..3 };
    let whole = load(&source, &mut empty(), &share).read;
    let mut held = empty();
    let mut left = 7;
    let error = source.load(&mut held, &share, &mut || {
        left -= 1;
        if left == 0 { Err(comm::Error::Aborted.into()) } else { Ok(()) }
    });
    assert!(matches!(error, Err(Error::Collective(comm::Error::Aborted))));
    let rest = load(&source, &mut held, &share);
    assert!(rest.kept > 0);
    assert_eq!(rest.kept + rest.read, whole);
    let ranges = [0..1, 1..3, 3..4];
    let stage = || Stage::whole(LAYERS);
    let mut group = local_group(3);
    let collective = |transport| MeshCollective::new(transport, ranges.to_vec()).unwrap();
    assert!(source.start(held, stage(), &ranges, collective(group.remove(1))).is_ok());
    // Another share is not there.
    let error = source.start(empty(), stage(), &ranges, collective(group.remove(0))).err().unwrap();
    assert!(error.to_string().ends_with("was not loaded"), "{error}");
}

#[test]
fn quantised_weights_are_kept_by_unit_too() {
    let config = Config::preset(Preset::Tiny).with_quantization(Some(4)).unwrap();
    let source = ModelSource::random("tiny", config, options(DType::Bf16)).unwrap();
    let (layers, all) = (source.config.shape.layers, source.config.shape.kv_heads);
    let mut held = empty();
    for units in [0..1, 0..all, all - 1..all, 0..all] {
        load(&source, &mut held, &Share { layers: 0..layers, units });
    }
}
