//! Matrix products, alone or added along the reduction tree.
//!
//! Rows are first cut into spans of k (see [`super::tile`]). A task is a few panels times a block of rows: small
//! enough that a span of its rows and all its sums stay in L2 while each panel's span, in L1, meets every row tile.

use std::ops::Range;

use half::bf16;

use super::buffer::{Buffer, Elements};
use super::isa::{Isa, Kernel};
use super::matrix::Matrix;
use super::memory::{Memory, Shared};
use super::path::Vectors;
use super::pool::Pool;
use super::tile::{Dot, PANEL, Product, SPAN, Single, Tile, Widened, ahead, even_part};
use super::vector::{Number, convert};
use crate::{DType, Result, Tree};

/// The most panels of a task.
const TASK_PANELS: usize = 4;
/// L2 that a task's rows and sums may take.
const L2_BYTES: usize = 640 << 10;

/// One result: products with some weights, added along the tree under `node`.
pub(crate) struct Sum {
    /// The weights, which are a node of the reduction tree: its splits depend on its length alone.
    pub node: Range<usize>,
    /// Columns.
    pub n: usize,
    /// The first row's first element.
    pub out: Shared<f32>,
    /// Distance of its rows.
    pub stride: usize,
}

/// Memory that products need, kept between them.
pub(crate) struct Scratch {
    /// Rows cut into spans.
    inputs: Memory,
    /// Each worker's sums.
    sums: Memory,
}

impl Scratch {
    pub(crate) fn new() -> Result<Self> {
        Ok(Scratch { inputs: Memory::zeroed(0, "scratch")?, sums: Memory::zeroed(0, "scratch")? })
    }
}

/// What is multiplied.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'a> {
    pub rows: usize,
    pub x: &'a Buffer,
    /// Whether each weight has columns of its own in `x`, side by side; otherwise all share them.
    pub apart: bool,
}

/// Computes `sums` of products of the inputs with `weights`.
pub(crate) fn products(
    pool: &Pool,
    vectors: Vectors,
    scratch: &mut Scratch,
    inputs: Inputs<'_>,
    weights: &[Matrix],
    sums: &[Sum],
) -> Result<()> {
    let Inputs { rows, x, apart } = inputs;
    if rows == 0 || sums.is_empty() {
        return Ok(());
    }
    let stay_bf16 = vectors.bf16_dot()
        && x.dtype() == DType::Bf16
        && weights.iter().all(|weight| weight.dtype() == DType::Bf16);
    let cuts = if apart { weights } else { &weights[..1] };
    let spans = cuts.iter().map(|weight| weight.k().div_ceil(SPAN)).sum::<usize>();
    scratch.inputs.reserve(spans * rows * SPAN * if stay_bf16 { 2 } else { 4 }, "packed rows")?;
    let mut first_col = 0;
    let mut first_span = 0;
    for weight in cuts {
        let cut = Cut { x, rows, cols: first_col..first_col + weight.k(), first_span };
        if stay_bf16 {
            cut.run_all::<bf16>(pool, vectors, scratch.inputs.shared());
        } else {
            cut.run_all::<f32>(pool, vectors, scratch.inputs.shared());
        }
        first_col += weight.k();
        first_span += weight.k().div_ceil(SPAN);
    }

    let plan = Plan::new(pool.threads(), rows, sums);
    scratch.sums.reserve(pool.threads() * plan.worker_sums * 4, "sums of products")?;
    let worker_sums = scratch.sums.shared::<f32>();
    let cut = scratch.inputs.as_slice::<u8>();
    let of_sum = |sum: &Sum| sum.n.div_ceil(PANEL).div_ceil(plan.panels);
    let tasks = sums.iter().map(of_sum).sum::<usize>() * plan.row_blocks;
    pool.for_each(tasks, |worker, task| {
        let mut group = task / plan.row_blocks;
        let mut index = 0;
        while group >= of_sum(&sums[index]) {
            group -= of_sum(&sums[index]);
            index += 1;
        }
        let sum = &sums[index];
        let first_panel = group * plan.panels;
        vectors.run(Task {
            weights,
            apart,
            inputs: cut.as_ptr(),
            input_rows: rows,
            stay_bf16,
            sum,
            panels: first_panel..(first_panel + plan.panels).min(sum.n.div_ceil(PANEL)),
            rows: rows * (task % plan.row_blocks) / plan.row_blocks
                ..rows * (task % plan.row_blocks + 1) / plan.row_blocks,
            // SAFETY: each worker has `plan.worker_sums` elements.
            sums: unsafe { worker_sums.at(worker * plan.worker_sums) },
        });
    });
    Ok(())
}

/// How an op falls into tasks.
struct Plan {
    panels: usize,
    row_blocks: usize,
    /// Elements of f32 that a worker needs.
    worker_sums: usize,
}

impl Plan {
    fn new(threads: usize, rows: usize, sums: &[Sum]) -> Self {
        let all_panels: usize = sums.iter().map(|sum| sum.n.div_ceil(PANEL)).sum();
        let levels = sums.iter().map(|sum| levels(sum.node.len())).max().unwrap_or(1);
        // A few tasks for each thread, so that they end together.
        let panels = (all_panels / (4 * threads)).clamp(1, TASK_PANELS);
        let row_bytes = SPAN * 2 + levels * panels * PANEL * 4;
        let row_blocks = rows.div_ceil(L2_BYTES / row_bytes);
        let worker_sums = levels * panels * PANEL * rows.div_ceil(row_blocks);
        Plan { panels, row_blocks, worker_sums }
    }
}

/// Sums that are alive at once while a node of `leaves` leaves is added up.
fn levels(leaves: usize) -> usize {
    leaves.next_power_of_two().trailing_zeros() as usize + 1
}

/// Cuts columns of a buffer into spans: `[span][row][SPAN]`.
struct Cut<'a> {
    x: &'a Buffer,
    rows: usize,
    cols: Range<usize>,
    first_span: usize,
}

impl Cut<'_> {
    fn run_all<T: Number>(&self, pool: &Pool, vectors: Vectors, out: Shared<T>) {
        // About 64 Ki elements each.
        let task_rows = (65_536 / self.cols.len().max(1)).max(1);
        pool.for_each(self.rows.div_ceil(task_rows), |_, task| {
            let rows = task * task_rows..self.rows.min((task + 1) * task_rows);
            vectors.run(CutRows { cut: self, rows, out });
        });
    }
}

struct CutRows<'a, T> {
    cut: &'a Cut<'a>,
    rows: Range<usize>,
    out: Shared<T>,
}

impl<T: Number> Kernel for CutRows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        match self.cut.x.elements() {
            Elements::F32(x) => self.copy::<I, f32>(x),
            Elements::Bf16(x) => self.copy::<I, bf16>(x),
        }
    }
}

impl<T: Number> CutRows<'_, T> {
    #[inline(always)]
    fn copy<I: Isa, X: Number>(self, x: &[X]) {
        let cut = self.cut;
        for row in self.rows {
            let from = &x[row * cut.x.cols()..][cut.cols.clone()];
            for (span, from) in from.chunks(SPAN).enumerate() {
                // SAFETY: the span's row lies in the scratch that was reserved for it, and is this task's.
                unsafe {
                    let to = self.out.at(((cut.first_span + span) * cut.rows + row) * SPAN);
                    convert::<I, X, T>(from.as_ptr(), to, from.len());
                }
            }
        }
    }
}

/// Some panels of one sum times a block of rows.
struct Task<'a> {
    weights: &'a [Matrix],
    apart: bool,
    inputs: *const u8,
    input_rows: usize,
    stay_bf16: bool,
    sum: &'a Sum,
    panels: Range<usize>,
    rows: Range<usize>,
    /// A stack of sums, each `[panel][row][PANEL]`.
    sums: *mut f32,
}

impl Kernel for Task<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        // SAFETY: the stack has room for the sum's levels.
        unsafe { self.add_up::<I>(self.sum.node.clone(), self.sums) };
        self.store();
    }
}

impl Task<'_> {
    /// Leaves the sum under `node` at `at`.
    ///
    /// # Safety
    /// The stack has room for the node's levels from `at` on.
    unsafe fn add_up<I: Isa>(&self, node: Range<usize>, at: *mut f32) {
        /// A leaf, entered anew: recursion cannot be inlined.
        struct Leaf<'a>(&'a Task<'a>, usize, *mut f32);
        impl Kernel for Leaf<'_> {
            type Output = ();
            #[inline(always)]
            fn run<I: Isa>(self) {
                // SAFETY: by the contract of `add_up`.
                unsafe { self.0.leaf::<I>(self.1, self.2) }
            }
        }
        /// `to += from`.
        struct Add(*mut f32, *const f32, usize);
        impl Kernel for Add {
            type Output = ();
            #[inline(always)]
            fn run<I: Isa>(self) {
                for i in (0..self.2).step_by(I::LANES) {
                    // SAFETY: two sums of the stack, whose rows are whole vectors.
                    unsafe {
                        I::store(self.0.add(i), I::add(I::load(self.0.add(i)), I::load(self.1.add(i))))
                    };
                }
            }
        }
        // SAFETY: `I` is running already; the stack has room by contract.
        unsafe {
            if node.len() == 1 {
                return I::vectorize(Leaf(self, node.start, at));
            }
            let middle = Tree::split(&node);
            let size = self.panels.len() * self.rows.len() * PANEL;
            self.add_up::<I>(node.start..middle, at);
            self.add_up::<I>(middle..node.end, at.add(size));
            I::vectorize(Add(at, at.add(size), size));
        }
    }

    /// One weight's product.
    ///
    /// # Safety
    /// `at` has room for a sum.
    #[inline(always)]
    unsafe fn leaf<I: Isa>(&self, index: usize, at: *mut f32) {
        let spans_before = if self.apart {
            self.weights[..index].iter().map(|weight| weight.k().div_ceil(SPAN)).sum::<usize>()
        } else {
            0
        };
        let input = spans_before * self.input_rows * SPAN;
        // SAFETY: by contract; `products` laid out `inputs` for these types.
        unsafe {
            match (self.stay_bf16, self.weights[index].dtype()) {
                (true, _) if I::BF16_DOT => {
                    self.multiply::<I, Dot>(index, self.inputs.cast::<bf16>().add(input), at)
                }
                (_, DType::Bf16) => {
                    self.multiply::<I, Widened>(index, self.inputs.cast::<f32>().add(input), at)
                }
                (_, DType::F32) => {
                    self.multiply::<I, Single>(index, self.inputs.cast::<f32>().add(input), at)
                }
            }
        }
    }

    /// # Safety
    /// `input` are the inputs of weight `index`, cut into spans; `at` has room for a sum.
    #[inline(always)]
    unsafe fn multiply<I: Isa, P: Product>(&self, index: usize, input: *const P::Row, at: *mut f32) {
        let weight = &self.weights[index];
        // The next task's panels are not known, and another thread's would be read in vain.
        let after = self.weights[..self.sum.node.end].get(index + 1);
        let rows = self.rows.len();
        let tiles = rows.div_ceil(I::TILE_ROWS);
        let place = |panel: usize, k: usize| {
            self.first_panel::<P>(weight).wrapping_add((panel * weight.k() + k) * PANEL)
        };
        // One tile has nothing to reuse: it reads panel after panel as they lie in memory.
        let together = if tiles == 1 { 1 } else { self.panels.len() };
        for first in (0..self.panels.len()).step_by(together) {
            for span in 0..weight.k().div_ceil(SPAN) {
                let k = span * SPAN;
                for panel in first..first + together {
                    let next = if panel + 1 < first + together {
                        place(panel + 1, k)
                    } else if k + SPAN < weight.k() {
                        place(first, k + SPAN)
                    } else if panel + 1 < self.panels.len() {
                        place(panel + 1, 0)
                    } else {
                        after.map_or(place(panel, k), |weight| self.first_panel::<P>(weight))
                    };
                    let lines = ahead(place(panel, k), next);
                    for index in 0..tiles {
                        let tile = even_part(rows, I::TILE_ROWS, index);
                        // The first two tiles read one line each of the next panel's span while they multiply this.
                        let ahead = match (tiles, index) {
                            (1, _) => lines,
                            (_, 0 | 1) => [lines[index], 0],
                            _ => [0, 0],
                        };
                        // SAFETY: row, panel and sum lie inside the input, the weight and the stack.
                        unsafe {
                            Tile::<P> {
                                rows: input
                                    .add((span * self.input_rows + self.rows.start + tile.start) * SPAN),
                                panels: &[place(panel, k)],
                                offset: 0,
                                panel_pairs: SPAN / 2,
                                pairs: SPAN.min(weight.k() - k) / 2,
                                sums: at.add((panel * rows + tile.start) * PANEL),
                                stride: PANEL,
                                fresh: span == 0,
                                ahead,
                            }
                            .multiply::<I>(tile.len());
                        }
                    }
                }
            }
        }
    }

    /// Where this task's panels begin in a weight.
    #[inline(always)]
    fn first_panel<P: Product>(&self, weight: &Matrix) -> *const P::Panel {
        weight.data().cast::<P::Panel>().wrapping_add(self.panels.start * weight.k() * PANEL)
    }

    /// Copies the finished sum to its place.
    fn store(&self) {
        let rows = self.rows.len();
        for (index, panel) in self.panels.clone().enumerate() {
            let width = PANEL.min(self.sum.n - panel * PANEL);
            for row in 0..rows {
                // SAFETY: this task's columns of this row; the sum lies at the bottom of the stack.
                unsafe {
                    let from = self.sums.add((index * rows + row) * PANEL);
                    let to = self.sum.out.at((self.rows.start + row) * self.sum.stride + panel * PANEL);
                    std::ptr::copy_nonoverlapping(from, to, width);
                }
            }
        }
    }
}
