//! Packed memory layers: int8 and fp8 rows, error budgets, and an image that is read in place.
