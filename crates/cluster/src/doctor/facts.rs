//! What a worker tells of its program and its machine without measuring.

use crate::convert::{self, Malformed};
use crate::proto;

/// Libraries of one worker.
const MAX_LIBRARIES: usize = 16;

/// What can be told of a worker without measuring; what is empty was not told.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Facts {
    /// Version of the program.
    pub program: String,
    /// The machine's name.
    pub machine: String,
    /// What tells this start of the machine from all other machines.
    pub boot: String,
    /// Version of the operating system's kernel.
    pub kernel: String,
    /// What a GPU needs.
    pub libraries: Vec<Library>,
    /// The one that has the address of the worker's collectives.
    pub interface: Option<Interface>,
}

/// A library that is loaded when it is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Library {
    /// As people call it.
    pub name: String,
    /// As it tells itself.
    pub version: String,
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// As the operating system calls it.
    pub name: String,
    /// Bytes of its largest packet.
    pub mtu: u32,
    /// What its driver says.
    pub megabits: Option<u32>,
    /// Nothing leaves the machine by it.
    pub loopback: bool,
}

impl From<Facts> for proto::Facts {
    fn from(facts: Facts) -> Self {
        let Facts { program, machine, boot, kernel, libraries, interface } = facts;
        let library = |Library { name, version }| proto::Library { name, version };
        let interface = interface.map(|Interface { name, mtu, megabits, loopback }| {
            proto::NetworkInterface { name, mtu, megabits, loopback }
        });
        let libraries = libraries.into_iter().map(library).collect();
        Self { program, machine, boot, kernel, libraries, interface }
    }
}

impl TryFrom<proto::Facts> for Facts {
    type Error = Malformed;

    fn try_from(facts: proto::Facts) -> Result<Self, Malformed> {
        let proto::Facts { program, machine, boot, kernel, libraries, interface } = facts;
        convert::check("facts.libraries", libraries.len() <= MAX_LIBRARIES, "has too many")?;
        let library = |proto::Library { name, version }| {
            let name = convert::text("facts.libraries.name", name)?;
            Ok(Library { name, version: convert::text("facts.libraries.version", version)? })
        };
        let told = |proto::NetworkInterface { name, mtu, megabits, loopback }| {
            let name = convert::text("facts.interface.name", name)?;
            Ok(Interface { name, mtu, megabits, loopback })
        };
        Ok(Self {
            program: convert::text("facts.program", program)?,
            machine: convert::text("facts.machine", machine)?,
            boot: convert::text("facts.boot", boot)?,
            kernel: convert::text("facts.kernel", kernel)?,
            libraries: libraries.into_iter().map(library).collect::<Result<_, _>>()?,
            interface: interface.map(told).transpose()?,
        })
    }
}
