//! The architectures that kernels are compiled for, and which of them a device takes.

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result};

/// What a module is compiled for: machine code of one generation, or PTX that the driver of a later one translates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Arch {
    /// A100, and the later ones of its generation (A10, L4, L40, RTX 30 and 40), which run the same code: compiled for
    /// themselves, kernels would spill registers and gain no instruction that they use.
    Sm80,
    /// H100, H200.
    Sm90a,
    /// PTX for devices that are newer than this table.
    Compute90,
}

impl Arch {
    /// All of them.
    pub const ALL: [Arch; 3] = [Self::Sm80, Self::Sm90a, Self::Compute90];

    /// NVRTC's name of it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sm80 => "sm_80",
            Self::Sm90a => "sm_90a",
            Self::Compute90 => "compute_90",
        }
    }

    /// Ten times the major plus the minor compute capability.
    pub(super) fn number(self) -> i32 {
        match self {
            Self::Sm80 => 80,
            Self::Sm90a | Self::Compute90 => 90,
        }
    }

    /// Whether its image is PTX, which has no registers yet.
    pub fn is_ptx(self) -> bool {
        self == Self::Compute90
    }

    /// What a device of compute capability `major.minor` takes. Code for 8.m runs on every 8.n with n ≥ m; code for an
    /// architecture with an `a` runs on that one alone.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for devices without bf16 products (before 8.0).
    pub fn for_device(major: i32, minor: i32) -> Result<Self> {
        match (major, minor) {
            (..=7, _) => Err(Error::Unsupported(format!(
                "the GPU's compute capability is {major}.{minor}: the kernels need 8.0 (A100) or later"
            ))),
            (8, _) => Ok(Self::Sm80),
            (9, 0) => Ok(Self::Sm90a),
            _ => Ok(Self::Compute90),
        }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Arch {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|arch| arch.name() == text).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            Error::Unsupported(format!(
                "unknown architecture '{text}': use {names} (GPUs of 8.6 and 8.9 run sm_80)"
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for arch in Arch::ALL {
            assert_eq!(arch.name().parse(), Ok(arch));
        }
        assert!("sm_75".parse::<Arch>().is_err());
    }

    #[test]
    fn devices_take_what_they_can_run() {
        let taken = |major, minor| Arch::for_device(major, minor).map(Arch::name);
        assert!(taken(7, 5).is_err());
        for (device, name) in [
            ((8, 0), "sm_80"),
            ((8, 6), "sm_80"),
            ((8, 9), "sm_80"),
            ((9, 0), "sm_90a"),
            ((10, 0), "compute_90"),
            ((12, 0), "compute_90"),
            ((13, 0), "compute_90"),
        ] {
            assert_eq!(taken(device.0, device.1), Ok(name));
        }
    }
}
