//! Tables of text with named columns, and errors that say where.
use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

/// The largest trace file that is read, in bytes, decompressed.
const FILE_BYTES_MAX: u64 = 1 << 30;

/// Why a trace was refused.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file cannot be read.
    #[error("{}: {error}", .file.display())]
    File {
        /// Which file.
        file: PathBuf,
        /// What the system says.
        error: std::io::Error,
    },
    /// A column is missing.
    #[error("{}, line 1: there is no column {column:?}; the columns are {}", .file.display(), .found.join(", "))]
    Column {
        /// Which file.
        file: PathBuf,
        /// The missing column.
        column: &'static str,
        /// Those that are there.
        found: Vec<String>,
    },
    /// A value makes no sense.
    #[error("{}, line {line}, column {column}: {why}", .file.display())]
    Value {
        /// Which file.
        file: PathBuf,
        /// From 1; the header is line 1.
        line: u64,
        /// Name of the column, or of the element in a file that is no table.
        column: String,
        /// What is wrong, and in which unit it should be.
        why: String,
    },
    /// The file is no table, or not the document it should be.
    #[error("{}, line {line}: {why}", .file.display())]
    Shape {
        /// Which file.
        file: PathBuf,
        /// From 1.
        line: u64,
        /// What is wrong.
        why: String,
    },
}

/// The whole text of a file; `.gz` is decompressed.
pub(super) fn text(file: &Path) -> Result<String, TraceError> {
    let failed = |error| TraceError::File {
        file: file.to_owned(),
        error,
    };
    let opened = File::open(file).map_err(failed)?;
    let mut out = String::new();
    if file.extension().is_some_and(|e| e == "gz") {
        flate2::read::GzDecoder::new(opened)
            .take(FILE_BYTES_MAX)
            .read_to_string(&mut out)
            .map_err(failed)?;
    } else {
        opened
            .take(FILE_BYTES_MAX)
            .read_to_string(&mut out)
            .map_err(failed)?;
    }
    Ok(out)
}

/// A table with a header.
pub(super) struct Table {
    file: PathBuf,
    header: Vec<String>,
    rows: Vec<(u64, csv::StringRecord)>,
}

impl Table {
    /// Reads it whole; every row must be as wide as the header, and there must be one.
    pub(super) fn read(file: &Path) -> Result<Self, TraceError> {
        let text = text(file)?;
        let mut reader = csv::ReaderBuilder::new().from_reader(text.as_bytes());
        let shape = |error: csv::Error| {
            let line = error.position().map_or(1, csv::Position::line);
            let why = match error.kind() {
                csv::ErrorKind::UnequalLengths {
                    expected_len, len, ..
                } => {
                    format!("has {len} columns, the header has {expected_len}")
                }
                _ => error.to_string(),
            };
            TraceError::Shape {
                file: file.to_owned(),
                line,
                why,
            }
        };
        let header = reader
            .headers()
            .map_err(shape)?
            .iter()
            .map(|name| name.trim().trim_start_matches('\u{feff}').to_owned())
            .collect();
        let mut rows = Vec::new();
        for row in reader.records() {
            let row = row.map_err(shape)?;
            let line = row.position().map_or(0, csv::Position::line);
            rows.push((line, row));
        }
        if rows.is_empty() {
            return Err(TraceError::Shape {
                file: file.to_owned(),
                line: 1,
                why: "there are no rows".into(),
            });
        }
        Ok(Self {
            file: file.to_owned(),
            header,
            rows,
        })
    }

    /// Where that column stands.
    pub(super) fn column(&self, name: &'static str) -> Result<Column, TraceError> {
        match self.header.iter().position(|h| h == name) {
            Some(at) => Ok(Column { name, at }),
            None => Err(TraceError::Column {
                file: self.file.clone(),
                column: name,
                found: self.header.clone(),
            }),
        }
    }

    /// Its rows, in order.
    pub(super) fn rows(&self) -> impl Iterator<Item = Row<'_>> {
        self.rows.iter().map(|(line, fields)| Row {
            file: &self.file,
            line: *line,
            fields,
        })
    }
}

/// A column of one table.
#[derive(Clone, Copy)]
pub(super) struct Column {
    name: &'static str,
    at: usize,
}

/// One row.
pub(super) struct Row<'a> {
    file: &'a Path,
    line: u64,
    fields: &'a csv::StringRecord,
}

impl Row<'_> {
    /// A value of this row is wrong.
    pub(super) fn bad(&self, column: Column, why: impl Into<String>) -> TraceError {
        TraceError::Value {
            file: self.file.to_owned(),
            line: self.line,
            column: column.name.into(),
            why: why.into(),
        }
    }

    /// As it stands, without blanks around it.
    pub(super) fn text(&self, column: Column) -> &str {
        self.fields.get(column.at).unwrap_or_default().trim()
    }

    /// Text that is not empty.
    pub(super) fn name(&self, column: Column) -> Result<String, TraceError> {
        match self.text(column) {
            "" => Err(self.bad(column, "is empty")),
            text => Ok(text.to_owned()),
        }
    }

    /// A whole number; some tables write it with a point.
    pub(super) fn whole(&self, column: Column, max: u64, unit: &str) -> Result<u64, TraceError> {
        let value = self.number(column, max as f64, unit)?;
        if value.fract() != 0.0 {
            return Err(self.bad(column, format!("{value} is not a whole number of {unit}")));
        }
        Ok(value as u64)
    }

    /// A number from 0 to `max`.
    pub(super) fn number(&self, column: Column, max: f64, unit: &str) -> Result<f64, TraceError> {
        let text = self.text(column);
        let value: f64 = text
            .parse()
            .map_err(|_| self.bad(column, format!("{text:?} is not a number of {unit}")))?;
        if !value.is_finite() || value < 0.0 {
            return Err(self.bad(column, format!("{text} is not a number of {unit} from 0 upwards")));
        }
        if value > max {
            return Err(self.bad(
                column,
                format!("{text} is over {max} {unit}: is it in another unit than {unit}?"),
            ));
        }
        Ok(value)
    }
}
