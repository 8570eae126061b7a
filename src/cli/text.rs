//! Text for terminals: what may reach them, and colours.

use std::{borrow::Cow, fmt::Display};

use unicode_width::{UnicodeWidthChar as _, UnicodeWidthStr as _};

/// Makes a text harmless to a terminal: newlines and tabs pass, carriage returns go, any other
/// control character becomes a picture of itself, so that the reader sees that it is there.
pub fn plain(text: &str) -> Cow<'_, str> {
    let passes = |c: char| !c.is_control() || c == '\n' || c == '\t';
    if text.chars().all(passes) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        match c {
            '\r' => {}
            c if passes(c) => safe.push(c),
            c => safe.push_str(&picture(c)),
        }
    }
    Cow::Owned(safe)
}

/// As [`plain`], and on one line.
pub fn one_line(text: &str) -> Cow<'_, str> {
    match plain(text) {
        safe if safe.contains(['\n', '\t']) => Cow::Owned(safe.replace(['\n', '\t'], " ")),
        safe => safe,
    }
}

/// Cuts a text of one line to so many columns, with an ellipsis where something is left out.
pub fn cut(text: &str, width: usize) -> Cow<'_, str> {
    if text.width() <= width {
        return Cow::Borrowed(text);
    }
    let mut short = String::new();
    let mut left = width.saturating_sub(1);
    for c in text.chars() {
        let columns = c.width().unwrap_or(0);
        if columns > left {
            break;
        }
        left -= columns;
        short.push(c);
    }
    short.push('…');
    Cow::Owned(short)
}

/// A visible stand-in for a control character: Unicode's picture of it where there is one.
fn picture(control: char) -> Cow<'static, str> {
    let code = u32::from(control);
    let picture = match code {
        0..=0x1f => char::from_u32(0x2400 + code),
        0x7f => Some('\u{2421}'),
        _ => None,
    };
    match picture {
        Some(picture) => Cow::Owned(picture.to_string()),
        None => Cow::Owned(format!("<U+{code:04X}>")),
    }
}

/// Whether and how text is set off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Style {
    /// Write escape sequences for colours.
    pub color: bool,
}

impl Style {
    /// No colours.
    pub const PLAIN: Self = Self { color: false };

    pub fn bold(self, text: impl Display) -> String {
        self.set_off("1", text)
    }

    pub fn dim(self, text: impl Display) -> String {
        self.set_off("2", text)
    }

    /// Begins and ends in one go, so that no way of ending leaves the terminal coloured.
    fn set_off(self, code: &str, text: impl Display) -> String {
        if self.color {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_string()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_control_character_but_newline_and_tab_reaches_the_terminal() {
        let every_character: String = ('\0'..='\u{ff}').collect();
        let safe = plain(&every_character);
        let left: Vec<char> = safe.chars().filter(|c| c.is_control()).collect();
        assert_eq!(left, ['\t', '\n']);
        assert!(safe.contains('ÿ'));
    }

    #[test]
    fn an_escape_sequence_is_shown_not_sent() {
        assert_eq!(plain("a\x1b[2Jb"), "a␛[2Jb");
        assert_eq!(plain("\u{9b}2J"), "<U+009B>2J");
        assert_eq!(plain("\x7f"), "␡");
    }

    #[test]
    fn a_carriage_return_cannot_overwrite_a_line() {
        assert_eq!(plain("good\rbad\r\n"), "goodbad\n");
    }

    #[test]
    fn harmless_text_is_not_copied() {
        assert!(matches!(plain("wörter\n\tund 🎉"), Cow::Borrowed(_)));
    }

    #[test]
    fn one_line_is_one_line() {
        assert_eq!(one_line("a\r\nb\tc"), "a b c");
    }

    #[test]
    fn a_text_is_cut_by_columns_not_by_letters() {
        assert_eq!(cut("größe", 5), "größe");
        assert_eq!(cut("größer", 5), "größ…");
        assert_eq!(cut("会話会話", 6), "会話…");
        assert_eq!(cut("会話会話", 5), "会話…");
    }

    #[test]
    fn colours_are_written_only_where_wanted() {
        assert_eq!(Style { color: true }.dim("x"), "\x1b[2mx\x1b[0m");
        assert_eq!(Style::PLAIN.dim("x"), "x");
    }
}
