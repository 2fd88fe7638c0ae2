//! Number formats.

use super::Compared;
use super::file::{GoldenError, GoldenFile};

pub(super) fn check(_file: &GoldenFile) -> Result<Vec<Compared>, GoldenError> {
    Ok(Vec::new())
}
