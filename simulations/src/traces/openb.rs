//! Alibaba's GPU cluster of 2023 (`cluster-trace-gpu-v2023`, "openb"): 1,523 nodes and 8,152 jobs.
use super::table::{Table, TraceError};
use std::path::Path;

/// One node of the inventory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// Its serial.
    pub name: String,
    /// Thousandths of a core.
    pub cpu_milli: u64,
    /// MiB.
    pub memory_mib: u64,
    /// GPUs in it; 0 to 16.
    pub gpus: u32,
    /// Their model; empty without any.
    pub model: String,
}

/// One job ("pod").
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    /// Its name.
    pub name: String,
    /// Thousandths of a core.
    pub cpu_milli: u64,
    /// MiB.
    pub memory_mib: u64,
    /// GPUs it needs; 0 to 16.
    pub gpus: u32,
    /// Thousandths of each GPU; 1000 is a whole one.
    pub gpu_milli: u32,
    /// Models it accepts; empty for any.
    pub models: Vec<String>,
    /// Seconds since the trace began.
    pub created_s: u64,
    /// Seconds; not before `created_s`.
    pub deleted_s: u64,
    /// Seconds; none when it never ran.
    pub scheduled_s: Option<u64>,
}

/// 1,024 cores, 16 TiB and ten years are more than any machine or trace of this kind has.
const CPU_MILLI_MAX: u64 = 1_024_000;
const MEMORY_MIB_MAX: u64 = 16 << 20;
const SECONDS_MAX: u64 = 10 * 366 * 86_400;

/// Reads `openb_nodes.csv`.
pub fn nodes(file: &Path) -> Result<Vec<Machine>, TraceError> {
    let table = Table::read(file)?;
    let (sn, cpu) = (table.column("sn")?, table.column("cpu_milli")?);
    let (memory, gpu) = (table.column("memory_mib")?, table.column("gpu")?);
    let model = table.column("model")?;
    table
        .rows()
        .map(|row| {
            let cpu_milli = row.whole(cpu, CPU_MILLI_MAX, "thousandths of a core")?;
            if cpu_milli < 1_000 {
                let why = format!("{cpu_milli} is under one core: is it in cores, not thousandths?");
                return Err(row.bad(cpu, why));
            }
            let gpus = row.whole(gpu, 16, "GPUs")? as u32;
            let named = row.text(model).to_owned();
            if (gpus > 0) == named.is_empty() {
                return Err(row.bad(model, format!("{gpus} GPUs of model {named:?}")));
            }
            Ok(Machine {
                name: row.name(sn)?,
                cpu_milli,
                memory_mib: row.whole(memory, MEMORY_MIB_MAX, "MiB")?,
                gpus,
                model: named,
            })
        })
        .collect()
}

/// Reads `openb_pods_*.csv`, in order of creation.
pub fn pods(file: &Path) -> Result<Vec<Pod>, TraceError> {
    let table = Table::read(file)?;
    let (name, cpu) = (table.column("name")?, table.column("cpu_milli")?);
    let (memory, gpu) = (table.column("memory_mib")?, table.column("num_gpu")?);
    let (share, spec) = (table.column("gpu_milli")?, table.column("gpu_spec")?);
    let created = table.column("creation_time")?;
    let deleted = table.column("deletion_time")?;
    let scheduled = table.column("scheduled_time")?;
    let mut last = 0;
    table
        .rows()
        .map(|row| {
            let created_s = row.whole(created, SECONDS_MAX, "seconds")?;
            let deleted_s = row.whole(deleted, SECONDS_MAX, "seconds")?;
            if created_s < last {
                return Err(row.bad(
                    created,
                    format!("{created_s} is earlier than the row before, {last}"),
                ));
            }
            last = created_s;
            if deleted_s < created_s {
                return Err(row.bad(
                    deleted,
                    format!("{deleted_s} lies before its creation at {created_s}"),
                ));
            }
            let scheduled_s = match row.text(scheduled) {
                "" => None,
                _ => Some(row.whole(scheduled, SECONDS_MAX, "seconds")?),
            };
            if scheduled_s.is_some_and(|s| s < created_s) {
                return Err(row.bad(scheduled, "lies before its creation"));
            }
            let gpus = row.whole(gpu, 16, "GPUs")? as u32;
            let gpu_milli = row.whole(share, 1_000, "thousandths of a GPU")? as u32;
            if (gpus > 0) != (gpu_milli > 0) {
                return Err(row.bad(share, format!("{gpus} GPUs of {gpu_milli} thousandths each")));
            }
            let models = row.text(spec).split('|').filter(|m| !m.is_empty());
            Ok(Pod {
                name: row.name(name)?,
                cpu_milli: row.whole(cpu, CPU_MILLI_MAX, "thousandths of a core")?,
                memory_mib: row.whole(memory, MEMORY_MIB_MAX, "MiB")?,
                gpus,
                gpu_milli,
                models: models.map(str::to_owned).collect(),
                created_s,
                deleted_s,
                scheduled_s,
            })
        })
        .collect()
}
