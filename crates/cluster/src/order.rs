//! What an operator orders: which workers are to have no part, and what groups are wanted.

use bytes::Bytes;
use prost::Message;

use crate::convert::{self, Malformed};
use crate::policy::{MAX_GROUP, Policy, Shape};
use crate::proto;

/// What an operator orders.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// The worker whose collectives listen at `address` is to have no part in any group.
    Drain {
        /// As `status` tells it.
        address: String,
    },
    /// It may have a part again.
    Restore {
        /// Likewise.
        address: String,
    },
    /// Groups of another shape, or another number of them; what is not said stays.
    Scale {
        /// How a group is cut.
        shape: Option<Shape>,
        /// Groups, at most.
        replicas: Option<usize>,
    },
    /// Examine all workers.
    Doctor {
        /// How much links carry is measured even though a group works.
        disturb: bool,
    },
}

impl Order {
    /// The order as it is sent, and proven.
    pub fn encode(&self) -> Bytes {
        proto::Order::from(self.clone()).encode_to_vec().into()
    }

    /// What was sent.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let order = proto::Order::decode(bytes)
            .map_err(|error| Malformed { field: "order", problem: format!("does not decode: {error}") })?;
        order.try_into()
    }
}

impl Policy {
    /// This policy with what an order changes.
    pub fn scaled(self, shape: Option<Shape>, replicas: Option<usize>) -> Self {
        Self { shape: shape.unwrap_or(self.shape), replicas: replicas.unwrap_or(self.replicas), ..self }
    }
}

impl From<Order> for proto::Order {
    fn from(order: Order) -> Self {
        use proto::order::Order as Wire;
        let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let order = match order {
            Order::Drain { address } => Wire::Drain(proto::Drain { address }),
            Order::Restore { address } => Wire::Restore(proto::Restore { address }),
            Order::Scale { shape, replicas } => {
                let shape = shape.map(|shape| match shape {
                    Shape::Fixed { stages, ranks, min_ranks } => proto::Shape {
                        stages: number(stages),
                        ranks: number(ranks),
                        min_ranks: number(min_ranks),
                    },
                    Shape::Auto { max_stages } => {
                        proto::Shape { stages: number(max_stages), ..proto::Shape::default() }
                    }
                });
                Wire::Scale(proto::Scale { shape, replicas: replicas.map(number) })
            }
            Order::Doctor { disturb } => Wire::Doctor(proto::Doctor { disturb }),
        };
        Self { order: Some(order) }
    }
}

impl TryFrom<proto::Order> for Order {
    type Error = Malformed;

    fn try_from(order: proto::Order) -> Result<Self, Malformed> {
        use proto::order::Order as Wire;
        Ok(match convert::present("order", order.order)? {
            Wire::Drain(drain) => {
                Self::Drain { address: convert::text("order.drain.address", drain.address)? }
            }
            Wire::Restore(restore) => {
                Self::Restore { address: convert::text("order.restore.address", restore.address)? }
            }
            Wire::Scale(proto::Scale { shape, replicas }) => {
                let replicas = replicas.map(|replicas| replicas as usize);
                let in_range = replicas.is_none_or(|replicas| (1..=MAX_GROUP).contains(&replicas));
                convert::check("order.scale.replicas", in_range, "is out of range")?;
                Self::Scale { shape: shape.map(Shape::try_from).transpose()?, replicas }
            }
            Wire::Doctor(proto::Doctor { disturb }) => Self::Doctor { disturb },
        })
    }
}

impl TryFrom<proto::Shape> for Shape {
    type Error = Malformed;

    fn try_from(shape: proto::Shape) -> Result<Self, Malformed> {
        let [stages, ranks, min_ranks] =
            [shape.stages, shape.ranks, shape.min_ranks].map(|number| number as usize);
        let shape = match ranks {
            0 => Shape::Auto { max_stages: stages },
            ranks => Shape::Fixed { stages, ranks, min_ranks },
        };
        shape.check().map_err(|problem| Malformed { field: "order.scale.shape", problem })?;
        Ok(shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_survive_the_wire() {
        let address = || "here:1".to_owned();
        for order in [
            Order::Drain { address: address() },
            Order::Restore { address: address() },
            Order::Doctor { disturb: true },
            Order::Scale { shape: None, replicas: Some(3) },
            Order::Scale { shape: Some(Shape::Auto { max_stages: 2 }), replicas: None },
            Order::Scale { shape: Some(Shape::Fixed { stages: 2, ranks: 3, min_ranks: 1 }), replicas: None },
        ] {
            assert_eq!(Order::decode(&order.encode()), Ok(order));
        }
    }

    #[test]
    fn shapes_and_numbers_out_of_range_are_named() {
        let problem = |order: Order| Order::decode(&order.encode()).unwrap_err().to_string();
        let scale = |shape| Order::Scale { shape: Some(shape), replicas: None };
        assert_eq!(
            problem(Order::Scale { shape: None, replicas: Some(0) }),
            "malformed message: order.scale.replicas is out of range"
        );
        for (shape, named) in [
            (Shape::Fixed { stages: 0, ranks: 3, min_ranks: 1 }, "0 stages"),
            (Shape::Fixed { stages: 17, ranks: 3, min_ranks: 1 }, "17 stages"),
            (Shape::Fixed { stages: 1, ranks: 3, min_ranks: 4 }, "4 ranks at least"),
            (Shape::Fixed { stages: 1, ranks: 3, min_ranks: 0 }, "0 ranks at least"),
            (Shape::Auto { max_stages: 0 }, "0 stages"),
        ] {
            let problem = problem(scale(shape));
            assert!(problem.contains(named), "{problem}");
        }
        assert!(Order::decode(&[255, 255]).is_err());
        assert!(Order::decode(&[]).is_err());
    }
}
