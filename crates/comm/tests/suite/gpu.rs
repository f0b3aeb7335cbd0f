//! Collectives for GPUs, on the emulator.

use std::ops::Range;

use comm::cuda::{LocalGpu, LocalGpuSeat, NcclCollective, StagedCollective, local_gpu_group};
use comm::{AbortHandle, Result};
use kernels::cuda::{Buffer, Store};
use kernels::{Backend, Cuda, CudaOptions, DType};

use crate::groups::{Connected, Kind, LONG};

/// The GPU of the thread that is to be this rank: all on one, or in turn where there are several.
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
        emulator::open()
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
        emulator::open()
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

    fn buffer(cuda: &Cuda, values: &[f32]) -> Buffer {
        buffer(cuda, values)
    }

    fn values(buffer: &Buffer) -> Vec<f32> {
        values(buffer)
    }
}

impl<T: Connected> Kind for NcclCollective<T> {
    type End = T;
    type Site = Cuda;
    type Buffer = Buffer;
    type Collective = Self;

    fn present() -> bool {
        emulator::open()
    }

    fn group(size: usize) -> Vec<T> {
        T::connect(size)
    }

    fn abort_handle(end: &T) -> AbortHandle {
        end.abort_handle()
    }

    fn join(end: T, ranges: &[Range<usize>]) -> Result<(Cuda, Self)> {
        let cuda = open(end.rank());
        let nccl = NcclCollective::form(&cuda, end, ranges.to_vec(), true, LONG)?;
        Ok((cuda, nccl))
    }

    fn buffer(cuda: &Cuda, values: &[f32]) -> Buffer {
        buffer(cuda, values)
    }

    fn values(buffer: &Buffer) -> Vec<f32> {
        values(buffer)
    }
}
