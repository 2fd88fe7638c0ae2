//! What it means to be a memlayer backend: one suite, many backends.
