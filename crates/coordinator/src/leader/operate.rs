//! What an operator orders: planned changes, which go the way of losses and cost as little.

use cluster::Order;
use tracing::info;

use super::Leader;

impl Leader {
    /// Carries an order out; what came of it, for people.
    pub(super) fn operate(&mut self, order: Order) -> Result<String, String> {
        info!(?order, "ordered");
        let (effects, done) = match order.clone() {
            Order::Drain { address } => {
                let effects = self.groups.drain(&address, true)?;
                (effects, format!("the worker at {address} has no part in any group now"))
            }
            Order::Restore { address } => {
                let effects = self.groups.drain(&address, false)?;
                (effects, format!("the worker at {address} may have a part again"))
            }
            // It changes nothing, and is a command of its own.
            Order::Doctor { .. } => return Err("an examination is no change".into()),
            Order::Scale { shape, replicas } => {
                let policy = self.groups.policy().scaled(shape, replicas);
                let effects = self.groups.scale(policy).map_err(|shortage| shortage.to_string())?;
                (effects, format!("asked for: {policy}"))
            }
        };
        self.orders.add(order);
        self.perform(effects);
        let groups: Vec<_> = self.groups.standing().map(|(group, _)| group.to_string()).collect();
        Ok(if groups.is_empty() { done } else { format!("{done}; {}", groups.join(", ")) })
    }
}
