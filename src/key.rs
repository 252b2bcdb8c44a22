//! `karez key`: API keys, each an Ed25519 key of its own that the user's key has let in with a budget.
use crate::{
    cli::Context,
    fault::{Kind, fault},
    link::{self, Link, call},
    out::{Column, Table, credits},
    task::utc_now,
};
use anyhow::Result;
use clap::{Args, Subcommand};
use karez_core::{
    apikey::ApiToken,
    records::{Delegation, Signed},
    unit::{Credits, Millis},
};
use karez_proto::{control as wire, records as record_wire};
use serde_json::json;
use std::time::Duration;

/// `karez key`.
#[derive(Debug, Args)]
#[command(
    arg_required_else_help = true,
    after_help = "\
Examples:
  karez key new --name notebook --budget 5
  karez key list
  karez key revoke notebook"
)]
pub(crate) struct KeyArgs {
    #[command(subcommand)]
    command: KeyCommand,
}

#[derive(Debug, Subcommand)]
enum KeyCommand {
    /// Make a key with a part of your budget; it is shown once
    #[command(after_help = "\
Whoever holds the key can spend its budget, and nothing else of yours.

Examples:
  karez key new --name notebook --budget 5
  export OPENAI_API_KEY=$(karez key new --name notebook --budget 5)")]
    New(NewArgs),
    /// List your keys and what is left of their budgets
    #[command(after_help = "Example:\n  karez key list")]
    List,
    /// Take a key back: it stops working, and what is left returns to you
    #[command(after_help = "Example:\n  karez key revoke notebook")]
    Revoke(RevokeArgs),
}

#[derive(Debug, Args)]
struct NewArgs {
    /// What you call it
    #[arg(long, value_name = "TEXT")]
    name: String,
    /// Credits it can spend, taken from yours
    #[arg(long, value_name = "CREDITS")]
    budget: Credits,
    /// How long it works
    #[arg(long, value_name = "SPAN", default_value = "1year", value_parser = humantime::parse_duration)]
    valid: Duration,
}

#[derive(Debug, Args)]
struct RevokeArgs {
    /// Its name, or the beginning of its id in `karez key list`
    key: String,
}

pub(crate) async fn run(context: &Context, args: KeyArgs) -> Result<()> {
    let link = link::open(&context.home).await?;
    match args.command {
        KeyCommand::New(args) => new(context, &link, args).await,
        KeyCommand::List => list(context, &link).await,
        KeyCommand::Revoke(args) => revoke(context, &link, &args.key).await,
    }
}

async fn new(context: &Context, link: &Link, args: NewArgs) -> Result<()> {
    let out = context.out;
    let known = call(link.client.clone().keys(wire::KeysRequest {})).await?;
    if named(&known, &args.name).next().is_some() {
        return Err(fault(
            Kind::Refused,
            format!("you have a key {:?} already: choose another name", args.name),
        ));
    }
    let mut random = [0; 32];
    getrandom::fill(&mut random).map_err(|e| anyhow::anyhow!("the system gives no randomness: {e}"))?;
    let token = ApiToken::new(random);
    let issued_at = utc_now();
    let valid = Millis(u64::try_from(args.valid.as_millis()).unwrap_or(u64::MAX));
    let delegation = Delegation {
        user: link.user(),
        scheduler: link.config.scheduler,
        key: token.public(),
        name: args.name,
        credits: args.budget,
        issued_at,
        expires_at: issued_at.after(valid),
    };
    let signed = Signed::sign(delegation, &link.secret);
    // The scheduler will check every field: find out here first, in the same words.
    let signed = Signed::<Delegation>::open(&signed.encode())
        .map_err(|error| fault(Kind::Refused, error.to_string()))?;
    let request = wire::DelegateRequest {
        delegation: signed.encode(),
    };
    let reply = call(link.client.clone().delegate(request)).await?;
    if out.json {
        out.json(&json!({
            "api_key": token.reveal(), "id": token.public().to_string(), "name": signed.name,
            "credits_microcredits": reply.credits, "expires_at": signed.expires_at.0, "base_url": url(&known),
        }));
        return Ok(());
    }
    out.line(token.reveal());
    out.note(format!(
        "it can spend {} credits and is shown this once: keep it like a password",
        credits(reply.credits)
    ));
    out.note(match url(&known) {
        Some(url) => format!("for OpenAI's clients: OPENAI_BASE_URL={url}"),
        None => {
            "this scheduler serves no HTTP: its operator can set gateway.enabled in scheduler.toml".into()
        }
    });
    Ok(())
}

fn url(keys: &wire::KeysReply) -> Option<&str> {
    Some(keys.gateway.as_str()).filter(|url| !url.is_empty())
}

fn named<'a>(
    keys: &'a wire::KeysReply,
    text: &'a str,
) -> impl Iterator<Item = &'a record_wire::Delegation> + 'a {
    let all = keys.keys.iter().filter_map(|key| key.delegation.as_ref());
    all.filter(move |d| d.name == text || (text.len() >= 4 && id(d).starts_with(text)))
}

fn id(delegation: &record_wire::Delegation) -> String {
    delegation.key.iter().map(|byte| format!("{byte:02x}")).collect()
}

async fn list(context: &Context, link: &Link) -> Result<()> {
    let out = context.out;
    let known = call(link.client.clone().keys(wire::KeysRequest {})).await?;
    let all = known
        .keys
        .iter()
        .filter_map(|key| Some((key.delegation.as_ref()?, key.left)));
    if out.json {
        let keys: Vec<_> = all
            .map(|(d, left)| {
                json!({
                    "id": id(d), "name": d.name, "left_microcredits": left, "credits_microcredits": d.credits,
                    "issued_at": d.issued_at, "expires_at": d.expires_at,
                })
            })
            .collect();
        out.json(&json!({"keys": keys, "base_url": url(&known)}));
        return Ok(());
    }
    let mut table = Table::new(&[
        ("NAME", Column::Left),
        ("ID", Column::Left),
        ("LEFT", Column::Right),
        ("OF", Column::Right),
        ("", Column::Left),
    ]);
    let now = utc_now();
    for (d, left) in all {
        let expired = if d.expires_at <= now.0 { "expired" } else { "" };
        table.row(vec![
            d.name.clone(),
            id(d).chars().take(10).collect(),
            credits(left),
            credits(d.credits),
            expired.into(),
        ]);
    }
    out.table(&table);
    if let Some(url) = url(&known) {
        out.note(format!("for OpenAI's clients: OPENAI_BASE_URL={url}"));
    }
    Ok(())
}

async fn revoke(context: &Context, link: &Link, text: &str) -> Result<()> {
    let known = call(link.client.clone().keys(wire::KeysRequest {})).await?;
    let mut found = named(&known, text);
    let (Some(one), None) = (found.next(), found.next()) else {
        return Err(fault(
            Kind::NotFound,
            format!("not exactly one key of yours is {text:?}: `karez key list` names them"),
        ));
    };
    let request = wire::RevokeRequest { key: one.key.clone() };
    let reply = call(link.client.clone().revoke(request)).await?;
    if context.out.json {
        let back = json!({"revoked": id(one), "name": one.name, "returned_microcredits": reply.credits});
        context.out.json(&back);
    } else {
        context.out.line(format!(
            "{} works no longer; {} credits came back",
            one.name,
            credits(reply.credits)
        ));
    }
    Ok(())
}
