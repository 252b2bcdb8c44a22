//! Readers of public traces: real inventories, jobs, requests, availability, latencies, prices.
//!
//! Every reader refuses a file that lacks a column, holds nonsense, or is in another unit than it should be, and
//! says where: file, line and column. Nothing here decides anything; worlds and benchmarks take what they need.
//! A data folder has the layout of [`Folder`].
pub mod availability;
pub mod azure;
pub mod energy;
pub mod latency;
pub mod market;
pub mod openb;
mod table;
#[cfg(test)]
mod tests;

pub use table::TraceError;

use std::path::{Path, PathBuf};

/// Where each trace lies below a data folder.
#[derive(Debug, Clone)]
pub struct Folder(PathBuf);

impl Folder {
    /// That folder; nothing is read yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }
    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.0
    }
    /// Nodes with their GPUs.
    pub fn openb_nodes(&self) -> PathBuf {
        self.0.join("inventory/openb_nodes.csv")
    }
    /// Jobs over 149 days.
    pub fn openb_pods(&self) -> PathBuf {
        self.0.join("jobs/openb_pods_default.csv")
    }
    /// The same, where a third name the GPU models they accept.
    pub fn openb_pods_gpuspec33(&self) -> PathBuf {
        self.0.join("jobs/openb_pods_gpuspec33.csv")
    }
    /// An hour of language-model requests.
    pub fn azure_llm(&self) -> PathBuf {
        self.0.join("requests/azure_llm_conv.csv")
    }
    /// Spot availability of that zone, such as `us-east-1a`.
    pub fn spot(&self, zone: &str) -> PathBuf {
        self.0.join(format!("availability/spot_{zone}_v100.json"))
    }
    /// Round trips between countries.
    pub fn latency(&self) -> PathBuf {
        self.0.join("latency/country_rtt.csv.gz")
    }
    /// Machines for rent, by GPU and country.
    pub fn gpu_market(&self) -> PathBuf {
        self.0.join("prices/gpu_market_offers.csv")
    }
    /// Electricity prices.
    pub fn electricity(&self) -> PathBuf {
        self.0.join("prices/electricity_by_country.csv")
    }
    /// Carbon intensities.
    pub fn carbon(&self) -> PathBuf {
        self.0.join("prices/carbon_by_country.json")
    }
}
