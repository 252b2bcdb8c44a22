//! What storing and losing a training run costs, with the real binary on loopback: a checkpoint through the whole network,
//! from `kill -9` to the first step on another node, and the time of a run whose machine is reclaimed in five intervals
//! beside an undisturbed one's.
//!
//! `cargo bench --bench training -- FILE` writes JSON to FILE and prints it. Takes about three minutes.
use serde_json::{Value, json};
use std::{
    error::Error,
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Reclaims of one run, one in each interval.
const EVICTIONS: usize = 5;
/// Steps of that run, and between two of its checkpoints: an interval takes some ten seconds.
const STEPS: usize = 1000;
const INTERVAL: usize = 200;
/// Steps of the runs that are stored often, and once.
const SHORT: usize = 240;
const OFTEN: usize = 8;
/// How long a test may take to get anywhere.
const PATIENCE: Duration = Duration::from_secs(300);

struct Net {
    home: PathBuf,
    dir: tempfile::TempDir,
}

fn main() -> Result<()> {
    let file = std::env::args().skip(1).find(|a| !a.starts_with('-'));
    let dir = tempfile::tempdir()?;
    let net = Net {
        home: dir.path().join("home"),
        dir,
    };
    net.karez(&["up"])?;
    let measured = measure(&net);
    net.karez(&["down"])?;
    let measured = measured?;
    if let Some(file) = file {
        fs::write(file, serde_json::to_vec_pretty(&measured)?)?;
    }
    println!("{}", serde_json::to_string_pretty(&measured)?);
    Ok(())
}

fn measure(net: &Net) -> Result<Value> {
    let data = net.dir.path().join("data.jsonl");
    let lines: Vec<String> = (0..400)
        .map(|n| {
            json!({"prompt": format!("Swali {n}?"), "completion": "Maji ni uhai. ".repeat(12)}).to_string()
                + "\n"
        })
        .collect();
    fs::write(&data, lines.concat())?;
    // The first one brings base and data to the nodes.
    net.timed(&data, 40, 20, |_| Ok(()))?;
    // What a checkpoint costs: the same steps, stored often and once.
    let once = net.timed(&data, SHORT, SHORT, |_| Ok(()))?;
    let often = net.timed(&data, SHORT, OFTEN, |_| Ok(()))?;
    let checkpoint = (often - once) / (SHORT / OFTEN - 1) as f64;

    // Undisturbed, from the first step to the end.
    let quiet = net.timed(&data, STEPS, INTERVAL, |_| Ok(()))?;
    // Reclaimed in the middle of every interval; what ran goes on elsewhere, and the owner lends again a moment later.
    let mut evictions = 0;
    let evicted = net.timed(&data, STEPS, INTERVAL, |id| {
        while evictions < EVICTIONS {
            net.steps(id, (INTERVAL / 2 + evictions * INTERVAL) as u64)?;
            let Some(node) = net.node_at_work(id)? else {
                continue;
            };
            let folder = net.home.join("up").join(&node);
            let folder = folder.to_string_lossy();
            net.karez(&["node", "reclaim", "--dir", &folder])?;
            evictions += 1;
            thread::sleep(Duration::from_millis(500));
            net.karez(&["node", "open", "--dir", &folder])?;
        }
        Ok(())
    })?;

    // Killed in the middle.
    let id = net.train(&data, 240, 20)?;
    net.steps(&id, 30)?;
    // Between two parts nobody is.
    let victim = net.until(|job| Some(at_work(job)?["institution"].as_str()?.to_owned()), &id)?;
    let pid = net.pid(&victim)?;
    let killed = Instant::now();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
    let noticed = net.until(
        |job| {
            let part = at_work(job).or_else(|| waiting(job))?;
            (part["institution"] != victim.as_str() || part["state"] == "queued").then(|| killed.elapsed())
        },
        &id,
    )?;
    let again = net.until(
        |job| {
            let part = at_work(job)?;
            (part["institution"] != victim.as_str() && part["items_done"].as_u64()? > 0)
                .then(|| killed.elapsed())
        },
        &id,
    )?;
    net.ended(&id)?;
    Ok(json!({
        "checkpoint": {
            "seconds": checkpoint, "stored_often_s": often, "stored_once_s": once, "checkpoints": SHORT / OFTEN,
            "share_of_interval": checkpoint / (quiet * INTERVAL as f64 / STEPS as f64),
        },
        "undisturbed_s": quiet,
        "interval_s": quiet * INTERVAL as f64 / STEPS as f64,
        "eviction_s": (evicted - quiet) / evictions.max(1) as f64,
        "evictions": evictions,
        "evicted_s": evicted,
        "goodput": quiet / evicted,
        "kill_to_noticed_s": noticed.as_secs_f64(),
        "kill_to_first_step_elsewhere_s": again.as_secs_f64(),
        "beyond_detection_s": (again - noticed).as_secs_f64(),
        "aims": {"goodput": 0.95, "beyond_detection_s": 10},
        "cores": thread::available_parallelism()?.get(),
        "load": fs::read_to_string("/proc/loadavg").unwrap_or_default().trim(),
    }))
}

fn at_work(job: &Value) -> Option<&Value> {
    job["parts"]
        .as_array()?
        .iter()
        .find(|part| part["state"] == "running")
}

fn waiting(job: &Value) -> Option<&Value> {
    let open = |part: &&Value| part["state"] != "done";
    job["parts"].as_array()?.iter().find(open)
}

impl Net {
    fn karez(&self, args: &[&str]) -> Result<String> {
        let output = Command::new(env!("CARGO_BIN_EXE_karez"))
            .args(args)
            .env("KAREZ_HOME", &self.home)
            .output()?;
        if !output.status.success() {
            return Err(format!("karez {args:?}: {}", String::from_utf8_lossy(&output.stderr)).into());
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Seconds from the first step to the end; `meanwhile` is called once the first step was seen.
    fn timed(
        &self,
        data: &Path,
        steps: usize,
        every: usize,
        mut meanwhile: impl FnMut(&str) -> Result<()>,
    ) -> Result<f64> {
        let id = self.train(data, steps, every)?;
        let begun = self.steps(&id, 1)?;
        meanwhile(&id)?;
        self.ended(&id)?;
        Ok(begun.elapsed().as_secs_f64())
    }

    fn train(&self, data: &Path, steps: usize, every: usize) -> Result<String> {
        let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("engine/models/karez-tiny");
        let every = format!("save_steps={every}");
        let steps = format!("max_steps={steps}");
        let (base, data) = (base.to_string_lossy(), data.to_string_lossy());
        let args = [
            "finetune",
            "--base",
            &base,
            "--data",
            &data,
            "--lang",
            "sw",
            "--set",
            &steps,
            "--set",
            "sequence_len=256",
            "--set",
            &every,
            "--attempts",
            "20",
            "--max-cost",
            "5",
            "--detach",
            "--json",
        ];
        let answer: Value = serde_json::from_str(&self.karez(&args)?)?;
        Ok(answer["job"].as_str().ok_or("no job")?.to_owned())
    }

    fn job(&self, id: &str) -> Result<Value> {
        Ok(serde_json::from_str(
            &self.karez(&["job", "show", id, "--json"])?,
        )?)
    }

    fn until<T>(&self, mut ask: impl FnMut(&Value) -> Option<T>, id: &str) -> Result<T> {
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            if let Some(answer) = ask(&self.job(id)?) {
                return Ok(answer);
            }
            thread::sleep(Duration::from_millis(50));
        }
        Err(format!("nothing happened for {PATIENCE:?}").into())
    }

    /// The moment at which so many steps were seen to be done.
    fn steps(&self, id: &str, steps: u64) -> Result<Instant> {
        self.until(
            |job| (job["items_done"].as_u64()? >= steps).then(Instant::now),
            id,
        )
    }

    fn ended(&self, id: &str) -> Result<()> {
        let state = self.until(
            |job| {
                let state = job["state"].as_str()?;
                ["done", "failed", "cancelled"]
                    .contains(&state)
                    .then(|| format!("{state}: {}", job["cause"]))
            },
            id,
        )?;
        if state.starts_with("done") {
            Ok(())
        } else {
            Err(state.into())
        }
    }

    fn node_at_work(&self, id: &str) -> Result<Option<String>> {
        let job = self.job(id)?;
        Ok(at_work(&job).and_then(|part| part["institution"].as_str().map(str::to_owned)))
    }

    fn pid(&self, name: &str) -> Result<rustix::process::Pid> {
        let table: toml::Table = toml::from_str(&fs::read_to_string(self.home.join("up/network.toml"))?)?;
        let all = table["process"].as_array().ok_or("no processes")?;
        let one = all
            .iter()
            .find(|p| p["name"].as_str().is_some_and(|n| n.contains(name)));
        let pid = one.and_then(|p| p["pid"].as_integer()).ok_or("no such process")?;
        rustix::process::Pid::from_raw(i32::try_from(pid)?).ok_or_else(|| "no such process".into())
    }
}
