//! What a group's steps may be: what the user allows, within what every rank can take.

use cluster::ModelReport;
use cluster::convert::MAX_SLICES;
use engine::SchedulerConfig;

use crate::config::CoordinatorConfig;
use crate::groups::Capacity;

/// Where neither the user nor the workers set limits.
const USUAL_BATCH_TOKENS: u32 = 512;
const USUAL_SEQUENCES: u32 = 64;

/// Limits of a group of this model, in so many stages, whose ranks have this in common.
pub(crate) fn limits(
    config: &CoordinatorConfig,
    report: &ModelReport,
    stages: usize,
    capacity: Capacity,
) -> SchedulerConfig {
    let Capacity { kv_blocks, steps_in_flight, step_rows, sampled_rows } = capacity;
    SchedulerConfig {
        blocks: kv_blocks,
        block_size: report.block_size,
        max_context: config.policy.context.map_or(report.max_context, |limit| limit.min(report.max_context)),
        vocabulary: report.vocabulary,
        max_batch_tokens: within(config.max_batch_tokens, step_rows, USUAL_BATCH_TOKENS),
        max_sequences: within(config.max_sequences, sampled_rows, USUAL_SEQUENCES).min(MAX_SLICES as u32),
        steps_in_flight,
        stages: stages as u32,
    }
}

/// What was asked for, or else the most that there is, or else what is usual; never more than the most, and at least 1.
fn within(asked: Option<u32>, most: Option<u32>, usual: u32) -> u32 {
    asked.or(most).unwrap_or(usual).min(most.unwrap_or(u32::MAX)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_no_larger_than_the_ranks_and_the_user_allow() {
        assert_eq!(within(None, None, 512), 512);
        assert_eq!(within(None, Some(4096), 512), 4096);
        assert_eq!(within(None, Some(20), 512), 20);
        assert_eq!(within(Some(1000), None, 512), 1000);
        assert_eq!(within(Some(1000), Some(600), 512), 600);
        assert_eq!(within(Some(30), Some(600), 512), 30);
        assert_eq!(within(Some(0), None, 512), 1);
    }
}
