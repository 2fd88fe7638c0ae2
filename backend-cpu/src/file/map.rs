//! A file as bytes.

use core::ops::Deref;
use std::fs::File;
use std::io;
use std::path::Path;

use memmap2::Mmap;

use super::Locked;

/// A file that is read where it lies; it must not change as long as this value lives.
///
/// The file is locked against those who ask for an exclusive lock. Nobody is kept from changing it who does not ask:
/// whoever replaces it must write another file and rename that, which leaves this one as it is. Where a file under a
/// map is cut off, the system ends the process that reads behind its end.
///
/// ```
/// use memlayer_core::DenseRows;
/// use memlayer_cpu::MappedFile;
/// # let folder = std::env::temp_dir().join(format!("memlayer-map-{}", std::process::id()));
/// # std::fs::create_dir_all(&folder)?;
/// # let path = folder.join("rows");
/// # std::fs::write(&path, [1u8, 2, 3, 4])?;
/// let file = MappedFile::open(&path)?;
/// let rows = DenseRows::new(bytemuck::cast_slice::<u8, i8>(&file), 2);
/// # assert_eq!(rows.codes(), [1, 2, 3, 4]);
/// # drop(file);
/// # std::fs::remove_dir_all(&folder)?;
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct MappedFile {
    /// None of an empty file.
    map: Option<Mmap>,
    _file: Locked,
}

impl MappedFile {
    /// Maps the file at `path`, whose rows will be read at random.
    ///
    /// # Errors
    /// The system's; [`io::ErrorKind::WouldBlock`] if somebody has locked the file to change it.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = Locked::shared(File::open(path)?)?;
        if file.metadata()?.len() == 0 {
            return Ok(Self { map: None, _file: file });
        }
        // SAFETY: the bytes are read as plain data, for which every value is one. That they do not change while they are
        // borrowed is what this type demands of its user; the lock, held as long as the map, tells all who ask.
        let map = unsafe { Mmap::map(&*file)? };
        read_at_random(&map);
        Ok(Self { map: Some(map), _file: file })
    }
}

/// What lies behind a row is no row that is wanted next. Only a wish: what it says is for speed alone.
#[cfg(unix)]
fn read_at_random(map: &Mmap) {
    let _ = map.advise(memmap2::Advice::Random);
}

#[cfg(not(unix))]
fn read_at_random(_: &Mmap) {}

impl Deref for MappedFile {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.map.as_deref().unwrap_or(&[])
    }
}
