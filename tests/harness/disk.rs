//! Disks that fail: a small one that can be filled, and a limit to the files of a process.

use std::{
    fs::File,
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

/// A file system of its own, small, and gone when this is dropped.
pub struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    /// `None` where this user may not make one.
    pub fn mount(size: &str) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(directory.path())
            .output();
        match mounted {
            Ok(output) if output.status.success() => Some(Self(directory)),
            _ => None,
        }
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Fills what is left, to the last byte, until what this returns is dropped.
    pub fn fill(&self) -> Filler {
        let path = self.path().join("filler");
        let mut file = File::create(&path).unwrap();
        for size in [1 << 16, 1 << 12, 1] {
            let bytes = vec![0; size];
            while file.write_all(&bytes).is_ok() {}
        }
        Filler(path)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("-l").arg(self.path()).status());
    }
}

/// The file that fills a disk.
pub struct Filler(PathBuf);

impl Drop for Filler {
    fn drop(&mut self) {
        std::fs::remove_file(&self.0).unwrap();
    }
}

/// Fails each write of a process beyond so many bytes of a file, or none any more. To a process that
/// outlives the signal that comes with it, this is an error of the disk.
pub fn limit_files(process: u32, bytes: Option<u64>) {
    let bytes = bytes.map_or("unlimited".to_owned(), |bytes| bytes.to_string());
    // Without a number behind the colon, the limit may be lifted again.
    let limit = format!("--fsize={bytes}:");
    let status = Command::new("prlimit")
        .args(["--pid", &process.to_string(), &limit])
        .status()
        .expect("prlimit, of util-linux");
    assert!(status.success());
}
