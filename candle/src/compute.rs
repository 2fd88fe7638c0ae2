//! The choice of a device.

use std::sync::Arc;

use candle_core::Device;
use memlayer_cpu::Cpu;
#[cfg(feature = "cuda")]
use memlayer_cuda::Cuda;

use crate::error::Error;

/// What computes. It decides where the rows of a pool are, and on which of candle's devices the tensors of its layers must
/// be.
#[derive(Clone)]
#[non_exhaustive]
pub enum Compute {
    /// The CPU.
    Cpu(Arc<Cpu>),
    /// An NVIDIA GPU.
    #[cfg(feature = "cuda")]
    Cuda(Arc<Cuda>),
}

impl Compute {
    /// What computes where a device of candle's is: the CPU, or its GPU by the very stream that candle's own work goes to.
    ///
    /// # Errors
    /// [`Error::Device`] if it is another device, or CUDA was left out of the build; [`Error::Argument`] if the CPU cannot
    /// do what it is told to, or the GPU's error.
    pub fn for_device(device: &Device) -> Result<Self, Error> {
        match device {
            Device::Cpu => Ok(Self::Cpu(Arc::new(Cpu::new()?))),
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => Ok(Self::Cuda(Arc::new(Cuda::builder(0).stream(device.cuda_stream()).build()?))),
            other => Err(Error::Device(other.location())),
        }
    }
}

impl From<Arc<Cpu>> for Compute {
    fn from(cpu: Arc<Cpu>) -> Self {
        Self::Cpu(cpu)
    }
}

#[cfg(feature = "cuda")]
impl From<Arc<Cuda>> for Compute {
    fn from(cuda: Arc<Cuda>) -> Self {
        Self::Cuda(cuda)
    }
}

impl core::fmt::Debug for Compute {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Cpu(cpu) => f.write_str(cpu.name()),
            #[cfg(feature = "cuda")]
            Self::Cuda(cuda) => f.write_str(memlayer_core::Device::name(&**cuda)),
        }
    }
}
