//! Buffers on any device, so that one suite fits all of them.

use memlayer_core::{Device, Element, Item, Real, Reference, ScaledRows, Scratch, ScratchReq, Table, TrainRows};
use memlayer_cpu::Cpu;
use memlayer_cuda::{Cuda, CudaError};

/// A device that the suite can fill and read back.
pub trait TestDevice: Device {
    /// An owned buffer.
    type Buffer<T: Item>;
    /// Rows of scalars that can be trained.
    type Train<'a>: Table<Elem = Self::Scalar>;
    /// Packed rows.
    type Packed<'a, E: Element>: Table<Elem = E>;

    /// A buffer with these items.
    fn upload<T: Item>(&self, items: &[T]) -> Self::Buffer<T>;
    /// The items of a buffer.
    fn download<T: Item>(&self, buffer: &Self::Buffer<T>) -> Vec<T>;
    /// The whole of a buffer.
    fn view<T: Item>(buffer: &Self::Buffer<T>) -> Self::View<'_, T>;
    /// The whole of a buffer.
    fn view_mut<T: Item>(buffer: &mut Self::Buffer<T>) -> Self::ViewMut<'_, T>;
    /// Rows of `dim` scalars with `state_len` scalars of state each.
    ///
    /// # Panics
    /// If the sizes do not fit.
    fn train<'a>(
        rows: &'a mut Self::Buffer<Self::Scalar>,
        dim: usize,
        state: &'a mut Self::Buffer<Self::Scalar>,
        state_len: usize,
    ) -> Self::Train<'a>;
    /// Packed rows of `dim` values, one scale a row.
    ///
    /// # Panics
    /// If the sizes do not fit.
    fn packed<'a, E: Element>(
        codes: &'a Self::Buffer<E>,
        scales: &'a Self::Buffer<f32>,
        dim: usize,
    ) -> Self::Packed<'a, E>;
    /// What runs.
    fn label(&self) -> String {
        self.name().to_owned()
    }
}

macro_rules! host_devices {
    ($([$($generics:tt)*] $device:ty, $scalar:ty;)*) => {
        $(impl<$($generics)*> TestDevice for $device {
        type Buffer<T: Item> = Vec<T>;
        type Train<'a> = TrainRows<'a, $scalar, $scalar>;
        type Packed<'a, E: Element> = ScaledRows<'a, E>;

        fn upload<T: Item>(&self, items: &[T]) -> Vec<T> {
            items.to_vec()
        }
        fn download<T: Item>(&self, buffer: &Vec<T>) -> Vec<T> {
            buffer.clone()
        }
        fn view<T: Item>(buffer: &Self::Buffer<T>) -> Self::View<'_, T> {
            buffer
        }
        fn view_mut<T: Item>(buffer: &mut Self::Buffer<T>) -> Self::ViewMut<'_, T> {
            buffer
        }
        fn train<'a>(
            rows: &'a mut Vec<$scalar>,
            dim: usize,
            state: &'a mut Vec<$scalar>,
            state_len: usize,
        ) -> Self::Train<'a> {
            TrainRows::new(rows, dim, state, state_len).expect("sizes of a table and its state")
        }
        fn packed<'a, E: Element>(codes: &'a Vec<E>, scales: &'a Vec<f32>, dim: usize) -> ScaledRows<'a, E> {
            ScaledRows::new(codes, scales, dim, dim).expect("sizes of packed rows")
        }
        })*
    };
}
host_devices! {
    [F: Real] Reference<F>, F;
    [] Cpu, f32;
}

/// The device's errors end a test.
impl TestDevice for Cuda {
    type Buffer<T: Item> = memlayer_cuda::Buffer<T>;
    type Train<'a> = memlayer_cuda::TrainRows<'a, f32>;
    type Packed<'a, E: Element> = memlayer_cuda::Rows<'a, E>;

    fn upload<T: Item>(&self, items: &[T]) -> Self::Buffer<T> {
        done(Self::upload(self, items))
    }
    fn download<T: Item>(&self, buffer: &Self::Buffer<T>) -> Vec<T> {
        let mut items = vec![T::default(); buffer.len()];
        done(self.read(buffer.view(), &mut items));
        items
    }
    fn view<T: Item>(buffer: &Self::Buffer<T>) -> Self::View<'_, T> {
        buffer.view()
    }
    fn view_mut<T: Item>(buffer: &mut Self::Buffer<T>) -> Self::ViewMut<'_, T> {
        buffer.view_mut()
    }
    fn train<'a>(
        rows: &'a mut Self::Buffer<f32>,
        dim: usize,
        state: &'a mut Self::Buffer<f32>,
        state_len: usize,
    ) -> Self::Train<'a> {
        memlayer_cuda::TrainRows::new(rows.view_mut(), dim, state.view_mut(), state_len)
            .expect("sizes of a table and its state")
    }
    fn packed<'a, E: Element>(
        codes: &'a Self::Buffer<E>,
        scales: &'a Self::Buffer<f32>,
        dim: usize,
    ) -> Self::Packed<'a, E> {
        memlayer_cuda::Rows::scaled(codes.view(), scales.view(), dim, dim).expect("sizes of packed rows")
    }
}

fn done<T>(result: Result<T, CudaError>) -> T {
    result.unwrap_or_else(|error| panic!("{error}"))
}

/// Memory for a [`Scratch`], poisoned: what an operation does not write must not matter.
pub struct Memory<D: TestDevice> {
    reals: D::Buffer<D::Scalar>,
    ids: D::Buffer<u32>,
}

impl<D: TestDevice> Memory<D> {
    /// Memory of exactly `req`.
    pub fn new(device: &D, req: ScratchReq) -> Self {
        Self { reals: poisoned(device, req.reals), ids: device.upload(&vec![u32::MAX; req.ids]) }
    }

    /// All of it, lent.
    pub fn lend(&mut self) -> Scratch<'_, D> {
        Scratch { reals: D::view_mut(&mut self.reals), ids: D::view_mut(&mut self.ids) }
    }
}

/// A buffer of NaN: what an operation leaves unwritten shows.
pub fn poisoned<D: TestDevice>(device: &D, len: usize) -> D::Buffer<D::Scalar> {
    device.upload(&vec![D::Scalar::of(f64::NAN); len])
}
