//! Images out of a fuzzer's bytes: where they may lie, and with checksums that let the parser go on.

/// Bytes that lie at a multiple of 64, and not one more than they are: a sanitizer sees what is read behind them.
pub struct File {
    blocks: Vec<u8>,
    at: usize,
    len: usize,
}

impl File {
    /// A copy of `bytes`.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Self {
        let mut blocks: Vec<u8> = Vec::with_capacity(bytes.len() + 63);
        let at = blocks.as_ptr().align_offset(64);
        blocks.resize(at, 0);
        blocks.extend_from_slice(bytes);
        Self { blocks, at, len: bytes.len() }
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.blocks[self.at..self.at + self.len]
    }
}

/// CRC-32 as the format's description has it.
#[must_use]
pub fn crc(bytes: &[u8]) -> u32 {
    static TABLE: [u32; 256] = {
        let (mut table, mut i) = ([0; 256], 0);
        while i < 256 {
            let (mut crc, mut bit) = (i as u32, 0);
            while bit < 8 {
                crc = if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 };
                bit += 1;
            }
            table[i] = crc;
            i += 1;
        }
        table
    };
    !bytes.iter().fold(!0u32, |crc, &byte| (crc >> 8) ^ TABLE[usize::from(crc as u8 ^ byte)])
}

/// Mends every checksum that can be found: of sections, of the table, of the header. With them wrong a fuzzer would
/// never come past the first one.
pub fn mend(bytes: &mut [u8]) {
    let Some(table) = field(bytes, 24) else { return };
    let sections = usize::try_from(field(bytes, 8).unwrap_or(0) >> 32).unwrap_or(0).min(64);
    let table = usize::try_from(table).unwrap_or(usize::MAX);
    for i in 0..sections {
        let Some(entry) = table.checked_add(i * 128) else { return };
        let mut all = Vec::new();
        for at in [88, 104] {
            let range = field(bytes, entry.saturating_add(at)).zip(field(bytes, entry.saturating_add(at + 8)));
            let part = range.and_then(|(at, len)| {
                let at = usize::try_from(at).ok()?;
                bytes.get(at..at.checked_add(usize::try_from(len).ok()?)?)
            });
            all.extend_from_slice(part.unwrap_or_default());
        }
        put(bytes, entry.saturating_add(84), crc(&all));
    }
    if let Some(end) = table.checked_add(sections * 128)
        && let Some(entries) = bytes.get(table..end)
    {
        let sum = crc(entries);
        put(bytes, end, sum);
    }
    if let Some(header) = bytes.get(..60) {
        let sum = crc(header);
        put(bytes, 60, sum);
    }
}

fn field(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|field| u64::from_le_bytes(*field))
}

fn put(bytes: &mut [u8], at: usize, sum: u32) {
    if let Some(place) = bytes.get_mut(at..at.saturating_add(4)) {
        place.copy_from_slice(&sum.to_le_bytes());
    }
}
