//! What the user sees: lines, tables and JSON on standard output, remarks on standard error.
//!
//! Tables and bars adapt to a terminal; piped output is plain and complete. A reader that goes away (`| head`)
//! is no error: what would follow is dropped. Remarks are for people who watch: into a pipe or a log go only those
//! that say what is wrong or what is waited for.
use serde_json::Value;
use std::{
    io::{self, IsTerminal, Write},
    sync::atomic::{AtomicBool, Ordering},
};
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

/// Where and how to write.
#[derive(Debug)]
pub(crate) struct Out {
    /// One JSON document (or one per line, for streams) instead of text.
    pub(crate) json: bool,
    pub(crate) quiet: bool,
    /// Somebody watches standard error, or asked for everything.
    watched: bool,
    /// Standard output is a terminal.
    pub(crate) terminal: bool,
    /// Standard error is a terminal that can redraw: bars may be shown.
    pub(crate) bars: bool,
    colour_out: bool,
    colour_err: bool,
    closed: AtomicBool,
}

impl Out {
    /// `talkative` commands make their remarks even when standard error goes into a pipe.
    pub(crate) fn new(json: bool, quiet: bool, talkative: bool) -> Self {
        let dumb = std::env::var_os("TERM").is_some_and(|t| t == "dumb");
        let no_colour = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty()) || dumb;
        let (terminal, err) = (io::stdout().is_terminal(), io::stderr().is_terminal());
        ASCII.store((terminal || err) && !utf8(), Ordering::Relaxed);
        Self {
            json,
            quiet,
            watched: err || talkative,
            terminal,
            bars: err && !quiet && !json && !dumb,
            colour_out: terminal && !no_colour,
            colour_err: err && !no_colour,
            closed: AtomicBool::new(false),
        }
    }

    /// Columns of the terminal; 80 where there is none.
    pub(crate) fn width(&self) -> usize {
        let size = rustix::termios::tcgetwinsize(io::stdout()).ok();
        size.map(|s| usize::from(s.ws_col))
            .filter(|w| *w >= 20)
            .unwrap_or(80)
    }

    /// The reader of standard output has gone away.
    pub(crate) fn closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// One line of the answer.
    pub(crate) fn line(&self, text: impl AsRef<str>) {
        self.raw(format!("{}\n", text.as_ref()).as_bytes());
    }

    /// Bytes of the answer, as they are.
    pub(crate) fn raw(&self, bytes: &[u8]) {
        if self.closed() {
            return;
        }
        let mut out = io::stdout().lock();
        if out.write_all(bytes).and_then(|()| out.flush()).is_err() {
            self.closed.store(true, Ordering::Relaxed);
        }
    }

    /// One JSON document on one line.
    pub(crate) fn json(&self, value: &Value) {
        self.line(value.to_string());
    }

    /// A remark for whoever watches, on standard error; silent in pipes, under `-q` and under `--json`.
    pub(crate) fn note(&self, text: impl AsRef<str>) {
        if self.watched {
            self.warn(text);
        }
    }

    /// A remark that matters in a log too; silent under `-q` and `--json`.
    pub(crate) fn warn(&self, text: impl AsRef<str>) {
        if !self.quiet && !self.json {
            drop(writeln!(io::stderr().lock(), "{}", text.as_ref()));
        }
    }

    /// The one line that ends a failed command: text, or under `--json` one document.
    pub(crate) fn error(&self, text: &str, code: u8) {
        if self.json {
            let document = serde_json::json!({"error": text, "exit_code": code});
            drop(writeln!(io::stderr().lock(), "{document}"));
            return;
        }
        let head = if self.colour_err {
            "\x1b[1;31merror:\x1b[0m"
        } else {
            "error:"
        };
        drop(writeln!(io::stderr().lock(), "{head} {text}"));
    }

    pub(crate) fn bold(&self, text: &str) -> String {
        if self.colour_out {
            format!("\x1b[1m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    /// Prints a table that fits the terminal; piped, nothing is cut.
    pub(crate) fn table(&self, table: &Table) {
        let limit = self.terminal.then(|| self.width());
        for (i, line) in table.lines(limit).into_iter().enumerate() {
            self.line(if i == 0 { self.bold(&line) } else { line });
        }
    }
}

/// How a column gives way when the table is too wide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Column {
    /// Text, never cut.
    Left,
    /// Numbers, never cut.
    Right,
    /// Text that may be cut with an ellipsis, down to eight columns.
    Cut,
}

/// Rows under a header.
#[derive(Debug)]
pub(crate) struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(header: &[(&str, Column)]) -> Self {
        Self {
            columns: header.iter().map(|(_, c)| *c).collect(),
            rows: vec![header.iter().map(|(name, _)| (*name).to_owned()).collect()],
        }
    }

    pub(crate) fn row(&mut self, cells: Vec<String>) {
        self.rows
            .push(cells.into_iter().map(|cell| clean(&cell)).collect());
    }

    /// The rows as aligned lines, the header first.
    pub(crate) fn lines(&self, limit: Option<usize>) -> Vec<String> {
        let mut widths: Vec<usize> = (0..self.columns.len())
            .map(|c| {
                self.rows
                    .iter()
                    .filter_map(|r| r.get(c))
                    .map(|t| t.width())
                    .max()
                    .unwrap_or(0)
            })
            .collect();
        if let Some(limit) = limit {
            let gaps = 2 * widths.len().saturating_sub(1);
            while widths.iter().sum::<usize>() + gaps > limit {
                // The widest of those that may be cut gives way first.
                let cuttable = |(i, w): &(usize, &usize)| self.columns[*i] == Column::Cut && **w > 8;
                let Some((i, _)) = widths
                    .iter()
                    .enumerate()
                    .filter(cuttable)
                    .max_by_key(|(_, w)| **w)
                else {
                    break;
                };
                widths[i] -= 1;
            }
        }
        self.rows.iter().map(|row| self.line(row, &widths)).collect()
    }

    fn line(&self, row: &[String], widths: &[usize]) -> String {
        let mut line = String::new();
        for (i, cell) in row.iter().enumerate() {
            let cell = cut(cell, widths[i]);
            let pad = " ".repeat(widths[i].saturating_sub(cell.width()));
            if i > 0 {
                line.push_str("  ");
            }
            match self.columns[i] {
                Column::Right => line.extend([pad.as_str(), cell.as_str()]),
                _ => line.extend([cell.as_str(), pad.as_str()]),
            }
        }
        line.trim_end().to_owned()
    }
}

/// The terminal's locale is not UTF-8: what we draw ourselves stays within ASCII. Foreign text is passed on as it is.
static ASCII: AtomicBool = AtomicBool::new(false);

/// Whether the locale says UTF-8, by the first of its variables that is set.
fn utf8() -> bool {
    let set = ["LC_ALL", "LC_CTYPE", "LANG"]
        .into_iter()
        .filter_map(std::env::var_os)
        .find(|value| !value.is_empty());
    set.is_some_and(|value| {
        let value = value.to_string_lossy().to_ascii_lowercase();
        value.contains("utf-8") || value.contains("utf8")
    })
}

/// What stands for something left out; one column.
fn ellipsis() -> char {
    if ASCII.load(Ordering::Relaxed) { '~' } else { '…' }
}

/// The letters of a bar: done, edge, to do.
pub(crate) fn bar_letters() -> &'static str {
    if ASCII.load(Ordering::Relaxed) {
        "#>-"
    } else {
        "█▌░"
    }
}

/// Foreign text made harmless for a terminal: control characters could move the cursor or colour what follows, and
/// overrides of the writing direction could turn around what stands beside them.
pub(crate) fn clean(text: &str) -> String {
    let harmful = |c: char| {
        c.is_control()
            || matches!(c, '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    text.chars().map(|c| if harmful(c) { ' ' } else { c }).collect()
}

/// At most `width` columns of `text`, with an ellipsis where something was left out.
pub(crate) fn cut(text: &str, width: usize) -> String {
    if text.width() <= width {
        return text.to_owned();
    }
    let (mut out, mut used) = (String::new(), 1);
    for c in text.chars() {
        used += c.width().unwrap_or(0);
        if used > width {
            break;
        }
        out.push(c);
    }
    out.push(ellipsis());
    out
}

/// `text` in lines of at most `width` columns, later ones indented. Spaces before the first word stay.
pub(crate) fn wrap(text: &str, width: usize, indent: &str) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let mut line = text[..text.len() - text.trim_start().len()].to_owned();
    for word in text.split_whitespace() {
        if !line.trim().is_empty() && line.width() + 1 + word.width() > width {
            lines.push(std::mem::replace(&mut line, indent.to_owned()));
        } else if !line.trim().is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    lines.push(line);
    lines
}

/// Credits without needless zeros: `0.25`, `0.000222`, `100.00`.
pub(crate) fn credits(micro: u64) -> String {
    let full = karez_core::unit::Credits(micro).to_string();
    let keep = full.find('.').map_or(full.len(), |dot| dot + 3);
    let trimmed = full.trim_end_matches('0');
    full[..trimmed.len().max(keep)].to_owned()
}

/// The same for balances, which the federation's may be below zero.
pub(crate) fn signed_credits(micro: i64) -> String {
    let text = credits(micro.unsigned_abs());
    if micro < 0 { format!("-{text}") } else { text }
}

/// A price per device-hour.
pub(crate) fn rate(micro: u64) -> String {
    if micro == 0 {
        "donated".into()
    } else {
        format!("{}/h", credits(micro))
    }
}

/// A span of time for people.
pub(crate) fn span(ms: u64) -> String {
    let s = ms / 1000;
    match s {
        0 => format!("{ms} ms"),
        1..60 => format!("{}.{} s", s, ms % 1000 / 100),
        60..3600 => format!("{} min {} s", s / 60, s % 60),
        3600..172_800 => format!("{} h {} min", s / 3600, s % 3600 / 60),
        _ => format!("{} days", s / 86_400),
    }
}

/// A size for people.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let (mut whole, mut unit) = (bytes as f64 / 1024.0, 0);
    while whole >= 1024.0 && unit + 1 < UNITS.len() {
        whole /= 1024.0;
        unit += 1;
    }
    format!("{whole:.1} {}", UNITS[unit])
}

/// A count with separators: `1,234,567`.
pub(crate) fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// `1 part`, `3 parts`.
pub(crate) fn plural(n: u64, noun: &str) -> String {
    if n == 1 {
        return format!("1 {noun}");
    }
    let nouns = match noun.strip_suffix('y') {
        Some(stem) if !noun.ends_with("ay") && !noun.ends_with("ey") => format!("{stem}ies"),
        _ if noun.ends_with('s') => format!("{noun}es"),
        _ => format!("{noun}s"),
    };
    format!("{} {nouns}", count(n))
}

/// A moment for tables, in UTC, to the minute.
pub(crate) fn minute(utc_ms: u64) -> String {
    moment(utc_ms).replace('T', " ").chars().take(16).collect()
}

/// A moment, in UTC, to the second.
pub(crate) fn moment(utc_ms: u64) -> String {
    let at = std::time::UNIX_EPOCH + std::time::Duration::from_secs(utc_ms / 1000);
    humantime::format_rfc3339_seconds(at).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_read_numbers_their_way() {
        for (micro, expected) in [
            (0, "0.00"),
            (222, "0.000222"),
            (250_000, "0.25"),
            (100_000_000, "100.00"),
            (1_100_000, "1.10"),
        ] {
            assert_eq!(credits(micro), expected);
        }
        assert_eq!(signed_credits(-1_500_000), "-1.50");
        assert_eq!(
            [span(350), span(3_240), span(125_000)],
            ["350 ms", "3.2 s", "2 min 5 s"]
        );
        assert_eq!([size(12), size(83_506_384)], ["12 B", "79.6 MiB"]);
        assert_eq!([count(7), count(1_234_567)], ["7", "1,234,567"]);
    }

    #[test]
    fn tables_fit_and_wide_letters_line_up() {
        let mut table = Table::new(&[("name", Column::Cut), ("n", Column::Right)]);
        table.row(vec!["数据中心 in a very long name".into(), "12".into()]);
        table.row(vec!["b\x1b[31m".into(), "3".into()]);
        for line in table.lines(Some(20)) {
            assert!(line.width() <= 20, "{line:?}");
        }
        assert_eq!(table.lines(None)[2], "b [31m                         3");
    }

    #[test]
    fn names_in_every_script_keep_their_columns() {
        let mut table = Table::new(&[("NAME", Column::Cut), ("N", Column::Right)]);
        for name in [
            "حقول الأرز ومياه الري",
            "水稻田与灌溉用水的长名字",
            "धान के खेत और सिंचाई",
            "👩‍🌾 farm",
        ] {
            table.row(vec![name.into(), "1".into()]);
        }
        for limit in [12, 16, 30] {
            for line in table.lines(Some(limit)) {
                assert!(line.width() <= limit, "{line:?} is wider than {limit}");
            }
        }
        // Nobody's name turns around the rest of the line.
        assert_eq!(clean("a\u{202e}b\u{2066}c\u{2028}d"), "a b c d");
        assert_eq!(clean("نص عربي"), "نص عربي");
    }

    #[test]
    fn minutes_are_enough_in_a_table() {
        assert_eq!(minute(1_795_456_785_090), "2026-11-23 17:59");
    }

    #[test]
    fn wrapping_keeps_every_word() {
        let text = "one two three four five";
        assert_eq!(wrap(text, 9, "  "), ["one two", "  three", "  four", "  five"]);
        assert_eq!(wrap(text, 80, ""), [text]);
        assert_eq!(wrap("  one two", 6, "    "), ["  one", "    two"]);
    }
}
