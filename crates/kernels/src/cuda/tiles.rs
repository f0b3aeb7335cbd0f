//! The product kernels of each format: their names, and the shapes of `gemm`'s tiles.

use super::matrix::Format;

/// A shape of `gemm`'s tiles.
#[derive(Debug, PartialEq)]
pub(crate) struct Tile {
    pub(crate) kernel: &'static str,
    /// Rows of x.
    pub(crate) rows: usize,
    pub(crate) weight_rows: usize,
    pub(crate) threads: u32,
    pub(crate) shared_bytes: u32,
}

/// One format's kernels.
#[derive(Debug)]
pub(crate) struct Kernels {
    pub(crate) gemv: &'static str,
    pub(crate) gemv_partials: &'static str,
    /// Shared memory of one warp's ring in both.
    pub(crate) gemv_ring: usize,
    pub(crate) unpack: &'static str,
    /// By rows of x.
    tiles: [Tile; 4],
}

/// The format's name, bytes of a ring of gemv.cu, and of gemm.cu's table weight rows of the largest tile and shared memory of all.
macro_rules! kernels {
    ($name:literal, $ring:literal, $largest:literal, [$t16:literal, $t32:literal, $t64:literal, $t128:literal]) => {
        Kernels {
            gemv: concat!("gemv_", $name),
            gemv_partials: concat!("gemv_partials_", $name),
            gemv_ring: $ring,
            unpack: concat!("unpack_", $name),
            tiles: [
                tile(concat!("gemm_", $name, "_t16"), 16, 64, 128, $t16),
                tile(concat!("gemm_", $name, "_t32"), 32, 64, 128, $t32),
                tile(concat!("gemm_", $name, "_t64"), 64, 64, 128, $t64),
                tile(concat!("gemm_", $name, "_t128"), 128, $largest, 256, $t128),
            ],
        }
    };
}

static BF16: Kernels = kernels!("bf16", 4096, 128, [40_960, 49_152, 65_536, 98_304]);
static INT8: Kernels = kernels!("int8", 5120, 64, [50_432, 50_112, 74_688, 123_840]);
static FP8: Kernels = kernels!("fp8", 4096, 64, [49_152, 49_152, 73_728, 122_880]);
static INT4: Kernels = kernels!("int4", 3072, 64, [34_048, 37_824, 62_400, 111_552]);

const fn tile(
    kernel: &'static str,
    rows: usize,
    weight_rows: usize,
    threads: u32,
    shared_bytes: u32,
) -> Tile {
    Tile { kernel, rows, weight_rows, threads, shared_bytes }
}

impl Format {
    /// Its kernels.
    pub(crate) fn kernels(self) -> &'static Kernels {
        match self {
            Self::Bf16 => &BF16,
            Self::Int8 => &INT8,
            Self::Int4 => &INT4,
            Self::Fp8 => &FP8,
        }
    }
}

impl Kernels {
    /// The tiles for `rows` rows of x on a device whose blocks may have so much shared memory. All give the same bits.
    pub(crate) fn tile(&self, rows: usize, shared_limit: u32) -> &Tile {
        let mut fitting = self.tiles.iter().filter(|tile| tile.shared_bytes <= shared_limit);
        let wanted = fitting.clone().find(|tile| tile.rows >= rows);
        wanted.or_else(|| fitting.next_back()).unwrap_or(&self.tiles[0])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shared memory of a block of sm_90 and of sm_86.
    const LARGE: u32 = 227 << 10;
    const SMALL: u32 = 99 << 10;

    #[test]
    fn the_smallest_tile_that_holds_all_rows() {
        let name = |rows| Format::Int4.kernels().tile(rows, LARGE).kernel;
        assert_eq!([9, 16, 17].map(name), ["gemm_int4_t16", "gemm_int4_t16", "gemm_int4_t32"]);
        assert_eq!([64, 65, 5000].map(name), ["gemm_int4_t64", "gemm_int4_t128", "gemm_int4_t128"]);
    }

    #[test]
    fn smaller_tiles_where_shared_memory_is_short() {
        for format in [Format::Int8, Format::Int4, Format::Fp8] {
            assert_eq!(format.kernels().tile(500, SMALL).rows, 64, "{format:?}");
        }
        assert_eq!(Format::Bf16.kernels().tile(500, SMALL).rows, 128);
    }
}
