//! What operators have ordered, in one entry without a lease: a coordinator that takes over holds to it.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::entries::{Entries, MAX_VALUE, to_json};
use super::{Registry, RegistryError, Transaction};
use crate::order::Order;
use crate::policy::{MAX_GROUP, Shape};

const KEY: &str = "orders";

/// The orders that stand.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct StandingOrders {
    /// Addresses of workers that are to have no part in any group.
    pub drained: BTreeSet<String>,
    /// How groups are to be cut, whatever coordinators were started with.
    pub shape: Option<Shape>,
    /// Groups, at most, likewise.
    pub replicas: Option<usize>,
}

impl StandingOrders {
    /// Adds an order that was carried out.
    pub fn add(&mut self, order: Order) {
        match order {
            Order::Drain { address } => drop(self.drained.insert(address)),
            Order::Restore { address } => drop(self.drained.remove(&address)),
            Order::Scale { shape, replicas } => {
                self.shape = shape.or(self.shape);
                self.replicas = replicas.or(self.replicas);
            }
            Order::Doctor { .. } => {}
        }
    }

    fn check(&self) -> Result<(), String> {
        self.shape.map_or(Ok(()), |shape| shape.check())?;
        match self.replicas {
            Some(replicas) if !(1..=MAX_GROUP).contains(&replicas) => {
                Err(format!("{replicas} groups: use 1 to {MAX_GROUP}"))
            }
            _ => Ok(()),
        }
    }
}

/// Where they stand.
#[derive(Debug, Clone)]
pub struct OrderBook(Arc<dyn Registry>);

impl OrderBook {
    /// That of a registry.
    pub fn new(registry: Arc<dyn Registry>) -> Self {
        Self(registry)
    }

    /// The orders that stand. Rubbish is reported, and none.
    ///
    /// # Errors
    /// Where the registry is away.
    pub async fn read(&self) -> Result<StandingOrders, RegistryError> {
        let mut entries = Entries::new(self.0.watch(KEY).await?);
        let Some(entry) = entries.latest().entries.remove(KEY) else { return Ok(StandingOrders::default()) };
        Ok(entries.parse(KEY, &entry, StandingOrders::check).unwrap_or_default())
    }

    /// Replaces them.
    ///
    /// # Errors
    /// Where the registry is away: whether they were replaced is then not known. Or where they are more than would be read again.
    pub async fn write(&self, orders: &StandingOrders) -> Result<(), RegistryError> {
        let value = to_json(orders);
        if value.len() > MAX_VALUE {
            return Err(RegistryError::Options(format!(
                "{} workers are drained, too many to put down: take some back with `phalanx drain --undo`",
                orders.drained.len()
            )));
        }
        self.0.transact(Transaction::default().put(KEY, value, None)).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_orders_replace_earlier_ones() {
        let drain = |address: &str| Order::Drain { address: address.into() };
        let fixed = |ranks| Shape::Fixed { stages: 1, ranks, min_ranks: 1 };
        let mut orders = StandingOrders::default();
        for order in [
            drain("a:1"),
            drain("b:1"),
            Order::Restore { address: "a:1".into() },
            Order::Scale { shape: Some(fixed(2)), replicas: Some(3) },
            Order::Scale { shape: Some(fixed(4)), replicas: None },
            Order::Doctor { disturb: true },
        ] {
            orders.add(order);
        }
        let drained = BTreeSet::from(["b:1".to_owned()]);
        assert_eq!(orders, StandingOrders { drained, shape: Some(fixed(4)), replicas: Some(3) });
    }
}
