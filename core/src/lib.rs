//! The mathematics of memory layers: forward and backward, no_std, generic over storage.
