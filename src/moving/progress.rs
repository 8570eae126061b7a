//! How far a command has come: one line on stderr that is written over, if that is a terminal.
//! Knows nothing of what is counted.

use std::{
    io::{self, IsTerminal as _, Write as _},
    time::{Duration, Instant},
};

/// How often the line changes, at most.
const INTERVAL: Duration = Duration::from_millis(100);
/// Characters of the bar.
const WIDTH: u64 = 24;

/// The line.
pub struct Progress {
    is_terminal: bool,
    is_shown: bool,
    shown_at: Option<Instant>,
    started_at: Instant,
}

impl Progress {
    pub fn new() -> Self {
        Self {
            is_terminal: io::stderr().is_terminal(),
            is_shown: false,
            shown_at: None,
            started_at: Instant::now(),
        }
    }

    /// Shows `what`, which must fit into a line, and how much of the whole is done if that is known.
    pub fn show(&mut self, part: Option<(u64, u64)>, what: impl FnOnce() -> String) {
        let is_recent = self.shown_at.is_some_and(|at| at.elapsed() < INTERVAL);
        if !self.is_terminal || is_recent {
            return;
        }
        let bar = part.map_or_else(String::new, |(done, whole)| bar(done, whole));
        let seconds = self.started_at.elapsed().as_secs();
        // Progress that cannot be shown is no failure.
        let _ = write!(io::stderr(), "\r\x1b[2K{bar}{} ({seconds} s)", what());
        let _ = io::stderr().flush();
        self.is_shown = true;
        self.shown_at = Some(Instant::now());
    }

    /// Takes the line away.
    pub fn clear(&mut self) {
        if std::mem::take(&mut self.is_shown) {
            let _ = write!(io::stderr(), "\r\x1b[2K");
        }
    }

    /// Says something that stays.
    pub fn say(&mut self, text: &str) {
        self.clear();
        let _ = writeln!(io::stderr(), "{text}");
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

fn bar(done: u64, whole: u64) -> String {
    let whole = whole.max(1);
    let done = done.min(whole);
    let filled = (done * WIDTH / whole) as usize;
    let empty = WIDTH as usize - filled;
    let percent = done * 100 / whole;
    format!(
        "[{}{}] {percent:3} % ",
        "#".repeat(filled),
        ".".repeat(empty)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_is_never_too_long_nor_too_short() {
        assert_eq!(bar(0, 0), "[........................]   0 % ");
        assert_eq!(bar(1, 2), "[############............]  50 % ");
        assert_eq!(bar(9, 3), "[########################] 100 % ");
    }
}
