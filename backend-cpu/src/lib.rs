//! Memory layers on the CPU: SIMD by run-time dispatch and its own workers.
