//! Opening the file: whose it is, whether it is ours to use, and in which version.

use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags, TransactionBehavior};

use super::BUSY_MS_MAX;
use super::fork::END_FORKS;
use super::log;
use super::turns::END_LEASES;

/// Marks a file as chat-memory's, in SQLite's header: the letters `CMem`.
const APPLICATION_ID: i32 = i32::from_be_bytes(*b"CMem");

/// Bytes of the log beside the file from which on it is emptied into the file. That takes two syncs
/// and a write of each page that is in it, however often: with SQLite's own 4 MiB, busy sessions'
/// last pages would be written every few commits, and all writes wait for that.
const LOG_BYTES: i64 = 64 << 20;
/// A page and what the log says of it. Files are made with SQLite's own size of a page.
const LOG_FRAME_BYTES: i64 = 4096 + 24;

/// What makes a file of version N + 1 out of one of version N. Only ever grows at its end.
pub const MIGRATIONS: [&str; 5] = [
    include_str!("schema.sql"),
    include_str!("schema_2.sql"),
    include_str!("schema_3.sql"),
    include_str!("schema_4.sql"),
    include_str!("schema_5.sql"),
];

/// The first version that has all that the statements of reads ask for.
const READ_AS_IT_IS: i64 = 3;

/// Shows a connection that only reads a file of an older version, which a server of that version may
/// have, what the statements of reads ask for.
const AS_NOW: &str = "
    CREATE TEMP VIEW sessions AS
        SELECT *, 0 AS active_ms, NULL AS expires_ms, NULL AS ttl_ms, NULL AS title,
            NULL AS metadata, NULL AS origin, NULL AS origin_sequence, NULL AS origin_through,
            NULL AS count
        FROM main.sessions;
    CREATE TEMP VIEW turns AS
        SELECT NULL AS session, NULL AS number, NULL AS id, NULL AS name, NULL AS fingerprint,
            NULL AS state, NULL AS token, NULL AS expires_ms, NULL AS attempt, NULL AS tries,
            NULL AS reserved, NULL AS first_chunk, NULL AS next_chunk, NULL AS stop,
            NULL AS outcome, NULL AS first_sequence, NULL AS count, NULL AS time_ms,
            NULL AS forget_ms
        WHERE 0;";

/// Why the file cannot be used. For the operator, at start.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("the directory {0} does not exist: create it, or name another file")]
    DirectoryMissing(PathBuf),

    #[error("there is no file {0}")]
    Missing(PathBuf),

    #[error("{0} is a directory: name a file in it")]
    IsDirectory(PathBuf),

    #[error("no permission to read and write {path} and its directory: {reason}")]
    Denied { path: PathBuf, reason: String },

    #[error("{0} is on a read-only disk")]
    ReadOnly(PathBuf),

    #[error("{path} is in use by another chat-memory server: a file can have only one")]
    InUse { path: PathBuf },

    #[error("{path} is not a chat-memory database: {reason}")]
    Foreign { path: PathBuf, reason: String },

    #[error(
        "{path} was written by a newer chat-memory (its schema has version {found}, this program \
         knows versions up to {known}): use that one"
    )]
    Newer {
        path: PathBuf,
        found: i64,
        known: i64,
    },

    #[error("cannot use {path} as a database: {reason}")]
    Failed { path: PathBuf, reason: String },
}

/// The file, held by this process and no other.
///
/// The lock is a `flock`, which SQLite, with its `fcntl` locks, does not see: SQLite's own tools can
/// use the file all the while.
///
/// It is taken before the first SQLite connection and let go after the last. The order matters:
/// when a process closes any descriptor of a file, it loses all its `fcntl` locks on that file,
/// and so SQLite's; another program could then take the database for unused and remove the log
/// beside it.
pub struct Held {
    /// Absolute, symbolic links resolved.
    pub path: PathBuf,
    /// `None` if the file is only read, beside whoever holds it.
    lock: Option<File>,
}

impl Held {
    /// Takes the file for this process; creates an empty one if there is none.
    pub fn take(path: &Path) -> Result<Self, OpenError> {
        let io_error = |error: io::Error| from_io(path, &error);
        let database = open_or_create(path).map_err(io_error)?;
        let path = path.canonicalize().map_err(io_error)?;
        #[cfg(target_os = "linux")]
        let lock = database;
        #[cfg(not(target_os = "linux"))]
        let lock = {
            // Stays open, for the same reason as below.
            std::mem::forget(database);
            open_or_create(&lock_path(&path)).map_err(io_error)?
        };

        match lock.try_lock() {
            Ok(()) => Ok(Self {
                path,
                lock: Some(lock),
            }),
            Err(TryLockError::WouldBlock) => {
                // It may be this very process that holds the file. Closing this descriptor would
                // drop the other store's `fcntl` locks, as told above; so it stays open.
                std::mem::forget(lock);
                Err(OpenError::InUse { path })
            }
            Err(TryLockError::Error(error)) => Err(OpenError::Failed {
                reason: format!("it cannot be locked: {error}"),
                path,
            }),
        }
    }

    /// Whether the path still names the file that is held. If somebody moved or deleted it, what
    /// is written now would not be found after a restart.
    pub fn is_in_place(&self) -> bool {
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt as _;
            let identity = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
            #[cfg(target_os = "linux")]
            let path = &self.path;
            #[cfg(not(target_os = "linux"))]
            let path = &lock_path(&self.path);
            let held = self.lock.as_ref().map(File::metadata);
            match (std::fs::metadata(path), held) {
                (Ok(named), Some(Ok(held))) => identity(named) == identity(held),
                _ => false,
            }
        }
        // Elsewhere an open file cannot be moved.
        #[cfg(not(unix))]
        true
    }
}

/// On Linux the database itself is locked. On other systems `flock` and `fcntl` locks exclude each
/// other, so SQLite could not work; there, a file beside it is.
#[cfg(not(target_os = "linux"))]
fn lock_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push("-lock");
    PathBuf::from(name)
}

fn open_or_create(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    #[cfg(unix)]
    {
        // Chats are private. SQLite gives its log the rights of the database.
        use std::os::unix::fs::OpenOptionsExt as _;
        options.mode(0o600);
    }
    options.open(path)
}

fn from_io(path: &Path, error: &io::Error) -> OpenError {
    let path = path.to_owned();
    match error.kind() {
        io::ErrorKind::NotFound => {
            let directory = path.parent().unwrap_or(&path);
            OpenError::DirectoryMissing(directory.to_owned())
        }
        io::ErrorKind::IsADirectory => OpenError::IsDirectory(path),
        io::ErrorKind::ReadOnlyFilesystem => OpenError::ReadOnly(path),
        io::ErrorKind::PermissionDenied => OpenError::Denied {
            path,
            reason: error.to_string(),
        },
        _ => OpenError::Failed {
            path,
            reason: error.to_string(),
        },
    }
}

/// Opens the connection that writes, and brings the file to this version.
pub fn open_writer(held: &Held, size_bytes_max: Option<u64>) -> Result<Connection, OpenError> {
    let path = &held.path;
    open_and_migrate(path, size_bytes_max).map_err(|failure| match failure {
        Failure::Refused(error) => error,
        Failure::Sqlite(error) => from_sqlite(path, &error),
    })
}

/// Opens a file that is there, without taking it: to read beside a server that holds it.
pub fn open_shared(path: &Path) -> Result<(Held, Connection), OpenError> {
    // The file is not opened here but by SQLite alone, for the reason told at `Held`.
    let path = path.canonicalize().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => OpenError::Missing(path.to_owned()),
        _ => from_io(path, &error),
    })?;
    if path.is_dir() {
        return Err(OpenError::IsDirectory(path));
    }
    let held = Held { path, lock: None };
    let opened = open_reader(&held).map_err(Failure::Sqlite);
    let checked = opened.and_then(|db| {
        let found = check_owner(&db, &held.path)?;
        if found == 0 {
            return Err(Failure::Refused(OpenError::Missing(held.path.clone())));
        }
        Ok(db)
    });
    match checked {
        Ok(db) => Ok((held, db)),
        Err(Failure::Refused(error)) => Err(error),
        Err(Failure::Sqlite(error)) => Err(from_sqlite(&held.path, &error)),
    }
}

/// Whether the file is ours, or empty, and of a version that this program knows. Returns its
/// version; 0 if it is empty. Writes nothing.
fn check_owner(db: &Connection, path: &Path) -> Result<i64, Failure> {
    let number = |sql: &str| db.query_row(sql, [], |row| row.get::<_, i64>(0));
    let application_id = number("PRAGMA application_id")?;
    let is_empty = number("SELECT count(*) FROM sqlite_schema")? == 0;
    let is_new = application_id == 0 && is_empty;
    if application_id != i64::from(APPLICATION_ID) && !is_new {
        return Err(Failure::Refused(OpenError::Foreign {
            path: path.to_owned(),
            reason: "another program's tables are in it".to_owned(),
        }));
    }
    let known = MIGRATIONS.len() as i64;
    let found = number("PRAGMA user_version")?;
    if !(0..=known).contains(&found) {
        return Err(Failure::Refused(OpenError::Newer {
            path: path.to_owned(),
            found,
            known,
        }));
    }
    Ok(found)
}

enum Failure {
    Refused(OpenError),
    Sqlite(rusqlite::Error),
}

impl From<rusqlite::Error> for Failure {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error)
    }
}

fn open_and_migrate(path: &Path, size_bytes_max: Option<u64>) -> Result<Connection, Failure> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut db = Connection::open_with_flags_and_vfs(path, flags, log::vfs()?)?;
    configure(&db)?;

    // Nothing is written before the file is known to be ours.
    let found = check_owner(&db, path)?;

    let mode: String = db.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0))?;
    if mode != "wal" {
        return Err(Failure::Refused(OpenError::Failed {
            path: path.to_owned(),
            reason: "SQLite's write-ahead log does not work there (is it a network disk?)".into(),
        }));
    }
    // Durable when acknowledged: with NORMAL, a commit is lost if the power fails soon after.
    db.pragma_update(None, "synchronous", "FULL")?;
    // What macOS calls fsync does not reach the disk; this does. No effect elsewhere.
    db.pragma_update(None, "fullfsync", true)?;
    db.pragma_update(None, "checkpoint_fullfsync", true)?;
    // After a burst, or a reader that kept it from being emptied, the log shrinks to this again.
    db.pragma_update(None, "journal_size_limit", LOG_BYTES)?;
    db.pragma_update(None, "wal_autocheckpoint", LOG_BYTES / LOG_FRAME_BYTES)?;
    // What was deleted is overwritten with zeros: a cleared chat is gone, not only unlisted.
    db.execute_batch("PRAGMA secure_delete = ON")?;
    // What a statement may have to undo would else be in files of SQLite's own, in /var/tmp.
    db.pragma_update(None, "temp_store", "MEMORY")?;
    if let Some(bytes) = size_bytes_max {
        let page_bytes: i64 = db.query_row("PRAGMA page_size", [], |row| row.get(0))?;
        let pages = i64::try_from(bytes).unwrap_or(i64::MAX) / page_bytes;
        db.query_row(&format!("PRAGMA max_page_count = {pages}"), [], |_| Ok(()))?;
    }

    for (index, migration) in MIGRATIONS.iter().enumerate().skip(found as usize) {
        let step = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        step.execute_batch(migration)?;
        step.pragma_update(None, "application_id", APPLICATION_ID)?;
        step.pragma_update(None, "user_version", index as i64 + 1)?;
        step.commit()?;
    }
    db.execute(END_LEASES, [])?;
    db.execute(END_FORKS, [])?;
    Ok(db)
}

/// Opens a connection that only reads.
pub fn open_reader(held: &Held) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let db = Connection::open_with_flags(&held.path, flags)?;
    configure(&db)?;
    let version: i64 = db.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    if (1..READ_AS_IT_IS).contains(&version) {
        db.execute_batch(AS_NOW)?;
    }
    Ok(db)
}

/// What every connection needs.
fn configure(db: &Connection) -> rusqlite::Result<()> {
    // Somebody else may be writing, with SQLite's tools.
    db.busy_timeout(std::time::Duration::from_millis(BUSY_MS_MAX))?;
    // With a session go its turns' line and its pairs, with a turn its log.
    db.pragma_update(None, "foreign_keys", true)?;
    // The schema comes out of the file: it may not call functions with effects.
    db.pragma_update(None, "trusted_schema", false)?;
    // More than we have: each is prepared once. And only once: without the second line, SQLite as
    // rusqlite builds it plans anew for new values of parameters, which takes longer than most reads.
    db.set_prepared_statement_cache_capacity(64);
    db.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    Ok(())
}

fn from_sqlite(path: &Path, error: &rusqlite::Error) -> OpenError {
    let path = path.to_owned();
    let reason = error.to_string();
    match error.sqlite_error_code() {
        Some(ErrorCode::NotADatabase) => OpenError::Foreign { path, reason },
        Some(ErrorCode::ReadOnly | ErrorCode::CannotOpen | ErrorCode::PermissionDenied) => {
            OpenError::Denied { path, reason }
        }
        _ => OpenError::Failed { path, reason },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of it would be elsewhere, and not be overwritten when it goes.
    #[test]
    fn what_may_have_to_be_undone_is_in_no_file_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let held = Held::take(&folder.path().join("db")).unwrap();
        let db = open_writer(&held, None).unwrap();
        let place = db.query_row("PRAGMA temp_store", [], |row| row.get(0));
        const MEMORY: i64 = 2;
        assert_eq!(place, Ok(MEMORY));
    }
}
