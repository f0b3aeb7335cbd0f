//! The shapes of published models, for measuring them without their files.

use engine::ModelShape;

use super::quantization::fits;
use super::{Config, Layout, Quantization, YI_ROPE_THETA};

/// Context of the models with 200K in their names, which are the others of the same size but for that.
const LONG_CONTEXT: usize = 200_000;
/// Columns of a group of the publisher's quantised models.
const GROUP_SIZE: usize = 128;

/// A shape that has a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Preset {
    /// Yi-34B-200K.
    Yi34B,
    /// Yi-6B-200K.
    Yi6B,
    /// About a billion parameters, as measured on CPUs; published by nobody.
    Yi1B,
    /// A few thousand parameters in two units, for trying things.
    Tiny,
}

impl Config {
    /// The config of a model of this shape.
    pub fn preset(preset: Preset) -> Self {
        let shape = |hidden, layers, [heads, kv_heads, head_dim]: [usize; 3], ffn, vocab| ModelShape {
            hidden,
            layers,
            heads,
            kv_heads,
            head_dim,
            ffn,
            vocab,
        };
        Self {
            architecture: "LlamaForCausalLM".into(),
            model_type: "llama".into(),
            shape: match preset {
                Preset::Yi34B => shape(7168, 60, [56, 8, 128], 20_480, 64_000),
                Preset::Yi6B => shape(4096, 32, [32, 4, 128], 11_008, 64_000),
                Preset::Yi1B => shape(2048, 16, [16, 4, 128], 5632, 64_000),
                Preset::Tiny => shape(128, 2, [8, 2, 32], 512, 512),
            },
            rms_norm_eps: 1e-5,
            rope_theta: YI_ROPE_THETA,
            max_positions: LONG_CONTEXT,
            tied: false,
            bos: Some(1),
            eos: vec![2],
            quantization: None,
        }
    }

    /// The same model with its projections quantised to 8 or 4 bits in groups of 128 columns, or not at all.
    ///
    /// # Errors
    /// Says what the shape should be for that.
    pub fn with_quantization(self, bits: Option<usize>) -> Result<Self, String> {
        let group_size = Some(GROUP_SIZE);
        let how = |bits| Quantization { layout: Layout::GptqV2, bits, group_size, reordered: false };
        let quantization = bits.map(how);
        match quantization {
            Some(Quantization { bits, .. }) if ![4, 8].contains(&bits) => {
                return Err(format!("4 or 8 bits, not {bits}"));
            }
            Some(quantization) => fits(quantization, &self.shape)?,
            None => {}
        }
        Ok(Self { quantization, ..self })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::Tensor;

    fn parameters(preset: Preset) -> usize {
        let config = Config::preset(preset);
        let tensors = Tensor::all(config.shape.layers, config.tied);
        tensors.map(|tensor| tensor.shape(&config.shape).iter().product::<usize>()).sum()
    }

    #[test]
    fn presets_have_the_published_numbers_of_parameters() {
        assert_eq!(parameters(Preset::Yi34B), 34_388_917_248);
        assert_eq!(parameters(Preset::Yi6B), 6_061_035_520);
        assert_eq!(parameters(Preset::Yi1B), 983_631_872);
    }

    #[test]
    fn what_cannot_be_quantised_is_refused() {
        let tiny = || Config::preset(Preset::Tiny);
        assert_eq!(tiny().with_quantization(Some(4)).unwrap().quantization.map(|q| q.bits), Some(4));
        assert_eq!(tiny().with_quantization(None), Ok(tiny()));
        assert!(tiny().with_quantization(Some(3)).unwrap_err().contains("not 3"));
        let mut odd = tiny();
        odd.shape.ffn = 513;
        assert!(odd.with_quantization(Some(4)).unwrap_err().contains("intermediate_size (513)"));
    }
}
