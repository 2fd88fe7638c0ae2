//! AdamW over candle's variables on a GPU, a kernel for each: of candle's own operations it is some fifteen.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{CpuStorage, CudaStorage, InplaceOp2, Layout, Storage, Tensor, Var};
pub use memlayer_cuda::AdamW;
use memlayer_cuda::{Buffer, Cuda, SQUARE_PARTS, View};

use crate::backend::view;
use crate::error::Error;

/// Both moments of a variable on a GPU.
pub struct Moments {
    cuda: Arc<Cuda>,
    buffers: Mutex<[Buffer<f32>; 2]>,
}

/// A step in place of a variable by its gradient.
struct InPlace<'a> {
    moments: &'a Moments,
    step: AdamW,
}

impl Moments {
    /// The first and the second moment of as many values.
    ///
    /// # Errors
    /// [`Error::State`] if they are not equally many; the device's.
    pub fn new(cuda: &Arc<Cuda>, first: &[f32], second: &[f32]) -> Result<Self, Error> {
        if first.len() != second.len() {
            return Err(Error::State { what: "second moment", expected: first.len(), found: second.len() });
        }
        let buffers = Mutex::new([cuda.upload(first)?, cuda.upload(second)?]);
        Ok(Self { cuda: Arc::clone(cuda), buffers })
    }

    /// Moments of zero.
    ///
    /// # Errors
    /// The device's.
    pub fn zeros(cuda: &Arc<Cuda>, len: usize) -> Result<Self, Error> {
        let buffers = Mutex::new([cuda.zeros(len)?, cuda.zeros(len)?]);
        Ok(Self { cuda: Arc::clone(cuda), buffers })
    }

    /// Both moments, copied to the host.
    ///
    /// # Errors
    /// The device's.
    pub fn get(&self) -> Result<[Vec<f32>; 2], Error> {
        let buffers = self.buffers();
        let mut values = [vec![0.0; buffers[0].len()], vec![0.0; buffers[1].len()]];
        for (buffer, values) in buffers.iter().zip(&mut values) {
            self.cuda.read(buffer.view(), values)?;
        }
        Ok(values)
    }

    /// Changes a variable and its moments, all where they are, by its gradient.
    ///
    /// # Errors
    /// candle's, if variable and gradient are not `f32` on the moments' device, or are not as many values as the moments.
    pub fn step(&mut self, var: &Var, grad: &Tensor, step: AdamW) -> candle_core::Result<()> {
        var.as_tensor().inplace_op2(&grad.contiguous()?, &InPlace { moments: self, step })
    }

    fn buffers(&self) -> MutexGuard<'_, [Buffer<f32>; 2]> {
        // A panic elsewhere leaves plain numbers behind.
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl core::fmt::Debug for Moments {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "moments of {} values", self.buffers()[0].len())
    }
}

const NAME: &str = "adamw";

impl InplaceOp2 for InPlace<'_> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> candle_core::Result<()> {
        candle_core::bail!("{NAME}: the moments are on a GPU, and the variable is on the CPU")
    }

    fn cuda_fwd(
        &self,
        var: &mut CudaStorage,
        var_layout: &Layout,
        grad: &CudaStorage,
        grad_layout: &Layout,
    ) -> candle_core::Result<()> {
        let cuda = &*self.moments.cuda;
        let grad = view(cuda, grad, grad_layout)?;
        let Some((start, end)) = var_layout.contiguous_offsets() else {
            candle_core::bail!("{NAME}: variables must be contiguous");
        };
        let all = cuda.borrow_mut(var.as_cuda_slice_mut::<f32>()?).map_err(Error::from)?;
        let (_, rest) = all.split_at(start);
        let (x, _) = rest.split_at(end - start);
        let mut buffers = self.moments.buffers();
        let [first, second] = &mut *buffers;
        cuda.adamw(self.step, grad, x, first.view_mut(), second.view_mut()).map_err(|e| Error::from(e).into())
    }
}

/// The sum of the squares of all values of these tensors, each of them read once.
///
/// # Errors
/// candle's, if a tensor is not `f32` on this device, or the device's.
pub fn square_sum(cuda: &Cuda, tensors: &[&Tensor]) -> candle_core::Result<f64> {
    let tensors: Vec<Tensor> = tensors.iter().map(|t| t.contiguous()).collect::<candle_core::Result<_>>()?;
    let guards: Vec<_> = tensors.iter().map(Tensor::storage_and_layout).collect();
    let views = guards.iter().map(|(storage, layout)| match &**storage {
        Storage::Cuda(storage) => view(cuda, storage, layout),
        _ => candle_core::bail!("square_sum: tensors must be on the GPU"),
    });
    let views: Vec<View<'_, f32>> = views.collect::<candle_core::Result<_>>()?;
    Ok(sum_of(cuda, &views)?)
}

fn sum_of(cuda: &Cuda, views: &[View<'_, f32>]) -> Result<f64, Error> {
    let (mut parts, mut sum) = (cuda.zeros::<f32>(views.len() * SQUARE_PARTS)?, cuda.zeros::<f32>(1)?);
    cuda.sum_squares(views, parts.view_mut(), sum.view_mut())?;
    let mut found = [0f32];
    cuda.read(sum.view(), &mut found)?;
    Ok(f64::from(found[0]))
}
