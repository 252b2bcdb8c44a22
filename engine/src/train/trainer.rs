//! A run: steps, looks at what was held out, checkpoints, and going on from one.

use std::path::Path;

use super::adapter::Adapter;
use super::checkpoint::{self, Checkpoint, Held, Look, State};
use super::data::{Data, Example, Packed, Reader};
use super::learner::{Learner, Numbers, Own, Taken};
use super::llama::Config;
use super::schedule::Schedule;
use super::settings::Settings;
use super::{Rng, TrainError, memory};

/// Tokens of one batch when looking at what was held out.
pub(super) const LOOK_TOKENS: usize = 2048;

/// Learners that a checkpoint names at most: a run that goes back and forth more often keeps the first ones.
const LEARNERS_MAX: usize = 64;

/// What a run is made of. Digests name what they stand for in checkpoints and manifests.
#[derive(Debug, Clone)]
pub struct Spec<'a> {
    /// The base model's directory.
    pub base: &'a Path,
    /// Its digest.
    pub base_digest: &'a str,
    /// JSON lines.
    pub data: &'a Path,
    /// Their digest.
    pub data_digest: &'a str,
    /// How to train.
    pub settings: &'a Settings,
    /// The language of lines that name none.
    pub language: Option<&'a str>,
    /// Threads to compute with.
    pub threads: usize,
    /// Bytes of private memory that a run may take; it does not begin with less than it needs.
    pub memory: Option<u64>,
}

/// What one step did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// Steps taken so far, this one counted.
    pub step: usize,
    /// Mean cross-entropy of the step's targets before it, in nats.
    pub loss: f64,
    /// Length of the gradient before clipping.
    pub norm: f64,
    /// Learning rate.
    pub rate: f64,
    /// Tokens that went through the model.
    pub tokens: usize,
}

/// What is known of a run before it begins.
#[derive(Debug, Clone, PartialEq)]
pub struct Outline {
    /// Steps in all.
    pub steps: usize,
    /// Examples to train on.
    pub examples: usize,
    /// Examples held out.
    pub held_out: usize,
    /// Tokens of one epoch.
    pub tokens: usize,
    /// Languages of the data.
    pub languages: Vec<String>,
    /// Numbers that will train.
    pub parameters: usize,
    /// Bytes of private memory that it takes on our own trainer.
    pub memory: u64,
    /// What a researcher should know of the data.
    pub notices: Vec<String>,
}

/// Checks base, data and settings as far as that goes without the weights, of which only the headers are read.
pub fn outline(spec: &Spec<'_>) -> Result<Outline, TrainError> {
    let (config, data, schedule) = prepare(spec)?;
    super::base::check_weights(spec.base)?;
    let adapter = fresh(&config, spec.settings)?;
    Ok(Outline {
        memory: memory::needed(&config, spec.settings, &data, adapter.values.len()),
        steps: schedule.total(),
        examples: data.examples.len(),
        held_out: data.held_out.len(),
        tokens: data.examples.iter().map(Example::length).sum(),
        languages: data.languages,
        parameters: adapter.values.len(),
        notices: data.notices,
    })
}

/// Whether a run does clearly worse than it began, not in one odd step but over several.
fn risen(before: &[f32], now: f64) -> Option<String> {
    const STEPS: usize = 8;
    if before.len() + 1 < 2 * STEPS {
        return None;
    }
    let sum = |losses: &[f32]| losses.iter().map(|loss| f64::from(*loss)).sum::<f64>();
    let begun = sum(&before[..STEPS]) / STEPS as f64;
    let recent = (sum(&before[before.len() + 1 - STEPS..]) + now) / STEPS as f64;
    (recent > 1.3 * begun + 1.0).then(|| {
        format!("the loss is {recent:.2} nats over the last {STEPS} steps, over the first it was {begun:.2}")
    })
}

fn prepare(spec: &Spec<'_>) -> Result<(Config, Data, Schedule), TrainError> {
    let settings = spec.settings;
    settings.check()?;
    let config = super::base::read_config(spec.base)?;
    if settings.sequence_len > config.max_position_embeddings {
        return Err(TrainError::Setting {
            name: "sequence_len".into(),
            why: format!(
                "is {}, the base model reads {} tokens at most",
                settings.sequence_len, config.max_position_embeddings
            ),
        });
    }
    let reader = Reader::open(spec.base)?;
    let data = Data::read(spec.data, &reader, settings, spec.language)?;
    let schedule = Schedule::new(&data.examples, settings);
    Ok((config, data, schedule))
}

fn fresh(config: &Config, settings: &Settings) -> Result<Adapter, TrainError> {
    Adapter::new(
        config,
        &settings.modules(),
        settings.lora_r,
        settings.lora_alpha,
        settings.seed,
    )
}

/// A run in progress.
pub struct Trainer {
    settings: Settings,
    learner: Box<dyn Learner>,
    /// How the numbers lie; what they are is the learner's to know.
    layout: Adapter,
    data: Data,
    schedule: Schedule,
    losses: Vec<f32>,
    state: State,
    /// Loss of guessing every token alike, in nats.
    guess: f64,
}

impl Trainer {
    /// Reads everything and stands before the first step, with our own learner. Say how the untrained model does with
    /// [`Trainer::look`].
    pub fn new(spec: &Spec<'_>) -> Result<Self, TrainError> {
        Self::with(spec, |spec, adapter| Ok(Box::new(Own::new(spec, adapter)?)))
    }

    /// The same with the learner that `make` gives, which begins with the numbers of the adapter it is shown.
    pub fn with(
        spec: &Spec<'_>,
        make: impl FnOnce(&Spec<'_>, &Adapter) -> Result<Box<dyn Learner>, TrainError>,
    ) -> Result<Self, TrainError> {
        let (config, data, schedule) = prepare(spec)?;
        let settings = spec.settings.clone();
        let layout = fresh(&config, &settings)?;
        let needs = memory::needed(&config, &settings, &data, layout.values.len());
        if let Some(has) = spec.memory.filter(|has| needs > *has) {
            return Err(TrainError::Memory { needs, has });
        }
        let learner = make(spec, &layout)?;
        let state = State {
            base: spec.base_digest.to_owned(),
            data: spec.data_digest.to_owned(),
            settings: settings.canonical(),
            total: schedule.total(),
            rng: settings.seed,
            examples: (data.examples.len(), data.held_out.len()),
            learners: vec![learner.name()],
            ..State::default()
        };
        Ok(Self {
            guess: (config.vocab_size as f64).ln(),
            settings,
            learner,
            layout,
            data,
            schedule,
            losses: Vec::new(),
            state,
        })
    }

    /// Goes on from a checkpoint of the same run, or from none at all.
    pub fn resume(spec: &Spec<'_>, bytes: &[u8]) -> Result<Self, TrainError> {
        let mut trainer = Self::new(spec)?;
        trainer.restore(bytes)?;
        Ok(trainer)
    }

    /// Takes up the state of a checkpoint of the same run; on an error nothing has changed.
    pub fn restore(&mut self, bytes: &[u8]) -> Result<(), TrainError> {
        let found = Checkpoint::decode(bytes, &self.layout)?;
        for (what, theirs, ours) in [
            ("base model", &found.state.base, &self.state.base),
            ("data", &found.state.data, &self.state.data),
            ("settings", &found.state.settings, &self.state.settings),
        ] {
            if theirs != ours {
                return Err(TrainError::Checkpoint(format!(
                    "was made with another {what}: {theirs}, not {ours}"
                )));
            }
        }
        if found.state.total != self.state.total || found.state.step > found.state.total {
            return Err(TrainError::Checkpoint(format!(
                "is of step {} of {}, this run has {}",
                found.state.step, found.state.total, self.state.total
            )));
        }
        let numbers = Numbers {
            values: found.values,
            mean: found.mean,
            square: found.square,
        };
        self.learner.take_up(numbers, found.state.step)?;
        self.losses = found.losses;
        self.state = State {
            previous: Some(checkpoint::digest(bytes)),
            ..found.state
        };
        let name = self.learner.name();
        if self.state.learners.last() != Some(&name) && self.state.learners.len() < LEARNERS_MAX {
            self.state.learners.push(name);
        }
        Ok(())
    }

    /// The checkpoint of this moment, and its digest. The next one will name it.
    pub fn checkpoint(&mut self) -> Result<(Vec<u8>, String), TrainError> {
        self.state.cursor = self.schedule.cursor(self.state.step);
        let Numbers { values, mean, square } = self.learner.numbers()?;
        let bytes = Checkpoint {
            state: self.state.clone(),
            values,
            mean,
            square,
            losses: self.losses.clone(),
        }
        .encode(&self.layout)?;
        let digest = checkpoint::digest(&bytes);
        self.state.previous = Some(digest.clone());
        Ok((bytes, digest))
    }

    /// How far it got, and what it belongs to.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// How the numbers that train lie, with those that they began as.
    pub fn layout(&self) -> &Adapter {
        &self.layout
    }

    /// What the learner took beside this process.
    pub fn taken(&self) -> Taken {
        self.learner.taken()
    }

    /// Loss of every step so far.
    pub fn losses(&self) -> &[f32] {
        &self.losses
    }

    /// What was read.
    pub fn data(&self) -> &Data {
        &self.data
    }

    /// Takes one step. `alive` is called after every batch; what it refuses ends the step without a trace.
    pub fn step<E: From<TrainError>>(
        &mut self,
        mut alive: impl FnMut(usize) -> Result<(), E>,
    ) -> Result<Step, E> {
        let number = self.state.step;
        let rate = self.settings.rate(number, self.state.total);
        let examples = &self.data.examples;
        let rows = self.schedule.rows(number);
        let batches: Vec<Packed> = rows
            .chunks(self.settings.micro_batch_size)
            .map(|rows| Packed::new(rows.iter().flatten().map(|example| &examples[*example])))
            .collect();
        // Every target counts alike, in whichever batch of the step it is.
        let targets: usize = batches.iter().map(|batch| batch.targets.len()).sum();
        let scale = 1.0 / targets.max(1) as f32;
        self.learner.begin();
        let (mut nats, mut tokens) = (0.0, 0);
        for (index, batch) in batches.iter().enumerate() {
            // Nothing is drawn from what came before: a step can be done again.
            let seed = Rng::new(self.settings.seed ^ ((number as u64) << 20) ^ index as u64).bits();
            nats += self.learner.add(batch, scale, seed)?;
            tokens += batch.ids.len();
            alive(batch.ids.len())?;
        }
        let loss = nats / targets.max(1) as f64;
        let diverged = |what: String| TrainError::Diverged {
            step: number + 1,
            what,
        };
        if !loss.is_finite() {
            return Err(diverged(format!("the loss is {loss}")).into());
        }
        // Far worse than blind guessing, and than it was: it will not find back.
        let first = self.losses.first().map_or(loss, |first| f64::from(*first));
        if loss > (self.guess + 2.0).max(1.5 * first) {
            let guess = self.guess;
            return Err(diverged(format!(
                "the loss is {loss:.2} nats, {first:.2} at first, and guessing blindly costs {guess:.2}"
            ))
            .into());
        }
        if let Some(what) = risen(&self.losses, loss) {
            return Err(diverged(what).into());
        }
        let norm = self
            .learner
            .apply(rate)?
            .ok_or_else(|| diverged("the gradient is not finite".into()))?;
        self.losses.push(loss as f32);
        self.state.step += 1;
        self.state.tokens += tokens as u64;
        self.state.finished = self.state.step >= self.state.total;
        Ok(Step {
            step: self.state.step,
            loss,
            norm,
            rate,
            tokens,
        })
    }

    /// Whether a look is due: before the first step, every `eval_steps`, and at the end.
    pub fn look_is_due(&self) -> bool {
        let State {
            step, total, looks, ..
        } = &self.state;
        let every = self.settings.eval_steps;
        let due = *step == 0 || step == total || (every > 0 && step.is_multiple_of(every));
        due && looks.last().is_none_or(|last| last.step != *step)
    }

    /// Looks at what was held out, language by language, and notes it. Ends the run when patience is at its end.
    pub fn look<E: From<TrainError>>(
        &mut self,
        mut alive: impl FnMut(usize) -> Result<(), E>,
    ) -> Result<&Look, E> {
        let mut look = Look {
            step: self.state.step,
            ..Look::default()
        };
        let mut held_out: Vec<&Example> = self.data.held_out.iter().collect();
        held_out.sort_by_key(|example| example.language);
        let same = |left: &&Example, right: &&Example| left.language == right.language;
        for examples in held_out.chunk_by(same) {
            let (mut held, mut nats) = (Held::default(), 0.0);
            let mut rest = examples;
            while !rest.is_empty() {
                let mut tokens = 0;
                let fits = |example: &&&Example| {
                    tokens += example.length();
                    tokens <= LOOK_TOKENS
                };
                let count = rest.iter().take_while(fits).count().max(1);
                let (now, later) = rest.split_at(count);
                rest = later;
                let batch = Packed::new(now.iter().copied());
                nats += self.learner.loss(&batch)?;
                held.tokens += batch.targets.len() as u64;
                held.bytes += now.iter().map(|example| example.bytes as u64).sum::<u64>();
                alive(batch.ids.len())?;
            }
            if !nats.is_finite() {
                let what = format!("the loss of what was held out is {nats}");
                return Err(TrainError::Diverged {
                    step: self.state.step,
                    what,
                }
                .into());
            }
            held.nanonats = (nats * 1e9) as u64;
            if let Some(tag) = examples
                .first()
                .and_then(|first| self.data.languages.get(first.language))
            {
                look.languages.insert(tag.clone(), held);
            }
        }
        let patience = self.settings.early_stopping_patience;
        self.state.looks.push(look);
        let losses: Vec<f64> = self.state.looks.iter().map(Look::loss).collect();
        if patience > 0 && losses.len() > patience {
            let (before, late) = losses.split_at(losses.len() - patience);
            let best = before.iter().copied().fold(f64::INFINITY, f64::min);
            self.state.finished |= late.iter().all(|loss| *loss >= best);
        }
        let last = self.state.looks.len() - 1;
        Ok(&self.state.looks[last])
    }
}

#[cfg(test)]
mod tests {
    use super::risen;

    #[test]
    fn a_loss_that_rises_for_good_is_told_from_one_that_jumps() {
        let falling: Vec<f32> = (0..40).map(|step| 5.0 - step as f32 * 0.1).collect();
        assert_eq!(risen(&falling, 9.0), None, "one odd step");
        assert_eq!(risen(&falling[..7], 90.0), None, "too early to say");
        let mut rising = falling.clone();
        rising.extend([9.0; 4]);
        assert_eq!(risen(&rising, 1.0), None);
        rising.extend([9.0; 3]);
        let why = risen(&rising, 9.0).unwrap();
        assert!(why.contains("9.00 nats over the last 8 steps"), "{why}");
        // What is nearly known may double.
        assert_eq!(risen(&[0.01; 40], 0.5), None);
    }
}
