//! A provider's PyTorch as a [`Learner`]: our program in a process of its own, spoken to in lines of JSON.
//!
//! What it says is not believed: replies have a limit and a deadline, losses and norms must be possible, and numbers
//! that come back must have their names, shapes and be finite. After an error the process is of no further use.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::Deserialize;
use serde_json::{Value, json};

use super::TrainError;
use super::adapter::Adapter;
use super::data::Packed;
use super::learner::{Learner, Numbers, Taken, optimiser};
use super::trainer::Spec;
use crate::provided::{PROGRAM, Provided};

/// Bytes of one reply at most; all are short.
const REPLY_MAX: u64 = 64 << 10;
/// Loading a base model from a cold disk to a device takes minutes.
const OPEN_MAX: Duration = Duration::from_secs(1800);
/// One batch, or one update.
const STEP_MAX: Duration = Duration::from_secs(600);
/// Between two calls of the pulse while it is waited.
const PULSE: Duration = Duration::from_secs(5);
/// The file in which numbers change hands.
const NUMBERS: &str = "trainer-numbers.safetensors";

/// The trainer's process. Killed when dropped.
pub struct Process {
    child: Child,
    /// To a thread that writes: a trainer that does not read must not hold anybody else up.
    requests: SyncSender<Vec<u8>>,
    replies: Receiver<Result<String, String>>,
    folder: PathBuf,
    /// Called now and then while an answer is waited for.
    pulse: Box<dyn Fn()>,
    limits: (Duration, Duration),
    taken: Taken,
    /// Why nothing more can be asked of it.
    ended: Option<String>,
}

#[derive(Deserialize)]
struct Reply {
    ok: bool,
    #[serde(default)]
    memory: bool,
    #[serde(default)]
    error: String,
    #[serde(default)]
    cpu_us: u64,
    #[serde(default)]
    peak_rss: u64,
    #[serde(flatten)]
    rest: BTreeMap<String, Value>,
}

impl Process {
    /// Starts the program. `folder` is where numbers change hands.
    pub fn start(provided: &Provided, folder: &Path, threads: usize) -> Result<Self, TrainError> {
        let mut command = Command::new(&provided.python);
        command
            .args(["-I", "-c", PROGRAM])
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        for name in ["LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES"] {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        let threads = threads.to_string();
        command
            .env("PATH", "/usr/bin:/bin")
            .env("HOME", folder)
            .env("TMPDIR", folder)
            .env("HF_HOME", folder)
            .env("HF_HUB_OFFLINE", "1")
            .env("HF_HUB_DISABLE_TELEMETRY", "1")
            .env("TOKENIZERS_PARALLELISM", "false")
            // What cuBLAS needs to give equal results twice.
            .env("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            .env("OMP_NUM_THREADS", &threads)
            .env("MKL_NUM_THREADS", &threads);
        let mut child = command.spawn().map_err(|error| {
            TrainError::Trainer(format!("{} does not start: {error}", provided.python.display()))
        })?;
        let (Some(mut input), Some(out)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(TrainError::Trainer("its pipes are missing".into()));
        };
        let (requests, to_write) = sync_channel::<Vec<u8>>(1);
        std::thread::spawn(move || {
            // Ends when its process is gone, or nobody asks any more; then the closed pipe tells the process to end.
            while let Ok(line) = to_write.recv() {
                if input.write_all(&line).and_then(|()| input.flush()).is_err() {
                    return;
                }
            }
        });
        let (tell, replies) = sync_channel(4);
        std::thread::spawn(move || {
            let mut out = BufReader::new(out);
            loop {
                let mut line = String::new();
                let read = (&mut out).take(REPLY_MAX + 1).read_line(&mut line);
                let reply = match read {
                    Ok(0) => return,
                    Ok(_) if line.len() as u64 > REPLY_MAX => Err("answered without end".to_owned()),
                    Ok(_) => Ok(line),
                    Err(error) => Err(format!("answered no text: {error}")),
                };
                let last = reply.is_err();
                if tell.send(reply).is_err() || last {
                    return;
                }
            }
        });
        Ok(Self {
            child,
            requests,
            replies,
            folder: folder.to_owned(),
            pulse: Box::new(|| ()),
            limits: (OPEN_MAX, STEP_MAX),
            taken: Taken::default(),
            ended: None,
        })
    }

    /// Calls `pulse` every few seconds while an answer is waited for.
    pub fn with_pulse(mut self, pulse: impl Fn() + 'static) -> Self {
        self.pulse = Box::new(pulse);
        self
    }

    /// Other deadlines: for opening a model, and for one batch.
    pub fn with_limits(mut self, open: Duration, step: Duration) -> Self {
        self.limits = (open, step);
        self
    }

    /// Why nothing more can be asked of it.
    pub fn ended(&self) -> Option<&str> {
        self.ended.as_deref()
    }

    /// What it took so far.
    pub fn taken(&self) -> Taken {
        self.taken
    }

    fn end(&mut self, why: String) -> TrainError {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.ended = Some(why.clone());
        TrainError::Trainer(why)
    }

    fn ask(&mut self, request: &Value, patience: Duration) -> Result<Reply, TrainError> {
        if let Some(why) = &self.ended {
            return Err(TrainError::Trainer(why.clone()));
        }
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        // A process that is gone is noticed below.
        let _ = self.requests.try_send(line);
        let began = Instant::now();
        let line = loop {
            let left = patience.saturating_sub(began.elapsed());
            match self.replies.recv_timeout(left.min(PULSE)) {
                Ok(Ok(line)) => break line,
                Ok(Err(why)) => return Err(self.end(why)),
                Err(RecvTimeoutError::Timeout) if began.elapsed() < patience => (self.pulse)(),
                Err(RecvTimeoutError::Timeout) => {
                    let seconds = patience.as_secs_f32();
                    return Err(self.end(format!("gave no answer for {seconds} s and was stopped")));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let status = self.child.wait();
                    let how = status.map_or_else(|error| error.to_string(), |status| status.to_string());
                    return Err(self.end(format!("ended on its own: {how}")));
                }
            }
        };
        let reply: Reply = match serde_json::from_str(&line) {
            Ok(reply) => reply,
            Err(error) => return Err(self.end(format!("answered nonsense: {error}"))),
        };
        self.taken.cpu_us = self.taken.cpu_us.max(reply.cpu_us);
        self.taken.peak_rss = self.taken.peak_rss.max(reply.peak_rss);
        if reply.ok {
            return Ok(reply);
        }
        let why: String = reply
            .error
            .chars()
            .filter(|c| !c.is_control())
            .take(400)
            .collect();
        let memory = reply.memory;
        let failed = self.end(format!("failed: {why}"));
        Err(if memory {
            TrainError::Incapable(format!("its memory does not suffice: {why}"))
        } else {
            failed
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A run on a provider's trainer.
pub struct Torch {
    process: Rc<RefCell<Process>>,
    layout: Adapter,
    name: String,
    /// The next batch is the first of its step.
    first: bool,
}

impl Torch {
    /// Loads the base model there, and begins with the numbers of `adapter`.
    pub fn open(
        process: Rc<RefCell<Process>>,
        spec: &Spec<'_>,
        adapter: &Adapter,
    ) -> Result<Self, TrainError> {
        let settings = spec.settings;
        let adamw = optimiser(spec);
        let request = json!({
            "do": "open", "model": spec.base, "threads": spec.threads, "bf16": settings.bf16,
            "recompute": settings.gradient_checkpointing, "rank": adapter.rank(), "alpha": adapter.alpha(),
            "dropout": settings.lora_dropout, "modules": settings.modules(), "clip": adamw.clip,
            "beta1": adamw.beta1, "beta2": adamw.beta2, "epsilon": adamw.epsilon, "weight_decay": adamw.weight_decay,
        });
        let reply = {
            let mut process = process.borrow_mut();
            let patience = process.limits.0;
            process.ask(&request, patience)?
        };
        let said = |key: &str| -> String {
            let text = reply.rest.get(key).and_then(Value::as_str).unwrap_or("?");
            text.chars().filter(|c| !c.is_control()).take(60).collect()
        };
        let name = format!(
            "torch {} transformers {} peft {} on {}",
            said("torch"),
            said("transformers"),
            said("peft"),
            said("where")
        );
        let mut torch = Self {
            process,
            layout: adapter.clone(),
            name,
            first: true,
        };
        let zeros = vec![0.0; adapter.values.len()];
        torch.take_up(
            Numbers {
                values: adapter.values.clone(),
                mean: zeros.clone(),
                square: zeros,
            },
            0,
        )?;
        Ok(torch)
    }

    fn ask(&mut self, request: &Value) -> Result<Reply, TrainError> {
        let mut process = self.process.borrow_mut();
        let patience = process.limits.1;
        process.ask(request, patience)
    }

    /// A number of a reply; not a number where the trainer found none.
    fn number(&self, reply: &Reply, key: &str) -> Result<f64, TrainError> {
        match reply.rest.get(key) {
            Some(Value::Null) => Ok(f64::NAN),
            Some(value) if value.as_f64().is_some_and(|number| number >= 0.0) => {
                Ok(value.as_f64().unwrap_or(f64::NAN))
            }
            other => {
                let found = other.map_or_else(|| "nothing".to_owned(), |value| value.to_string());
                let found: String = found.chars().take(60).collect();
                let mut process = self.process.borrow_mut();
                Err(process.end(format!("answered {found} for {key}, which cannot be")))
            }
        }
    }

    fn batch(what: &str, batch: &Packed) -> Value {
        json!({"do": what, "ids": batch.ids, "lengths": batch.lengths, "targets": batch.targets})
    }

    /// Rows of numbers with the names and shapes that the trainer knows them by.
    fn places(&self) -> Vec<(String, [usize; 2], std::ops::Range<usize>)> {
        let rank = self.layout.rank();
        let slots = self.layout.slots().iter();
        slots
            .flat_map(|slot| {
                let [a, b] = slot.peft_names();
                [
                    (a, [rank, slot.columns], slot.a_range(rank)),
                    (b, [slot.rows, rank], slot.b_range(rank)),
                ]
            })
            .collect()
    }
}

/// The three rows and what their tensors' names end with.
const ROWS: [&str; 3] = ["", ".mean", ".square"];

impl Learner for Torch {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn begin(&mut self) {
        self.first = true;
    }

    fn add(&mut self, batch: &Packed, scale: f32, seed: u64) -> Result<f64, TrainError> {
        if batch.targets.is_empty() {
            return Ok(0.0);
        }
        let mut request = Self::batch("add", batch);
        request["scale"] = json!(scale);
        request["first"] = json!(self.first);
        // Seeds of PyTorch have 63 bits.
        request["seed"] = json!(seed >> 1);
        self.first = false;
        let reply = self.ask(&request)?;
        self.number(&reply, "nats")
    }

    fn apply(&mut self, rate: f64) -> Result<Option<f64>, TrainError> {
        let reply = self.ask(&json!({"do": "apply", "rate": rate}))?;
        let norm = self.number(&reply, "norm")?;
        Ok(Some(norm).filter(|norm| norm.is_finite()))
    }

    fn loss(&mut self, batch: &Packed) -> Result<f64, TrainError> {
        if batch.targets.is_empty() {
            return Ok(0.0);
        }
        let reply = self.ask(&Self::batch("loss", batch))?;
        self.number(&reply, "nats")
    }

    fn numbers(&mut self) -> Result<Numbers, TrainError> {
        let path = self.process.borrow().folder.join(NUMBERS);
        let _ = fs::remove_file(&path);
        self.ask(&json!({"do": "save", "file": path}))?;
        let found = fs::read(&path)
            .map_err(|error| error.to_string())
            .and_then(|bytes| {
                let file = SafeTensors::deserialize(&bytes).map_err(|error| error.to_string())?;
                let count = self.layout.values.len();
                let mut rows = [vec![0.0; count], vec![0.0; count], vec![0.0; count]];
                for (name, shape, range) in self.places() {
                    for (row, suffix) in rows.iter_mut().zip(ROWS) {
                        let name = format!("{name}{suffix}");
                        let tensor = file.tensor(&name).map_err(|_| format!("{name} is missing"))?;
                        if tensor.dtype() != Dtype::F32 || tensor.shape() != shape {
                            return Err(format!("{name} has the wrong shape"));
                        }
                        for (to, from) in row[range.clone()].iter_mut().zip(tensor.data().chunks_exact(4)) {
                            *to = f32::from_le_bytes([from[0], from[1], from[2], from[3]]);
                            if !to.is_finite() {
                                return Err(format!("{name} holds a number that is not finite"));
                            }
                        }
                    }
                }
                Ok(rows)
            });
        let _ = fs::remove_file(&path);
        match found {
            Ok([values, mean, square]) => Ok(Numbers { values, mean, square }),
            Err(why) => Err(self
                .process
                .borrow_mut()
                .end(format!("handed over broken numbers: {why}"))),
        }
    }

    fn take_up(&mut self, numbers: Numbers, steps: usize) -> Result<(), TrainError> {
        let rows = [&numbers.values, &numbers.mean, &numbers.square];
        let bytes = rows.map(|row| row.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>());
        let mut views = Vec::new();
        for (name, shape, range) in self.places() {
            for (bytes, suffix) in bytes.iter().zip(ROWS) {
                let part = &bytes[range.start * 4..range.end * 4];
                let view =
                    TensorView::new(Dtype::F32, shape.to_vec(), part).map_err(candle_core::Error::from)?;
                views.push((format!("{name}{suffix}"), view));
            }
        }
        let file = safetensors::serialize(views, None).map_err(candle_core::Error::from)?;
        let path = self.process.borrow().folder.join(NUMBERS);
        fs::write(&path, file)?;
        let taken = self.ask(&json!({"do": "take_up", "file": path, "steps": steps}));
        let _ = fs::remove_file(&path);
        taken?;
        self.first = true;
        Ok(())
    }

    fn taken(&self) -> Taken {
        self.process.borrow().taken
    }
}
