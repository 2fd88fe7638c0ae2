//! The dense rest: projections, norms and gates. A host framework may bring its own.

use crate::device::Device;
use crate::error::{ArgError, check_len, product};

/// The arguments of [`Dense::linear`].
pub struct Linear<'a, D: Device> {
    /// T.
    pub tokens: usize,
    /// `[T, I]`.
    pub x: D::View<'a, D::Scalar>,
    /// `[O, I]`.
    pub weight: D::View<'a, D::Scalar>,
    /// `[O]`.
    pub bias: Option<D::View<'a, D::Scalar>>,
    /// `[T, O]`, overwritten.
    pub out: D::ViewMut<'a, D::Scalar>,
}

/// The arguments of [`Dense::linear_backward`].
pub struct LinearBackward<'a, D: Device> {
    /// T.
    pub tokens: usize,
    /// `[T, I]`.
    pub x: D::View<'a, D::Scalar>,
    /// `[O, I]`.
    pub weight: D::View<'a, D::Scalar>,
    /// `[T, O]`.
    pub dout: D::View<'a, D::Scalar>,
    /// `[T, I]`: overwritten, or added to if `accumulate`.
    pub dx: Option<D::ViewMut<'a, D::Scalar>>,
    /// Whether `dx` is added to.
    pub accumulate: bool,
    /// `[O, I]`, overwritten.
    pub dweight: Option<D::ViewMut<'a, D::Scalar>>,
    /// `[O]`, overwritten.
    pub dbias: Option<D::ViewMut<'a, D::Scalar>>,
}

/// The widths of a linear map.
#[derive(Clone, Copy, Debug)]
pub struct LinearDims {
    /// T.
    pub tokens: usize,
    /// I.
    pub inputs: usize,
    /// O.
    pub outputs: usize,
}

fn linear_dims(op: &'static str, tokens: usize, x: usize, weight: usize, out: usize) -> Result<LinearDims, ArgError> {
    // The widths follow from the operands' lengths; with no tokens nothing is computed and none is needed.
    if tokens == 0 {
        check_len(op, "x", 0, x)?;
        check_len(op, "out", 0, out)?;
        return Ok(LinearDims { tokens, inputs: 0, outputs: 0 });
    }
    for (operand, found) in [("x", x), ("out", out)] {
        if found == 0 || !found.is_multiple_of(tokens) {
            return Err(ArgError::Size { op, operand, found, multiple_of: tokens });
        }
    }
    let (inputs, outputs) = (x / tokens, out / tokens);
    check_len(op, "weight", product(&[inputs, outputs]), weight)?;
    Ok(LinearDims { tokens, inputs, outputs })
}

impl<D: Device> Linear<'_, D> {
    /// The widths, if all sizes fit.
    ///
    /// # Errors
    /// [`ArgError`].
    pub fn check(&self) -> Result<LinearDims, ArgError> {
        const OP: &str = "linear";
        let out = D::len_mut(&self.out);
        let dims = linear_dims(OP, self.tokens, D::len(self.x), D::len(self.weight), out)?;
        if let Some(bias) = self.bias
            && dims.tokens > 0
        {
            check_len(OP, "bias", dims.outputs, D::len(bias))?;
        }
        Ok(dims)
    }
}

impl<D: Device> LinearBackward<'_, D> {
    /// The widths, if all sizes fit.
    ///
    /// # Errors
    /// [`ArgError`].
    pub fn check(&self) -> Result<LinearDims, ArgError> {
        const OP: &str = "linear_backward";
        let dout = D::len(self.dout);
        let dims = linear_dims(OP, self.tokens, D::len(self.x), D::len(self.weight), dout)?;
        if let Some(dx) = &self.dx {
            check_len(OP, "dx", D::len(self.x), D::len_mut(dx))?;
        }
        if let Some(dweight) = &self.dweight {
            check_len(OP, "dweight", D::len(self.weight), D::len_mut(dweight))?;
        }
        if let Some(dbias) = &self.dbias
            && dims.tokens > 0
        {
            check_len(OP, "dbias", dims.outputs, D::len_mut(dbias))?;
        }
        Ok(dims)
    }
}

/// Which gain belongs to which row of a norm: row `r` has gain `(r / repeat) % groups`.
///
/// Queries `[T, H, P, C]` have `H·P` groups and repeat 1; keys `[H, P, N, C]` have the same groups and repeat N.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NormDims {
    /// Rows.
    pub rows: usize,
    /// C, values in a row.
    pub dim: usize,
    /// Gains.
    pub groups: usize,
    /// Rows in a run that share a gain.
    pub repeat: usize,
}

impl NormDims {
    /// The gain of row `r`.
    #[inline(always)]
    #[must_use]
    pub const fn group(&self, r: usize) -> usize {
        (r / self.repeat) % self.groups
    }
}

/// What keeps the RMSNorm of a zero row finite, added to the mean square.
pub const NORM_EPS: f64 = 1e-6;

/// The arguments of [`Dense::rms_norm`].
pub struct RmsNorm<'a, D: Device> {
    /// The sizes.
    pub dims: NormDims,
    /// `[R, C]`.
    pub x: D::View<'a, D::Scalar>,
    /// `[G, C]`.
    pub gain: D::View<'a, D::Scalar>,
    /// `[R, C]`, overwritten.
    pub out: D::ViewMut<'a, D::Scalar>,
}

/// The arguments of [`Dense::rms_norm_backward`].
pub struct RmsNormBackward<'a, D: Device> {
    /// The sizes.
    pub dims: NormDims,
    /// `[R, C]`.
    pub x: D::View<'a, D::Scalar>,
    /// `[G, C]`.
    pub gain: D::View<'a, D::Scalar>,
    /// `[R, C]`: the gradient of the output; overwritten with that of `x`.
    pub dx: D::ViewMut<'a, D::Scalar>,
    /// `[G, C]`, overwritten.
    pub dgain: Option<D::ViewMut<'a, D::Scalar>>,
}

impl<D: Device> RmsNorm<'_, D> {
    /// Fails unless all sizes fit.
    ///
    /// # Errors
    /// [`ArgError::Shape`].
    pub fn check(&self) -> Result<(), ArgError> {
        const OP: &str = "rms_norm";
        check_norm(OP, &self.dims, D::len(self.x), D::len(self.gain))?;
        check_len(OP, "out", D::len(self.x), D::len_mut(&self.out))
    }
}

impl<D: Device> RmsNormBackward<'_, D> {
    /// Fails unless all sizes fit.
    ///
    /// # Errors
    /// [`ArgError::Shape`].
    pub fn check(&self) -> Result<(), ArgError> {
        const OP: &str = "rms_norm_backward";
        check_norm(OP, &self.dims, D::len(self.x), D::len(self.gain))?;
        check_len(OP, "dx", D::len(self.x), D::len_mut(&self.dx))?;
        match &self.dgain {
            Some(dgain) => check_len(OP, "dgain", D::len(self.gain), D::len_mut(dgain)),
            None => Ok(()),
        }
    }
}

fn check_norm(op: &'static str, dims: &NormDims, x: usize, gain: usize) -> Result<(), ArgError> {
    if dims.groups == 0 || dims.repeat == 0 || dims.dim == 0 {
        return Err(ArgError::Size { op, operand: "groups, repeat or dim", found: 0, multiple_of: 1 });
    }
    check_len(op, "x", product(&[dims.rows, dims.dim]), x)?;
    check_len(op, "gain", product(&[dims.groups, dims.dim]), gain)
}

/// The arguments of the gates: `out` is `y` times a function of `gate`.
pub struct Gate<'a, D: Device> {
    /// `[T, W]`.
    pub y: D::View<'a, D::Scalar>,
    /// `[T, W]`, or `[T]` for a gate that all values of a token share.
    pub gate: D::View<'a, D::Scalar>,
    /// `[T, W]`, overwritten.
    pub out: D::ViewMut<'a, D::Scalar>,
}

/// The arguments of the gates' backward.
pub struct GateBackward<'a, D: Device> {
    /// `[T, W]`.
    pub y: D::View<'a, D::Scalar>,
    /// `[T, W]`, or `[T]` for a gate that all values of a token share.
    pub gate: D::View<'a, D::Scalar>,
    /// `[T, W]`: the gradient of the output.
    pub dout: D::View<'a, D::Scalar>,
    /// `[T, W]`, overwritten.
    pub dy: D::ViewMut<'a, D::Scalar>,
    /// As `gate`, overwritten.
    pub dgate: D::ViewMut<'a, D::Scalar>,
}

impl<D: Device> Gate<'_, D> {
    /// How many values share a gate, if all sizes fit. `shared` says whether a token's values share one.
    ///
    /// # Errors
    /// [`ArgError`].
    pub fn check(&self, op: &'static str, shared: bool) -> Result<usize, ArgError> {
        check_len(op, "out", D::len(self.y), D::len_mut(&self.out))?;
        gate_width(op, shared, D::len(self.y), D::len(self.gate))
    }
}

impl<D: Device> GateBackward<'_, D> {
    /// How many values share a gate, if all sizes fit. `shared` says whether a token's values share one.
    ///
    /// # Errors
    /// [`ArgError`].
    pub fn check(&self, op: &'static str, shared: bool) -> Result<usize, ArgError> {
        check_len(op, "dout", D::len(self.y), D::len(self.dout))?;
        check_len(op, "dy", D::len(self.y), D::len_mut(&self.dy))?;
        check_len(op, "dgate", D::len(self.gate), D::len_mut(&self.dgate))?;
        gate_width(op, shared, D::len(self.y), D::len(self.gate))
    }
}

fn gate_width(op: &'static str, shared: bool, y: usize, gate: usize) -> Result<usize, ArgError> {
    if !shared {
        return check_len(op, "gate", y, gate).map(|()| 1);
    }
    if gate == 0 {
        return check_len(op, "y", 0, y).map(|()| 1);
    }
    if !y.is_multiple_of(gate) || y == 0 {
        return Err(ArgError::Size { op, operand: "y", found: y, multiple_of: gate });
    }
    Ok(y / gate)
}

/// Projections, norms and gates. All sums here are horizontal, but for those over tokens they are in their order.
pub trait Dense: Device {
    /// `out = x · weightᵀ + bias`.
    ///
    /// # Errors
    /// [`ArgError`] if a size does not fit.
    fn linear(&self, args: Linear<'_, Self>) -> Result<(), Self::Error>;

    /// The gradients of [`Dense::linear`]; those not asked for are not computed.
    ///
    /// # Errors
    /// [`ArgError`] if a size does not fit.
    fn linear_backward(&self, args: LinearBackward<'_, Self>) -> Result<(), Self::Error>;

    /// `out = x / sqrt(mean(x²) + eps) · gain`, for each row.
    ///
    /// # Errors
    /// [`ArgError`] if a size does not fit.
    fn rms_norm(&self, args: RmsNorm<'_, Self>) -> Result<(), Self::Error>;

    /// The gradients of [`Dense::rms_norm`].
    ///
    /// # Errors
    /// [`ArgError`] if a size does not fit.
    fn rms_norm_backward(&self, args: RmsNormBackward<'_, Self>) -> Result<(), Self::Error>;

    /// `out = y · silu(gate)`, a gate for each value.
    ///
    /// # Errors
    /// [`ArgError`] if a size does not fit.
    fn silu_gate(&self, args: Gate<'_, Self>) -> Result<(), Self::Error>;

    /// The gradients of [`Dense::silu_gate`].
    ///
    /// # Errors
    /// [`ArgError`] if a size does not fit.
    fn silu_gate_backward(&self, args: GateBackward<'_, Self>) -> Result<(), Self::Error>;

    /// `out = y · sigmoid(gate)`, a gate for each token.
    ///
    /// # Errors
    /// [`ArgError`] if a size does not fit.
    fn sigmoid_gate(&self, args: Gate<'_, Self>) -> Result<(), Self::Error>;

    /// The gradients of [`Dense::sigmoid_gate`].
    ///
    /// # Errors
    /// [`ArgError`] if a size does not fit.
    fn sigmoid_gate_backward(&self, args: GateBackward<'_, Self>) -> Result<(), Self::Error>;

    /// `out = y · gelu(gate)`, exact (erf) GELU, a gate for each value: PEER's experts, `y` being their weights.
    ///
    /// # Errors
    /// [`ArgError`] if a size does not fit.
    fn gelu_gate(&self, args: Gate<'_, Self>) -> Result<(), Self::Error>;

    /// The gradients of [`Dense::gelu_gate`].
    ///
    /// # Errors
    /// [`ArgError`] if a size does not fit.
    fn gelu_gate_backward(&self, args: GateBackward<'_, Self>) -> Result<(), Self::Error>;
}
