//! Products by cuBLAS.

use core::ffi::{c_int, c_void};
use std::sync::{Mutex, PoisonError};

use cudarc::cublas::{result as blas, sys as blas_sys};

use super::{Allocation, Stream};
use crate::error::CudaError;
use crate::recording::apart;

/// A matrix of a product, row-major: `rows` rows of `columns`, a row beginning every `stride` elements.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix {
    pub(crate) pointer: u64,
    /// Elements from one row to the next.
    pub(crate) stride: usize,
    /// Elements from one matrix of a batch to the next.
    pub(crate) batch: usize,
    /// Whether the matrix is used transposed.
    pub(crate) transposed: bool,
}

/// What a product's operands are stored as. The sum is made in f32 either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operands {
    F32,
    Bf16,
}

/// `out [m, n] = a [m, k] · b [k, n]`, for each of a batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Product {
    pub(crate) operands: Operands,
    pub(crate) sizes: [usize; 3],
    pub(crate) batch: usize,
    pub(crate) a: Matrix,
    pub(crate) b: Matrix,
    pub(crate) out: Matrix,
    pub(crate) accumulate: bool,
}

/// cuBLAS on a stream, with a workspace of its own.
pub(crate) struct Blas {
    handle: Mutex<Handle>,
    stream: Stream,
    _workspace: Allocation,
}

struct Handle(blas_sys::cublasHandle_t);

// SAFETY: a cuBLAS handle may be used by one thread at a time, whichever; the mutex around it sees to that.
unsafe impl Send for Handle {}

/// What NVIDIA recommends for Hopper.
const BLAS_WORKSPACE: usize = 32 << 20;

fn blas_error(call: &'static str) -> impl Fn(blas::CublasError) -> CudaError {
    move |error| CudaError::Blas { call, error: format!("{error:?}") }
}

impl Blas {
    pub(crate) fn new(stream: &Stream) -> Result<Self, CudaError> {
        stream.bind()?;
        let workspace = stream.allocate(BLAS_WORKSPACE)?;
        let handle = apart(blas::create_handle).map_err(blas_error("cublasCreate"))?;
        let this = Self { handle: Mutex::new(Handle(handle)), stream: stream.clone(), _workspace: workspace };
        // SAFETY: handle and stream are alive and of one context; the workspace is kept as long as the handle.
        // Setting the stream resets the workspace, so it comes second.
        unsafe {
            blas::set_stream(handle, stream.stream.cu_stream().cast()).map_err(blas_error("cublasSetStream"))?;
            blas_sys::cublasSetWorkspace_v2(handle, this._workspace.pointer as *mut c_void, BLAS_WORKSPACE)
                .result()
                .map_err(blas_error("cublasSetWorkspace"))?;
            // Without leave for TF32: f32 products are made in f32.
            blas_sys::cublasSetMathMode(handle, blas_sys::cublasMath_t::CUBLAS_DEFAULT_MATH)
                .result()
                .map_err(blas_error("cublasSetMathMode"))?;
            blas_sys::cublasSetAtomicsMode(handle, blas_sys::cublasAtomicsMode_t::CUBLAS_ATOMICS_NOT_ALLOWED)
                .result()
                .map_err(blas_error("cublasSetAtomicsMode"))?;
        }
        Ok(this)
    }

    pub(crate) fn product(&self, product: &Product) -> Result<(), CudaError> {
        use blas_sys::cublasOperation_t::{CUBLAS_OP_N, CUBLAS_OP_T};
        const CALL: &str = "cublasGemmStridedBatchedEx";
        let [m, n, k] = product.sizes;
        if m == 0 || n == 0 || product.batch == 0 {
            return Ok(());
        }
        let too_large = |_| CudaError::Blas { call: CALL, error: "a matrix has 2^31 rows or columns".to_owned() };
        let int = |x: usize| c_int::try_from(x).map_err(too_large);
        let (m, n, k, batch) = (int(m)?, int(n)?, int(k)?, int(product.batch)?);
        let (a_stride, b_stride, out_stride) =
            (int(product.a.stride)?, int(product.b.stride)?, int(product.out.stride)?);
        let step = |x: usize| i64::try_from(x).unwrap_or(i64::MAX);
        let op = |matrix: &Matrix| if matrix.transposed { CUBLAS_OP_T } else { CUBLAS_OP_N };
        let (alpha, beta) = (1.0f32, if product.accumulate { 1.0f32 } else { 0.0 });
        let of = match product.operands {
            Operands::F32 => blas_sys::cudaDataType_t::CUDA_R_32F,
            Operands::Bf16 => blas_sys::cudaDataType_t::CUDA_R_16BF,
        };
        self.stream.bind()?;
        let handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        // cuBLAS counts by columns, where a row-major matrix is its transpose: outᵀ = bᵀ · aᵀ.
        // The first product of a kind loads code.
        // SAFETY: the handle is alive; alpha and beta are locals that the call reads; the matrices lie in views whose
        // lengths the operation checked against these sizes.
        apart(|| unsafe {
            blas::gemm_strided_batched_ex(
                handle.0,
                op(&product.b),
                op(&product.a),
                n,
                m,
                k,
                (&raw const alpha).cast(),
                product.b.pointer as *const c_void,
                of,
                b_stride,
                step(product.b.batch),
                product.a.pointer as *const c_void,
                of,
                a_stride,
                step(product.a.batch),
                (&raw const beta).cast(),
                product.out.pointer as *mut c_void,
                blas_sys::cudaDataType_t::CUDA_R_32F,
                out_stride,
                step(product.out.batch),
                batch,
                blas_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                blas_sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        })
        .map_err(blas_error(CALL))
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        if self.stream.synchronize().is_ok() {
            let handle = self.handle.get_mut().unwrap_or_else(PoisonError::into_inner);
            // SAFETY: the handle is alive, is destroyed once, and its work is over.
            let _ = apart(|| unsafe { blas::destroy_handle(handle.0) });
        }
    }
}
