//! The node as its owner sees it.
use super::Daemon;
use crate::control::{DeviceView, EngineView, LeaseView, NodeStatus, SchedulerView};

impl Daemon {
    pub(super) fn status(&self) -> NodeStatus {
        let agent = self.agent.status();
        let settings = self.agent.config();
        let mut notes = self.found.notes.clone();
        notes.extend(
            self.stalled
                .as_ref()
                .map(|why| format!("no leases are taken: {why}")),
        );
        NodeStatus {
            node: self.id.to_string(),
            name: self.config.name.clone(),
            institution: self.config.institution.to_string(),
            country: self.config.country.to_string(),
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            uptime_ms: self.now().mono.0,
            state: agent.state.as_str().into(),
            offer_sequence: agent.offer_sequence,
            devices: settings
                .devices
                .iter()
                .map(|d| DeviceView {
                    class: d.class.clone(),
                    count: d.count,
                    memory_bytes: d.memory.0,
                    rate: d.rate.0,
                })
                .collect(),
            engines: settings
                .engines
                .iter()
                .map(|e| EngineView {
                    name: e.name.clone(),
                    work: e.work.as_str().into(),
                    speed_milli: e.speed.0,
                    method: e.method.clone(),
                })
                .collect(),
            isolation: settings.isolation.clone(),
            schedulers: self
                .known
                .iter()
                .map(|(key, known)| SchedulerView {
                    key: key.to_string(),
                    name: known.name.clone(),
                    control_addr: known.control_addr.clone(),
                    connected: known.connected,
                    why: known.why.clone(),
                    offer: known.offer.clone(),
                })
                .collect(),
            leases: agent
                .held
                .iter()
                .map(|(scheduler, held)| LeaseView {
                    job: held.key.job.to_string(),
                    part: held.key.part,
                    fence: held.key.fence,
                    scheduler: scheduler.to_string(),
                    phase: held.phase.as_str().into(),
                    items_done: held.items_done,
                    tokens: held.tokens,
                })
                .collect(),
            guests: self.guests.len(),
            workers_warm: self.tools.warm.idle(),
            store_bytes: self.tools.artifacts.store().used().0,
            store_bytes_max: self.tools.artifacts.store().limit().0,
            notes,
        }
    }
}
