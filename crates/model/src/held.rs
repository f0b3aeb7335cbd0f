//! What a rank holds from one group to the next: its backend with the weights that are there. A share is loaded onto it, and an executor
//! started with it, which gives it back when it leaves its group.

use std::ops::Range;
use std::time::Duration;

use comm::Collective;
use engine::units;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use kernels::{BLOCK_TOKENS, Backend};

use crate::error::{Error, Result};
use crate::executor::{Limits, ModelExecutor};
use crate::forward::{Layout, Model};
use crate::source::ModelSource;
use crate::stage::Stage;
use crate::weights::{Loaded, Parts, Share, Weights};

/// A backend and weights of one [`ModelSource`] on it.
pub struct Held<B: Backend> {
    backend: B,
    parts: Parts<B>,
}

impl<B: Backend> Held<B> {
    /// A backend without weights.
    pub fn new(backend: B) -> Self {
        Self::with(backend, Parts::default())
    }

    pub(crate) fn with(backend: B, parts: Parts<B>) -> Self {
        Self { backend, parts }
    }

    /// The backend, to connect it with others.
    pub fn backend(&self) -> &B {
        &self.backend
    }
}

impl ModelSource {
    /// The share of rank `rank` of a stage whose ranks have these units.
    ///
    /// # Errors
    /// [`Error::Option`] where the stage cannot have these layers, or the rank no units.
    pub fn share<T>(&self, stage: &Stage<T>, ranges: &[Range<usize>], rank: usize) -> Result<Share> {
        let shape = &self.config.shape;
        stage.check(shape.layers)?;
        let units = ranges
            .get(rank)
            .filter(|held| held.start < held.end && held.end <= shape.kv_heads)
            .ok_or_else(|| Error::Option(format!("rank {rank} has no units")))?;
        Ok(Share { layers: stage.layers.clone(), units: units.clone() })
    }

    /// Units of a run of layers, whatever stage they will belong to.
    ///
    /// # Errors
    /// [`Error::Option`] where the model has no such layers or units, or they are none.
    pub fn part(&self, layers: Range<usize>, units: Range<usize>) -> Result<Share> {
        let shape = &self.config.shape;
        let within = |range: &Range<usize>, end: usize| range.start < range.end && range.end <= end;
        if within(&layers, shape.layers) && within(&units, shape.kv_heads) {
            return Ok(Share { layers, units });
        }
        Err(Error::Option(format!(
            "units {units:?} of layers {layers:?}: the model has {} units and {} layers",
            shape.kv_heads, shape.layers
        )))
    }

    /// Has `held` hold a share and nothing else: first what the share does not have is freed, then what is missing is read, and what
    /// both have stays where it is. `go_on` is asked after every few matrices; its error ends the load.
    ///
    /// # Errors
    /// Those of the checkpoint, the backend and `go_on`. What had come by then is held.
    pub fn load<B: Backend>(
        &self,
        held: &mut Held<B>,
        share: &Share,
        go_on: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Loaded> {
        let units = units(&self.config.shape);
        let bar = self.progress_bar(share);
        let Held { backend, parts } = held;
        let loaded =
            parts.become_share(backend, self.cut(&units), share, self.options.dtype, &mut |bytes, all| {
                bar.set_length(all);
                bar.set_position(bytes);
                go_on()
            });
        bar.finish_and_clear();
        loaded
    }

    /// An executor of a share that is held. The collective is that of the stage, whose ranks have the units `ranges`, and knows which of
    /// them this is.
    ///
    /// # Errors
    /// [`Error::Option`] where the share is not held or there is no room for the KV cache, and the backend's. Then all is let go.
    pub fn start<B: Backend, C: Collective<B::Buffer>>(
        &self,
        held: Held<B>,
        stage: Stage<B::Buffer>,
        ranges: &[Range<usize>],
        collective: C,
    ) -> Result<ModelExecutor<B, C>> {
        let share = self.share(&stage, ranges, collective.rank())?;
        let Held { backend, mut parts } = held;
        let weights = Weights::of(&mut parts, &share, &self.config.shape)?;
        let kv_shape = self.kv_shape(share.layers.len(), share.units.len());
        let stages = stage.link.stages();
        let layout = Layout {
            config: &self.config,
            ranges,
            dtype: self.options.dtype,
            largest_step: self.options.largest_step,
        };
        let mut kv_blocks = 0;
        let model = Model::new(backend, collective, stage, weights, &layout, |backend| {
            kv_blocks = self.kv_blocks(backend, kv_shape)?;
            Ok(backend.kv_cache(kv_shape, kv_blocks)?)
        })?;
        let limits = Limits {
            vocabulary: self.config.shape.vocab,
            max_context: self.max_context(),
            kv_blocks,
            block_size: BLOCK_TOKENS,
            stages,
        };
        Ok(ModelExecutor::new(model, kv_shape, limits, &self.options))
    }

    /// Loads one rank's units of all layers. `ranges` are the units of every rank of the group; the collective knows which rank this is.
    ///
    /// # Errors
    /// As [`Self::stage_executor`].
    pub fn executor<B: Backend, C: Collective<B::Buffer>>(
        &self,
        backend: B,
        ranges: &[Range<usize>],
        collective: C,
    ) -> Result<ModelExecutor<B, C>> {
        self.stage_executor(backend, Stage::whole(self.config.shape.layers), ranges, collective)
    }

    /// Loads one rank's units of a stage's layers, and nothing else. `ranges` are the units of every rank of that stage; the collective
    /// is the stage's own and knows which rank this is.
    ///
    /// # Errors
    /// [`Error::Option`] where the stage cannot have these layers, or the rank no units, or there is no room for the KV cache.
    pub fn stage_executor<B: Backend, C: Collective<B::Buffer>>(
        &self,
        backend: B,
        stage: Stage<B::Buffer>,
        ranges: &[Range<usize>],
        collective: C,
    ) -> Result<ModelExecutor<B, C>> {
        let mut held = Held::new(backend);
        let share = self.share(&stage, ranges, collective.rank())?;
        self.load(&mut held, &share, &mut || Ok(()))?;
        self.start(held, stage, ranges, collective)
    }

    fn progress_bar(&self, share: &Share) -> ProgressBar {
        let bar = ProgressBar::no_length();
        if !self.options.progress {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        if let Ok(style) =
            ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}")
        {
            bar.set_style(style);
        }
        let Share { layers, units } = share;
        let mut message = format!("loading units {}..{}", units.start, units.end);
        if layers.len() < self.config.shape.layers {
            message += &format!(" of layers {}..{}", layers.start, layers.end);
        }
        bar.set_message(message);
        bar.enable_steady_tick(Duration::from_millis(200));
        bar
    }
}

#[cfg(test)]
mod tests;
