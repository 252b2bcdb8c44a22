//! The report of a job: where each part ran and why there, what it used, what it cost, where the results lie.
use crate::{
    follow,
    out::{Column, Out, Table, clean, count, credits, plural, rate, span, wrap},
    task::utc_now,
    view,
};
use karez_proto::{control as wire, records};
use std::path::Path;

/// Parts listed one by one; of more, only the sums are told.
const PARTS_SHOWN: usize = 24;

/// The report as lines. Tables fit `width` columns when one is given.
pub(crate) fn lines(job: &wire::JobView, results: Option<(&Path, u64)>, width: Option<usize>) -> Vec<String> {
    let wide = width.unwrap_or(80);
    let mut lines = wrap(&headline(job), wide, "  ");
    lines.push(String::new());
    let mut table = Table::new(&[
        ("PART", Column::Right),
        ("ITEMS", Column::Right),
        ("NODE", Column::Cut),
        ("INSTITUTION", Column::Cut),
        ("IN", Column::Left),
        ("PRICE", Column::Right),
        ("TIME", Column::Right),
        ("CREDITS", Column::Right),
    ]);
    for part in job.parts.iter().take(PARTS_SHOWN) {
        table.row(vec![
            part.part.to_string(),
            count(part.items),
            part.node_name.clone(),
            part.institution.clone(),
            part.country.clone(),
            rate(part.rate),
            span(part.meters.map_or(0, |m| m.device_ms)),
            credits(part.credits),
        ]);
    }
    lines.extend(table.lines(width));
    if job.parts.len() > PARTS_SHOWN {
        lines.push(format!(
            "and {} more",
            plural((job.parts.len() - PARTS_SHOWN) as u64, "part")
        ));
    }
    lines.push(String::new());
    for (why, others, parts) in reasons(job) {
        lines.extend(wrap(&format!("{parts}: {why}"), wide, "  "));
        if !others.is_empty() {
            lines.extend(wrap(&format!("  elsewhere: {others}"), wide, "    "));
        }
    }
    lines.extend(wrap(&metered(job.meters.as_ref()), wide, "  "));
    lines.extend(wrap(&money(job), wide, "  "));
    let receipts: Vec<String> = job
        .parts
        .iter()
        .filter(|p| !p.receipt.is_empty())
        .take(PARTS_SHOWN)
        .map(|p| view::short(&p.receipt))
        .collect();
    if !receipts.is_empty() {
        lines.extend(wrap(&format!("receipts: {}", receipts.join(" ")), wide, "  "));
    }
    if let Some((path, written)) = results {
        lines.push(format!(
            "results: {} ({})",
            path.display(),
            plural(written, "line")
        ));
    }
    lines
}

/// Prints the report on standard output, or on standard error when results went to standard output.
pub(crate) fn print(out: &Out, job: &wire::JobView, results: Option<(&Path, u64)>) {
    let width = out.terminal.then(|| out.width());
    let to_stdout = results.is_some();
    for line in lines(job, results, width) {
        if to_stdout { out.line(line) } else { out.note(line) }
    }
}

fn headline(job: &wire::JobView) -> String {
    let time = if follow::has_ended(&job.state) {
        format!("in {}", span(job.changed_at.saturating_sub(job.submitted_at)))
    } else {
        format!("for {}", span(utc_now().0.saturating_sub(job.submitted_at)))
    };
    let label = if job.label.is_empty() {
        String::new()
    } else {
        format!(" \"{}\"", clean(&job.label))
    };
    format!(
        "job {}{label} {} {time}: {}, {}",
        view::short(&job.job),
        job.state,
        view::work_text(job),
        plural(job.items, "item")
    )
}

/// Why parts ran where they ran; parts with the same reason and the same alternatives share a line.
fn reasons(job: &wire::JobView) -> Vec<(String, String, String)> {
    let mut groups: Vec<(String, String, Vec<u32>)> = Vec::new();
    for part in job.parts.iter().take(PARTS_SHOWN).filter(|p| !p.why.is_empty()) {
        let why = format!("{} in {}: {}", part.node_name, part.country, part.why);
        let other = |a: &wire::Alternative| {
            let note = if a.note.is_empty() {
                String::new()
            } else {
                format!(" ({})", clean(&a.note))
            };
            format!(
                "{} in {} about {}{note}",
                a.node_name,
                a.country,
                credits(a.cost_estimate)
            )
        };
        let others = part.alternatives.iter().map(other).collect::<Vec<_>>().join("; ");
        match groups.iter_mut().find(|(w, o, _)| *w == why && *o == others) {
            Some((_, _, parts)) => parts.push(part.part),
            None => groups.push((why, others, vec![part.part])),
        }
    }
    let name = |parts: &[u32]| {
        let list = parts.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
        if parts.len() == 1 {
            format!("part {list}")
        } else {
            format!("parts {list}")
        }
    };
    groups
        .into_iter()
        .map(|(why, others, parts)| (why, others, name(&parts)))
        .collect()
}

fn metered(meters: Option<&records::Meters>) -> String {
    let m = meters.copied().unwrap_or_default();
    format!(
        "metered: {} tokens in, {} out, {}; {} of device time, {} of CPU time",
        count(m.tokens_in),
        count(m.tokens_out),
        plural(m.items, "item"),
        span(m.device_ms),
        span(m.cpu_ms)
    )
}

fn money(job: &wire::JobView) -> String {
    let back = job.credits_reserved.saturating_sub(job.credits_spent);
    format!(
        "credits: {} paid of {} set aside, {} returned",
        credits(job.credits_spent),
        credits(job.credits_reserved),
        credits(back)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use unicode_width::UnicodeWidthStr;

    #[test]
    fn a_report_fits_eighty_columns() {
        let alternative = wire::Alternative {
            node_name: "uni-nairobi-1".into(),
            country: "KE".into(),
            cost_estimate: 322,
            ..Default::default()
        };
        let part = |part| wire::PartView {
            part,
            items: 80,
            node_name: "unicamp-lab-with-a-long-name-1".into(),
            institution: "uni-campinas".into(),
            country: "BR".into(),
            rate: 250_000,
            credits: 222,
            why: "cheapest finished work of 3 free nodes (0.250000 credits/h, about 0.000222 credits)".into(),
            alternatives: vec![alternative.clone(), alternative.clone()],
            meters: Some(records::Meters {
                device_ms: 3_240,
                ..Default::default()
            }),
            receipt: vec![part as u8; 32],
            ..Default::default()
        };
        let job = wire::JobView {
            job: vec![7; 32],
            state: "done".into(),
            items: 160,
            parts: vec![part(0), part(1)],
            work: "embed".into(),
            model: "all-MiniLM-L6-v2".into(),
            credits_reserved: 1_000_000,
            credits_spent: 444,
            submitted_at: 1_000,
            changed_at: 13_400,
            meters: Some(records::Meters {
                tokens_in: 3_456,
                items: 160,
                device_ms: 6_480,
                ..Default::default()
            }),
            ..Default::default()
        };
        let lines = lines(&job, Some((Path::new("out.jsonl"), 160)), Some(80));
        for line in &lines {
            assert!(line.width() <= 80, "{line:?}");
        }
        insta::assert_snapshot!(lines.join("\n"), @r"
        job 070707070707 done in 12.4 s: embed with all-MiniLM-L6-v2, 160 items

        PART  ITEMS  NODE                      INSTITUTION   IN   PRICE   TIME   CREDITS
           0     80  unicamp-lab-with-a-long…  uni-campinas  BR  0.25/h  3.2 s  0.000222
           1     80  unicamp-lab-with-a-long…  uni-campinas  BR  0.25/h  3.2 s  0.000222

        parts 0, 1: unicamp-lab-with-a-long-name-1 in BR: cheapest finished work of 3
          free nodes (0.250000 credits/h, about 0.000222 credits)
          elsewhere: uni-nairobi-1 in KE about 0.000322; uni-nairobi-1 in KE about
            0.000322
        metered: 3,456 tokens in, 0 out, 160 items; 6.4 s of device time, 0 ms of CPU
          time
        credits: 0.000444 paid of 1.00 set aside, 0.999556 returned
        receipts: 000000000000 010101010101
        results: out.jsonl (160 lines)
        ");
    }
}
