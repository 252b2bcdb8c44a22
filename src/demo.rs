//! `karez demo`: a network from nothing, two real jobs, the books checked by anybody, and nothing left behind.
use crate::{
    cli::Context,
    fault::{Kind, fault},
    generate::{parse, text_of},
    home::Home,
    input::Items,
    ledger, link,
    network::{Network, SHIPPED_MODEL},
    options::JobOptions,
    out::{Column, Out, Table, clean, count, credits, cut, plural, size, span, wrap},
    process, report,
    task::{self, Sampling, Task, What},
    texts,
};
use anyhow::{Context as _, Result};
use clap::Args;
use karez_proto::control as wire;
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

/// The embedding model's name in the catalogue.
const MINILM: &str = "all-MiniLM-L6-v2";
/// Languages in which answers must come.
const LANGUAGES_MIN: usize = 6;

/// `karez demo`.
#[derive(Debug, Args)]
#[command(after_help = "\
Everything runs on this machine, in a folder that is removed at the end.

Examples:
  karez demo
  karez demo --minilm ./all-MiniLM-L6-v2
  karez demo --minilm ./all-MiniLM-L6-v2 --texts ./udhr")]
pub(crate) struct DemoArgs {
    /// The folder of the embedding model (config.json, tokenizer.json, model.safetensors)
    #[arg(long, value_name = "DIR", env = "KAREZ_MINILM")]
    minilm: Option<PathBuf>,
    /// What to embed: text files, or folders with udhr_*.txt [default: the sentences of the shipped model]
    #[arg(long, value_name = "PATH", num_args = 1.., env = "KAREZ_TEXTS", value_delimiter = ':')]
    texts: Vec<PathBuf>,
    /// Keep the demo's home here instead of removing it
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

/// The demo's folder; removed when dropped unless it is to be kept.
struct Folder {
    dir: PathBuf,
    keep: bool,
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !self.keep {
            drop(fs::remove_dir_all(&self.dir));
        }
    }
}

pub(crate) async fn run(context: &Context, args: DemoArgs) -> Result<()> {
    let began = Instant::now();
    let folder = match &args.keep {
        Some(dir) => Folder {
            dir: dir.clone(),
            keep: true,
        },
        None => Folder {
            dir: std::env::temp_dir().join(format!("karez-demo-{:08x}", task::nonce()? as u32)),
            keep: false,
        },
    };
    let demo = Context {
        out: context.out,
        home: Home::new(Some(folder.dir.clone()))?,
    };
    // Read before anything starts: a wrong path should cost nothing.
    let sentences = if args.texts.is_empty() {
        texts::shipped()
    } else {
        texts::read(&args.texts)?
    };
    let mut network = Network::open(&demo, true)?;
    let done = tokio::select! {
        done = steps(&demo, &args, &sentences, &mut network) => done,
        () = process::told_to_stop() => Err(fault(Kind::Interrupted, "interrupted: the demo's network was stopped")),
    };
    let say = Say(context.out);
    say.head(5, "Stopping everything");
    let processes = network.processes();
    network.stop().await?;
    drop(network);
    say.line(format!("{processes} processes stopped, none left"));
    let kept = folder.keep.then(|| folder.dir.display().to_string());
    drop(folder);
    let mut facts = done?;
    if let Some(kept) = kept {
        say.line(format!("kept: {kept}"));
    }
    say.line(format!(
        "\nThe demo held all it promised, in {}.",
        span(began.elapsed().as_millis() as u64)
    ));
    if context.out.json {
        facts["seconds"] = json!(began.elapsed().as_secs_f64());
        context.out.json(&facts);
    }
    Ok(())
}

/// Plain sentences for whoever watches; silent under `--json`.
struct Say(&'static Out);

impl Say {
    fn line(&self, text: impl AsRef<str>) {
        if !self.0.json {
            self.0.line(text);
        }
    }
    fn head(&self, number: u32, text: &str) {
        self.line("");
        self.line(self.0.bold(&format!("{number}. {text}")));
    }
    fn wrapped(&self, text: &str, indent: &str) {
        for line in wrap(text, 80, indent) {
            self.line(line);
        }
    }
    fn table(&self, table: &Table) {
        for line in table.lines(Some(80)) {
            self.line(format!("  {line}"));
        }
    }
    fn report(&self, job: &wire::JobView) {
        for line in report::lines(job, None, Some(78)) {
            self.line(format!("  {line}").trim_end());
        }
    }
}

async fn steps(
    context: &Context,
    args: &DemoArgs,
    sentences: &[texts::Sentence],
    network: &mut Network,
) -> Result<Value> {
    let say = Say(context.out);
    let began = Instant::now();
    say.line("A scheduler and three nodes of different institutions start on this machine, each");
    say.line("a process with its own key. Your key has a budget of 100 credits.");
    network.bring_up(context).await?;
    say.line(format!(
        "up in {}: {} processes",
        span(began.elapsed().as_millis() as u64),
        network.processes()
    ));
    let embedded = embed(context, &say, args.minilm.as_deref(), sentences).await?;
    let answered = generate(context, &say).await?;
    let books = books(context, &say).await?;
    Ok(json!({"held": true, "embed": embedded, "generate": answered, "ledger": books}))
}

async fn embed(
    context: &Context,
    say: &Say,
    minilm: Option<&Path>,
    sentences: &[texts::Sentence],
) -> Result<Value> {
    say.head(1, "Embeddings");
    let Some(dir) = minilm else {
        say.wrapped(
            &format!(
                "Skipped: {MINILM} is not here. Fetch it with scripts/fetch-minilm and pass its folder with --minilm DIR. \
                 The demo goes on with the model that is part of Karez."
            ),
            "",
        );
        return Ok(json!({"skipped": true}));
    };
    let format = crate::artifact::check_model(dir).with_context(|| format!("--minilm {}", dir.display()))?;
    let link = link::open(&context.home).await?;
    let artifacts = link.artifacts(&context.home).await?;
    let (store, from) = (artifacts.store.clone(), dir.to_owned());
    let model = tokio::task::spawn_blocking(move || store.add_dir(&from)).await??;
    artifacts.push(context.out, MINILM, model).await?;
    artifacts.close().await;
    crate::artifact::name_model(&link, MINILM, model, format, "Apache-2.0").await?;
    say.line(format!(
        "model {MINILM}: {}, now known to the scheduler by its content",
        size(model.bytes.0)
    ));

    let languages: std::collections::BTreeSet<&str> = sentences.iter().map(|s| s.language.as_str()).collect();
    say.line(format!(
        "{} in {}",
        plural(sentences.len() as u64, "sentence"),
        plural(languages.len() as u64, "language")
    ));
    let what = What::Embed { model: MINILM.into() };
    let texts = sentences.iter().map(|s| s.text.as_str());
    let items = Items::of_texts(what.field(), texts, context.home.dir())?;
    let options = JobOptions {
        part_items: u32::try_from(sentences.len().div_ceil(3)).unwrap_or(0),
        label: "demo: embeddings".into(),
        ..JobOptions::default()
    };
    let (view, lines) = job(context, link, Task { what, items, options }).await?;
    say.report(&view);

    let vectors: Vec<Vec<f32>> = lines.iter().map(vector).collect::<Result<_>>()?;
    if vectors.len() != sentences.len() {
        return Err(fault(
            Kind::NotVerified,
            format!("{} sentences gave {} vectors", sentences.len(), vectors.len()),
        ));
    }
    let found = meaning(say, sentences, &vectors)?;
    Ok(json!({
        "sentences": sentences.len(), "dimensions": vectors.first().map(Vec::len), "neighbours": found,
        "job": crate::view::job(&view),
    }))
}

/// The vector of a result line.
fn vector(line: &Value) -> Result<Vec<f32>> {
    let numbers = line.get("embedding").and_then(Value::as_array);
    numbers
        .and_then(|list| list.iter().map(|n| n.as_f64().map(|n| n as f32)).collect())
        .ok_or_else(|| fault(Kind::NotVerified, "a result line holds no \"embedding\""))
}

/// Do neighbours among the vectors mean the same? Prints and demands it.
fn meaning(say: &Say, sentences: &[texts::Sentence], vectors: &[Vec<f32>]) -> Result<Value> {
    let Some(found) = texts::meaning(sentences, vectors) else {
        say.line("the texts are no translations of each other, so there is nothing to compare");
        return Ok(Value::Null);
    };
    say.line("");
    say.wrapped(
        &format!(
            "Do the vectors mean something? Of every sentence, the nearest one in {:?} should say the same. \
             By chance {:.0} % would; here {:.0} % do:",
            found.reference,
            100.0 * found.chance,
            100.0 * found.rate()
        ),
        "",
    );
    let shares = found
        .scores
        .iter()
        .map(|s| format!("{} {}/{}", s.language, s.hits, s.of))
        .collect::<Vec<_>>();
    say.wrapped(&format!("  {}", shares.join(", ")), "  ");
    for (text, nearest, likeness) in &found.examples {
        say.line(format!("  {likeness:.2}  {}", cut(&clean(text), 70)));
        say.line(format!("        {}", cut(&clean(nearest), 70)));
    }
    say.wrapped(
        &format!("({MINILM} was trained on English, so it does best in related languages.)"),
        "",
    );
    if !found.holds() {
        return Err(fault(
            Kind::NotVerified,
            "the vectors are hardly better than chance: something is wrong with the model or the engine",
        ));
    }
    Ok(json!({"rate": found.rate(), "chance": found.chance}))
}

async fn generate(context: &Context, say: &Say) -> Result<Value> {
    say.head(2, "Answers");
    let questions = texts::questions();
    say.line(format!(
        "{}, one in each of {}, for {SHIPPED_MODEL}",
        plural(questions.len() as u64, "question"),
        plural(questions.len() as u64, "language")
    ));
    let sampling = Sampling {
        max_tokens: 96,
        temperature_milli: 0,
        top_k: 0,
        top_p_milli: 1000,
        seed: 0,
        raw: false,
        system: String::new(),
        stream: false,
        keep_going: false,
    };
    let what = What::Generate {
        model: SHIPPED_MODEL.into(),
        sampling,
    };
    let texts = questions.iter().map(|q| q.question.as_str());
    let items = Items::of_texts(what.field(), texts, context.home.dir())?;
    let options = JobOptions {
        part_items: 4,
        label: "demo: answers".into(),
        ..JobOptions::default()
    };
    let link = link::open(&context.home).await?;
    let (view, lines) = job(context, link, Task { what, items, options }).await?;
    let (mut answered, mut exact) = (0, 0);
    for (question, line) in questions.iter().zip(&lines) {
        let answer = text_of(line, "text").trim();
        answered += usize::from(!answer.is_empty());
        exact += usize::from(answer == question.answer);
        say.line(format!(
            "  {}  {}",
            question.language,
            cut(&clean(&question.question), 72)
        ));
        say.wrapped(&format!("      {}", clean(answer)), "      ");
    }
    say.line(format!(
        "{answered} of {} answered; {exact} word for word as taught",
        questions.len()
    ));
    say.line("");
    say.report(&view);
    if answered < LANGUAGES_MIN || lines.len() != questions.len() {
        return Err(fault(
            Kind::NotVerified,
            format!("only {answered} languages were answered, {LANGUAGES_MIN} are promised"),
        ));
    }
    Ok(json!({"languages": answered, "as_taught": exact, "job": crate::view::job(&view)}))
}

/// Submits, follows to the end and reads the results.
async fn job(context: &Context, link: link::Link, task: Task) -> Result<(wire::JobView, Vec<Value>)> {
    let mut running = task::submit(context.out, &context.home, link, &task).await?;
    running.finish(context.out).await?;
    let mut lines = Vec::new();
    running.results(context.out, &mut lines).await?;
    let view = running.view.clone();
    running.close().await;
    Ok((view, parse(&lines)?))
}

async fn books(context: &Context, say: &Say) -> Result<Value> {
    say.head(3, "The books");
    let link = link::open(&context.home).await?;
    let accounts = link::call(link.client.clone().balance(wire::BalanceRequest { all: true }))
        .await?
        .accounts;
    let mut table = Table::new(&[("ACCOUNT", Column::Left), ("CREDITS", Column::Right)]);
    for account in &accounts {
        let name = account
            .name
            .get(..24)
            .filter(|_| account.name.starts_with("user:"))
            .unwrap_or(&account.name);
        table.row(vec![name.to_owned(), crate::out::signed_credits(account.balance)]);
    }
    say.table(&table);
    let path = context.home.dir().join("ledger.jsonl");
    let mut bytes = Vec::new();
    ledger::export(&link, &mut bytes).await?;
    fs::write(&path, &bytes).with_context(|| path.display().to_string())?;
    let key = link.config.scheduler;
    let summary = ledger::verify_file(&path, vec![key])?;
    say.wrapped(
        &format!(
            "Exported {} and verified it from the file and the scheduler's public key alone: {} entries, \
             {} signed records, {} credits settled with {}.",
            size(bytes.len() as u64),
            count(summary.entries),
            count(summary.records),
            credits(summary.settled.0),
            plural(summary.institutions.len() as u64, "institution")
        ),
        "",
    );
    let receipts: u64 = summary.institutions.values().map(|e| e.receipts).sum();
    if receipts == 0 {
        return Err(fault(
            Kind::NotVerified,
            "the ledger holds no receipt, though work was done",
        ));
    }
    say.line(format!(
        "every one of {} was checked",
        plural(receipts, "receipt")
    ));

    say.head(4, "One flipped byte");
    // In the middle of the file, inside a line: somewhere in the evidence of an entry.
    let mut at = bytes.len() / 2;
    while bytes.get(at).is_some_and(|b| !b.is_ascii_alphanumeric()) {
        at += 1;
    }
    let mut forged = bytes.clone();
    forged[at] ^= 1;
    let line = 1 + bytes[..at].iter().filter(|b| **b == b'\n').count();
    let copy = context.home.dir().join("ledger-forged.jsonl");
    fs::write(&copy, &forged).with_context(|| copy.display().to_string())?;
    match ledger::check(&mut &forged[..], vec![key]) {
        Ok(_) => Err(fault(
            Kind::NotVerified,
            format!("byte {at} of the ledger was flipped and nobody noticed"),
        )),
        Err(found) => {
            say.wrapped(
                &format!(
                    "byte {at} of a copy, in line {line}, was changed from {:?} to {:?}",
                    char::from(bytes[at]),
                    char::from(forged[at])
                ),
                "",
            );
            say.wrapped(&format!("caught: {found}"), "  ");
            Ok(json!({
                "entries": summary.entries, "records": summary.records, "receipts": receipts,
                "forged_byte": at, "forged_line": line, "caught": found.to_string(), "caught_line": found.line,
            }))
        }
    }
}
