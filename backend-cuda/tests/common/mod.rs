//! What the test programs share.

use memlayer_cuda::{Cuda, CudaError};

/// Device 0, if there is one. Any other reason for having none is a failure.
pub(crate) fn cuda() -> Option<Cuda> {
    match Cuda::new(0) {
        Ok(cuda) => Some(cuda),
        Err(error @ (CudaError::Library(_) | CudaError::NoDevice(_))) => {
            let required = std::env::var("MEMLAYER_REQUIRE_CUDA").is_ok_and(|v| v == "1");
            assert!(!required, "a CUDA device is required here: {error}");
            None
        }
        Err(error) => panic!("device 0: {error}"),
    }
}
