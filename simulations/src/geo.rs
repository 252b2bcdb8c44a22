//! Countries of a world: where they lie, what time it is there, and how long a message takes between them.
//!
//! The table is coarse on purpose: one point and one offset per country, no summer time. Latencies come from
//! measurements where a data folder has them ([`Links::measured`]); otherwise from distance, by a line fitted to
//! public RIPE Atlas means between 925 pairs of these countries: 48 ms + 0.015 ms/km round trip, 12 ms inside a
//! country. Half of the measured pairs lie within 20 % of it, nine tenths within 57 %.
use crate::traces::latency::RoundTrip;
use karez_core::id::Country;
use std::collections::BTreeMap;

/// A country as a world knows it.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// ISO 3166 alpha-2.
    pub code: &'static str,
    /// ISO 3166 alpha-3, as price and carbon tables have it.
    pub iso3: &'static str,
    /// In English.
    pub name: &'static str,
    /// Degrees north, degrees east: where most of its machines may stand.
    pub at: (f64, f64),
    /// Minutes ahead of UTC.
    pub utc_minutes: i32,
}

/// Every country a scenario can name.
#[rustfmt::skip]
pub const PLACES: &[Place] = &[
    Place { code: "AR", iso3: "ARG", name: "Argentina", at: (-34.0, -60.0), utc_minutes: -180 },
    Place { code: "AU", iso3: "AUS", name: "Australia", at: (-34.0, 146.0), utc_minutes: 600 },
    Place { code: "BD", iso3: "BGD", name: "Bangladesh", at: (23.8, 90.3), utc_minutes: 360 },
    Place { code: "BR", iso3: "BRA", name: "Brazil", at: (-15.8, -47.9), utc_minutes: -180 },
    Place { code: "CA", iso3: "CAN", name: "Canada", at: (45.5, -76.0), utc_minutes: -300 },
    Place { code: "CH", iso3: "CHE", name: "Switzerland", at: (46.8, 8.2), utc_minutes: 60 },
    Place { code: "CL", iso3: "CHL", name: "Chile", at: (-33.4, -70.7), utc_minutes: -240 },
    Place { code: "CN", iso3: "CHN", name: "China", at: (33.0, 114.0), utc_minutes: 480 },
    Place { code: "CO", iso3: "COL", name: "Colombia", at: (4.6, -74.1), utc_minutes: -300 },
    Place { code: "DE", iso3: "DEU", name: "Germany", at: (51.0, 10.0), utc_minutes: 60 },
    Place { code: "EG", iso3: "EGY", name: "Egypt", at: (29.5, 31.0), utc_minutes: 120 },
    Place { code: "ES", iso3: "ESP", name: "Spain", at: (40.2, -3.6), utc_minutes: 60 },
    Place { code: "ET", iso3: "ETH", name: "Ethiopia", at: (9.0, 38.7), utc_minutes: 180 },
    Place { code: "FI", iso3: "FIN", name: "Finland", at: (61.5, 25.5), utc_minutes: 120 },
    Place { code: "FR", iso3: "FRA", name: "France", at: (47.0, 2.5), utc_minutes: 60 },
    Place { code: "GB", iso3: "GBR", name: "United Kingdom", at: (52.5, -1.5), utc_minutes: 0 },
    Place { code: "GH", iso3: "GHA", name: "Ghana", at: (7.9, -1.2), utc_minutes: 0 },
    Place { code: "ID", iso3: "IDN", name: "Indonesia", at: (-6.5, 108.0), utc_minutes: 420 },
    Place { code: "IN", iso3: "IND", name: "India", at: (19.5, 77.0), utc_minutes: 330 },
    Place { code: "IT", iso3: "ITA", name: "Italy", at: (42.8, 12.1), utc_minutes: 60 },
    Place { code: "JP", iso3: "JPN", name: "Japan", at: (35.6, 138.5), utc_minutes: 540 },
    Place { code: "KE", iso3: "KEN", name: "Kenya", at: (0.5, 37.9), utc_minutes: 180 },
    Place { code: "KR", iso3: "KOR", name: "South Korea", at: (37.0, 127.5), utc_minutes: 540 },
    Place { code: "KZ", iso3: "KAZ", name: "Kazakhstan", at: (47.0, 72.0), utc_minutes: 300 },
    Place { code: "LK", iso3: "LKA", name: "Sri Lanka", at: (7.0, 80.0), utc_minutes: 330 },
    Place { code: "MA", iso3: "MAR", name: "Morocco", at: (33.0, -6.9), utc_minutes: 60 },
    Place { code: "MX", iso3: "MEX", name: "Mexico", at: (20.5, -100.5), utc_minutes: -360 },
    Place { code: "MY", iso3: "MYS", name: "Malaysia", at: (3.3, 101.8), utc_minutes: 480 },
    Place { code: "NG", iso3: "NGA", name: "Nigeria", at: (7.5, 5.0), utc_minutes: 60 },
    Place { code: "NL", iso3: "NLD", name: "Netherlands", at: (52.2, 5.3), utc_minutes: 60 },
    Place { code: "NP", iso3: "NPL", name: "Nepal", at: (28.2, 84.0), utc_minutes: 345 },
    Place { code: "NZ", iso3: "NZL", name: "New Zealand", at: (-39.0, 175.5), utc_minutes: 720 },
    Place { code: "PE", iso3: "PER", name: "Peru", at: (-11.5, -76.5), utc_minutes: -300 },
    Place { code: "PH", iso3: "PHL", name: "Philippines", at: (14.0, 121.3), utc_minutes: 480 },
    Place { code: "PK", iso3: "PAK", name: "Pakistan", at: (30.5, 70.5), utc_minutes: 300 },
    Place { code: "PL", iso3: "POL", name: "Poland", at: (52.1, 19.4), utc_minutes: 60 },
    Place { code: "RW", iso3: "RWA", name: "Rwanda", at: (-1.9, 30.0), utc_minutes: 120 },
    Place { code: "SE", iso3: "SWE", name: "Sweden", at: (59.5, 16.0), utc_minutes: 60 },
    Place { code: "SG", iso3: "SGP", name: "Singapore", at: (1.35, 103.8), utc_minutes: 480 },
    Place { code: "SN", iso3: "SEN", name: "Senegal", at: (14.7, -17.2), utc_minutes: 0 },
    Place { code: "TH", iso3: "THA", name: "Thailand", at: (14.5, 100.8), utc_minutes: 420 },
    Place { code: "TR", iso3: "TUR", name: "Turkey", at: (39.2, 34.0), utc_minutes: 180 },
    Place { code: "TZ", iso3: "TZA", name: "Tanzania", at: (-6.5, 36.5), utc_minutes: 180 },
    Place { code: "UA", iso3: "UKR", name: "Ukraine", at: (49.5, 31.3), utc_minutes: 120 },
    Place { code: "UG", iso3: "UGA", name: "Uganda", at: (0.4, 32.5), utc_minutes: 180 },
    Place { code: "US", iso3: "USA", name: "United States", at: (39.0, -95.0), utc_minutes: -360 },
    Place { code: "UZ", iso3: "UZB", name: "Uzbekistan", at: (41.0, 67.0), utc_minutes: 300 },
    Place { code: "VN", iso3: "VNM", name: "Vietnam", at: (16.0, 107.5), utc_minutes: 420 },
    Place { code: "ZA", iso3: "ZAF", name: "South Africa", at: (-28.0, 27.0), utc_minutes: 120 },
];

/// Round trip inside a country, in milliseconds.
const DOMESTIC_MS: f64 = 12.0;
/// Round trip between countries: what routing, queues and last miles cost, and what distance costs.
const BETWEEN_MS: f64 = 48.0;
const PER_KM_MS: f64 = 0.015;
/// Light in fibre needs that long there and back: a mean under it was measured to a machine that stands elsewhere.
const LIGHT_PER_KM_MS: f64 = 0.01;
/// Deviation of a round trip, as a share of its mean, where none was measured.
const JITTER_SHARE: f64 = 0.1;

/// The country with that code.
pub fn place(code: &str) -> Option<&'static Place> {
    PLACES.iter().find(|p| p.code == code)
}

/// Great-circle distance in kilometres.
pub fn distance_km(a: &Place, b: &Place) -> f64 {
    let (lat_a, lon_a) = (a.at.0.to_radians(), a.at.1.to_radians());
    let (lat_b, lon_b) = (b.at.0.to_radians(), b.at.1.to_radians());
    let half = |x: f64| (x / 2.0).sin().powi(2);
    let h = half(lat_a - lat_b) + lat_a.cos() * lat_b.cos() * half(lon_a - lon_b);
    12_742.0 * h.sqrt().min(1.0).asin()
}

/// How long one message takes: at least `base`, and up to `spread` more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delay {
    /// Milliseconds.
    pub base: u64,
    /// Milliseconds.
    pub spread: u64,
}

/// Latencies between countries.
#[derive(Debug, Clone, Default)]
pub struct Links {
    measured: BTreeMap<(String, String), RoundTrip>,
}

impl Links {
    /// From measurements; pairs that are not among them come from distance.
    pub fn measured(trips: Vec<RoundTrip>) -> Self {
        let measured = trips
            .into_iter()
            .map(|trip| (pair(&trip.from, &trip.to), trip))
            .collect();
        Self { measured }
    }

    /// How many pairs were measured.
    pub fn pairs(&self) -> usize {
        self.measured.len()
    }

    /// One way from `a` to `b`.
    pub fn delay(&self, a: &Country, b: &Country) -> Delay {
        let (a, b) = (a.to_string(), b.to_string());
        let trip = self.measured.get(&pair(&a, &b));
        let km = match (place(&a), place(&b)) {
            (Some(a), Some(b)) => distance_km(a, b),
            _ => 5_000.0,
        };
        let modelled = if a == b {
            DOMESTIC_MS
        } else {
            BETWEEN_MS + PER_KM_MS * km
        };
        let mean = trip.map_or(modelled, |t| t.mean_ms.max(km * LIGHT_PER_KM_MS));
        // Some deviations hold outages of minutes: those are faults, not jitter.
        let jitter = trip
            .and_then(|t| t.deviation_ms)
            .unwrap_or(mean * JITTER_SHARE)
            .min(mean);
        Delay {
            base: ((mean / 2.0).round() as u64).max(1),
            spread: (jitter / 2.0).round() as u64,
        }
    }
}

fn pair(a: &str, b: &str) -> (String, String) {
    let (low, high) = if a <= b { (a, b) } else { (b, a) };
    (low.to_owned(), high.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(text: &str) -> Country {
        text.parse().unwrap()
    }

    #[test]
    fn countries_are_known_once_and_lie_where_they_lie() {
        for (i, p) in PLACES.iter().enumerate() {
            assert!(PLACES[..i].iter().all(|other| other.code != p.code), "{}", p.code);
            assert!(
                p.code.parse::<Country>().is_ok() && p.iso3.len() == 3,
                "{}",
                p.code
            );
            assert!(
                p.utc_minutes % 15 == 0 && p.utc_minutes.abs() <= 14 * 60,
                "{}",
                p.code
            );
        }
        let km = |a, b| distance_km(place(a).unwrap(), place(b).unwrap());
        assert!(
            (9_000.0..10_500.0).contains(&km("FR", "JP")),
            "{}",
            km("FR", "JP")
        );
        assert!((500.0..900.0).contains(&km("KE", "UG")), "{}", km("KE", "UG"));
        assert_eq!(km("BR", "BR"), 0.0);
    }

    #[test]
    fn latency_comes_from_measurements_never_faster_than_light() {
        let trip = |from: &str, to: &str, mean_ms, deviation_ms| RoundTrip {
            from: from.into(),
            to: to.into(),
            mean_ms,
            deviation_ms,
        };
        let links = Links::measured(vec![
            trip("BR", "KE", 300.0, Some(4.0)),
            trip("FR", "JP", 2.0, None),
            trip("KE", "UG", 30.0, Some(9_000.0)),
        ]);
        let delay = |a: &str, b: &str| links.delay(&code(a), &code(b));
        assert_eq!(delay("KE", "BR"), Delay { base: 150, spread: 2 });
        assert_eq!(delay("BR", "KE"), delay("KE", "BR"));
        assert!(delay("JP", "FR").base > 45, "{:?}", delay("JP", "FR"));
        assert_eq!(delay("KE", "UG").spread, 15, "an outage is no jitter");
        assert_eq!(delay("KE", "KE").base, 6);
        assert!(delay("CL", "CN").base > 140);
    }
}
