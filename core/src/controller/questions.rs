//! Questions: orders of one item whose answer somebody waits for. They go where their prompt is known, and leave a node
//! that says nothing.
//!
//! The rule itself is [`crate::routing`]; here is what it is asked about.
use super::mind::Controller;
use super::placing::request;
use crate::{
    id::{JobId, LeaseKey, PartIndex},
    key::NodeId,
    placement::Plan,
    prelude::*,
    records::{Order, Work},
    routing::{self, Prefix, Question, Route},
    unit::{Millis, Now},
};

/// A node that took a question and says nothing for so long is left: it should have said every second that it is at work.
pub(super) const QUIET_MAX: Millis = Millis(4_500);
/// For so long such a node is the last choice for questions, however cheap it is.
pub(super) const SHUN: Millis = Millis(60_000);
/// Prompts that are kept; those of further questions are guessed at.
const PROMPTS_MAX: usize = 8_192;
/// Nodes that one question is kept from at most.
const SHUNNED_MAX: usize = 32;

/// Somebody waits for the one answer of this order.
pub(super) fn is_question(order: &Order) -> bool {
    matches!(order.work, Work::Generate(_)) && order.items == 1
}

impl Controller {
    pub(super) fn on_prompt(&mut self, job: JobId, prefix: Prefix) {
        if self.prompts.len() >= PROMPTS_MAX {
            let jobs = &self.jobs;
            self.prompts
                .retain(|id, _| jobs.get(id).is_some_and(|job| !job.state.ended()));
        }
        if self.prompts.len() < PROMPTS_MAX && !prefix.is_empty() {
            self.prompts.insert(job, prefix);
        }
    }

    /// Nodes that a new question had better not go to. When no other is left, they are tried all the same, after a pause.
    pub(super) fn shunned(&self, now: Now, order: &Order) -> Vec<NodeId> {
        let lately = self.silent.iter().filter(|(_, until)| **until > now.mono);
        let lately = lately.map(|(node, _)| *node).take(SHUNNED_MAX);
        if is_question(order) {
            lately.collect()
        } else {
            Vec::new()
        }
    }

    /// Its node must say every second that it is at work.
    pub(super) fn must_speak(&self, key: &LeaseKey) -> bool {
        let order = self.jobs.get(&key.job).map(|job| &job.order);
        order.is_some_and(|order| is_question(order) && matches!(&order.work, Work::Generate(g) if g.stream))
    }

    /// Sends a question where it costs least, what is warm counted in. `None` when it rather waits a moment for a node
    /// that is busy.
    pub(super) fn route(&mut self, now: Now, id: JobId, index: PartIndex, plan: Plan) -> Option<Plan> {
        let Some(job) = self.jobs.get(&id).filter(|job| is_question(&job.order)) else {
            return Some(plan);
        };
        let Some(model) = job.order.work.model().copied() else {
            return Some(plan);
        };
        let part = job.parts.get(index as usize)?;
        let age = Millis(now.utc.0.saturating_sub(part.changed_at.0));
        let request = request(&job.order, part.items, part.ceiling, &part.avoid);
        let nothing = Prefix::default();
        let prefix = self.prompts.get(&id).unwrap_or(&nothing);
        let question = Question {
            request: &request,
            model: &model,
            prefix,
            age,
        };
        match routing::route(now.mono, &self.market, &self.hearth, &question, plan) {
            Route::Go(plan) => {
                let prefix = prefix.clone();
                self.hearth.expect(plan.chosen.node, model.digest, &prefix);
                Some(plan)
            }
            Route::Wait(more) => {
                let at = now.mono.after(more.max(Millis(1)));
                if let Some(part) = self
                    .jobs
                    .get_mut(&id)
                    .and_then(|job| job.parts.get_mut(index as usize))
                {
                    part.cause = format!("waits up to {} ms for a node that knows its prompt", more.0);
                }
                // A device that comes free before then is looked at by itself.
                self.hold_back(at);
                None
            }
        }
    }
}
