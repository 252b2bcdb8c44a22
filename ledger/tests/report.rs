//! Statements, netting and the forms of usage, computed from a verified export.
#![allow(clippy::unwrap_used)]
mod common;
use common::*;
use karez_core::{id::Institution, unit::UtcMillis};
use karez_ledger::{
    Book, Entry, Summary, VerifyOptions, export,
    note::Note,
    report::{Form, FormWriter, Month, Pseudonyms, StandingBuilder, Statement, StatementBuilder},
    verify_each,
};
use std::{
    path::{Path, PathBuf},
    process::Command,
};

fn file() -> Vec<u8> {
    let mut book = Book::new(scheduler());
    let entries: Vec<Entry> = all_kinds(4)
        .into_iter()
        .map(|p| book.append(AT, p).unwrap())
        .collect();
    let mut out = Vec::new();
    export(&mut out, &scheduler_secret(), AT, entries.into_iter().map(Ok)).unwrap();
    out
}

fn walk(each: &mut dyn FnMut(&Entry) -> std::io::Result<()>) -> Summary {
    verify_each(&mut file().as_slice(), &VerifyOptions::default(), each).unwrap()
}

fn month() -> Month {
    Month::of(AT)
}

fn statement(name: &str, month: Month) -> Statement {
    let mut builder = StatementBuilder::new(name.parse().unwrap(), month);
    let summary = walk(&mut |entry| {
        builder.take(entry);
        Ok(())
    });
    builder.finish(&summary.tree_head).0
}

#[test]
fn a_statement_adds_up_from_both_sides() {
    let nairobi: Institution = "uni-nairobi".parse().unwrap();
    let used = statement("uni-nairobi", month());
    let mut receipts = 0;
    for name in ["uni-0", "uni-1", "uni-2"] {
        let lent = statement(name, month());
        let Some(flow) = lent.lent.get(&nairobi) else {
            continue;
        };
        assert_eq!(used.used.get(&name.parse::<Institution>().unwrap()), Some(flow));
        receipts += flow.receipts;
        assert_eq!(lent.opening, 0);
        // Earned, less refunds, plus or less payments: what the account holds.
        let earned = flow.credits.0 as i64 - flow.refunded.0 as i64;
        assert_eq!(lent.closing, earned - lent.granted + lent.paid, "{name}");
    }
    assert!(receipts > 5);
    let refunded: u64 = used.used.values().map(|f| f.refunded.0).sum();
    assert_eq!(refunded, 400);
    let standard: u64 = used.used.values().map(|f| f.standard.0).sum();
    assert!(
        standard > 0,
        "the two receipts after the rate card have a standard value"
    );
    // The next month begins where this one ends.
    let next = statement("uni-0", "2026-10".parse().unwrap());
    assert_eq!(next.opening, statement("uni-0", month()).closing);
    assert!(next.lent.is_empty());
}

/// Beside the raw meters, never in their place: what was measured is counted, what was not is said.
#[test]
fn the_reference_unit_counts_what_was_measured_and_says_what_was_not() {
    let rows: Vec<serde_json::Value> = form(Form::Ndjson)
        .0
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let (mut measured, mut others) = (0, 0);
    for row in &rows {
        let billed = row["billed_ms"].as_u64().unwrap();
        match row["benchmark"].as_str() {
            Some("bench/1") => {
                assert_eq!(row["reference_unit"], "ref/1");
                assert_eq!(row["benchmark_tokens_per_second"], 250.0);
                assert_eq!(row["reference_ms"].as_u64(), Some(billed * 5 / 2));
                measured += billed * 5 / 2;
            }
            // An estimate, or nothing: in the row as it is, but no measure for comparing.
            _ => {
                assert!(
                    row["reference_ms"].is_null() && row["reference_unit"].is_null(),
                    "{row}"
                );
                others += u64::from(billed > 0);
            }
        }
    }
    assert!(measured > 0 && others > 0 && rows.iter().any(|row| row["benchmark"] == "probe/1"));
    let used = statement("uni-nairobi", month());
    let sum = |of: fn(&karez_ledger::report::Flow) -> u64| used.used.values().map(of).sum::<u64>();
    assert_eq!(
        (sum(|f| f.reference.0), sum(|f| f.unmeasured)),
        (measured, others)
    );
    let text = used.text();
    assert!(
        text.starts_with("karez-statement/2\n") && text.contains("\nreference unit ref/1\n"),
        "{text}"
    );
    assert!(
        form(Form::Apel)
            .0
            .contains("ServiceLevelType: custom\nServiceLevel: 2.500000\n")
    );
    assert!(
        form(Form::Auditor)
            .0
            .contains(r#""scores":[{"name":"bench/1","value":250.0}]"#)
    );
    assert!(form(Form::Focus).0.contains("reference_unit"));
}

/// A statement that was signed before the unit was there is still compared, line by line as it was then.
#[test]
fn a_statement_of_the_form_before_is_still_the_same() {
    let ours = statement("uni-0", month());
    let before = ours.as_in("karez-statement/1\n");
    assert!(
        before.starts_with("karez-statement/1\n") && !before.contains("reference"),
        "{before}"
    );
    let name = format!("karez-statement/{}", scheduler());
    let note = Note::sign(before, &name, &scheduler_secret());
    assert_eq!(ours.is_signed(&note, &scheduler().0), Ok(true));
}

#[test]
fn a_statement_is_signed_and_any_change_shows() {
    let ours = statement("uni-0", month());
    let note = ours.sign(&scheduler_secret());
    let text = note.to_string();
    let read = Note::parse(&text).unwrap();
    assert_eq!(ours.is_signed(&read, &scheduler().0), Ok(true));
    assert!(ours.is_signed(&read, &user(0).0).is_err());
    let digit = text.find("credits ").unwrap() + 8;
    let mut forged = text.clone().into_bytes();
    forged[digit] = if forged[digit] == b'9' { b'8' } else { b'9' };
    let forged = Note::parse(std::str::from_utf8(&forged).unwrap()).unwrap();
    assert!(ours.is_signed(&forged, &scheduler().0).is_err());
    assert_eq!(ours.csv().lines().count(), 1 + ours.lent.len() + ours.used.len());
}

/// The rows of one order have one name, in whichever month they were settled: else the order would join two names.
#[test]
fn a_job_that_outlasts_a_month_joins_no_two_names() {
    let asked = UtcMillis(month().start().0 - 1);
    let old = order_with(1, 5, 9_000, |order| order.issued_at = asked);
    let mut book = Book::new(scheduler());
    let entries: Vec<Entry> = [
        grant(1, 9_000),
        reserve(&old, 9_000),
        Part::of(&old, 0, 1).settle(),
    ]
    .into_iter()
    .map(|p| book.append(AT, p).unwrap())
    .collect();
    let mut out = Vec::new();
    let mut writer =
        FormWriter::begin(&mut out, Form::Csv, Pseudonyms::new(b"s"), Some(month()), None).unwrap();
    entries.iter().for_each(|entry| writer.take(entry).unwrap());
    assert_eq!(writer.finish().unwrap(), 1);
    let names = Pseudonyms::new(b"s");
    let institution = "uni-nairobi".parse().unwrap();
    let [then, now] = [Month::of(asked), month()].map(|m| names.name(user(1), &institution, m));
    let text = String::from_utf8(out).unwrap();
    assert!(text.contains(&then) && !text.contains(&now), "{text}");
}

/// What happens after a month changes nothing of how it ended.
#[test]
fn a_standing_is_as_of_the_months_end() {
    let later = UtcMillis(month().end().0 + 1);
    let standing = |posts_later: bool| {
        let mut book = Book::new(scheduler());
        let mut entries: Vec<Entry> = all_kinds(4)
            .into_iter()
            .map(|p| book.append(AT, p).unwrap())
            .collect();
        if posts_later {
            let next = order(1, 777, 2_000);
            let part = Part::of(&next, 0, 1);
            for posting in [
                grant(1, 2_000),
                limit("uni-nairobi", 5_000_000, later.0),
                payment("uni-nairobi", "uni-0", 70, 99),
                reserve(&next, 2_000),
                part.settle(),
            ] {
                entries.push(book.append(later, posting).unwrap());
            }
        }
        let mut out = Vec::new();
        let created = UtcMillis(later.0 + 1);
        export(
            &mut out,
            &scheduler_secret(),
            created,
            entries.into_iter().map(Ok),
        )
        .unwrap();
        let of = |month: Month| {
            let mut builder = StandingBuilder::new(month, "any-one".parse().unwrap());
            let take = &mut |entry: &Entry| builder.take(entry).map_err(std::io::Error::other);
            let summary = verify_each(&mut out.as_slice(), &VerifyOptions::default(), take).unwrap();
            let standing = builder.finish(&summary);
            let positions: Vec<_> = standing
                .netting
                .positions()
                .map(|(name, net)| (name.clone(), net, standing.accounts.limit(name)))
                .collect();
            let accounts: Vec<_> = standing.accounts.iter().map(|(a, n)| (a.clone(), n)).collect();
            (standing.at, positions, accounts)
        };
        (of(month()), of(Month::of(later)), book)
    };
    let (then, _, _) = standing(false);
    let (still, after, book) = standing(true);
    assert_eq!(still, then);
    assert_eq!(still.0, UtcMillis(month().end().0 - 1));
    assert_ne!(after, still);
    let whole: Vec<_> = book.accounts().iter().map(|(a, n)| (a.clone(), n)).collect();
    assert_eq!(after.2, whole, "the last month ends as the book does");
}

fn form(form: Form) -> (String, u64) {
    let mut out = Vec::new();
    let mut writer = FormWriter::begin(&mut out, form, Pseudonyms::new(b"s"), Some(month()), None).unwrap();
    walk(&mut |entry| writer.take(entry));
    let records = writer.finish().unwrap();
    (String::from_utf8(out).unwrap(), records)
}

#[test]
fn every_form_has_every_receipt_and_no_user() {
    let (plain, records) = form(Form::Csv);
    assert_eq!(plain.lines().count() as u64, records + 1);
    let columns = plain.lines().next().unwrap().split(',').count();
    assert!(
        plain.lines().all(|line| line.split(',').count() == columns),
        "{plain}"
    );
    for (name, which) in Form::ALL {
        let (text, found) = form(which);
        assert_eq!(found, records, "{name}");
        for n in 0..4 {
            assert!(!text.contains(&user(n).to_string()), "{name} names a user by key");
        }
        assert!(text.contains("u-"), "{name}");
    }
    let lines = |text: &str| -> Vec<serde_json::Value> {
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    };
    let rows = lines(&form(Form::Ndjson).0);
    let credits: u64 = rows.iter().map(|row| row["microcredits"].as_u64().unwrap()).sum();
    let settled = walk(&mut |_| Ok(())).settled.0;
    assert_eq!(credits, settled);
    for record in lines(&form(Form::Auditor).0) {
        for key in [
            "record_id",
            "meta",
            "components",
            "start_time",
            "stop_time",
            "runtime",
        ] {
            assert!(!record[key].is_null(), "{key}");
        }
    }
    let (apel, _) = form(Form::Apel);
    assert_eq!(apel.matches("%%\n").count() as u64, records);
    assert!(apel.starts_with("APEL-individual-job-message: v0.3\nSite: "));
    let (ogf, _) = form(Form::Ogf);
    assert_eq!(ogf.matches("<ur:UsageRecord>").count() as u64, records);
    assert!(ogf.trim_end().ends_with("</ur:UsageRecords>"));
}

/// Rules of focus-validator 1.0.0 that ask for columns by the names of drafts: FOCUS 1.0 says InvoiceIssuerName,
/// ProviderName, PublisherName, ResourceId, and ChargeCategory where the last rule's query reads ChargeType.
const DRAFT_RULES: [&str; 5] = [
    "InvoiceIssuer_Required",
    "Provider_Required",
    "Publisher_Required",
    "ResourceID_Required",
    "SkuPriceId_Nullable",
];

/// The same file with the columns that [`DRAFT_RULES`] look for, too, with the values of those that took their place.
fn with_draft_names(focus: &str) -> String {
    let names = [
        "InvoiceIssuerName",
        "ProviderName",
        "PublisherName",
        "ResourceId",
        "ChargeCategory",
    ];
    let mut lines = focus.lines();
    let header: Vec<&str> = lines.next().unwrap().split(',').collect();
    let at = names.map(|name| header.iter().position(|column| *column == name).unwrap());
    let drafts = "InvoiceIssuer,Provider,Publisher,ResourceID,ChargeType";
    let mut out = format!("{},{drafts}\n", header.join(","));
    for line in lines {
        let fields = fields(line);
        let values: Vec<&str> = at.iter().map(|at| fields[*at].as_str()).collect();
        out += &format!("{line},{}\n", values.join(","));
    }
    out
}

/// The fields of a line of CSV.
fn fields(line: &str) -> Vec<String> {
    let (mut out, mut quoted) = (vec![String::new()], false);
    for c in line.chars() {
        match c {
            '"' => quoted = !quoted,
            ',' if !quoted => out.push(String::new()),
            c => out.last_mut().unwrap().push(c),
        }
    }
    out
}

/// A Python that has the FinOps Foundation's own validator, and the folder of its packages; nothing, and the reason printed,
/// where PyPI cannot be reached.
fn validator() -> Option<(PathBuf, PathBuf)> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/focus-validator");
    let said = Command::new(script).output().unwrap();
    if !said.status.success() {
        println!("skipped: {}", String::from_utf8_lossy(&said.stderr).trim());
        return None;
    }
    let python = PathBuf::from(String::from_utf8(said.stdout).unwrap().trim());
    let code = "import focus_validator as f; from pathlib import Path; print(Path(f.__file__).parent.parent)";
    let found = Command::new(&python).args(["-c", code]).output().unwrap();
    assert!(found.status.success(), "{found:?}");
    let home = PathBuf::from(String::from_utf8(found.stdout).unwrap().trim());
    Some((python, home))
}

#[test]
fn the_focus_form_passes_the_validator() {
    let Some((python, home)) = validator() else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    // It ends well whatever it finds: only its words count.
    let failed = |text: &str| {
        let path = dir.path().join("usage.csv");
        std::fs::write(&path, text).unwrap();
        // It looks for its table of currencies from where it is run, so it is run where it is installed.
        let output = Command::new(&python)
            .args(["-c", "from focus_validator.main import main; main()"])
            .args(["--data-file".as_ref(), path.as_os_str()])
            .args(["--validate-version", "1.0"])
            .current_dir(&home)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            said.contains("Validation"),
            "{said}\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let rules = said.lines().filter_map(|line| line.strip_suffix(" failed:"));
        let rules: Vec<String> = rules.map(str::to_owned).collect();
        (rules, said)
    };
    let good = form(Form::Focus).0;
    let (rules, said) = failed(&good);
    assert!(
        rules.iter().all(|rule| DRAFT_RULES.contains(&rule.as_str())),
        "{said}"
    );
    // Under the names of the drafts they hold, too, so that no rule is left unasked.
    let both = with_draft_names(&good);
    let (rules, said) = failed(&both);
    assert_eq!(rules, Vec::<String>::new(), "{said}");
    // And it does look: credits are no currency that it knows.
    let (rules, said) = failed(&good.replace(",XXX,", ",credits,"));
    assert!(
        rules.iter().any(|rule| rule.starts_with("BillingCurrency")),
        "{said}"
    );
    println!("focus-validator ran from {}", home.display());
}
