//! A small language model in which any feed-forward layer may be a memory layer.
