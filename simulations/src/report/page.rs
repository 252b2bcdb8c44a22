//! The page: a verdict first, then figures, plots, rules and lenders.
use super::{
    Report,
    plot::{Plot, Series, escape, short},
};
use std::fmt::Write;

/// The most countries drawn by themselves; the rest are drawn together.
const REGIONS_MAX: usize = 7;

/// One self-contained page about a run.
pub fn html(report: &Report) -> String {
    let mut out = String::with_capacity(64 << 10);
    let _ = write!(
        out,
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>{} · Karez simulation</title><style>{STYLE}</style></head><body><main>",
        escape(&report.scenario)
    );
    let _ = write!(
        out,
        "<header><p class=\"kicker\">Karez simulation</p><h1>{}</h1><p class=\"about\">{}</p></header>",
        escape(&report.scenario),
        escape(&report.about)
    );
    verdict(&mut out, report);
    figures(&mut out, report);
    plots(&mut out, report);
    rules(&mut out, report);
    lenders(&mut out, report);
    footer(&mut out, report);
    out.push_str("</main></body></html>\n");
    out
}

fn verdict(out: &mut String, report: &Report) {
    let f = &report.figures;
    match &report.broken {
        None => {
            let judged: u64 = report.rules.iter().map(|r| r.judged).sum();
            let _ = write!(
                out,
                "<p class=\"verdict kept\"><strong>Every rule held.</strong> {} judgements by checkers apart \
                 from the code under test; {} of {} jobs done, {} failed, {} called off.</p>",
                grouped(judged),
                grouped(f.done),
                grouped(f.jobs),
                grouped(f.failed),
                grouped(f.cancelled)
            );
        }
        Some(rule) => {
            let _ = write!(
                out,
                "<p class=\"verdict broken\"><strong>A rule broke.</strong> {}. The same seed, {}, shows it again.</p>",
                escape(rule),
                report.seed
            );
        }
    }
}

fn figures(out: &mut String, report: &Report) {
    let f = &report.figures;
    let share = 100.0 * f.device_hours_used / f.device_hours_lent.max(1e-9);
    let useful = 100.0 * f.device_hours_billed / f.device_hours_used.max(1e-9);
    let reclaims = if f.reclaims == 0 {
        "no owner came back".to_owned()
    } else {
        format!(
            "guests gone after {} at most, {} allowed",
            span(f.leaving_s_max),
            span(f.leaving_s_allowed)
        )
    };
    let tiles = [
        (
            "Jobs done",
            grouped(f.done),
            format!("{} leases, {} settled", grouped(f.leases), grouped(f.settled)),
        ),
        (
            "Wait",
            span(f.wait_s[0]),
            format!("median; 95 % under {}", span(f.wait_s[1])),
        ),
        (
            "Turnaround",
            span(f.turnaround_s[0]),
            format!("median; 95 % under {}", span(f.turnaround_s[1])),
        ),
        (
            "Lent capacity used",
            format!("{share:.0} %"),
            format!(
                "{} of {} device hours",
                short(f.device_hours_used.round()),
                short(f.device_hours_lent.round())
            ),
        ),
        (
            "Work that counted",
            format!("{useful:.1} %"),
            "the rest was lost to owners, faults or failures".to_owned(),
        ),
        ("Reclaims", grouped(f.reclaims), reclaims),
        (
            "Credits billed",
            short((f.credits * 100.0).round() / 100.0),
            format!(
                "{:.3} per device hour",
                f.credits / f.device_hours_billed.max(1e-9)
            ),
        ),
        (
            "Faults survived",
            grouped(f.crashes + f.breaks),
            format!(
                "{} crashes, {} broken sessions",
                grouped(f.crashes),
                grouped(f.breaks)
            ),
        ),
    ];
    out.push_str("<section class=\"tiles\">");
    for (name, value, note) in tiles {
        let _ = write!(
            out,
            "<div><h3>{name}</h3><p class=\"value\">{value}</p><p class=\"note\">{}</p></div>",
            escape(&note)
        );
    }
    out.push_str("</section>");
}

fn plots(out: &mut String, report: &Report) {
    if report.samples.len() < 2 {
        return;
    }
    let hours: Vec<f64> = report
        .samples
        .iter()
        .map(|s| s.at_ms as f64 / 3_600_000.0)
        .collect();
    let marks: Vec<(f64, f64, String)> = report
        .marks
        .iter()
        .map(|m| {
            let hour = |ms: u64| ms as f64 / 3_600_000.0;
            (hour(m.from_ms), hour(m.until_ms), m.what.clone())
        })
        .collect();
    let plot = |label, stacked, lines| Plot {
        label,
        hours: &hours,
        stacked,
        lines,
        marks: marks.clone(),
        storm: report.hours,
    };
    let line = |name: &str, colour, dashed, value: &dyn Fn(&crate::record::Sample) -> f64| Series {
        name: name.to_owned(),
        values: report.samples.iter().map(value).collect(),
        colour,
        dashed,
    };
    // The largest countries by themselves, the rest together.
    let mut order: Vec<usize> = (0..report.regions.len()).collect();
    order.sort_by_key(|r| std::cmp::Reverse(report.regions[*r].devices));
    let (shown, rest) = order.split_at(order.len().min(REGIONS_MAX));
    let mut busy: Vec<Series> = shown
        .iter()
        .enumerate()
        .map(|(colour, r)| line(&report.regions[*r].name, colour, false, &|s| s.busy[*r] as f64))
        .collect();
    if !rest.is_empty() {
        let name = format!("{} others", rest.len());
        busy.push(line(&name, 7, false, &|s| {
            rest.iter().map(|r| s.busy[*r]).sum::<u64>() as f64
        }));
    }
    let total: u64 = report.regions.iter().map(|r| r.devices).sum();
    let lent = line("lent by their owners", 7, true, &|s| {
        s.lent.iter().sum::<u64>() as f64
    });
    let _ = write!(
        out,
        "<section><h2>Where the work ran</h2><p>Devices at work for others, by country, of {} in all; dashed: those \
         that their owners lend at that moment. Hours are UTC, from a Monday at midnight.</p>",
        grouped(total)
    );
    out.push_str(&plot("Devices at work by country over time", busy, vec![lent]).draw());
    out.push_str("</section><section><h2>Who waited</h2><p>Parts of jobs waiting for a node, and jobs accepted but not ended.</p>");
    let queued = line("parts waiting", 1, false, &|s| s.queued as f64);
    let open = line("jobs open", 0, false, &|s| s.open as f64);
    out.push_str(
        &plot(
            "Waiting parts and open jobs over time",
            Vec::new(),
            vec![open, queued],
        )
        .draw(),
    );
    out.push_str("</section>");
    if !report.competing.is_empty() {
        let prices = report
            .competing
            .iter()
            .enumerate()
            .map(|(i, name)| {
                line(name, i, i >= 8, &|s| {
                    s.prices.get(i).copied().unwrap_or_default() as f64
                })
            })
            .collect();
        out.push_str("<section><h2>What owners asked</h2><p>Prices of those who compete, in percent of where each began.</p>");
        out.push_str(&plot("Prices over time", Vec::new(), prices).draw());
        out.push_str("</section>");
    }
}

fn rules(out: &mut String, report: &Report) {
    out.push_str("<section><h2>What was judged</h2><p>Checkers apart from the code under test read disks, wires and machines. A rule that was never tried says so.</p><table><thead><tr><th>Rule</th><th>Judged</th></tr></thead><tbody>");
    for rule in &report.rules {
        let judged = match rule.judged {
            0 => "never tried".to_owned(),
            times => format!("{} times", grouped(times)),
        };
        let _ = write!(out, "<tr><td>{}</td><td>{judged}</td></tr>", escape(rule.rule));
    }
    out.push_str("</tbody></table></section>");
}

fn lenders(out: &mut String, report: &Report) {
    if report.lenders.is_empty() {
        return;
    }
    let most = report.lenders.iter().map(|l| l.micro_credits).max().unwrap_or(0);
    out.push_str("<section><h2>What institutions earned</h2><table><thead><tr><th>Institution</th><th>Credits</th><th class=\"bar\"></th></tr></thead><tbody>");
    let mut lenders = report.lenders.clone();
    lenders.sort_by(|a, b| {
        b.micro_credits
            .cmp(&a.micro_credits)
            .then(a.institution.cmp(&b.institution))
    });
    for lender in lenders.iter().take(40) {
        let width = 100.0 * lender.micro_credits as f64 / most.max(1) as f64;
        let _ = write!(
            out,
            "<tr><td>{}</td><td>{:.2}</td><td class=\"bar\"><span style=\"width:{width:.1}%\"></span></td></tr>",
            escape(&lender.institution),
            lender.micro_credits as f64 / 1e6
        );
    }
    out.push_str("</tbody></table></section>");
}

fn footer(out: &mut String, report: &Report) {
    let r = &report.run;
    let _ = write!(
        out,
        "<footer><p>{} nodes with {} devices, {} researchers, schedulers: {}. {:.1} virtual hours, then calm: the last \
         job ended {} later. Latencies: {}. Seed {}: equal seeds give equal worlds.</p><p>The minds are the real ones, \
         with real signatures; clocks, disks, links and workers are simulated. {} events in {:.1} s ({} per second), \
         {} messages, {} at most in memory.</p></footer>",
        grouped(report.nodes),
        grouped(report.devices),
        grouped(report.users),
        escape(&report.schedulers.join(", ")),
        report.hours,
        span(report.figures.calm_hours * 3_600.0),
        escape(&report.links),
        report.seed,
        grouped(r.events),
        r.seconds,
        short(r.events_per_second.round()),
        grouped(r.messages),
        bytes(r.memory_peak_bytes)
    );
}

fn bytes(bytes: u64) -> String {
    match bytes {
        0 => "an unknown amount".into(),
        b if b >= 1 << 30 => format!("{:.1} GiB", b as f64 / f64::from(1 << 30)),
        b => format!("{} MiB", b >> 20),
    }
}

/// 1234567 as `1 234 567`, with narrow spaces.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push('\u{202f}');
        }
        out.push(digit);
    }
    out
}

/// A span for people.
fn span(seconds: f64) -> String {
    match seconds {
        s if s < 1.0 => format!("{:.0} ms", s * 1_000.0),
        s if s < 120.0 => format!("{s:.1} s"),
        s if s < 7_200.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3_600.0),
    }
}

const STYLE: &str = include_str!("style.css");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_spans_read_well() {
        assert_eq!(grouped(1_234_567), "1\u{202f}234\u{202f}567");
        assert_eq!(grouped(999), "999");
        for (seconds, text) in [
            (0.25, "250 ms"),
            (61.0, "61.0 s"),
            (600.0, "10 min"),
            (9_000.0, "2.5 h"),
        ] {
            assert_eq!(span(seconds), text);
        }
    }
}
