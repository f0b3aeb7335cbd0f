//! What ptxas says that a kernel takes (`--ptxas-options=-v`).

/// One kernel's share of a multiprocessor.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct KernelUsage {
    /// Its name.
    pub kernel: String,
    /// The architecture, in ptxas's words.
    pub arch: String,
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of registers that are written to memory for want of room.
    pub spill_stores: u32,
    /// Bytes of them that are read back.
    pub spill_loads: u32,
    /// Bytes of a thread's stack, that of called functions included.
    pub stack: u32,
    /// Bytes of static shared memory of a block.
    pub shared: u32,
    /// Named barriers of a block.
    pub barriers: u32,
}

/// The kernels of a log, in its order; lines of other kinds are passed over.
///
/// What a called function spills counts for the kernel above it: ptxas lists functions after the kernel that they serve.
pub(super) fn parse_log(log: &str) -> Vec<KernelUsage> {
    let mut kernels: Vec<KernelUsage> = Vec::new();
    for line in log.lines() {
        let text = line.trim_start_matches("ptxas").trim_start();
        let Some(text) = text.strip_prefix("info").or_else(|| text.strip_prefix('.')) else { continue };
        let text = text.trim_start().trim_start_matches(':').trim_start();
        if let Some(names) = text.strip_prefix("Compiling entry function ") {
            let mut quoted = names.split('\'').skip(1).step_by(2).map(str::to_owned);
            let (Some(kernel), Some(arch)) = (quoted.next(), quoted.next()) else { continue };
            kernels.push(KernelUsage { kernel, arch, ..KernelUsage::default() });
        } else if let Some(kernel) = kernels.last_mut() {
            for part in text.split(',') {
                kernel.add(part.trim());
            }
        }
    }
    kernels
}

impl KernelUsage {
    /// Takes one figure, such as `Used 32 registers` or `0 bytes stack frame`.
    fn add(&mut self, part: &str) {
        let part = part.strip_prefix("Used ").or_else(|| part.strip_prefix("used ")).unwrap_or(part);
        let Some((number, what)) = part.split_once(' ') else { return };
        let Ok(number) = number.parse::<u32>() else { return };
        match what {
            "registers" => self.registers = number,
            "barriers" => self.barriers = number,
            "bytes smem" => self.shared = number,
            "bytes spill stores" => self.spill_stores += number,
            "bytes spill loads" => self.spill_loads += number,
            "bytes stack frame" | "bytes cumulative stack size" => self.stack = self.stack.max(number),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // NVRTC 13.0.88 on norm.cu, and on a kernel that spills beside one that calls a function which was not inlined.
    const NORM_SM_80: &str = "\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'add_rms_norm' for 'sm_80'
ptxas info    : Function properties for add_rms_norm
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 32 bytes smem, 392 bytes cmem[0]
ptxas info    : Compile time = 13.044 ms
ptxas info    : Compiling entry function 'rms_norm' for 'sm_80'
ptxas info    : Function properties for rms_norm
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 31 registers, used 1 barriers, 32 bytes smem, 384 bytes cmem[0]
ptxas info    : Compile time = 2.831 ms
";
    const SPILLS_SM_90A: &str = "\
ptxas warning : Registers are spilled to local memory in function 'spilly', 1440 bytes spill stores, 1448 bytes spill loads
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'calls' for 'sm_90a'
ptxas info    : Function properties for calls
ptxas         .     256 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 140 registers, used 0 barriers, 256 bytes cumulative stack size
ptxas info    : Compile time = 25.925 ms
ptxas info    : Function properties for _Z6helperPfi
ptxas         .     0 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Compiling entry function 'spilly' for 'sm_90a'
ptxas info    : Function properties for spilly
ptxas         .     1344 bytes stack frame, 1440 bytes spill stores, 1448 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 1344 bytes cumulative stack size
ptxas info    : Compile time = 70.427 ms
";

    fn usage(kernel: &str, arch: &str) -> KernelUsage {
        KernelUsage { kernel: kernel.to_owned(), arch: arch.to_owned(), ..KernelUsage::default() }
    }

    #[test]
    fn kernels_without_spills() {
        let expected = [
            KernelUsage { registers: 32, shared: 32, barriers: 1, ..usage("add_rms_norm", "sm_80") },
            KernelUsage { registers: 31, shared: 32, barriers: 1, ..usage("rms_norm", "sm_80") },
        ];
        assert_eq!(parse_log(NORM_SM_80), expected);
    }

    #[test]
    fn spills_and_stacks() {
        let expected = [
            KernelUsage {
                registers: 140,
                stack: 256,
                spill_stores: 8,
                spill_loads: 12,
                ..usage("calls", "sm_90a")
            },
            KernelUsage {
                registers: 32,
                stack: 1344,
                spill_stores: 1440,
                spill_loads: 1448,
                barriers: 1,
                ..usage("spilly", "sm_90a")
            },
        ];
        assert_eq!(parse_log(SPILLS_SM_90A), expected);
    }

    #[test]
    fn other_texts_have_no_kernels() {
        assert_eq!(parse_log(""), []);
        assert_eq!(parse_log("ptxas info : Used 3 registers\nCompiling entry function 'x"), []);
        assert_eq!(parse_log("ptxas info    : Compiling entry function 'x' for"), []);
    }
}
