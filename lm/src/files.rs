//! Files that are whole or not there.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::error::{LmError, Result};

/// Writes `path` through `write`: to a new file beside it, synced, then renamed. Until that is done an old file stays
/// as it is, and a failure leaves nothing behind.
///
/// # Errors
/// [`LmError::Io`] with the file's name, [`LmError::File`] if something else than a file has that name, or what `write`
/// gives.
pub fn replace(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
    // A rename would put a file in the place of a device or a folder.
    if std::fs::symlink_metadata(path).is_ok_and(|old| !old.is_file()) {
        return Err(LmError::file(path, "is there and is no regular file"));
    }
    let temporary = beside(path);
    let result = write_synced(&temporary, write)
        .and_then(|()| std::fs::rename(&temporary, path).map_err(|e| LmError::io(path, e)))
        .and_then(|()| sync_folder(path));
    if result.is_err() {
        // The first error is the one to report; the remains may well be gone already.
        let _ = std::fs::remove_file(&temporary);
    }
    result
}

/// Writes a new file through `write` and syncs it.
pub(crate) fn write_synced(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
    let io = |e| LmError::io(path, e);
    let mut writer = BufWriter::with_capacity(1 << 20, File::create(path).map_err(io)?);
    write(&mut writer)?;
    writer.flush().map_err(io)?;
    writer.get_ref().sync_all().map_err(io)
}

/// Syncs the folder of `path`, so that a rename in it lasts.
pub(crate) fn sync_folder(path: &Path) -> Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder).and_then(|f| f.sync_all()).map_err(|e| LmError::io(folder, e))
}

/// A name beside `path` that nobody else uses.
fn beside(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    path.with_file_name(name)
}

/// A folder that one process has for itself while this lives.
#[derive(Debug)]
pub struct Lock {
    file: File,
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing is not enough: a process that is being started has a copy of every open file until it begins, and a lock
        // lasts as long as any copy. If this fails, the last copy's end unlocks it.
        let _ = self.file.unlock();
    }
}

impl Lock {
    /// Takes `folder`, made if it is not there.
    ///
    /// # Errors
    /// [`LmError::File`] if another process has it, [`LmError::Io`] if it cannot be made.
    pub fn take(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(|e| LmError::io(folder, e))?;
        let path = folder.join("lock");
        let open = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let file = open.map_err(|e| LmError::io(&path, e))?;
        match file.try_lock() {
            Ok(()) => Ok(Self { file }),
            Err(std::fs::TryLockError::WouldBlock) => {
                Err(LmError::file(folder, "another process is training in this folder"))
            }
            Err(std::fs::TryLockError::Error(e)) => Err(LmError::io(&path, e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("model");
        let write = |text: &'static [u8]| {
            move |w: &mut BufWriter<File>| w.write_all(text).map_err(|e| LmError::io(Path::new("x"), e))
        };
        replace(&path, write(b"old")).expect("a file");
        let failed = replace(&path, |w| {
            w.write_all(b"half").expect("a write");
            Err(LmError::Training("full".to_owned()))
        });
        assert!(failed.is_err());
        assert_eq!(std::fs::read(&path).expect("the file"), b"old");
        assert_eq!(std::fs::read_dir(folder.path()).expect("the folder").count(), 1, "nothing is left behind");
        replace(&path, write(b"new")).expect("a file");
        assert_eq!(std::fs::read(&path).expect("the file"), b"new");
    }

    #[test]
    fn a_folder_is_taken_once() {
        let folder = tempfile::tempdir().expect("a folder");
        let lock = Lock::take(folder.path()).expect("a lock");
        assert!(Lock::take(folder.path()).expect_err("taken").to_string().contains("another process"));
        drop(lock);
        Lock::take(folder.path()).expect("a lock");
    }

    #[test]
    fn errors_name_the_file() {
        let error = replace(Path::new("/no/such/folder/x"), |_| Ok(())).expect_err("no folder");
        assert!(error.to_string().contains("/no/such/folder/x"), "{error}");
    }

    #[test]
    fn what_is_no_file_is_not_replaced() {
        let folder = tempfile::tempdir().expect("a folder");
        let error = replace(folder.path(), |_| Ok(())).expect_err("a folder");
        assert!(error.to_string().contains("no regular file"), "{error}");
        assert!(folder.path().is_dir());
    }
}
