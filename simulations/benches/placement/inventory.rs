//! Machines and jobs for the benchmarks: the real ones, or some drawn after their statistics.
use karez_simulations::{
    rng::Rng,
    traces::{
        Folder, TraceError,
        openb::{self, Machine, Pod},
    },
};

/// Model, list price in thousandths of a dollar per hour.
pub(crate) const MODELS: [(&str, u32); 7] = [
    ("T4", 350),
    ("P100", 450),
    ("V100M16", 800),
    ("V100M32", 1_100),
    ("A10", 600),
    ("G2", 900),
    ("G3", 1_200),
];

/// What the worlds are made of.
pub(crate) struct Inventory {
    pub(crate) source: String,
    /// Where other traces are, if anywhere.
    pub(crate) folder: Option<Folder>,
    pub(crate) machines: Vec<Machine>,
    /// A third of them name the models they accept.
    pub(crate) pods: Vec<Pod>,
}

impl Inventory {
    pub(crate) fn load(folder: Option<&Folder>) -> Result<Self, TraceError> {
        match folder {
            Some(folder) => Ok(Self {
                folder: Some(folder.clone()),
                source: format!("openb traces in {}", folder.path().display()),
                machines: openb::nodes(&folder.openb_nodes())?,
                pods: openb::pods(&folder.openb_pods_gpuspec33())?,
            }),
            None => Ok(Self::drawn()),
        }
    }

    /// After the published statistics of the same cluster: so many nodes of each model and size, so many jobs of
    /// each need, a third of them bound to models.
    fn drawn() -> Self {
        let mut rng = Rng::new(1);
        // Nodes by model and GPUs each; cores and memory as they are typical there.
        let shelves: [(&str, u32, usize, u64, u64); 8] = [
            ("", 0, 310, 64, 256),
            ("T4", 2, 404, 96, 384),
            ("P100", 2, 134, 64, 256),
            ("V100M16", 8, 24, 96, 512),
            ("V100M32", 8, 26, 96, 768),
            ("A10", 1, 2, 96, 512),
            ("G2", 8, 549, 96, 384),
            ("G3", 8, 39, 128, 768),
        ];
        let mut machines = Vec::new();
        for (model, gpus, count, cores, gib) in shelves {
            for i in 0..count {
                machines.push(Machine {
                    name: format!("drawn-{model}-{i}"),
                    cpu_milli: cores * 1_000,
                    memory_mib: gib * 1_024,
                    gpus,
                    model: model.into(),
                });
            }
        }
        let pods = (0..8_152u64)
            .map(|i| {
                let (gpus, gpu_milli) = match rng.below(1_000) {
                    0..=133 => (0, 0),
                    134..=511 => (1, rng.pick(&[80, 160, 250, 330, 460, 500, 660, 810])),
                    512..=991 => (1, 1_000),
                    992..=994 => (2, 1_000),
                    995..=996 => (4, 1_000),
                    _ => (8, 1_000),
                };
                let model = MODELS[rng.below(MODELS.len() as u64) as usize].0;
                Pod {
                    name: format!("drawn-{i}"),
                    cpu_milli: rng.between(2, 12) * 1_000 * u64::from(gpus.max(1)),
                    memory_mib: rng.between(4, 48) * 1_024,
                    gpus,
                    gpu_milli,
                    models: if gpus > 0 && rng.chance(330) {
                        vec![model.into()]
                    } else {
                        Vec::new()
                    },
                    created_s: i * 1_579,
                    deleted_s: i * 1_579 + rng.between(60, 200_000),
                    scheduled_s: Some(i * 1_579),
                }
            })
            .collect();
        Self {
            folder: None,
            source: "a generator after the published statistics of the openb cluster (no data folder given)"
                .into(),
            machines,
            pods,
        }
    }
}
