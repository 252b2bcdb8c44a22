//! `karez init` and `karez join`: becoming a user of a network.
use crate::{
    cli::Context,
    fault::{Kind, fault},
    home::ClientConfig,
    link::{call, dial},
    out::credits,
    task::utc_now,
};
use anyhow::{Context as _, Result};
use clap::Args;
use karez_core::{
    invite,
    key::{PublicKey, UserId},
    records::Role,
};
use karez_proto::control as wire;
use serde_json::json;
use std::io::Read;

/// `karez init`.
#[derive(Debug, Args)]
#[command(after_help = "\
An invitation makes the key too. `init` alone is for schedulers that list keys:
give the printed key to the operator.

Example:
  karez init")]
pub(crate) struct InitArgs {}

/// `karez join`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  karez join karez1abc...\n  karez join - < invitation.txt")]
pub(crate) struct JoinArgs {
    /// The invitation, or - to read it from standard input
    invitation: String,
    /// A name for people
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    name: String,
    /// Leave the network this home belongs to
    #[arg(long)]
    replace: bool,
}

/// Makes the user's key, or says which one there is.
pub(crate) fn init(context: &Context, _: InitArgs) -> Result<()> {
    let (secret, new) = context.home.key_or_new()?;
    let user = UserId(PublicKey::of(&secret));
    let path = context.home.key_path();
    if context.out.json {
        context
            .out
            .json(&json!({"user": user.to_string(), "path": path.display().to_string(), "new": new}));
    } else {
        let verb = if new { "made" } else { "there already, kept" };
        context
            .out
            .line(format!("your key: {user}\n{verb}: {}", path.display()));
    }
    Ok(())
}

/// Redeems an invitation for the user's key.
pub(crate) async fn join(context: &Context, args: JoinArgs) -> Result<()> {
    let mut text = args.invitation;
    if text == "-" {
        text.clear();
        std::io::stdin()
            .take(invite::TEXT_MAX as u64 * 2)
            .read_to_string(&mut text)
            .context("standard input")?;
    }
    let reply = redeem(context, &text, &args.name, args.replace).await?;
    if context.out.json {
        context.out.json(&json!({"institution": reply.institution, "role": reply.role, "credits_microcredits": reply.credits}));
    } else {
        context.out.line(format!(
            "you are a user of {} with {} credits",
            reply.institution,
            credits(reply.credits)
        ));
        context
            .out
            .note("next: `karez offers` shows the capacity, `karez models` the models");
    }
    Ok(())
}

/// Redeems `text` and remembers the scheduler.
pub(crate) async fn redeem(
    context: &Context,
    text: &str,
    name: &str,
    replace: bool,
) -> Result<wire::JoinReply> {
    let invitation = invite::decode(text).map_err(|error| fault(Kind::Refused, error.to_string()))?;
    if invitation.role != Role::User {
        return Err(fault(
            Kind::Refused,
            "this invitation is for a node: use it with `karez node init --join`, or ask for one for users",
        ));
    }
    if invitation.expires_at <= utc_now() {
        return Err(fault(
            Kind::Refused,
            "this invitation has expired: ask the operator for a new one",
        ));
    }
    if let Some(known) = context.home.config_if_any()?
        && known.scheduler != invitation.scheduler
        && !replace
    {
        return Err(fault(
            Kind::Refused,
            format!(
                "{} already belongs to the network of scheduler {} at {}: use another folder with --home DIR, or leave that network with --replace",
                context.home.dir().display(),
                known.scheduler.short(),
                known.control_addr
            ),
        ));
    }
    let (secret, _) = context.home.key_or_new()?;
    let mut client = dial(&invitation.control_addr, &secret, invitation.scheduler.0).await?;
    let request = wire::JoinRequest {
        invitation: invite::encode(&invitation),
        name: name.to_owned(),
        role: Role::User.as_str().into(),
        institution: invitation.institution.to_string(),
    };
    let reply = call(client.join(request)).await?;
    let institution = reply.institution.parse().context("the scheduler's answer")?;
    context.home.set_config(&ClientConfig {
        scheduler: invitation.scheduler,
        control_addr: invitation.control_addr.clone(),
        institution,
    })?;
    Ok(reply)
}
