//! Files of kernels: compiled, loaded, and their kernels found.

use core::ffi::c_char;
use std::ffi::CString;
use std::sync::Arc;

use cudarc::driver::{result, sys};
use cudarc::nvrtc::{result as nvrtc, sys as nvrtc_sys};

use super::{Stream, driver};
use crate::error::CudaError;
use crate::recording::apart;

/// A compiled file on the device.
pub(crate) struct Module {
    handle: sys::CUmodule,
    stream: Stream,
}

// SAFETY: a module's handle may be used by any thread that has the context bound, which every call here does first.
unsafe impl Send for Module {}
// SAFETY: as above; the driver locks what calls share.
unsafe impl Sync for Module {}

impl Module {
    pub(crate) fn load(stream: &Stream, image: &[u8]) -> Result<Self, CudaError> {
        stream.bind()?;
        // SAFETY: the image is what the compiler gave, or a file whose checksum says that it is; the driver checks
        // its headers and copies it.
        let handle = apart(|| unsafe { result::module::load_data(image.as_ptr().cast()) });
        let handle = handle.map_err(driver("cuModuleLoadData"))?;
        Ok(Self { handle, stream: stream.clone() })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // Work that still runs a kernel of this module must be over.
        if self.stream.synchronize().is_ok() {
            // SAFETY: the module is alive, nothing runs in it, and kernels of it hold it alive.
            let _ = apart(|| unsafe { result::module::unload(self.handle) });
        }
    }
}

pub(super) struct Function {
    pub(super) handle: sys::CUfunction,
    pub(super) name: &'static str,
    /// The sizes of its parameters in bytes.
    pub(super) sizes: Vec<usize>,
    _module: Arc<Module>,
}

// SAFETY: as for `Module`.
unsafe impl Send for Function {}
// SAFETY: as for `Module`.
unsafe impl Sync for Function {}

/// A kernel that can be launched.
#[derive(Clone)]
pub(crate) struct Kernel(pub(super) Arc<Function>);

impl Kernel {
    pub(crate) fn find(module: &Arc<Module>, name: &'static str) -> Result<Self, CudaError> {
        module.stream.bind()?;
        let c_name = CString::new(name).unwrap_or_default();
        // SAFETY: the module is alive.
        let handle = apart(|| unsafe { result::module::get_function(module.handle, c_name) }).map_err(driver(name))?;
        let mut sizes = Vec::new();
        let (mut offset, mut size) = (0, 0);
        // SAFETY: the function is alive and both pointers are to locals; behind the last parameter this is an error.
        while unsafe { sys::cuFuncGetParamInfo(handle, sizes.len(), &raw mut offset, &raw mut size) }.result().is_ok() {
            sizes.push(size);
        }
        Ok(Self(Arc::new(Function { handle, name, sizes, _module: module.clone() })))
    }
}

/// The version of the run-time compiler.
pub(crate) fn compiler_version() -> Result<(i32, i32), CudaError> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both pointers are to locals.
    unsafe { nvrtc_sys::nvrtcVersion(&raw mut major, &raw mut minor) }
        .result()
        .map_err(|e| CudaError::Compile { file: "", log: format!("nvrtcVersion: {e}") })?;
    Ok((major, minor))
}

/// Compiles a file for an architecture.
pub(crate) fn compile(file: &'static str, source: &str, options: &[String]) -> Result<Vec<u8>, CudaError> {
    let fail = |log: String| CudaError::Compile { file, log };
    let source = CString::new(source).map_err(|_| fail("the source has a zero byte".to_owned()))?;
    let name = CString::new(file).unwrap_or_default();
    let program = nvrtc::create_program(&source, Some(&name)).map_err(|e| fail(format!("nvrtcCreateProgram: {e}")))?;
    // SAFETY: the program is alive until it is destroyed below, once.
    let compiled = unsafe { nvrtc::compile_program(program, options) };
    let image = match compiled {
        Ok(()) => cubin(program).map_err(|e| fail(format!("nvrtcGetCUBIN: {e}"))),
        Err(error) => {
            // SAFETY: as above.
            let log = unsafe { nvrtc::get_program_log(program) }.unwrap_or_default();
            let log: Vec<u8> = log.iter().map(|c| c.to_ne_bytes()[0]).take_while(|&c| c != 0).collect();
            Err(fail(format!("{error}: {}", String::from_utf8_lossy(&log))))
        }
    };
    // SAFETY: as above; `source` and `name` are still alive.
    let _ = unsafe { nvrtc::destroy_program(program) };
    image
}

fn cubin(program: nvrtc_sys::nvrtcProgram) -> Result<Vec<u8>, nvrtc::NvrtcError> {
    let mut len = 0;
    // SAFETY: the program is alive and compiled; the pointer is to a local.
    unsafe { nvrtc_sys::nvrtcGetCUBINSize(program, &raw mut len) }.result()?;
    let mut image = vec![0u8; len];
    // SAFETY: the buffer is as long as the library said.
    unsafe { nvrtc_sys::nvrtcGetCUBIN(program, image.as_mut_ptr().cast::<c_char>()) }.result()?;
    Ok(image)
}
