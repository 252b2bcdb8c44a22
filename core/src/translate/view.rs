//! What questions are answered with.
use crate::{
    controller::{Explanation, JobView, LogLine, NodeStatus, PartView, Start},
    placement::{Candidate, Exclusion},
    prelude::*,
    records::Record,
};
use karez_proto::control as wire;

impl From<JobView> for wire::JobView {
    fn from(view: JobView) -> Self {
        let work = &view.order.work;
        let model = match (work.model_name(), work.model()) {
            ("", Some(model)) => model.digest.short(),
            (name, _) => name.to_owned(),
        };
        Self {
            job: view.id.0.0.to_vec(),
            label: view.label,
            state: view.state.as_str().into(),
            cause: view.cause,
            submitted_at: view.submitted_at.0,
            changed_at: view.changed_at.0,
            items: view.order.items,
            items_done: view.items_done,
            credits_reserved: view.reserved.0,
            credits_spent: view.spent.0,
            user: view.order.user.0.0.to_vec(),
            institution: view.order.institution.to_string(),
            work: work.kind().as_str().into(),
            model,
            meters: Some(view.meters.into()),
            input: Some(view.order.input.into()),
            parts: view.parts.into_iter().map(Into::into).collect(),
        }
    }
}

impl From<PartView> for wire::PartView {
    fn from(part: PartView) -> Self {
        Self {
            part: part.part,
            first_item: part.first_item,
            items: part.items,
            state: part.state.as_str().into(),
            cause: part.cause,
            fence: part.fence,
            node: part.node.map(|n| n.0.0.to_vec()).unwrap_or_default(),
            node_name: part.node_name,
            institution: part.institution.map(String::from).unwrap_or_default(),
            country: part.country.map(String::from).unwrap_or_default(),
            device_class: part.device_class,
            rate: part.rate.0,
            items_done: part.items_done,
            credits: part.credits.0,
            meters: Some(part.meters.into()),
            result: part.result.map(Into::into),
            why: part.why,
            alternatives: part.alternatives.into_iter().map(Into::into).collect(),
            changed_at: part.changed_at.0,
            receipt: part.receipt.map(|r| r.0.to_vec()).unwrap_or_default(),
            cost_estimate: part.cost_estimate.0,
            tokens: part.tokens,
            loss_micro: part.loss_micro,
        }
    }
}

impl From<Candidate> for wire::Alternative {
    fn from(candidate: Candidate) -> Self {
        let busy = if candidate.busy { ", busy now" } else { "" };
        Self {
            node: candidate.node.0.0.to_vec(),
            node_name: candidate.name,
            institution: candidate.institution.to_string(),
            country: candidate.country.to_string(),
            cost_estimate: candidate.cost.0,
            note: format!("{}, {}{busy}", candidate.device_class, candidate.rate),
        }
    }
}

impl From<Exclusion> for wire::Exclusion {
    fn from(exclusion: Exclusion) -> Self {
        Self {
            requirement: exclusion.requirement.to_string(),
            nodes: exclusion.nodes,
            nearest: exclusion.nearest,
        }
    }
}

impl From<Explanation> for wire::ExplainReply {
    fn from(explanation: Explanation) -> Self {
        let feasible = explanation.candidates.iter().filter(|c| !c.busy).count();
        let (starts, starts_in_ms) = match explanation.starts {
            Start::Now => ("now", 0),
            Start::In(wait) => ("later", wait.0),
            Start::Unknown => ("unknown", 0),
            Start::Never => ("never", 0),
        };
        Self {
            nodes_known: explanation.known,
            nodes_feasible: u32::try_from(feasible).unwrap_or(u32::MAX),
            exclusions: explanation
                .refusal
                .exclusions
                .into_iter()
                .map(Into::into)
                .collect(),
            candidates: explanation.candidates.into_iter().map(Into::into).collect(),
            summary: explanation.summary,
            job: None,
            cost_low: explanation.cost.map(|(low, _)| low.0),
            cost_high: explanation.cost.map(|(_, high)| high.0),
            starts: starts.into(),
            starts_in_ms,
        }
    }
}

impl From<LogLine> for wire::LogEntry {
    fn from(line: LogLine) -> Self {
        Self {
            at: line.at.0,
            part: line.part,
            text: line.text,
        }
    }
}

impl From<NodeStatus> for wire::OfferView {
    fn from(status: NodeStatus) -> Self {
        Self {
            offer: Some(status.offer.to_wire()),
            connected: status.connected,
            heard_at: status.heard_at.0,
            leases: status.leases,
            failures: status.failures,
        }
    }
}
