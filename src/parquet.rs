//! Parquet as training data: the columns that an example may have, row by row, as the JSON lines that trainers read.
//!
//! The job's data is those lines: providers need not read Parquet, and the record names the digest of what was learnt.
use crate::fault::{Kind, fault};
use anyhow::Result;
use karez_engine::train::data::{DATA_MAX, LINE_MAX};
use parquet::{
    file::reader::{FileReader, SerializedFileReader},
    schema::types::Type,
};
use std::{
    fs::File,
    io::{BufWriter, Read, Write},
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::Arc,
};
use tempfile::NamedTempFile;

/// The first and the last bytes of every such file.
const MAGIC: &[u8; 4] = b"PAR1";
/// Columns that are read; pictures and notes that lie beside them are not.
const COLUMNS: [&str; 9] = [
    "messages",
    "prompt",
    "completion",
    "text",
    "instruction",
    "input",
    "output",
    "lang",
    "language",
];

/// Whether a file says of itself that it is Parquet; its name says nothing.
pub(crate) fn is_parquet(path: &Path) -> bool {
    let mut first = [0; 4];
    File::open(path).is_ok_and(|mut file| file.read_exact(&mut first).is_ok() && first == *MAGIC)
}

/// The rows of `path` as JSON lines, row n in line n, in a file that goes away with the value.
///
/// # Errors
/// Names the file, and the row where one is at fault: over [`LINE_MAX`] bytes, or [`DATA_MAX`] all together.
pub(crate) fn lines(path: &Path) -> Result<NamedTempFile> {
    let wrong = |why: &str| fault(Kind::Refused, format!("{}: {why}", path.display()));
    // The format is full of lengths and offsets that a damaged file may lie about; whatever the library makes of them
    // is this one file's fault.
    let read = catch_unwind(AssertUnwindSafe(|| write_lines(path)));
    match read {
        Ok(Ok(file)) => Ok(file),
        Ok(Err(Why::Ours(error))) => Err(error),
        Ok(Err(Why::Text(why))) => Err(wrong(&why)),
        Err(_) => Err(wrong("is damaged: write it again, or convert it to JSON lines")),
    }
}

enum Why {
    /// What is wrong with the file.
    Text(String),
    /// What is wrong here: the disk is full.
    Ours(anyhow::Error),
}

impl From<parquet::errors::ParquetError> for Why {
    fn from(error: parquet::errors::ParquetError) -> Self {
        Self::Text(format!("is not readable as Parquet: {error}"))
    }
}

fn write_lines(path: &Path) -> Result<NamedTempFile, Why> {
    let ours = |error: std::io::Error| Why::Ours(anyhow::Error::new(error).context("the rows as JSON lines"));
    let file = File::open(path).map_err(|error| Why::Text(format!("cannot be opened: {error}")))?;
    let reader = SerializedFileReader::new(file)?;
    let schema = reader.metadata().file_metadata().schema();
    let found: Vec<_> = schema
        .get_fields()
        .iter()
        .filter(|column| COLUMNS.contains(&column.name()))
        .map(Arc::clone)
        .collect();
    if found.is_empty() {
        let there: Vec<_> = schema
            .get_fields()
            .iter()
            .take(20)
            .map(|column| column.name())
            .collect();
        return Err(Why::Text(format!(
            "has none of the columns {}; it has {}",
            COLUMNS.join(", "),
            there.join(", ")
        )));
    }
    let wanted = Type::group_type_builder(schema.name())
        .with_fields(found)
        .build()?;
    let out = NamedTempFile::with_suffix(".jsonl").map_err(ours)?;
    let mut lines = BufWriter::new(out.as_file());
    let mut written = 0;
    for (row, number) in reader.get_row_iter(Some(wanted))?.zip(1u64..) {
        let row = row.map_err(|error| Why::Text(format!("row {number} is not readable: {error}")))?;
        let line = row.to_json_value().to_string();
        if line.len() > LINE_MAX {
            return Err(Why::Text(format!(
                "row {number} is longer than {LINE_MAX} bytes as JSON"
            )));
        }
        written += line.len() as u64 + 1;
        if written > DATA_MAX {
            return Err(Why::Text(format!(
                "has over {DATA_MAX} bytes as JSON by row {number}, more than one run can hold"
            )));
        }
        writeln!(lines, "{line}").map_err(ours)?;
    }
    lines.flush().map_err(ours)?;
    drop(lines);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use parquet::{
        basic::{Compression, ZstdLevel},
        data_type::{ByteArray, ByteArrayType},
        file::{properties::WriterProperties, writer::SerializedFileWriter},
        schema::parser::parse_message_type,
    };

    /// A file with the columns `text` and `lang`, and one that is nobody's.
    fn written(folder: &Path, compression: Compression, rows: &[(&str, Option<&str>)]) -> std::path::PathBuf {
        let schema = "message rows { required binary text (UTF8); optional binary lang (UTF8);
            required binary picture; }";
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let path = folder.join("rows.parquet");
        let properties = WriterProperties::builder().set_compression(compression).build();
        let file = File::create(&path).unwrap();
        let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties)).unwrap();
        let mut group = writer.next_row_group().unwrap();
        let texts: Vec<_> = rows.iter().map(|(text, _)| ByteArray::from(*text)).collect();
        let langs: Vec<_> = rows
            .iter()
            .filter_map(|(_, lang)| lang.map(ByteArray::from))
            .collect();
        let there: Vec<i16> = rows.iter().map(|(_, lang)| lang.is_some().into()).collect();
        let pictures = vec![ByteArray::from(vec![255; 1_000]); rows.len()];
        for (values, levels) in [(&texts, None), (&langs, Some(&there[..])), (&pictures, None)] {
            let mut column = group.next_column().unwrap().unwrap();
            column
                .typed::<ByteArrayType>()
                .write_batch(values, levels, None)
                .unwrap();
            column.close().unwrap();
        }
        group.close().unwrap();
        writer.close().unwrap();
        path
    }

    #[test]
    fn rows_become_the_lines_of_the_same_number() {
        let folder = tempfile::tempdir().unwrap();
        for compression in [
            Compression::UNCOMPRESSED,
            Compression::SNAPPY,
            Compression::ZSTD(ZstdLevel::default()),
            Compression::GZIP(Default::default()),
        ] {
            let rows = [("Habari ya \"asubuhi\"?\nNjema.", Some("sw")), ("Bom dia", None)];
            let path = written(folder.path(), compression, &rows);
            assert!(is_parquet(&path));
            let file = lines(&path).unwrap();
            let text = std::fs::read_to_string(file.path()).unwrap();
            let values: Vec<serde_json::Value> = text
                .lines()
                .map(|line| serde_json::from_str(line).unwrap())
                .collect();
            assert_eq!(
                values,
                [
                    serde_json::json!({"text": rows[0].0, "lang": "sw"}),
                    serde_json::json!({"text": rows[1].0, "lang": null}),
                ]
            );
        }
    }

    #[test]
    fn damage_is_an_error_that_names_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let rows = [("Habari", Some("sw")); 50];
        let path = written(folder.path(), Compression::SNAPPY, &rows);
        let whole = std::fs::read(&path).unwrap();
        std::panic::set_hook(Box::new(|_| {}));
        let mut refused = 0;
        for at in 4..whole.len() {
            for bytes in [
                [&whole[..at], &[whole[at] ^ 0x55], &whole[at + 1..]].concat(),
                whole[..at].to_vec(),
            ] {
                std::fs::write(&path, bytes).unwrap();
                if let Err(error) = lines(&path) {
                    refused += 1;
                    assert!(format!("{error:#}").contains("rows.parquet: "), "{error:#}");
                }
            }
        }
        let _ = std::panic::take_hook();
        assert!(refused > whole.len(), "{refused} of {}", 2 * whole.len());
    }

    #[test]
    fn a_file_without_a_known_column_says_which_it_has() {
        let folder = tempfile::tempdir().unwrap();
        let schema = Arc::new(parse_message_type("message rows { required int64 age; }").unwrap());
        let path = folder.path().join("ages.parquet");
        let file = File::create(&path).unwrap();
        let writer = SerializedFileWriter::new(file, schema, Default::default()).unwrap();
        writer.close().unwrap();
        let error = format!("{:#}", lines(&path).unwrap_err());
        assert!(error.contains("has none of the columns messages, "), "{error}");
        assert!(error.ends_with("it has age"), "{error}");
    }
}
