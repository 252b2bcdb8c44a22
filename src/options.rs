//! Options that every kind of job shares, and the limits they become.
use clap::Args;
use karez_core::{
    id::{Country, Institution},
    records::Constraints,
    unit::{Bytes, Credits, Rate},
};
use karez_node::human::Size;
use std::path::PathBuf;

/// What is set aside for a job unless `--max-cost` says otherwise.
pub(crate) const MAX_COST: Credits = Credits::ONE;

/// Where a job may run, what it may cost, and how to wait for it.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Where and at what price")]
pub(crate) struct JobOptions {
    /// Only nodes in these countries (ISO 3166-1: KE,BR)
    #[arg(long, value_name = "CODES", value_delimiter = ',')]
    pub(crate) country: Vec<Country>,
    /// No node in these countries
    #[arg(long, value_name = "CODES", value_delimiter = ',')]
    pub(crate) exclude_country: Vec<Country>,
    /// Only nodes of these institutions
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub(crate) institution: Vec<Institution>,
    /// No node of these institutions
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub(crate) exclude_institution: Vec<Institution>,
    /// The highest price to accept, in credits per device-hour
    #[arg(long, value_name = "CREDITS", value_parser = rate)]
    pub(crate) max_rate: Option<Rate>,
    /// Only capacity that is lent at price zero
    #[arg(long, conflicts_with = "max_rate")]
    pub(crate) donated: bool,
    /// Credits set aside for the whole job and never exceeded
    #[arg(long, value_name = "CREDITS", default_value = "1")]
    pub(crate) max_cost: Credits,
    /// Only devices whose class begins like this: cuda, cpu/x86-64-v3
    #[arg(long, value_name = "CLASS")]
    pub(crate) device: Option<String>,
    /// Only devices with at least this much memory (8GiB)
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) memory: Option<Bytes>,

    /// Cut the job into parts of this many items; by default the scheduler chooses
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        hide_default_value = true,
        help_heading = "The job"
    )]
    pub(crate) part_items: u32,
    /// Attempts at each part before the job fails
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100), help_heading = "The job")]
    pub(crate) attempts: u32,
    /// Queue the job even when no known node could ever run it
    #[arg(long, help_heading = "The job")]
    pub(crate) wait: bool,
    /// Submit, print the job's id and return at once
    #[arg(long, help_heading = "The job")]
    pub(crate) detach: bool,
    /// A name to find the job by in `karez jobs`
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        hide_default_value = true,
        value_parser = label,
        help_heading = "The job"
    )]
    pub(crate) label: String,
    /// Where to write the results, one JSON object per line; - for standard output
    #[arg(short, long, value_name = "FILE", help_heading = "The job")]
    pub(crate) output: Option<PathBuf>,
}

impl Default for JobOptions {
    fn default() -> Self {
        Self {
            country: Vec::new(),
            exclude_country: Vec::new(),
            institution: Vec::new(),
            exclude_institution: Vec::new(),
            max_rate: None,
            donated: false,
            max_cost: MAX_COST,
            device: None,
            memory: None,
            part_items: 0,
            attempts: 3,
            wait: false,
            detach: false,
            label: String::new(),
            output: None,
        }
    }
}

impl JobOptions {
    /// The masks of the order.
    pub(crate) fn constraints(&self) -> Constraints {
        Constraints {
            countries: self.country.clone(),
            countries_excluded: self.exclude_country.clone(),
            institutions: self.institution.clone(),
            institutions_excluded: self.exclude_institution.clone(),
            device: self.device.clone().unwrap_or_default(),
            memory: self.memory.unwrap_or_default(),
            donated_only: self.donated,
            rate_max: self.max_rate,
        }
    }
}

/// Letters of a label at most; the scheduler would cut a longer one.
pub(crate) const LABEL_MAX: usize = 120;

/// A label that will not be cut.
pub(crate) fn label(text: &str) -> Result<String, String> {
    match text.chars().count() {
        0..=LABEL_MAX => Ok(text.to_owned()),
        n => Err(format!(
            "a label has at most {LABEL_MAX} letters, this one has {n}"
        )),
    }
}

/// A price from text.
pub(crate) fn rate(text: &str) -> Result<Rate, karez_core::unit::UnitError> {
    text.parse().map(|c: Credits| Rate(c.0))
}

/// A size from text.
pub(crate) fn size(text: &str) -> Result<Bytes, karez_node::human::QuantityError> {
    text.parse().map(|s: Size| s.0)
}
