//! A rank's place in a pipeline: the layers of its stage, and what connects it with the stages around.

use std::ops::Range;

use comm::{Alone, StageLink};

use crate::error::{Error, Result};

/// The stage that a rank belongs to. The first one embeds, the last one has the final norm and the head, and samples.
/// `B`: buffers of its device.
pub struct Stage<B> {
    /// Its decoder layers.
    pub layers: Range<usize>,
    /// From the stage in front, and to the one behind.
    pub link: Box<dyn StageLink<B>>,
}

impl<B> Stage<B> {
    /// The only one, of a model of so many layers.
    pub fn whole(layers: usize) -> Self {
        Self { layers: 0..layers, link: Box::new(Alone) }
    }

    /// Fails unless these are layers of a model of `layers` layers such as this stage may have.
    pub(crate) fn check(&self, layers: usize) -> Result<()> {
        let Range { start, end } = self.layers;
        let borders = (start == 0, end == layers) == (self.is_first(), self.is_last());
        if start < end && end <= layers && borders {
            return Ok(());
        }
        let (stage, stages) = (self.link.stage(), self.link.stages());
        Err(Error::Option(format!(
            "stage {stage} of {stages} cannot have layers {start}..{end} of a model of {layers} layers"
        )))
    }

    pub(crate) fn is_first(&self) -> bool {
        self.link.stage() == 0
    }

    pub(crate) fn is_last(&self) -> bool {
        self.link.stage() + 1 == self.link.stages()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use comm::local_pipeline;
    use kernels::{Backend, Cpu};

    #[test]
    fn only_the_first_and_the_last_stage_have_the_ends() {
        let allowed = |stage: usize, layers: Range<usize>| {
            let link = local_pipeline(&[1, 1, 1]).unwrap().swap_remove(stage).remove(0);
            Stage::<<Cpu as Backend>::Buffer> { layers, link: Box::new(link) }.check(8)
        };
        for (stage, layers) in [(0, 0..1), (1, 1..2), (2, 2..8)] {
            assert!(allowed(stage, layers).is_ok());
        }
        for (stage, layers) in [
            (0, 1..2),
            (0, 0..8),
            (0, 0..0),
            (1, 0..2),
            (1, 2..8),
            (1, 3..3),
            (2, 2..7),
            (2, 0..8),
            (2, 7..9),
        ] {
            let error = allowed(stage, layers.clone()).unwrap_err().to_string();
            assert!(error.starts_with(&format!("stage {stage} of 3 cannot have layers")), "{error}");
        }
        assert!(Stage::<()>::whole(8).check(8).is_ok());
    }
}
