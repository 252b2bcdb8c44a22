//! `karez offers` and `karez models`: what there is to use.
use crate::{
    cli::Context,
    link::{self, call},
    out::{Column, Table, rate, size},
    view,
};
use anyhow::Result;
use clap::Args;
use karez_core::unit::Portion;
use karez_proto::{control as wire, records};
use serde_json::{Value, json};

/// `karez offers`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  karez offers\n  karez offers --json")]
pub(crate) struct OffersArgs {}

/// `karez models`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  karez models")]
pub(crate) struct ModelsArgs {}

pub(crate) async fn offers(context: &Context, _: OffersArgs) -> Result<()> {
    let mut link = link::open(&context.home).await?;
    let mut offers = call(link.client.offers(wire::OffersRequest {})).await?.offers;
    offers.sort_by_key(|v| {
        let offer = v.offer.as_ref();
        let cheapest = offer
            .and_then(|o| o.devices.iter().map(|d| d.rate).min())
            .unwrap_or(u64::MAX);
        (cheapest, offer.map(|o| o.name.clone()))
    });
    if context.out.json {
        context
            .out
            .json(&Value::Array(offers.iter().map(view::offer).collect()));
        return Ok(());
    }
    if offers.is_empty() {
        context
            .out
            .note("no node is known yet: wait for one to join, or invite one with `karez scheduler invite`");
        return Ok(());
    }
    let mut table = Table::new(&[
        ("NODE", Column::Cut),
        ("INSTITUTION", Column::Cut),
        ("IN", Column::Left),
        ("DEVICE", Column::Cut),
        ("FREE", Column::Right),
        ("PRICE", Column::Right),
        ("STATE", Column::Left),
    ]);
    for listed in &offers {
        let Some(offer) = &listed.offer else { continue };
        let state = if listed.connected {
            offer.state.clone()
        } else {
            "away".to_owned()
        };
        for device in &offer.devices {
            table.row(vec![
                offer.name.clone(),
                offer.institution.clone(),
                offer.country.clone(),
                device.class.clone(),
                free(device),
                rate(device.rate),
                state.clone(),
            ]);
        }
    }
    context.out.table(&table);
    Ok(())
}

/// What is free: whole devices of all there are, and what is left of those that are shared.
fn free(device: &records::Device) -> String {
    let parts = device.shared_milli.iter().filter(|milli| **milli > 0);
    let parts: Vec<String> = parts
        .map(|milli| Portion::of(0, *milli).unwrap_or(Portion::ONE).to_string())
        .collect();
    let whole = format!("{}/{}", device.free, device.count);
    if parts.is_empty() {
        whole
    } else {
        format!("{whole} + {}", parts.join(" + "))
    }
}

pub(crate) async fn models(context: &Context, _: ModelsArgs) -> Result<()> {
    let mut link = link::open(&context.home).await?;
    let mut models = call(link.client.models(wire::ModelsRequest {})).await?.models;
    models.sort_by(|a, b| a.name.cmp(&b.name));
    if context.out.json {
        let model = |m: &wire::Model| json!({"name": m.name, "format": m.format, "licence": m.licence, "artifact": view::artifact_text(m.artifact.as_ref())});
        context
            .out
            .json(&Value::Array(models.iter().map(model).collect()));
        return Ok(());
    }
    if models.is_empty() {
        context
            .out
            .note("the scheduler knows no model yet: `karez artifact add --shipped` adds the one that is part of Karez");
        return Ok(());
    }
    let mut table = Table::new(&[
        ("MODEL", Column::Left),
        ("FOR", Column::Left),
        ("FORMAT", Column::Left),
        ("SIZE", Column::Right),
        ("LICENCE", Column::Cut),
    ]);
    for m in &models {
        let work = match m.format.as_str() {
            "gguf" => "generate",
            "safetensors" => "embed",
            _ => "",
        };
        let bytes = m.artifact.as_ref().map_or(0, |a| a.bytes);
        table.row(vec![
            m.name.clone(),
            work.into(),
            m.format.clone(),
            size(bytes),
            m.licence.clone(),
        ]);
    }
    context.out.table(&table);
    Ok(())
}
