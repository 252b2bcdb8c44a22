//! The scheduler's answers in the CLI's own forms: short ids, references, JSON.
use crate::fault::{Kind, fault};
use anyhow::Result;
use karez_core::{
    artifact::{ArtifactKind, ArtifactRef},
    id::Digest,
    unit::Bytes,
};
use karez_proto::{control as wire, records};
use serde_json::{Value, json};
use std::fmt::Write;

/// Bytes as hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::with_capacity(2 * bytes.len()), |mut out, byte| {
            let _ = write!(out, "{byte:02x}");
            out
        })
}

/// The first twelve hex digits of an id: enough to name it to the scheduler again.
pub(crate) fn short(bytes: &[u8]) -> String {
    hex(bytes.get(..6).unwrap_or(bytes))
}

/// A reference as the scheduler wrote it, checked.
pub(crate) fn artifact(wire: Option<&records::ArtifactRef>) -> Result<ArtifactRef> {
    let bad = |why: &str| fault(Kind::Other, format!("the scheduler named an artifact that {why}"));
    let wire = wire.ok_or_else(|| bad("is missing"))?;
    let kind = match wire.kind.as_str() {
        "blob" => ArtifactKind::Blob,
        "tree" => ArtifactKind::Tree,
        "served" => ArtifactKind::Served,
        _ => return Err(bad("is of an unknown kind")),
    };
    let digest = Digest::try_from(wire.digest.as_slice()).map_err(|_| bad("has no digest"))?;
    Ok(ArtifactRef {
        digest,
        bytes: Bytes(wire.bytes),
        kind,
    })
}

/// The reference as text, or nothing.
pub(crate) fn artifact_text(wire: Option<&records::ArtifactRef>) -> Option<String> {
    artifact(wire).ok().map(|a| a.to_string())
}

/// `embed with all-MiniLM-L6-v2`.
pub(crate) fn work_text(job: &wire::JobView) -> String {
    if job.model.is_empty() {
        job.work.clone()
    } else {
        format!("{} with {}", job.work, job.model)
    }
}

pub(crate) fn meters(m: Option<&records::Meters>) -> Value {
    let Some(m) = m else { return Value::Null };
    json!({
        "device_ms": m.device_ms, "cpu_ms": m.cpu_ms, "memory_peak_bytes": m.memory_peak_bytes,
        "memory_byte_seconds": m.memory_byte_seconds,
        "tokens_in": m.tokens_in, "tokens_out": m.tokens_out, "tokens_cached": m.tokens_cached,
        "items": m.items, "bytes_in": m.bytes_in, "bytes_out": m.bytes_out, "millijoules": m.millijoules,
    })
}

fn alternative(a: &wire::Alternative) -> Value {
    json!({
        "node": hex(&a.node), "node_name": a.node_name, "institution": a.institution, "country": a.country,
        "cost_estimate_microcredits": a.cost_estimate, "note": a.note,
    })
}

fn part(p: &wire::PartView) -> Value {
    json!({
        "part": p.part, "first_item": p.first_item, "items": p.items, "items_done": p.items_done,
        "state": p.state, "cause": p.cause, "attempt": p.fence,
        "node": hex(&p.node), "node_name": p.node_name, "institution": p.institution, "country": p.country,
        "device_class": p.device_class, "rate_microcredits": p.rate, "credits_microcredits": p.credits,
        "cost_estimate_microcredits": p.cost_estimate, "why": p.why,
        "alternatives": p.alternatives.iter().map(alternative).collect::<Vec<_>>(),
        "meters": meters(p.meters.as_ref()), "result": artifact_text(p.result.as_ref()),
        "receipt": if p.receipt.is_empty() { Value::Null } else { json!(hex(&p.receipt)) },
        "changed_at_ms": p.changed_at,
    })
}

/// A job as JSON. Money is in micro-credits, times in milliseconds since 1970.
pub(crate) fn job(j: &wire::JobView) -> Value {
    json!({
        "job": hex(&j.job), "label": j.label, "state": j.state, "cause": j.cause,
        "work": j.work, "model": j.model, "user": hex(&j.user), "institution": j.institution,
        "items": j.items, "items_done": j.items_done,
        "submitted_at_ms": j.submitted_at, "changed_at_ms": j.changed_at,
        "reserved_microcredits": j.credits_reserved, "spent_microcredits": j.credits_spent,
        "meters": meters(j.meters.as_ref()), "parts": j.parts.iter().map(part).collect::<Vec<_>>(),
    })
}

/// An explanation as JSON.
pub(crate) fn explanation(e: &wire::ExplainReply) -> Value {
    let exclusion =
        |x: &wire::Exclusion| json!({"requirement": x.requirement, "nodes": x.nodes, "nearest": x.nearest});
    json!({
        "summary": e.summary, "nodes_known": e.nodes_known, "nodes_feasible": e.nodes_feasible,
        "exclusions": e.exclusions.iter().map(exclusion).collect::<Vec<_>>(),
        "candidates": e.candidates.iter().map(alternative).collect::<Vec<_>>(),
        "cost_low_microcredits": e.cost_low, "cost_high_microcredits": e.cost_high,
        "starts": e.starts, "starts_in_ms": (e.starts == "later").then_some(e.starts_in_ms),
        "job": e.job.as_ref().map(job),
    })
}

/// A listed offer as JSON.
pub(crate) fn offer(view: &wire::OfferView) -> Value {
    let o = view.offer.clone().unwrap_or_default();
    let device = |d: &records::Device| json!({"class": d.class, "count": d.count, "free": d.free, "memory_bytes": d.memory_bytes, "rate_microcredits": d.rate, "share_min_milli": d.share_min_milli, "shared_milli": d.shared_milli});
    let engine = |e: &records::Engine| json!({"name": e.name, "version": e.version, "work": e.work, "speed_milli": e.speed_milli, "method": e.method});
    json!({
        "node": hex(&o.node), "name": o.name, "institution": o.institution, "country": o.country, "state": o.state,
        "connected": view.connected, "leases": view.leases, "failures": view.failures, "heard_at_ms": view.heard_at,
        "devices": o.devices.iter().map(device).collect::<Vec<_>>(),
        "engines": o.engines.iter().map(engine).collect::<Vec<_>>(),
        "cores": o.cores, "memory_bytes": o.memory_bytes, "isa": o.isa, "isolation": o.isolation,
        "artifact_addrs": o.artifact_addrs, "cached": o.cached.iter().map(|d| hex(d)).collect::<Vec<_>>(),
        "expires_at_ms": o.expires_at,
    })
}
