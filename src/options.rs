//! Options that every kind of job shares, and the limits they become.
use clap::Args;
use karez_core::{
    id::{Country, Institution},
    records::{Constraints, DataClass, Tier},
    unit::{Bytes, Credits, Millis, Portion, Rate, UtcMillis},
};
use karez_node::human::{Share, Size};
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
    /// Devices of one node that each part takes
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) devices: u32,
    /// A share of one device for each part, of its memory too: 0.25. Only owners
    /// who lend shares are asked
    #[arg(long, value_name = "SHARE", value_parser = share, conflicts_with = "devices")]
    pub(crate) share: Option<Portion>,
    /// Workers are cut off at least so far: seccomp, landlock+seccomp, container,
    /// machine
    #[arg(long, value_name = "TIER", default_value = "none", hide_default_value = true)]
    pub(crate) isolation: Tier,
    /// How delicate the input is: public, internal, personal, sensitive. Only
    /// owners who take such data are given it
    #[arg(
        long = "data-class",
        id = "data-class",
        value_name = "CLASS",
        default_value = "public"
    )]
    pub(crate) data: DataClass,
    /// When the job should be done: 45min, 6h, 2d from now. Reliable machines
    /// are chosen when there is no time left to lose
    #[arg(long, value_name = "TIME", value_parser = span)]
    pub(crate) deadline: Option<Millis>,
    /// All parts run at the same time, on machines of one institution in one
    /// country, or not at all
    #[arg(long)]
    pub(crate) together: bool,

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
            devices: 1,
            share: None,
            isolation: Tier::None,
            data: DataClass::Public,
            deadline: None,
            together: false,
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
    /// The masks of an order that is signed now, for a model under `licence`; empty when that is unknown.
    pub(crate) fn constraints(&self, now: UtcMillis, licence: &str) -> Constraints {
        Constraints {
            countries: self.country.clone(),
            countries_excluded: self.exclude_country.clone(),
            institutions: self.institution.clone(),
            institutions_excluded: self.exclude_institution.clone(),
            device: self.device.clone().unwrap_or_default(),
            memory: self.memory.unwrap_or_default(),
            donated_only: self.donated,
            rate_max: self.max_rate,
            isolation: self.isolation,
            licence: licence.to_owned(),
            data: self.data,
            devices: if self.devices > 1 { self.devices } else { 0 },
            share_milli: self.share.map_or(0, Portion::share_milli),
            deadline: self.deadline.map(|left| now.after(left)),
            together: self.together,
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

/// A share of one device from text.
pub(crate) fn share(text: &str) -> Result<Portion, karez_node::human::QuantityError> {
    text.parse::<Share>()
        .map(|share| Portion::share(share.0).unwrap_or(Portion::ONE))
}

/// A span from text.
pub(crate) fn span(text: &str) -> Result<Millis, humantime::DurationError> {
    let span = humantime::parse_duration(text)?;
    Ok(Millis(u64::try_from(span.as_millis()).unwrap_or(u64::MAX)))
}

/// A size from text.
pub(crate) fn size(text: &str) -> Result<Bytes, karez_node::human::QuantityError> {
    text.parse().map(|s: Size| s.0)
}
