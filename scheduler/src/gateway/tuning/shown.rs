//! Jobs, events and checkpoints in OpenAI's shapes.
use super::{JobState, Trail, Tuning};
use crate::mind::Shared;
use karez_net::store::ArtifactStore;
use serde_json::{Value, json};

pub(super) async fn job(shared: &Shared, row: &Tuning) -> Value {
    let view = match &row.over {
        Some(_) => None,
        None => shared.look(|c| c.job(&row.job)).await,
    };
    let over = row.over.as_ref();
    let status = match (over.map(|over| over.state), view.as_ref().map(|view| view.state)) {
        (Some(JobState::Done), _) => "succeeded",
        (Some(JobState::Cancelled), _) | (None, Some(JobState::Cancelled)) => "cancelled",
        (Some(_), _) | (None, Some(JobState::Failed)) => "failed",
        (None, Some(JobState::Queued | JobState::Placed)) => "queued",
        // Done, too: its result is being made.
        (None, _) => "running",
    };
    let error = over.filter(|over| over.state == JobState::Failed);
    let error = error.map(|over| json!({"code": "job_failed", "message": over.cause, "param": null}));
    let hyper = json!({
        "n_epochs": row.epochs, "batch_size": row.batch_size, "learning_rate_multiplier": row.multiplier,
    });
    json!({
        "id": row.id, "object": "fine_tuning.job", "model": row.model, "status": status, "error": error,
        "created_at": row.created_at, "finished_at": over.map(|over| over.at), "estimated_finish": null,
        "fine_tuned_model": row.is_ready().then_some(&row.name), "organization_id": row.owner.short(),
        "training_file": row.file, "validation_file": null,
        "result_files": over.map(|over| over.results.clone()).unwrap_or_default(),
        "trained_tokens": over.filter(|over| over.state == JobState::Done).map(|over| over.tokens),
        "hyperparameters": hyper,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyper}},
        "seed": row.seed, "user_provided_suffix": row.suffix, "metadata": row.metadata, "integrations": [],
        "karez": {
            "job": row.job.to_string(), "steps": row.steps, "steps_done": view.as_ref().map(|view| view.items_done),
            "examples": row.examples.0, "examples_held_out": row.examples.1,
            "cost_microcredits": view.as_ref().map(|view| view.spent.0),
        },
    })
}

/// A model that came of a job.
pub(super) fn model(row: &Tuning) -> Value {
    let adapter = row.over.as_ref().and_then(|over| over.adapter);
    json!({
        "id": row.name, "object": "model", "created": row.over.as_ref().map_or(0, |over| over.at),
        "owned_by": row.owner.short(),
        "karez": {
            "base": row.served.digest.to_string(), "adapter": adapter.map(|adapter| adapter.digest.to_string()),
            "bytes": row.served.bytes.0, "format": "gguf",
        },
    })
}

/// What happened, the latest first.
pub(super) fn events(row: &Tuning, trail: &Trail) -> Vec<Value> {
    // Within a second the order of making stands.
    let mut all: Vec<(u64, Value)> = Vec::new();
    let mut say = |at: u64, mark: String, level: &str, message: String, data: Option<Value>| {
        let kind = if data.is_some() { "metrics" } else { "message" };
        all.push((
            at,
            json!({
                "id": format!("ftevent-{}-{mark}", row.id.trim_start_matches("ftjob-")),
                "object": "fine_tuning.job.event", "created_at": at, "level": level, "message": message,
                "type": kind, "data": data.unwrap_or_else(|| json!({})),
            }),
        ));
    };
    let begun = format!(
        "Accepted: {} steps over {} examples, {} held out",
        row.steps, row.examples.0, row.examples.1
    );
    say(row.created_at, "begin".into(), "info", begun, None);
    for (i, notice) in row.notices.iter().enumerate() {
        say(row.created_at, format!("notice{i}"), "warn", notice.clone(), None);
    }
    for line in &trail.log {
        let part = line
            .part
            .map(|part| format!("Part {}: ", part))
            .unwrap_or_default();
        // The middle of a long history is dropped: what a line says is its name, not its place.
        let mark =
            karez_core::id::Digest::of(format!("{} {part}{}", line.at.0, line.text).as_bytes()).to_string();
        let mark = format!("l{}", mark.get(..12).unwrap_or(&mark));
        say(
            line.at.0 / 1000,
            mark,
            "info",
            format!("{part}{}", line.text),
            None,
        );
    }
    for (step, loss) in &trail.losses {
        // A step is told once its checkpoint stands; one under way, with the latest.
        let at = trail.checkpoints.iter().find(|stored| stored.step >= *step);
        let at = at.map_or_else(|| trail.latest(row), |stored| stored.at);
        let mut data = json!({"step": step, "total_steps": row.steps, "train_loss": loss});
        let mut message = format!("Step {step}/{}: training loss={loss:.4}", row.steps);
        if let Some(held) = trail.held_out.get(step) {
            data["full_valid_loss"] = json!(held);
            message += &format!(", held-out loss={held:.4}");
        }
        say(at, format!("s{step}"), "info", message, Some(data));
    }
    if let Some(over) = &row.over {
        let (level, message) = match over.state {
            JobState::Done if over.adapter.is_some() => ("info", format!("The model {} is ready", row.name)),
            JobState::Done => ("info", format!("The model {} was deleted", row.name)),
            JobState::Cancelled => ("warn", "The job was cancelled".to_owned()),
            _ => ("error", format!("The job failed: {}", over.cause)),
        };
        say(over.at, "end".into(), level, message, None);
    }
    all.sort_by_key(|(at, _)| *at);
    all.into_iter().rev().map(|(_, event)| event).collect()
}

impl Trail {
    /// When something last happened.
    fn latest(&self, row: &Tuning) -> u64 {
        let stored = self.checkpoints.iter().map(|stored| stored.at);
        let said = self.log.iter().map(|line| line.at.0 / 1000);
        let last = stored.chain(said).max();
        last.unwrap_or(row.created_at).max(row.created_at)
    }

    /// The loss at that step, or at the last one before it that is known.
    fn loss(&self, step: u64) -> Option<f64> {
        let upto = self.losses.iter().take_while(|(at, _)| *at <= step);
        upto.last().map(|(_, loss)| *loss)
    }
}

/// What a checkpoint is called as a model.
pub(super) fn checkpoint_name(row: &Tuning, step: u64) -> String {
    format!("{}:step-{step}", row.name)
}

/// The checkpoints that are still there, the latest first.
pub(super) fn checkpoints(store: &ArtifactStore, row: &Tuning, trail: &Trail) -> Vec<Value> {
    let there = trail
        .checkpoints
        .iter()
        .filter(|stored| store.contains(&stored.artifact));
    let shown = there.map(|stored| {
        let step = stored.step;
        json!({
            "id": format!("ftckpt-{}-{step}", row.id.trim_start_matches("ftjob-")),
            "object": "fine_tuning.job.checkpoint", "created_at": stored.at, "fine_tuning_job_id": row.id,
            "fine_tuned_model_checkpoint": checkpoint_name(row, step), "step_number": step,
            "metrics": {
                "step": step, "train_loss": trail.loss(step), "full_valid_loss": trail.held_out.get(&step),
            },
            "karez": {"digest": stored.artifact.digest.to_string(), "bytes": stored.artifact.bytes.0},
        })
    });
    let mut shown: Vec<Value> = shown.collect();
    shown.reverse();
    shown
}
