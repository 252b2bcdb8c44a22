//! Plots over virtual time, as SVG that takes its colours from the page.
use std::fmt::Write;

/// Width and height of a plot in its own units; the page scales it.
const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 240.0;
const LEFT: f64 = 52.0;
const RIGHT: f64 = 10.0;
const TOP: f64 = 22.0;
const BOTTOM: f64 = 26.0;
/// The most points drawn for one series: more would not be seen.
const POINTS_MAX: usize = 720;

/// A line or an area.
pub(super) struct Series {
    pub(super) name: String,
    /// One for each moment.
    pub(super) values: Vec<f64>,
    /// Index into the page's colours.
    pub(super) colour: usize,
    pub(super) dashed: bool,
}

/// What a plot shows.
pub(super) struct Plot<'a> {
    /// For those who cannot see it.
    pub(super) label: &'a str,
    /// Hours, rising.
    pub(super) hours: &'a [f64],
    /// Areas, on top of each other.
    pub(super) stacked: Vec<Series>,
    /// Lines over them.
    pub(super) lines: Vec<Series>,
    /// From, until, in hours, and what.
    pub(super) marks: Vec<(f64, f64, String)>,
    /// The storm's end, in hours.
    pub(super) storm: f64,
}

impl Plot<'_> {
    /// The `<figure>` with plot and legend.
    pub(super) fn draw(&self) -> String {
        let mut out = String::new();
        let end = self.hours.last().copied().unwrap_or(1.0).max(1e-9);
        let high = self.high();
        let x = |hour: f64| LEFT + (WIDTH - LEFT - RIGHT) * (hour / end).clamp(0.0, 1.0);
        let y = |value: f64| HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value / high).clamp(0.0, 1.0);
        let _ = write!(
            out,
            "<figure><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">",
            escape(self.label)
        );
        for (from, until, what) in &self.marks {
            let (a, b) = (x(*from), x(until.min(end)));
            let _ = write!(
                out,
                "<rect class=\"mark\" x=\"{a:.1}\" y=\"{TOP}\" width=\"{:.1}\" height=\"{:.1}\"/>",
                (b - a).max(1.5),
                HEIGHT - TOP - BOTTOM
            );
            // A label near the right edge grows to the left.
            let (at, anchor) = if a > WIDTH * 0.7 { (b, "end") } else { (a, "start") };
            let _ = write!(
                out,
                "<text class=\"note\" x=\"{at:.1}\" y=\"{}\" text-anchor=\"{anchor}\">{}</text>",
                TOP - 7.0,
                escape(what)
            );
        }
        self.axes(&mut out, end, high, &x, &y);
        let step = self.hours.len().div_ceil(POINTS_MAX).max(1);
        let shown: Vec<usize> = (0..self.hours.len()).step_by(step).collect();
        let mut below = vec![0.0; self.hours.len()];
        for series in &self.stacked {
            let mut path = String::new();
            for (k, i) in shown.iter().enumerate() {
                let top = below[*i] + series.values[*i];
                let verb = if k == 0 { 'M' } else { 'L' };
                let _ = write!(path, "{verb}{:.1} {:.1}", x(self.hours[*i]), y(top));
            }
            for i in shown.iter().rev() {
                let _ = write!(path, "L{:.1} {:.1}", x(self.hours[*i]), y(below[*i]));
            }
            for (i, value) in series.values.iter().enumerate() {
                below[i] += value;
            }
            let _ = write!(out, "<path class=\"area c{}\" d=\"{path}Z\"/>", series.colour % 8);
        }
        for series in &self.lines {
            let mut path = String::new();
            for (k, i) in shown.iter().enumerate() {
                let verb = if k == 0 { 'M' } else { 'L' };
                let _ = write!(path, "{verb}{:.1} {:.1}", x(self.hours[*i]), y(series.values[*i]));
            }
            let dashed = if series.dashed { " dashed" } else { "" };
            let _ = write!(
                out,
                "<path class=\"line c{}{dashed}\" d=\"{path}\"/>",
                series.colour % 8
            );
        }
        let calm = self.storm < end * 0.995;
        if calm {
            let at = x(self.storm);
            let _ = write!(
                out,
                "<line class=\"storm\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{}\"/>",
                HEIGHT - BOTTOM
            );
        }
        out.push_str("</svg><figcaption>");
        for series in self.stacked.iter().chain(&self.lines) {
            let dashed = if series.dashed { " dashed" } else { "" };
            let _ = write!(
                out,
                "<span class=\"key c{}{dashed}\">{}</span> ",
                series.colour % 8,
                escape(&series.name)
            );
        }
        if calm {
            out.push_str("<span>dotted line: no new jobs from here on</span>");
        }
        out.push_str("</figcaption></figure>");
        out
    }

    fn high(&self) -> f64 {
        let sums = (0..self.hours.len()).map(|i| self.stacked.iter().map(|s| s.values[i]).sum::<f64>());
        let lines = self.lines.iter().flat_map(|s| s.values.iter().copied());
        nice(sums.chain(lines).fold(0.0, f64::max))
    }

    fn axes(&self, out: &mut String, end: f64, high: f64, x: &dyn Fn(f64) -> f64, y: &dyn Fn(f64) -> f64) {
        for quarter in 0..=4 {
            let value = high * f64::from(quarter) / 4.0;
            let at = y(value);
            let _ = write!(
                out,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
                 <text class=\"tick\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                WIDTH - RIGHT,
                LEFT - 6.0,
                at + 4.0,
                short(value)
            );
        }
        let steps = [0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 6.0, 12.0, 24.0, 48.0, 168.0];
        let step = steps.iter().find(|s| end / **s <= 8.0).copied().unwrap_or(336.0);
        let mut hour = 0.0;
        while hour <= end {
            let text = if step >= 24.0 {
                format!("day {}", (hour / 24.0) as u64 + 1)
            } else {
                format!("{} h", short(hour))
            };
            let at = x(hour);
            let anchor = if at > WIDTH - 30.0 { "end" } else { "middle" };
            let _ = write!(
                out,
                "<text class=\"tick\" x=\"{at:.1}\" y=\"{}\" text-anchor=\"{anchor}\">{text}</text>",
                HEIGHT - 8.0
            );
            hour += step;
        }
    }
}

/// The next round number upwards, so that a quarter of it is round too.
fn nice(value: f64) -> f64 {
    if value <= 0.0 {
        return 4.0;
    }
    let power = 10f64.powf(value.log10().floor());
    let steps = [1.0, 1.2, 1.6, 2.0, 2.4, 3.2, 4.0, 5.0, 6.0, 8.0, 10.0];
    let best = steps
        .iter()
        .map(|s| s * power)
        .find(|high| *high >= value * 0.999);
    best.unwrap_or(power * 10.0).max(4.0)
}

/// A number fit for a tick: `1.2k`, `3M`.
pub(super) fn short(value: f64) -> String {
    let (scaled, suffix) = match value.abs() {
        v if v >= 1e6 => (value / 1e6, "M"),
        v if v >= 1e4 => (value / 1e3, "k"),
        _ => (value, ""),
    };
    let text = format!("{scaled:.2}");
    format!("{}{suffix}", text.trim_end_matches('0').trim_end_matches('.'))
}

/// Text fit for HTML.
pub(super) fn escape(text: &str) -> String {
    text.chars()
        .fold(String::with_capacity(text.len()), |mut out, c| {
            match c {
                '&' => out.push_str("&amp;"),
                '<' => out.push_str("&lt;"),
                '>' => out.push_str("&gt;"),
                '"' => out.push_str("&quot;"),
                c => out.push(c),
            }
            out
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_end_at_round_numbers() {
        for (value, high) in [
            (0.0, 4.0),
            (3.0, 4.0),
            (97.0, 100.0),
            (101.0, 120.0),
            (1_530.0, 1_600.0),
        ] {
            assert_eq!(nice(value), high, "{value}");
        }
        assert_eq!(short(12_500.0), "12.5k");
        assert_eq!(short(2.0), "2");
    }

    #[test]
    fn foreign_text_cannot_become_markup() {
        let plot = Plot {
            label: "<b>",
            hours: &[0.0, 1.0],
            stacked: Vec::new(),
            lines: vec![Series {
                name: "</svg><script>".into(),
                values: vec![1.0, 2.0],
                colour: 0,
                dashed: false,
            }],
            marks: vec![(0.0, 1.0, "\"&".into())],
            storm: 1.0,
        };
        let drawn = plot.draw();
        assert!(!drawn.contains("<script") && !drawn.contains("<b>"), "{drawn}");
        assert!(drawn.contains("&quot;&amp;"));
    }
}
