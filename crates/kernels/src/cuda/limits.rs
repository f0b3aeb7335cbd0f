//! What the kernels may take of a multiprocessor: a change that makes one larger is seen here before it is felt.

use super::usage::KernelUsage;

/// Most registers of a thread, on any architecture. Registers are handed out by eights, so these are multiples of eight.
const REGISTERS: &[(&str, u32)] = &[
    ("add_rms_norm", 64),
    ("attend_long_d128", 256),
    ("attend_long_d16", 160),
    ("attend_long_d32", 176),
    ("attend_long_d64", 200),
    ("attend_merge_d128", 128),
    ("attend_merge_d16", 128),
    ("attend_merge_d32", 128),
    ("attend_merge_d64", 128),
    ("attend_short_d128", 200),
    ("attend_short_d16", 104),
    ("attend_short_d32", 144),
    ("attend_short_d64", 144),
    ("embed", 24),
    ("fold", 72),
    ("gather_rows_2", 24),
    ("gather_rows_4", 24),
    ("gemm_bf16_t128", 232),
    ("gemm_bf16_t16", 88),
    ("gemm_bf16_t32", 112),
    ("gemm_bf16_t64", 152),
    ("gemm_fp8_t128", 152),
    ("gemm_fp8_t16", 88),
    ("gemm_fp8_t32", 136),
    ("gemm_fp8_t64", 160),
    ("gemm_int4_t128", 192),
    ("gemm_int4_t16", 104),
    ("gemm_int4_t32", 152),
    ("gemm_int4_t64", 200),
    ("gemm_int8_t128", 200),
    ("gemm_int8_t16", 112),
    ("gemm_int8_t32", 160),
    ("gemm_int8_t64", 208),
    ("gemv_bf16", 48),
    ("gemv_fp8", 64),
    ("gemv_int4", 80),
    ("gemv_int8", 64),
    ("gemv_partials_bf16", 48),
    ("gemv_partials_fp8", 64),
    ("gemv_partials_int4", 80),
    ("gemv_partials_int8", 72),
    ("keep_sampled", 16),
    ("one_shot_gather", 48),
    ("one_shot_reduce", 56),
    ("pack_bf16", 24),
    ("pack_fp8", 40),
    ("pack_int4", 24),
    ("pack_int8", 24),
    ("place_columns", 16),
    ("read_memory", 48),
    ("rms_norm", 64),
    ("rope_table", 24),
    ("rope_write_kv", 48),
    ("sample", 64),
    ("silu_mul", 24),
    ("unpack_bf16", 24),
    ("unpack_fp8", 32),
    ("unpack_int4", 40),
    ("unpack_int8", 32),
];

/// What is wrong with the kernels of one architecture: registers above their limit, spills, stacks, and kernels or limits
/// without the other. Nothing, as a rule.
pub fn violations(kernels: &[KernelUsage]) -> Vec<String> {
    violations_of(REGISTERS, kernels)
}

fn violations_of(limits: &[(&str, u32)], kernels: &[KernelUsage]) -> Vec<String> {
    let mut found = Vec::new();
    for usage in kernels {
        let KernelUsage { kernel, arch, registers, spill_stores, spill_loads, stack, .. } = usage;
        match limits.iter().find(|(name, _)| name == kernel) {
            None => {
                let limit = registers.next_multiple_of(8);
                found.push(format!("{kernel} ({arch}): no limit; add (\"{kernel}\", {limit}) to limits.rs"));
            }
            Some((_, limit)) if registers > limit => {
                found.push(format!("{kernel} ({arch}): {registers} registers, above the limit of {limit}"));
            }
            Some(_) => {}
        }
        if spill_stores + spill_loads > 0 {
            found.push(format!(
                "{kernel} ({arch}): spills {spill_stores} bytes and loads {spill_loads} of them back"
            ));
        }
        if *stack > 0 {
            found.push(format!("{kernel} ({arch}): a stack of {stack} bytes"));
        }
    }
    for (name, _) in limits {
        if !kernels.iter().any(|usage| usage.kernel == *name) {
            found.push(format!("{name}: a limit in limits.rs without a kernel"));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(kernel: &str, registers: u32) -> KernelUsage {
        KernelUsage {
            kernel: kernel.to_owned(),
            arch: "sm_80".to_owned(),
            registers,
            ..KernelUsage::default()
        }
    }

    #[test]
    fn kernels_within_their_limits_pass() {
        assert_eq!(violations_of(&[("a", 40), ("b", 8)], &[usage("a", 40), usage("b", 3)]), [""; 0]);
    }

    #[test]
    fn each_excess_is_told() {
        let limits = [("a", 40), ("gone", 8)];
        let spilling = KernelUsage { spill_stores: 4, stack: 8, ..usage("a", 41) };
        let expected = [
            "a (sm_80): 41 registers, above the limit of 40",
            "a (sm_80): spills 4 bytes and loads 0 of them back",
            "a (sm_80): a stack of 8 bytes",
            "new (sm_80): no limit; add (\"new\", 16) to limits.rs",
            "gone: a limit in limits.rs without a kernel",
        ];
        assert_eq!(violations_of(&limits, &[spilling, usage("new", 9)]), expected);
    }
}
