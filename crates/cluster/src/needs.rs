//! What a model takes of a device's memory, on the wire.

use engine::MemoryNeeds;

use crate::convert::{self, Malformed};
use crate::proto;

/// Layers of any model that is served.
const MAX_LAYERS: u32 = 4096;

impl From<MemoryNeeds> for proto::MemoryNeeds {
    fn from(needs: MemoryNeeds) -> Self {
        let MemoryNeeds { layers, layer_unit, embedding_unit, head_unit, activation_unit, rank, kv_token } =
            needs;
        Self { layers, layer_unit, embedding_unit, head_unit, activation_unit, rank, kv_token }
    }
}

impl TryFrom<proto::MemoryNeeds> for MemoryNeeds {
    type Error = Malformed;

    fn try_from(needs: proto::MemoryNeeds) -> Result<Self, Malformed> {
        let proto::MemoryNeeds {
            layers,
            layer_unit,
            embedding_unit,
            head_unit,
            activation_unit,
            rank,
            kv_token,
        } = needs;
        convert::check("model.needs.layers", (1..=MAX_LAYERS).contains(&layers), "is out of range")?;
        Ok(Self { layers, layer_unit, embedding_unit, head_unit, activation_unit, rank, kv_token })
    }
}
