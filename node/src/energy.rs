//! Joules: what processors (RAPL) and GPUs (NVML) say they used while a lease ran.
//!
//! - **RAPL** counts whole processor packages, through `/sys/class/powercap`. A lease is charged the share that its worker
//!   has of all processor time used on the machine meanwhile, so that idle power is shared by those who keep it awake. The counters
//!   wrap; they are read at every progress of a lease, far more often than that. Kernels since 2020 show them to root only.
//! - **NVML** counts each GPU by itself (Volta and later). A lease has its GPUs to itself, so it is charged all of it; the
//!   processors' part is not added, or one lease would be measured by two rulers.
//!
//! A machine that cannot tell says so once, in its log, and meters no energy: nothing is estimated.
use karez_core::{
    agent::{Energy, EnergyMeter},
    unit::Millis,
};
use libloading::Library;
use std::{
    ffi::{CString, c_char, c_int, c_ulonglong, c_void},
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
};

const POWERCAP: &str = "/sys/class/powercap";
const STAT: &str = "/proc/stat";
/// The unit of `/proc/stat`: a hundredth of a second, by the kernel's promise to programs.
const TICK_MS: u64 = 10;

/// The machine's energy meters.
pub(crate) struct Meters {
    rapl: Option<Mutex<Rapl>>,
    /// Asked for at the first lease with a GPU: it keeps the driver loaded.
    nvml: OnceLock<Option<Nvml>>,
    stat: PathBuf,
}

impl Meters {
    /// What this machine has.
    pub(crate) fn find() -> Self {
        Self::at(Path::new(POWERCAP), Path::new(STAT))
    }

    fn at(powercap: &Path, stat: &Path) -> Self {
        let rapl = Rapl::open(powercap)
            .inspect(|rapl| {
                tracing::info!(
                    packages = rapl.packages.len(),
                    "energy of processors is metered (RAPL)"
                )
            })
            .inspect_err(|why| tracing::info!("energy of processors is not metered: {why}"));
        Self {
            rapl: rapl.ok().map(Mutex::new),
            nvml: OnceLock::new(),
            stat: stat.to_owned(),
        }
    }

    fn nvml(&self) -> Option<&Nvml> {
        let open = || {
            Nvml::open()
                .inspect_err(|why| tracing::info!("energy of GPUs is not metered: {why}"))
                .ok()
        };
        self.nvml.get_or_init(open).as_ref()
    }

    /// Begins to count for a lease on these GPUs, or on processors where there are none.
    pub(crate) fn begin(&self, gpus: &[String]) -> Span {
        let from = if gpus.is_empty() {
            self.packages().map(Count::Packages)
        } else {
            self.gpus(gpus).map(|millijoules| Count::Gpus {
                uuids: gpus.to_vec(),
                millijoules,
            })
        };
        Span { from, last: None }
    }

    fn packages(&self) -> Option<Used> {
        let microjoules = lock(self.rapl.as_ref()?).read().ok()?;
        let busy_ms = busy_ms(&fs::read_to_string(&self.stat).ok()?)?;
        Some(Used { microjoules, busy_ms })
    }

    fn gpus(&self, uuids: &[String]) -> Option<u64> {
        let nvml = self.nvml()?;
        let each = uuids.iter().map(|uuid| nvml.millijoules(uuid));
        each.into_iter()
            .try_fold(0, |sum: u64, used| sum.checked_add(used?))
    }
}

/// The processors so far: energy of all packages, and time of all processors that was put to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Used {
    microjoules: u64,
    busy_ms: u64,
}

enum Count {
    Packages(Used),
    Gpus { uuids: Vec<String>, millijoules: u64 },
}

/// One lease's count.
pub(crate) struct Span {
    from: Option<Count>,
    last: Option<Energy>,
}

impl Span {
    /// What the lease has used so far, when its worker has had `cpu` of processor time. Never falls; `None` where the
    /// machine cannot tell.
    pub(crate) fn read(&mut self, meters: &Meters, cpu: Millis) -> Option<Energy> {
        let now = match self.from.as_ref()? {
            Count::Packages(from) => meters.packages().map(|now| Energy {
                millijoules: share(from, &now, cpu),
                by: EnergyMeter::Rapl,
            }),
            Count::Gpus { uuids, millijoules } => meters.gpus(uuids).map(|now| Energy {
                millijoules: now.saturating_sub(*millijoules),
                by: EnergyMeter::Nvml,
            }),
        };
        // A meter that falls silent half way leaves what it said before.
        self.last = match (self.last, now) {
            (Some(last), Some(now)) if now.millijoules < last.millijoules => Some(last),
            (last, now) => now.or(last),
        };
        self.last
    }
}

/// Millijoules for a worker that used `cpu` between the two.
fn share(from: &Used, to: &Used, cpu: Millis) -> u64 {
    let energy = u128::from(to.microjoules.saturating_sub(from.microjoules));
    let busy = u128::from(to.busy_ms.saturating_sub(from.busy_ms));
    // The kernel counts in ticks: a short lease may seem to have had more than there was.
    let cpu = u128::from(cpu.0).min(busy);
    let micro = (energy * cpu).checked_div(busy).unwrap_or(0);
    u64::try_from(micro / 1_000).unwrap_or(u64::MAX)
}

/// Milliseconds of all processors that were not idle, out of `/proc/stat`. Guests' time is in their hosts' already.
fn busy_ms(stat: &str) -> Option<u64> {
    let mut fields = stat
        .lines()
        .next()?
        .strip_prefix("cpu ")?
        .split_ascii_whitespace();
    let mut next = || fields.next().and_then(|f| f.parse::<u64>().ok());
    let (user, nice, system) = (next()?, next()?, next()?);
    let (_idle, _waiting) = (next()?, next()?);
    let rest = [next(), next(), next()].into_iter().flatten().sum::<u64>();
    Some((user + nice + system + rest).saturating_mul(TICK_MS))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The processor packages' counters, added up and without their wrapping.
#[derive(Debug)]
struct Rapl {
    packages: Vec<Package>,
    /// Since it was opened.
    microjoules: u64,
}

#[derive(Debug)]
struct Package {
    counter: PathBuf,
    /// The largest value before it begins at zero again.
    range: u64,
    last: u64,
}

impl Rapl {
    /// Finds the packages under a folder like `/sys/class/powercap`; says why there are none that can be read.
    fn open(powercap: &Path) -> Result<Self, String> {
        let name = powercap.display();
        let zones = fs::read_dir(powercap).map_err(|e| format!("{name}: {e}"))?;
        let mut packages = Vec::new();
        for zone in zones.flatten().map(|zone| zone.path()) {
            // Parts of packages (cores, memory) are counted in them; `psys` would count everything twice.
            let is_package = text(&zone.join("name")).is_ok_and(|name| name.starts_with("package-"));
            // One package may be listed through two interfaces.
            let is_rapl = zone
                .file_name()
                .and_then(|name| name.to_str())
                .is_some_and(|name| name.starts_with("intel-rapl:"));
            if !is_package || !is_rapl {
                continue;
            }
            let counter = zone.join("energy_uj");
            let at = |e: io::Error| {
                format!(
                    "{}: {e} (on most kernels only root may read it)",
                    counter.display()
                )
            };
            packages.push(Package {
                range: number(&zone.join("max_energy_range_uj")).map_err(at)?,
                last: number(&counter).map_err(at)?,
                counter,
            });
        }
        if packages.is_empty() {
            return Err(format!("{name} lists no processor package"));
        }
        Ok(Self {
            packages,
            microjoules: 0,
        })
    }

    /// Microjoules of all packages since it was opened.
    fn read(&mut self) -> io::Result<u64> {
        for package in &mut self.packages {
            let now = number(&package.counter)?;
            let since = match now.checked_sub(package.last) {
                Some(since) => since,
                // It counted up to its range, and from zero on.
                None => package
                    .range
                    .saturating_sub(package.last)
                    .saturating_add(now)
                    .saturating_add(1),
            };
            package.last = now;
            self.microjoules = self.microjoules.saturating_add(since);
        }
        Ok(self.microjoules)
    }
}

/// The driver's own library, loaded for as long as the process runs.
struct Nvml {
    library: Library,
}

impl Nvml {
    /// NVML's word for "done".
    const SUCCESS: c_int = 0;

    fn open() -> Result<Self, String> {
        const NAME: &str = "libnvidia-ml.so.1";
        #[expect(unsafe_code, reason = "the driver's library has no safe door")]
        // SAFETY: it is the driver's library, whose initialisers may run in any process; `nvmlInit_v2` takes nothing.
        let (library, status) = unsafe {
            let library = Library::new(NAME).map_err(|e| e.to_string())?;
            let init = library.get::<unsafe extern "C" fn() -> c_int>(b"nvmlInit_v2\0");
            let status = init.map_err(|e| e.to_string())?();
            (library, status)
        };
        match status {
            Self::SUCCESS => Ok(Self { library }),
            other => Err(format!("{NAME}: nvmlInit_v2 gives {other}")),
        }
    }

    /// What a GPU has used since its driver was loaded; `None` where it cannot tell.
    fn millijoules(&self, uuid: &str) -> Option<u64> {
        type Handle = *mut c_void;
        type ByUuid = unsafe extern "C" fn(*const c_char, *mut Handle) -> c_int;
        type Energy = unsafe extern "C" fn(Handle, *mut c_ulonglong) -> c_int;
        let uuid = CString::new(uuid).ok()?;
        let (mut device, mut energy) = (std::ptr::null_mut(), 0);
        #[expect(unsafe_code, reason = "the driver's library has no safe door")]
        // SAFETY: the signatures are those of nvml.h; the text ends with a zero, both results have a place of their
        // type, and a handle is only used when the library gave one.
        unsafe {
            let by_uuid = self.library.get::<ByUuid>(b"nvmlDeviceGetHandleByUUID\0");
            if by_uuid.ok()?(uuid.as_ptr(), &raw mut device) != Self::SUCCESS {
                return None;
            }
            let read = self
                .library
                .get::<Energy>(b"nvmlDeviceGetTotalEnergyConsumption\0");
            (read.ok()?(device, &raw mut energy) == Self::SUCCESS).then_some(energy)
        }
    }
}

fn text(path: &Path) -> io::Result<String> {
    Ok(fs::read_to_string(path)?.trim().to_owned())
}

fn number(path: &Path) -> io::Result<u64> {
    text(path)?
        .parse()
        .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, format!("not a number: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    /// A folder like the kernel's: two packages, a part of one, and a zone of another kind.
    struct Machine(TempDir);

    impl Machine {
        fn new() -> Self {
            let machine = Self(tempfile::tempdir().unwrap());
            for (zone, name) in [
                ("intel-rapl:0", "package-0"),
                ("intel-rapl:0:0", "core"),
                ("intel-rapl:1", "package-1"),
                ("intel-rapl:2", "psys"),
                ("intel-rapl-mmio:0", "package-0"),
                ("dtpm", "dtpm"),
            ] {
                let dir = machine.0.path().join(zone);
                fs::create_dir(&dir).unwrap();
                fs::write(dir.join("name"), format!("{name}\n")).unwrap();
                fs::write(dir.join("max_energy_range_uj"), "999999\n").unwrap();
                fs::write(dir.join("energy_uj"), "500\n").unwrap();
            }
            machine.busy(1_000);
            machine
        }

        fn count(&self, zone: &str, microjoules: u64) {
            let path = self.0.path().join(zone).join("energy_uj");
            fs::write(path, format!("{microjoules}\n")).unwrap();
        }

        fn busy(&self, ticks: u64) {
            let line = format!("cpu  {ticks} 0 0 77777 55 0 0 0 0 0\ncpu0 1 2 3\n");
            fs::write(self.0.path().join("stat"), line).unwrap();
        }

        fn meters(&self) -> Meters {
            Meters::at(self.0.path(), &self.0.path().join("stat"))
        }
    }

    #[test]
    fn packages_add_up_and_a_counter_that_wraps_goes_on() {
        let machine = Machine::new();
        let mut rapl = Rapl::open(machine.0.path()).unwrap();
        assert_eq!(rapl.packages.len(), 2);
        assert_eq!(rapl.read().unwrap(), 0);
        machine.count("intel-rapl:0", 700);
        machine.count("intel-rapl:1", 501);
        // Counted in its package already.
        machine.count("intel-rapl:0:0", 690);
        machine.count("intel-rapl:2", 9_000);
        machine.count("intel-rapl-mmio:0", 9_000);
        assert_eq!(rapl.read().unwrap(), 201);
        machine.count("intel-rapl:0", 999_999);
        assert_eq!(rapl.read().unwrap(), 201 + 999_299);
        // One step past its range it stands at zero.
        machine.count("intel-rapl:0", 0);
        assert_eq!(rapl.read().unwrap(), 201 + 999_300);
        machine.count("intel-rapl:0", 40);
        assert_eq!(rapl.read().unwrap(), 201 + 999_340);
    }

    #[test]
    fn a_lease_pays_for_its_share_of_the_processors() {
        let machine = Machine::new();
        let meters = machine.meters();
        let mut span = meters.begin(&[]);
        let read = |span: &mut Span, cpu| span.read(&meters, Millis(cpu)).unwrap();
        assert_eq!(read(&mut span, 0).millijoules, 0);
        // 8 seconds of processor time were used in all, 2 of them by this worker, and 400 mJ.
        machine.count("intel-rapl:0", 400_500);
        machine.busy(1_800);
        let energy = read(&mut span, 2_000);
        assert_eq!((energy.millijoules, energy.by), (100, EnergyMeter::Rapl));
        // It never falls, and is never more than there was.
        assert_eq!(read(&mut span, 0).millijoules, 100);
        assert_eq!(read(&mut span, 1_000_000).millijoules, 400);
        // A counter that cannot be read any more leaves what it said.
        fs::remove_file(machine.0.path().join("intel-rapl:1/energy_uj")).unwrap();
        assert_eq!(read(&mut span, 1_000_000).millijoules, 400);
    }

    #[test]
    fn a_machine_that_cannot_tell_says_why_and_meters_nothing() {
        let machine = Machine::new();
        let missing = machine.0.path().join("nowhere");
        assert!(Rapl::open(&missing).unwrap_err().contains("nowhere"));
        let empty = tempfile::tempdir().unwrap();
        assert!(
            Rapl::open(empty.path())
                .unwrap_err()
                .contains("no processor package")
        );
        fs::write(machine.0.path().join("intel-rapl:0/energy_uj"), "many\n").unwrap();
        let why = Rapl::open(machine.0.path()).unwrap_err();
        assert!(
            why.contains("intel-rapl:0/energy_uj") && why.contains("not a number"),
            "{why}"
        );
        let meters = Meters::at(&missing, &machine.0.path().join("stat"));
        assert_eq!(meters.begin(&[]).read(&meters, Millis(5)), None);
    }

    /// Not a check of the machine, which may have neither: whatever is there can be read, or says why not.
    #[test]
    fn this_machine_tells_or_says_why_not() {
        match Rapl::open(Path::new(POWERCAP)) {
            Ok(mut rapl) => println!("RAPL: {} packages, {:?}", rapl.packages.len(), rapl.read()),
            Err(why) => println!("RAPL: {why}"),
        }
        assert!(busy_ms(&fs::read_to_string(STAT).unwrap()).unwrap() > 0);
        match Nvml::open() {
            Ok(nvml) => assert_eq!(nvml.millijoules("GPU-00000000-0000-0000-0000-000000000000"), None),
            Err(why) => println!("NVML: {why}"),
        }
    }
}
