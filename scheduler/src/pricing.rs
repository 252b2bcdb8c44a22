//! `[placement]` and `[fair]` of `scheduler.toml`: what the operator counts into the cost of finished work, and how
//! institutions share.
//!
//! Everything is optional: without settings nothing is known of power and carbon, and fair share has its defaults.
use crate::config::{credits, duration};
use karez_core::{
    fair::Shares,
    id::{Country, Institution},
    placement::{Energy, Grid, Policy},
    unit::{Credits, Millis, Rate},
};
use serde::Deserialize;
use std::collections::BTreeMap;

/// The most classes of devices, and of institutions, that are told apart.
const ENTRIES_MAX: usize = 1_000;
/// A kilowatt-hour that weighs more is a slip of units.
const GRAMS_MAX: u32 = 5_000;
/// A device that draws more is one too.
const WATTS_MAX: u32 = 100_000;

/// `[placement]`: the cost of finished work.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Placement {
    /// Credits for a kilogram of CO₂; zero leaves it out.
    #[serde(deserialize_with = "credits")]
    pub carbon_price: Credits,
    /// No node where a kilowatt-hour weighs more grams of CO₂ than this.
    pub carbon_max: Option<u32>,
    /// Watts of a device, by the start of its class; the longest match counts.
    pub watts: BTreeMap<String, u32>,
    /// Electricity by country.
    pub grid: BTreeMap<Country, GridEntry>,
    /// Time between two checkpoints that work is assumed to make.
    #[serde(deserialize_with = "duration")]
    pub checkpoint_interval: Millis,
    /// How long a new start elsewhere is assumed to take.
    #[serde(deserialize_with = "duration")]
    pub restart: Millis,
    /// By so many percent each recent failure of a node raises the expected cost there.
    pub failure_percent: u64,
}

/// `[placement.grid.KE]`: electricity of one country.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GridEntry {
    /// Credits for a kilowatt-hour: counted where capacity is lent for nothing.
    #[serde(deserialize_with = "credits", default)]
    pub price: Credits,
    /// Grams of CO₂ for a kilowatt-hour.
    #[serde(default)]
    pub grams: u32,
}

/// `[fair]`: how institutions share.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Fair {
    /// After so long, use and contribution count half.
    #[serde(deserialize_with = "duration")]
    pub half_life: Millis,
    /// Credits that an hour of a donated device counts as.
    #[serde(deserialize_with = "credits")]
    pub donated: Credits,
    /// The part of everything that is the same for all, in percent; the rest goes by contribution.
    pub floor_percent: u32,
    /// Extra weight of institutions, in percent of an equal share.
    pub grants: BTreeMap<Institution, u32>,
}

impl Default for Placement {
    fn default() -> Self {
        let policy = Policy::default();
        Self {
            carbon_price: policy.energy.carbon_price,
            carbon_max: policy.energy.carbon_max,
            watts: BTreeMap::new(),
            grid: BTreeMap::new(),
            checkpoint_interval: policy.checkpoint_interval,
            restart: policy.restart,
            failure_percent: policy.failure_percent,
        }
    }
}

impl Default for Fair {
    fn default() -> Self {
        let shares = Shares::default();
        Self {
            half_life: shares.half_life,
            donated: Credits(shares.donated.0),
            floor_percent: shares.floor_percent,
            grants: shares.grants_percent,
        }
    }
}

impl Placement {
    /// The first value that makes no sense: its key, and why.
    pub(crate) fn check(&self) -> Result<(), (&'static str, String)> {
        if self.watts.len() > ENTRIES_MAX {
            let many = self.watts.len();
            return Err((
                "placement.watts",
                format!("has {many} entries, the limit is {ENTRIES_MAX}"),
            ));
        }
        if let Some((class, watts)) = self.watts.iter().find(|(_, w)| **w > WATTS_MAX) {
            return Err((
                "placement.watts",
                format!("gives {class} {watts} watts, the limit is {WATTS_MAX}"),
            ));
        }
        let heavy = |grid: &GridEntry| grid.grams > GRAMS_MAX || grid.price > Credits(1_000 * Credits::ONE.0);
        if let Some((country, _)) = self.grid.iter().find(|(_, grid)| heavy(grid)) {
            return Err((
                "placement.grid",
                format!(
                    "of {country} is over {GRAMS_MAX} grams or 1000 credits for a kilowatt-hour: check the units"
                ),
            ));
        }
        if self.carbon_max.is_some() && self.grid.is_empty() {
            return Err((
                "placement.carbon_max",
                "excludes nothing while no country's grams are known: add [placement.grid.KE] and others"
                    .into(),
            ));
        }
        if self.failure_percent > 1_000 {
            return Err(("placement.failure_percent", "is over 1000".into()));
        }
        Ok(())
    }

    /// What placement is told.
    pub fn policy(&self) -> Policy {
        let grid = |entry: &GridEntry| Grid {
            price: entry.price,
            grams: entry.grams,
        };
        Policy {
            energy: Energy {
                watts: self.watts.clone(),
                grids: self
                    .grid
                    .iter()
                    .map(|(country, entry)| (*country, grid(entry)))
                    .collect(),
                carbon_price: self.carbon_price,
                carbon_max: self.carbon_max,
            },
            checkpoint_interval: self.checkpoint_interval,
            restart: self.restart,
            failure_percent: self.failure_percent,
            ..Policy::default()
        }
    }
}

impl Fair {
    /// The first value that makes no sense: its key, and why.
    pub(crate) fn check(&self) -> Result<(), (&'static str, String)> {
        const DAY: u64 = 24 * 3_600_000;
        if !(3_600_000..=366 * DAY).contains(&self.half_life.0) {
            return Err(("fair.half_life", "must be from an hour to a year, like 7d".into()));
        }
        if self.floor_percent > 100 {
            return Err((
                "fair.floor_percent",
                format!("is {}: 0 to 100 is allowed", self.floor_percent),
            ));
        }
        if self.grants.len() > ENTRIES_MAX || self.grants.values().any(|percent| *percent > 10_000) {
            return Err((
                "fair.grants",
                format!("may name {ENTRIES_MAX} institutions, each with at most 10000 percent"),
            ));
        }
        Ok(())
    }

    /// What fair share is told.
    pub fn shares(&self) -> Shares {
        Shares {
            half_life: self.half_life,
            donated: Rate(self.donated.0),
            floor_percent: self.floor_percent,
            grants_percent: self.grants.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_reach_placement_and_nonsense_is_refused() {
        let text = r#"
            carbon_price = "0.05"
            carbon_max = 600
            checkpoint_interval = "5m"
            watts = { cuda = 400, "cuda/NVIDIA T4" = 70 }
            [grid.KE]
            price = "0.2"
            grams = 100
        "#;
        let placement: Placement = toml::from_str(text).unwrap();
        placement.check().unwrap();
        let policy = placement.policy();
        assert_eq!(policy.energy.carbon_price, Credits(50_000));
        assert_eq!(
            policy.energy.grids[&"KE".parse().unwrap()].price,
            Credits(200_000)
        );
        assert_eq!(policy.checkpoint_interval, Millis(300_000));
        assert!(policy.energy.allows(&"KE".parse().unwrap()));
        for (text, key) in [
            ("carbon_max = 600", "placement.carbon_max"),
            ("[watts]\ncuda = 400000", "placement.watts"),
            ("[grid.KE]\ngrams = 600000", "placement.grid"),
            ("failure_percent = 5000", "placement.failure_percent"),
        ] {
            let placement: Placement = toml::from_str(text).unwrap();
            assert_eq!(placement.check().unwrap_err().0, key);
        }
        let fair: Fair = toml::from_str("half_life = \"14d\"\n[grants]\nuni-nairobi = 50").unwrap();
        fair.check().unwrap();
        assert_eq!(fair.shares().grants_percent[&"uni-nairobi".parse().unwrap()], 50);
        for (text, key) in [
            ("half_life = \"1s\"", "fair.half_life"),
            ("floor_percent = 101", "fair.floor_percent"),
            ("[grants]\nuni-a = 10001", "fair.grants"),
        ] {
            let fair: Fair = toml::from_str(text).unwrap();
            assert_eq!(fair.check().unwrap_err().0, key);
        }
        assert!(toml::from_str::<Fair>("halflife = \"1d\"").is_err());
    }
}
