//! SQLite's log, written in few large pieces. SQLite writes each page of a commit by two calls: what the
//! log says of it, and the page. Here they are kept, and written together when the commit syncs the log.
//! Knows no tables, and of transactions that a COMMIT runs.
//!
//! It is a VFS over SQLite's own, which does all the work, for the one connection that writes. It stands
//! before the log alone. Whatever is done with that besides writing finds there what was written before,
//! so nothing reaches the disk in another order than SQLite's; and nobody else looks for a page in it
//! before its commit has synced it.
//!
//! # What is kept, and when
//!
//! Only what a COMMIT writes ([`gathered`]), and no longer than to its sync. A transaction that outgrows
//! the cache writes pages before that; those go straight through, for it may be rolled back, and then
//! that place in the log is anybody's who writes next.
//!
//! A COMMIT holds the lock to write from before its first frame until after its sync (`walFrames` in
//! SQLite's `wal.c`), so no other program writes there as long as something is kept. If a write or the
//! sync fails, SQLite rolls back the whole transaction; it never undoes a single statement of it in a
//! COMMIT, as it may where a statement finds no room. So bytes that were taken and could not be written
//! are missing in no transaction that is committed. What is still kept when the COMMIT returns is of
//! one that failed, and is dropped.
//!
//! A sync ends the gathering. SQLite may write more after it, which nothing would follow; and when the log
//! is begun anew, its head is synced by itself, before the pages: that one commit goes as SQLite writes it.

use std::ffi::{CStr, c_int, c_void};
use std::ptr::{self, NonNull};
use std::sync::OnceLock;

use rusqlite::Connection;
use rusqlite::ffi::{
    self, SQLITE_ERROR, SQLITE_FCNTL_JOURNAL_POINTER, SQLITE_INTERNAL, SQLITE_OK, SQLITE_OPEN_WAL,
    sqlite3_file, sqlite3_file_control, sqlite3_filename, sqlite3_int64, sqlite3_io_methods,
    sqlite3_vfs, sqlite3_vfs_find, sqlite3_vfs_register,
};

/// What a connection names to be given this VFS.
const NAME: &CStr = c"chat-memory";

/// Bytes that are kept, at most. SQLite's own VFS passes on less than 128 KiB at a time.
const KEPT_MAX: usize = 127 << 10;

/// Makes the VFS known to SQLite, and returns its name.
pub fn vfs() -> rusqlite::Result<&'static CStr> {
    static REGISTERED: OnceLock<c_int> = OnceLock::new();
    let code = *REGISTERED.get_or_init(|| {
        // SAFETY: SQLite's default VFS lives as long as the process, and so does ours, which is leaked.
        // It has the methods and data of the default one, but for `open`.
        unsafe {
            let Some(default) = sqlite3_vfs_find(ptr::null()).as_ref() else {
                return SQLITE_ERROR;
            };
            let ours = Box::leak(Box::new(sqlite3_vfs {
                szOsFile: size_of::<Log>() as c_int + default.szOsFile,
                pNext: ptr::null_mut(),
                zName: NAME.as_ptr(),
                xOpen: Some(open),
                ..*default
            }));
            sqlite3_vfs_register(ours, 0)
        }
    });
    match code {
        SQLITE_OK => Ok(NAME),
        code => Err(rusqlite::Error::SqliteFailure(ffi::Error::new(code), None)),
    }
}

/// Does a COMMIT, and has what it writes to the log gathered. The connection is one that syncs each
/// commit: what is written is not in the log before that.
pub fn gathered<T>(db: &Connection, commit: impl FnOnce() -> T) -> T {
    with_log(db, |log| log.gathers = true);
    let committed = commit();
    with_log(db, |log| {
        log.gathers = false;
        log.kept.clear();
    });
    committed
}

/// Does something with the log of a connection. `None` if it has none yet, or has not this VFS.
fn with_log<T>(db: &Connection, work: impl FnOnce(&mut Log) -> T) -> Option<T> {
    let mut file: *mut sqlite3_file = ptr::null_mut();
    // SAFETY: the connection is open, and only this thread has it. SQLite gives the file that is its
    // journal, open or not; it is one of ours if it has our methods. SQLite does nothing with it before
    // `work` returns, which has no connection.
    unsafe {
        let code = sqlite3_file_control(
            db.handle(),
            c"main".as_ptr(),
            SQLITE_FCNTL_JOURNAL_POINTER,
            ptr::from_mut(&mut file).cast(),
        );
        let is_ours =
            code == SQLITE_OK && !file.is_null() && ptr::eq((*file).pMethods, &raw const METHODS);
        is_ours.then(|| work(Log::of(file)))
    }
}

/// An open log. SQLite makes room for it and, behind it, for the file of its own VFS.
#[repr(C)]
struct Log {
    /// First, where SQLite looks for it.
    base: sqlite3_file,
    /// The file of SQLite's own VFS.
    file: NonNull<sqlite3_file>,
    /// Whether what is written is kept: that is of a COMMIT, which has not synced it yet.
    gathers: bool,
    kept: Vec<u8>,
    /// Where in the file the first byte belongs that is kept.
    offset: sqlite3_int64,
}

impl Log {
    /// # Safety
    ///
    /// `file` is one that [`open`] made a log of, and nobody else has it at the moment.
    unsafe fn of<'a>(file: *mut sqlite3_file) -> &'a mut Self {
        unsafe { &mut *file.cast() }
    }

    fn write(&mut self, bytes: &[u8], offset: sqlite3_int64) -> c_int {
        if !self.gathers {
            return self.pass(bytes, offset);
        }
        let follows = offset == self.offset + self.kept.len() as sqlite3_int64;
        if !follows || self.kept.len() + bytes.len() > KEPT_MAX {
            let code = self.flush();
            if code != SQLITE_OK {
                return code;
            }
        }
        if self.kept.is_empty() {
            self.offset = offset;
        }
        self.kept.extend_from_slice(bytes);
        SQLITE_OK
    }

    /// Writes what is kept. Where that fails it is given up: the COMMIT is told, and fails.
    fn flush(&mut self) -> c_int {
        if self.kept.is_empty() {
            return SQLITE_OK;
        }
        let code = self.pass(&self.kept, self.offset);
        self.kept.clear();
        code
    }

    fn pass(&self, bytes: &[u8], offset: sqlite3_int64) -> c_int {
        let (bytes, length) = (bytes.as_ptr().cast(), bytes.len() as c_int);
        // SAFETY: the bytes are there for as long as the call takes.
        self.call(
            |methods| methods.xWrite,
            |write, file| unsafe { write(file, bytes, length, offset) },
        )
    }

    /// Does something else with the file.
    fn after_flush<F>(
        &mut self,
        method: impl FnOnce(&sqlite3_io_methods) -> Option<F>,
        call: impl FnOnce(F, *mut sqlite3_file) -> c_int,
    ) -> c_int {
        match self.flush() {
            SQLITE_OK => self.call(method, call),
            code => code,
        }
    }

    fn call<F>(
        &self,
        method: impl FnOnce(&sqlite3_io_methods) -> Option<F>,
        call: impl FnOnce(F, *mut sqlite3_file) -> c_int,
    ) -> c_int {
        let file = self.file.as_ptr();
        // SAFETY: SQLite's own VFS has opened the file, and it is closed last.
        let method = unsafe { method(&*(*file).pMethods) };
        method.map_or(SQLITE_INTERNAL, |method| call(method, file))
    }
}

/// All that SQLite does with a log. Version 1: locks and shared memory are the database's.
static METHODS: sqlite3_io_methods = sqlite3_io_methods {
    iVersion: 1,
    xClose: Some(close),
    xRead: Some(read),
    xWrite: Some(write),
    xTruncate: Some(truncate),
    xSync: Some(sync),
    xFileSize: Some(file_size),
    xLock: None,
    xUnlock: None,
    xCheckReservedLock: None,
    xFileControl: Some(file_control),
    xSectorSize: Some(sector_size),
    xDeviceCharacteristics: Some(device_characteristics),
    xShmMap: None,
    xShmLock: None,
    xShmBarrier: None,
    xShmUnmap: None,
    xFetch: None,
    xUnfetch: None,
};

// SAFETY of all below: SQLite calls them as it says at `sqlite3_vfs` and `sqlite3_io_methods`, each with
// a file that `open` was given, and one call at a time for a file: a connection is used by one thread.

unsafe extern "C" fn open(
    _: *mut sqlite3_vfs,
    name: sqlite3_filename,
    file: *mut sqlite3_file,
    flags: c_int,
    flags_out: *mut c_int,
) -> c_int {
    unsafe {
        // Without methods there is nothing to close if it fails.
        (*file).pMethods = ptr::null();
        let default = sqlite3_vfs_find(ptr::null());
        let Some(open) = default.as_ref().and_then(|default| default.xOpen) else {
            return SQLITE_ERROR;
        };
        if flags & SQLITE_OPEN_WAL == 0 {
            return open(default, name, file, flags, flags_out);
        }
        let log: *mut Log = file.cast();
        let inner: *mut sqlite3_file = log.add(1).cast();
        let code = open(default, name, inner, flags, flags_out);
        if code == SQLITE_OK {
            log.write(Log {
                base: sqlite3_file { pMethods: &METHODS },
                file: NonNull::new_unchecked(inner),
                gathers: false,
                kept: Vec::new(),
                offset: 0,
            });
        }
        code
    }
}

unsafe extern "C" fn close(file: *mut sqlite3_file) -> c_int {
    unsafe {
        let log = Log::of(file);
        let closed = log.call(|methods| methods.xClose, |close, file| close(file));
        ptr::drop_in_place(log);
        (*file).pMethods = ptr::null();
        closed
    }
}

unsafe extern "C" fn read(
    file: *mut sqlite3_file,
    bytes: *mut c_void,
    length: c_int,
    offset: sqlite3_int64,
) -> c_int {
    unsafe {
        Log::of(file).after_flush(
            |methods| methods.xRead,
            |read, file| read(file, bytes, length, offset),
        )
    }
}

unsafe extern "C" fn write(
    file: *mut sqlite3_file,
    bytes: *const c_void,
    length: c_int,
    offset: sqlite3_int64,
) -> c_int {
    unsafe {
        let bytes = std::slice::from_raw_parts(bytes.cast(), length as usize);
        Log::of(file).write(bytes, offset)
    }
}

unsafe extern "C" fn truncate(file: *mut sqlite3_file, size: sqlite3_int64) -> c_int {
    unsafe {
        Log::of(file).after_flush(
            |methods| methods.xTruncate,
            |truncate, file| truncate(file, size),
        )
    }
}

unsafe extern "C" fn sync(file: *mut sqlite3_file, flags: c_int) -> c_int {
    unsafe {
        let log = Log::of(file);
        let code = log.after_flush(|methods| methods.xSync, |sync, file| sync(file, flags));
        log.gathers = false;
        code
    }
}

unsafe extern "C" fn file_size(file: *mut sqlite3_file, size: *mut sqlite3_int64) -> c_int {
    unsafe {
        Log::of(file).after_flush(
            |methods| methods.xFileSize,
            |file_size, file| file_size(file, size),
        )
    }
}

unsafe extern "C" fn file_control(
    file: *mut sqlite3_file,
    operation: c_int,
    argument: *mut c_void,
) -> c_int {
    unsafe {
        Log::of(file).after_flush(
            |methods| methods.xFileControl,
            |control, file| control(file, operation, argument),
        )
    }
}

unsafe extern "C" fn sector_size(file: *mut sqlite3_file) -> c_int {
    unsafe { Log::of(file).call(|methods| methods.xSectorSize, |size, file| size(file)) }
}

unsafe extern "C" fn device_characteristics(file: *mut sqlite3_file) -> c_int {
    unsafe {
        Log::of(file).call(
            |methods| methods.xDeviceCharacteristics,
            |of, file| of(file),
        )
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use rusqlite::{Connection, OpenFlags, config::DbConfig};

    use super::*;

    const ROWS: i64 = 2_000;

    fn writer(path: &Path) -> Connection {
        let flags = OpenFlags::default();
        let db = Connection::open_with_flags_and_vfs(path, flags, vfs().unwrap()).unwrap();
        let mode: String = db
            .query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0))
            .unwrap();
        assert_eq!(mode, "wal");
        // What is at the end of a test is what a crash leaves.
        db.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)
            .unwrap();
        db
    }

    fn add_rows(db: &Connection) {
        db.execute_batch("CREATE TABLE IF NOT EXISTS rows (number INTEGER PRIMARY KEY, text TEXT)")
            .unwrap();
        db.execute_batch("BEGIN").unwrap();
        for _ in 0..ROWS {
            db.execute("INSERT INTO rows (text) VALUES (hex(randomblob(150)))", [])
                .unwrap();
        }
    }

    fn commit(db: &Connection) {
        assert!(with_log(db, |_| ()).is_some());
        gathered(db, || db.execute_batch("COMMIT")).unwrap();
    }

    fn count(db: &Connection) -> i64 {
        let checked: String = db
            .query_row("PRAGMA integrity_check", [], |row| row.get(0))
            .unwrap();
        assert_eq!(checked, "ok");
        db.query_row(
            "SELECT count(*) FROM rows WHERE length(text) = 300",
            [],
            |row| row.get(0),
        )
        .unwrap()
    }

    /// More than is kept, and more than the cache holds, so that the log is read before the commit.
    #[test]
    fn a_transaction_finds_its_own_pages_in_the_log() {
        let folder = tempfile::tempdir().unwrap();
        let db = writer(&folder.path().join("db"));
        db.execute_batch("PRAGMA cache_size = 10").unwrap();
        add_rows(&db);
        assert_eq!(count(&db), ROWS);
        db.execute_batch("UPDATE rows SET text = hex(randomblob(150))")
            .unwrap();
        commit(&db);
        assert_eq!(count(&db), ROWS);
    }

    #[test]
    fn others_find_what_was_committed_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("db");
        let db = writer(&path);
        add_rows(&db);
        commit(&db);
        let reader = Connection::open(&path).unwrap();
        assert_eq!(count(&reader), ROWS);
        add_rows(&db);
        assert_eq!(count(&reader), ROWS);
        db.execute_batch("ROLLBACK; PRAGMA wal_checkpoint(TRUNCATE)")
            .unwrap();
        add_rows(&db);
        commit(&db);
        assert_eq!(count(&reader), 2 * ROWS);
    }

    /// What was spilled into the log is nobody's after a rollback: another program writes there.
    #[test]
    fn a_transaction_that_was_rolled_back_leaves_the_log_to_others() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("db");
        let db = writer(&path);
        add_rows(&db);
        commit(&db);
        db.execute_batch("PRAGMA wal_checkpoint(TRUNCATE); PRAGMA cache_size = 10; BEGIN")
            .unwrap();
        db.execute("UPDATE rows SET text = hex(randomblob(150))", [])
            .unwrap();
        db.execute_batch("ROLLBACK").unwrap();
        let other = Connection::open(&path).unwrap();
        for _ in 0..2 {
            add_rows(&other);
            other.execute_batch("COMMIT").unwrap();
        }
        assert_eq!(count(&db), 3 * ROWS);
        add_rows(&db);
        commit(&db);
        assert_eq!(count(&Connection::open(&path).unwrap()), 4 * ROWS);
    }

    /// Else each page would take two writes.
    #[test]
    fn a_commit_is_kept_until_its_sync_and_nothing_else_is() {
        let folder = tempfile::tempdir().unwrap();
        let db = writer(&folder.path().join("db"));
        let kept = || with_log(&db, |log| log.kept.capacity()).unwrap();
        db.execute_batch("PRAGMA cache_size = 10").unwrap();
        add_rows(&db);
        db.execute_batch("COMMIT").unwrap();
        assert_eq!(kept(), 0);
        db.execute_batch("PRAGMA cache_size = 1000").unwrap();
        add_rows(&db);
        commit(&db);
        assert!(kept() > KEPT_MAX / 2, "{}", kept());
        assert!(with_log(&db, |log| log.kept.is_empty() && !log.gathers).unwrap());
    }

    /// What is in the files after the commit is all there is after a crash.
    #[test]
    fn a_commit_is_in_the_files_when_it_returns() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("db");
        let db = writer(&path);
        db.execute_batch("PRAGMA synchronous = FULL").unwrap();
        add_rows(&db);
        commit(&db);
        for name in ["db", "db-wal"] {
            let copy = folder.path().join(format!("copy-{name}"));
            std::fs::copy(folder.path().join(name), copy).unwrap();
        }
        let copy = Connection::open(folder.path().join("copy-db")).unwrap();
        assert_eq!(count(&copy), ROWS);
    }
}
