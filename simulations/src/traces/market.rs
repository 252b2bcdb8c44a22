//! Offers of a public marketplace of GPUs (`gpu_market_offers.csv`): what is rented where, and for how much.
use super::table::{Table, TraceError};
use std::path::Path;

/// One machine for rent.
#[derive(Debug, Clone, PartialEq)]
pub struct GpuOffer {
    /// Model of its GPUs, as the marketplace writes it: `RTX4090`.
    pub model: String,
    /// How many; 1 to 16.
    pub gpus: u32,
    /// Memory of one, in MiB.
    pub memory_mib: u64,
    /// US dollars for one GPU and hour.
    pub usd: f64,
    /// ISO 3166 alpha-2.
    pub country: String,
}

/// No machine of this kind has more, in MiB.
const MEMORY_MIB_MAX: u64 = 16 << 20;
/// Nobody pays that much for a machine and hour.
const USD_MAX: f64 = 1_000.0;

/// Reads the offers, in the file's order.
pub fn offers(file: &Path) -> Result<Vec<GpuOffer>, TraceError> {
    let table = Table::read(file)?;
    let (model, count) = (table.column("accelerator")?, table.column("count")?);
    let (memory, usd) = (
        table.column("total_gpu_mem_mib")?,
        table.column("price_usd_per_hour")?,
    );
    let region = table.column("region")?;
    table
        .rows()
        .map(|row| {
            let gpus = row.whole(count, 16, "GPUs")? as u32;
            if gpus == 0 {
                return Err(row.bad(count, "an offer without a GPU"));
            }
            let country = row.name(region)?;
            if country.len() != 2 || !country.bytes().all(|b| b.is_ascii_uppercase()) {
                return Err(row.bad(
                    region,
                    format!("{country:?} is not a code of two capital letters"),
                ));
            }
            Ok(GpuOffer {
                model: row.name(model)?,
                gpus,
                memory_mib: row.whole(memory, MEMORY_MIB_MAX, "MiB")? / u64::from(gpus),
                usd: row.number(usd, USD_MAX, "US dollars for an hour")? / f64::from(gpus),
                country,
            })
        })
        .collect()
}
