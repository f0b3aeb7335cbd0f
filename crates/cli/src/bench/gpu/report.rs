//! What was measured, as JSON with keys that stay, as text and as Markdown.

use std::fmt::{self, Write};

use serde::Serialize;

use crate::bench::spread::Spread;

/// All figures of a run. `tests/gpu/bench.py` gives the peer's under the same keys.
#[derive(Debug, Default, Serialize)]
pub(super) struct Report {
    pub(super) engine: String,
    pub(super) version: String,
    /// The GPU's name, the kernels' architecture, and its memory in bytes.
    pub(super) device: String,
    pub(super) path: String,
    pub(super) memory_bytes: u64,
    pub(super) shape: String,
    pub(super) parameters: u64,
    pub(super) ceilings: Ceilings,
    pub(super) loads: Vec<Load>,
    pub(super) decode: Vec<Decode>,
    pub(super) attention: Vec<Attention>,
    pub(super) attention_in_step: Vec<AttentionInStep>,
    pub(super) prefill: Vec<Prefill>,
    pub(super) deterministic_cost: Cost,
    pub(super) skipped: Vec<Skipped>,
    /// What went wrong, beyond what has no room.
    pub(super) failures: Vec<String>,
}

/// What the GPU reached at best, measured at the start and after every format of weights.
#[derive(Debug, Default, Serialize)]
pub(super) struct Ceilings {
    /// By a kernel that reads and does nothing else.
    pub(super) read_gb_s: Spread,
    /// By the driver, from memory to memory; bytes read and bytes written counted together.
    pub(super) copy_gb_s: Spread,
    /// By cuBLASLt: bf16 operands and results.
    pub(super) gemm_tflop_s: Spread,
    pub(super) memory_bytes: u64,
    pub(super) gemm_size: u32,
    /// The larger of the medians of reading and copying, of which shares of bandwidth are.
    pub(super) bandwidth_gb_s: f64,
}

/// From nothing to weights on the GPU, by way of the host's memory.
#[derive(Debug, Serialize)]
pub(super) struct Load {
    pub(super) weights: &'static str,
    pub(super) seconds: f64,
    /// Bytes that a decoding step reads of them: every matrix, as the GPU has it.
    pub(super) weight_bytes: u64,
    /// Where the GPU's memory went.
    pub(super) memory: String,
}

/// Steps of a token for each of `batch` sequences.
#[derive(Debug, Serialize)]
pub(super) struct Decode {
    pub(super) weights: &'static str,
    pub(super) deterministic: bool,
    pub(super) batch: u32,
    /// Keys that each sequence attends to.
    pub(super) context: u32,
    /// Of a step, by the clock on the wall, with the next one begun before it ends.
    pub(super) ms: Spread,
    /// Likewise, by the GPU's own clock, on average.
    pub(super) device_ms: f64,
    /// Of a step that nothing follows until its tokens are known.
    pub(super) single_ms: Spread,
    pub(super) tokens_per_second: f64,
    /// Weights, and keys and values, that a step reads.
    pub(super) weight_bytes: u64,
    pub(super) kv_bytes: u64,
    pub(super) gb_s: f64,
    /// Of the bandwidth.
    pub(super) share: f64,
}

/// The attention of a layer by itself, of `batch` sequences that decode.
#[derive(Debug, Serialize)]
pub(super) struct Attention {
    pub(super) batch: u32,
    pub(super) context: u32,
    pub(super) ms: Spread,
    pub(super) kv_bytes: u64,
    pub(super) gb_s: f64,
    pub(super) share: f64,
}

/// What more context adds to a step: a step's time less that of the same step with a short context, against the keys and values that
/// it reads more. Missing where the longer one was no slower.
#[derive(Debug, Serialize)]
pub(super) struct AttentionInStep {
    pub(super) weights: &'static str,
    pub(super) deterministic: bool,
    pub(super) batch: u32,
    pub(super) context: u32,
    pub(super) less_context: u32,
    pub(super) ms: f64,
    pub(super) kv_bytes: u64,
    pub(super) gb_s: f64,
    pub(super) share: f64,
}

/// A prompt, read in chunks.
#[derive(Debug, Serialize)]
pub(super) struct Prefill {
    pub(super) weights: &'static str,
    pub(super) deterministic: bool,
    pub(super) tokens: u32,
    /// Rows of a chunk.
    pub(super) chunk: u32,
    pub(super) ms: Spread,
    pub(super) tokens_per_second: f64,
    pub(super) tflop: f64,
    pub(super) tflop_s: f64,
    /// Of the large product.
    pub(super) share: f64,
}

/// How much longer the same takes with --deterministic, as a part of the time without: 0.05 is 5%. Over all rows that have both.
#[derive(Debug, Default, Serialize)]
pub(super) struct Cost {
    pub(super) decode: Option<Spread>,
    pub(super) prefill: Option<Spread>,
}

/// What was not measured.
#[derive(Debug, Serialize)]
pub(super) struct Skipped {
    pub(super) what: String,
    pub(super) why: String,
}

impl Report {
    /// Takes the ceilings' samples and works out all shares.
    pub(super) fn finish(&mut self, read: Vec<f64>, copy: Vec<f64>, gemm: Vec<f64>) {
        let ceilings = &mut self.ceilings;
        (ceilings.read_gb_s, ceilings.copy_gb_s) = (Spread::of(read), Spread::of(copy));
        ceilings.gemm_tflop_s = Spread::of(gemm);
        ceilings.bandwidth_gb_s = ceilings.read_gb_s.median.max(ceilings.copy_gb_s.median);
        let (bandwidth, product) = (ceilings.bandwidth_gb_s, ceilings.gemm_tflop_s.median);
        for row in &mut self.decode {
            row.share = row.gb_s / bandwidth;
        }
        for row in &mut self.attention {
            row.share = row.gb_s / bandwidth;
        }
        for row in &mut self.prefill {
            row.share = row.tflop_s / product;
        }
        self.attention_in_step = attention_in_step(&self.decode, bandwidth);
        self.deterministic_cost = Cost {
            decode: cost(
                self.decode
                    .iter()
                    .map(|row| ((row.weights, row.batch, row.context), row.deterministic, row.ms.median)),
            ),
            prefill: cost(
                self.prefill
                    .iter()
                    .map(|row| ((row.weights, row.tokens, row.chunk), row.deterministic, row.ms.median)),
            ),
        };
    }
}

fn attention_in_step(decode: &[Decode], bandwidth: f64) -> Vec<AttentionInStep> {
    let kind = |row: &Decode| (row.weights, row.deterministic, row.batch);
    let shortest =
        |of: &Decode| decode.iter().filter(|row| kind(row) == kind(of)).min_by_key(|row| row.context);
    let more = |row: &Decode| {
        let less = shortest(row).filter(|less| less.context < row.context)?;
        let ms = row.ms.median - less.ms.median;
        if ms <= 0.0 {
            return None;
        }
        let kv_bytes = row.kv_bytes - less.kv_bytes;
        let gb_s = kv_bytes as f64 / ms / 1e6;
        Some(AttentionInStep {
            weights: row.weights,
            deterministic: row.deterministic,
            batch: row.batch,
            context: row.context,
            less_context: less.context,
            ms,
            kv_bytes,
            gb_s,
            share: gb_s / bandwidth,
        })
    };
    decode.iter().filter_map(more).collect()
}

/// Of rows that tell what they are, whether they are deterministic, and how long they took.
fn cost<K: PartialEq>(rows: impl Iterator<Item = (K, bool, f64)>) -> Option<Spread> {
    let rows: Vec<_> = rows.collect();
    let costs: Vec<f64> = rows
        .iter()
        .filter(|(_, deterministic, _)| *deterministic)
        .filter_map(|(kind, _, ms)| {
            let (.., free) = rows.iter().find(|(other, on, _)| other == kind && !on)?;
            Some(ms / free - 1.0)
        })
        .collect();
    (!costs.is_empty()).then(|| Spread::of(costs))
}

/// The tables, for people and for files alike.
pub(super) fn markdown(report: &Report) -> String {
    let Report { shape, device, path, version, .. } = report;
    let mut out = format!("# {shape} on {device} ({path}), phalanx {version}\n\n");
    for (title, table) in tables(report) {
        let _ = writeln!(out, "## {title}\n");
        for (index, line) in table.iter().enumerate() {
            let _ = writeln!(out, "| {} |", line.join(" | "));
            if index == 0 {
                let _ = writeln!(out, "|{}", "---|".repeat(line.len()));
            }
        }
        out.push('\n');
    }
    for line in notes(report) {
        let _ = writeln!(out, "* {line}");
    }
    out
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { shape, device, path, version, .. } = self;
        let billions = self.parameters as f64 / 1e9;
        writeln!(f, "{shape} ({billions:.2} B parameters) on {device} ({path}), phalanx {version}")?;
        for (title, table) in tables(self) {
            writeln!(f, "\n{title}")?;
            let width = |column: usize| table.iter().map(|line| line[column].chars().count()).max();
            for line in &table {
                for (column, cell) in line.iter().enumerate() {
                    write!(f, "  {cell:>0$}", width(column).unwrap_or(0))?;
                }
                writeln!(f)?;
            }
        }
        writeln!(f)?;
        notes(self).iter().try_for_each(|line| writeln!(f, "{line}"))
    }
}

type Table = Vec<Vec<String>>;

/// Titles and tables; the first line of each is its head, and ratios are in the first column of figures.
fn tables(report: &Report) -> Vec<(&'static str, Table)> {
    let head = |cells: &[&str]| cells.iter().map(|&cell| cell.to_owned()).collect::<Vec<_>>();
    let mode = |deterministic: bool| if deterministic { "on" } else { "off" }.to_owned();
    let mut decode = vec![head(&[
        "weights",
        "deterministic",
        "batch",
        "context",
        "share of bandwidth",
        "ms a step",
        "ms by the GPU's clock",
        "ms alone",
        "tokens/s",
        "GB a step",
    ])];
    decode.extend(report.decode.iter().map(|row| {
        vec![
            row.weights.to_owned(),
            mode(row.deterministic),
            row.batch.to_string(),
            row.context.to_string(),
            format!("{:.3}", row.share),
            format!("{:.3}", row.ms),
            format!("{:.3}", row.device_ms),
            format!("{:.3}", row.single_ms),
            format!("{:.1}", row.tokens_per_second),
            format!("{:.3}", (row.weight_bytes + row.kv_bytes) as f64 / 1e9),
        ]
    }));
    let mut attention = vec![head(&["batch", "context", "share of bandwidth", "ms a layer", "GB/s"])];
    attention.extend(report.attention.iter().map(|row| {
        vec![
            row.batch.to_string(),
            row.context.to_string(),
            format!("{:.3}", row.share),
            format!("{:.4}", row.ms),
            format!("{:.0}", row.gb_s),
        ]
    }));
    let mut more = vec![head(&[
        "weights",
        "deterministic",
        "batch",
        "context",
        "share of bandwidth",
        "ms more",
        "than at context",
    ])];
    more.extend(report.attention_in_step.iter().map(|row| {
        vec![
            row.weights.to_owned(),
            mode(row.deterministic),
            row.batch.to_string(),
            row.context.to_string(),
            format!("{:.3}", row.share),
            format!("{:.3}", row.ms),
            row.less_context.to_string(),
        ]
    }));
    let mut prefill = vec![head(&[
        "weights",
        "deterministic",
        "tokens",
        "share of the large product",
        "ms",
        "tokens/s",
        "TFLOP/s",
        "rows of a chunk",
    ])];
    prefill.extend(report.prefill.iter().map(|row| {
        vec![
            row.weights.to_owned(),
            mode(row.deterministic),
            row.tokens.to_string(),
            format!("{:.3}", row.share),
            format!("{:.1}", row.ms),
            format!("{:.0}", row.tokens_per_second),
            format!("{:.1}", row.tflop_s),
            row.chunk.to_string(),
        ]
    }));
    let all = [
        ("Decoding", decode),
        ("Attention of a layer, decoding, by itself", attention),
        ("What more context adds to a step", more),
        ("Prefill", prefill),
    ];
    all.into_iter().filter(|(_, table)| table.len() > 1).collect()
}

fn notes(report: &Report) -> Vec<String> {
    let ceilings = &report.ceilings;
    let mut notes = vec![
        format!(
            "ceilings, measured between the sections: {:.0} GB/s read, {:.0} GB/s copied (read and written), {:.1} TFLOP/s in a bf16 \
             product of {}³ by cuBLASLt",
            ceilings.read_gb_s, ceilings.copy_gb_s, ceilings.gemm_tflop_s, ceilings.gemm_size
        ),
        "shares are of the larger bandwidth; a step's bytes are its weights and its keys and values, of prompts the products and \
         causal attention are counted"
            .to_owned(),
        "weights are random; keys and values that no step wrote are zeros".to_owned(),
    ];
    for load in &report.loads {
        let Load { weights, seconds, weight_bytes, memory } = load;
        let gigabytes = *weight_bytes as f64 / 1e9;
        notes.push(format!("{weights}: loaded in {seconds:.1} s, a step reads {gigabytes:.3} GB; {memory}"));
    }
    for (what, cost) in
        [("decoding", &report.deterministic_cost.decode), ("prefill", &report.deterministic_cost.prefill)]
    {
        if let Some(cost) = cost {
            let [median, min, max] = [cost.median, cost.min, cost.max].map(|part| 100.0 * part);
            notes.push(format!("--deterministic costs {what} {median:+.1}% [{min:+.1}% to {max:+.1}%]"));
        }
    }
    notes.extend(
        report.skipped.iter().map(|skipped| format!("not measured: {}: {}", skipped.what, skipped.why)),
    );
    notes.extend(report.failures.iter().map(|failure| format!("failed: {failure}")));
    notes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(deterministic: bool, context: u32, ms: f64) -> Decode {
        Decode {
            weights: "bf16",
            deterministic,
            batch: 2,
            context,
            ms: Spread::of([ms]),
            device_ms: ms,
            single_ms: Spread::of([ms]),
            tokens_per_second: 2e3 / ms,
            weight_bytes: 1_000_000,
            kv_bytes: 1000 * u64::from(context),
            gb_s: (1e6 + 1e3 * f64::from(context)) / ms / 1e6,
            share: 0.0,
        }
    }

    #[test]
    fn shares_costs_and_what_context_adds() {
        let mut report = Report {
            decode: vec![decode(false, 512, 2.0), decode(false, 1512, 3.0), decode(true, 512, 2.1)],
            ..Report::default()
        };
        report.finish(vec![2.0, 4.0, 1.0], vec![1.0], vec![5.0]);
        assert_eq!(report.ceilings.bandwidth_gb_s, 2.0);
        assert!((report.decode[0].share - 1.512 / 2.0 / 2.0).abs() < 1e-12);
        let [more] = &report.attention_in_step[..] else { panic!("{:?}", report.attention_in_step) };
        // 1 MB more in a millisecond more.
        assert_eq!((more.context, more.less_context, more.kv_bytes), (1512, 512, 1_000_000));
        assert!((more.gb_s - 1.0).abs() < 1e-12 && (more.share - 0.5).abs() < 1e-12);
        let cost = report.deterministic_cost.decode.unwrap();
        assert!((cost.median - 0.05).abs() < 1e-12 && cost.min == cost.max);
        assert_eq!(report.deterministic_cost.prefill, None);
        let (text, markdown) = (report.to_string(), markdown(&report));
        for words in ["0.378", "--deterministic costs decoding +5.0%", "2 [1–4] GB/s read"] {
            assert!(text.contains(words) && markdown.contains(words), "{words}: {text}{markdown}");
        }
    }
}
