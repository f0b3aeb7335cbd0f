//! Collectives for GPUs, on the emulator: as many GPUs as ranks can share memory, each of which runs beside the host.

use std::marker::PhantomData;
use std::ops::Range;

use comm::cuda::{ConnectOptions, LocalGpu, LocalGpuSeat, StagedCollective, connect, local_gpu_group};
use comm::{AbortHandle, Collective, CollectiveChoice, Result};
use kernels::cuda::{Buffer, MAX_RANKS, Store};
use kernels::{Backend, Cuda, CudaOptions, DType};

use crate::groups::{Connected, Kind, LONG};

/// Whether there is an emulator.
pub(crate) fn present() -> bool {
    emulator::open_with(MAX_RANKS as u16, true)
}

/// Whether the emulator was told to run work late, which means on the threads that wait for it: then these cannot look up.
pub(crate) fn waits_on_callers() -> bool {
    std::env::var("PHALANX_EMULATOR_LATE").is_ok_and(|late| late == "1")
}

/// The GPU of the thread that is to be this rank: in turn.
pub(crate) fn open(rank: usize) -> Cuda {
    let ordinal = rank % kernels::gpus().unwrap();
    let options = CudaOptions { ordinal, separate_allocations: true, ..CudaOptions::default() };
    Cuda::with_kernels(options, &Store::none()).unwrap()
}

pub(crate) fn buffer(cuda: &Cuda, values: &[f32]) -> Buffer {
    let mut buffer = cuda.buffer(DType::F32, 1, values.len()).unwrap();
    buffer.write(values).unwrap();
    buffer
}

pub(crate) fn values(buffer: &Buffer) -> Vec<f32> {
    buffer.row(0).unwrap()
}

impl<T: Connected> Kind for StagedCollective<T> {
    type End = T;
    type Site = Cuda;
    type Buffer = Buffer;
    type Collective = Self;

    fn present() -> bool {
        present()
    }

    fn group(size: usize) -> Vec<T> {
        T::connect(size)
    }

    fn abort_handle(end: &T) -> AbortHandle {
        end.abort_handle()
    }

    fn join(end: T, ranges: &[Range<usize>]) -> Result<(Cuda, Self)> {
        let cuda = open(end.rank());
        let staged = StagedCollective::new(&cuda, end, ranges.to_vec())?;
        Ok((cuda, staged))
    }

    fn buffer(cuda: &Cuda, values: &[f32]) -> Buffer {
        buffer(cuda, values)
    }

    fn values(buffer: &Buffer) -> Vec<f32> {
        values(buffer)
    }
}

impl Kind for LocalGpu {
    type End = (LocalGpuSeat, AbortHandle);
    type Site = Cuda;
    type Buffer = Buffer;
    type Collective = Self;

    fn present() -> bool {
        present()
    }

    fn group(size: usize) -> Vec<(LocalGpuSeat, AbortHandle)> {
        local_gpu_group(size).into_iter().map(|seat| (seat, AbortHandle::default())).collect()
    }

    fn abort_handle((_, abort): &(LocalGpuSeat, AbortHandle)) -> AbortHandle {
        abort.clone()
    }

    fn join((seat, abort): Self::End, ranges: &[Range<usize>]) -> Result<(Cuda, Self)> {
        let cuda = open(seat.rank());
        let local = seat.join(&cuda, ranges.to_vec(), abort, LONG)?;
        Ok((cuda, local))
    }

    fn settle(cuda: &Cuda) {
        cuda.synchronize().unwrap();
    }

    fn buffer(cuda: &Cuda, values: &[f32]) -> Buffer {
        buffer(cuda, values)
    }

    fn values(buffer: &Buffer) -> Vec<f32> {
        values(buffer)
    }
}

/// What is asked for of [`connect`].
pub(crate) trait Ask {
    const CHOICE: CollectiveChoice;
}

/// By memory that the GPUs share alone.
pub(crate) struct Peer;
impl Ask for Peer {
    const CHOICE: CollectiveChoice = CollectiveChoice::Peer;
}

/// By that for short messages and NCCL for long ones, since both are there.
pub(crate) struct Auto;
impl Ask for Auto {
    const CHOICE: CollectiveChoice = CollectiveChoice::Auto;
}

/// By NCCL alone.
pub(crate) struct Nccl;
impl Ask for Nccl {
    const CHOICE: CollectiveChoice = CollectiveChoice::Nccl;
}

/// What a process makes of a transport: nothing of a rank is known to another but by that.
pub(crate) struct Process<A, T>(PhantomData<(A, T)>);

impl<A: Ask, T: Connected> Kind for Process<A, T> {
    type End = T;
    type Site = Cuda;
    type Buffer = Buffer;
    type Collective = Box<dyn Collective<Buffer>>;

    fn present() -> bool {
        present()
    }

    fn group(size: usize) -> Vec<T> {
        T::connect(size)
    }

    fn abort_handle(end: &T) -> AbortHandle {
        end.abort_handle()
    }

    fn join(end: T, ranges: &[Range<usize>]) -> Result<(Cuda, Self::Collective)> {
        let cuda = open(end.rank());
        let options = ConnectOptions { choice: A::CHOICE, deterministic: true, limit: LONG };
        let connected = connect(&cuda, end, ranges.to_vec(), options)?;
        Ok((cuda, connected))
    }

    fn buffer(cuda: &Cuda, values: &[f32]) -> Buffer {
        buffer(cuda, values)
    }

    fn values(buffer: &Buffer) -> Vec<f32> {
        values(buffer)
    }

    fn settle(cuda: &Cuda) {
        cuda.synchronize().unwrap();
    }
}
