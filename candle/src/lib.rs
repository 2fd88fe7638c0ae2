//! Memory layers as candle operations.
