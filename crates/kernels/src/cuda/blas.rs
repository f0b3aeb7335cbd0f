//! Wide matrix products by cuBLASLt, which is faster than our own kernels there and keeps no promise about bits.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::rc::Rc;

use cudarc::cublaslt::result::CublasError;
use cudarc::cublaslt::{result, sys};

use super::device::Device;
use super::memory::Memory;
use crate::{DType, Error, Result};

/// What NVIDIA recommends for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;
/// Bytes on a multiple of which rows of x and of results begin.
pub(crate) const OPERAND_ALIGNMENT: u32 = 16;
/// Sizes of products that are remembered at a time.
const MAX_PRODUCTS: usize = 1024;
/// The first version whose types are those that this program was built with.
const VERSION: usize = 130_000;

/// A handle, its workspace, and what was found out about each size of product.
pub(crate) struct Blas {
    device: Rc<Device>,
    handle: sys::cublasLtHandle_t,
    workspace: Memory,
    products: HashMap<Size, Product>,
}

/// `out[rows, n] = x[rows, k] · W[n, k]ᵀ`: sizes, elements from one row to the next, and the type of results.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Size {
    pub(crate) rows: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) x_stride: usize,
    pub(crate) weight_stride: usize,
    pub(crate) out_stride: usize,
    pub(crate) out_dtype: DType,
}

/// Descriptions of the operands and the algorithm that the library chose.
struct Product {
    matmul: sys::cublasLtMatmulDesc_t,
    weight: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Blas {
    /// # Errors
    /// [`Error::Unsupported`] where the library is missing or too old: in a sentence for users.
    pub(crate) fn open(device: &Rc<Device>) -> Result<Self> {
        // SAFETY: looks whether a library can be opened, and opens it.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::Unsupported(
                "cuBLAS (libcublasLt.so.13, part of CUDA 13) is not among the libraries of this machine; install it, \
                 or run with --deterministic, which does without"
                    .into(),
            ));
        }
        // SAFETY: no arguments.
        let version = unsafe { sys::cublasLtGetVersion() };
        if version < VERSION {
            return Err(Error::Unsupported(format!(
                "cuBLAS {version} is too old: version {VERSION} (CUDA 13) or newer is needed, or --deterministic, \
                 which does without"
            )));
        }
        device.bind()?;
        let handle = result::create_handle().map_err(failed)?;
        let workspace = Memory::allocate(device, "cuBLAS", WORKSPACE_BYTES)?;
        Ok(Self { device: device.clone(), handle, workspace, products: HashMap::new() })
    }

    /// `out = x · Wᵀ`; bf16 operands, sums in f32, addresses on the device.
    ///
    /// # Safety
    /// The operands are as large as `size` says; x and the result begin on a multiple of [`OPERAND_ALIGNMENT`], weights of 256.
    pub(crate) unsafe fn multiply(&mut self, size: Size, x: u64, weight: u64, out: u64) -> Result<()> {
        // Prompts have any length: what was found out about the rarer ones is found out anew.
        if self.products.len() >= MAX_PRODUCTS && !self.products.contains_key(&size) {
            self.products.clear();
        }
        let product = match self.products.entry(size) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(vacant) => vacant.insert(Product::describe(self.handle, size)?),
        };
        let alpha = 1f32;
        let beta = 0f32;
        // SAFETY: the caller's promise about the operands; everything else belongs to this object.
        unsafe {
            result::matmul(
                self.handle,
                product.matmul,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                weight as *const c_void,
                product.weight,
                x as *const c_void,
                product.x,
                out as *const c_void,
                product.out,
                out as *mut c_void,
                product.out,
                &raw const product.algorithm,
                self.workspace.pointer() as *mut c_void,
                self.workspace.bytes(),
                self.device.stream().cu_stream().cast(),
            )
        }
        .map_err(failed)
    }
}

impl Product {
    /// The library's matrices are column-major, so it is asked for `outᵀ[n, rows] = W · xᵀ`.
    fn describe(handle: sys::cublasLtHandle_t, size: Size) -> Result<Self> {
        let bf16 = sys::cudaDataType::CUDA_R_16BF;
        let f32 = sys::cudaDataType::CUDA_R_32F;
        let layout = |dtype, rows: usize, cols: usize, stride: usize| {
            result::create_matrix_layout(dtype, rows as u64, cols as u64, stride as i64).map_err(failed)
        };
        let matmul =
            result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, f32).map_err(failed)?;
        let transposed = 1i32;
        // SAFETY: the attribute is an integer of 32 bits.
        unsafe {
            result::set_matmul_desc_attribute(
                matmul,
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
                (&raw const transposed).cast(),
                size_of::<i32>(),
            )
        }
        .map_err(failed)?;
        let weight = layout(bf16, size.k, size.n, size.weight_stride)?;
        let x = layout(bf16, size.k, size.rows, size.x_stride)?;
        let out_dtype = if size.out_dtype == DType::Bf16 { bf16 } else { f32 };
        let out = layout(out_dtype, size.n, size.rows, size.out_stride)?;
        let preference = result::create_matmul_pref().map_err(failed)?;
        use sys::cublasLtMatmulPreferenceAttributes_t as Preference;
        let set = |attribute, value: &[u8]| {
            // SAFETY: the value is as long as the library's header says for the attribute.
            unsafe {
                result::set_matmul_pref_attribute(preference, attribute, value.as_ptr().cast(), value.len())
            }
        };
        // The library takes 256 for granted: weights are; a unit's columns of x begin where they do.
        let alignment = &OPERAND_ALIGNMENT.to_ne_bytes();
        let heuristic =
            set(Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE_BYTES.to_ne_bytes())
                .and_then(|()| set(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment))
                .and_then(|()| set(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment))
                .and_then(|()| set(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment))
                .and_then(|()| {
                    // SAFETY: all descriptions were made above.
                    unsafe {
                        result::get_matmul_algo_heuristic(handle, matmul, weight, x, out, out, preference)
                    }
                });
        // SAFETY: made above.
        let _ = unsafe { result::destroy_matmul_pref(preference) };
        Ok(Self { matmul, weight, x, out, algorithm: heuristic.map_err(failed)?.algo })
    }
}

impl Drop for Product {
    fn drop(&mut self) {
        // SAFETY: made by `describe`, and used nowhere else.
        unsafe {
            let _ = result::destroy_matmul_desc(self.matmul);
            for layout in [self.weight, self.x, self.out] {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        self.products.clear();
        // SAFETY: made by `open`; its work ends before its workspace is freed, which waits for the device.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

fn failed(error: CublasError) -> Error {
    Error::Device { what: "a matrix product by cuBLAS".into(), why: format!("{:?}", error.0) }
}
