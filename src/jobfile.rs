//! The job file: what `karez submit` reads, and its JSON Schema.
//!
//! Unknown keys are errors. Every error names the file, the line and the key.
use crate::{
    fault::{Kind, fault},
    generate,
    options::{self, JobOptions, MAX_COST},
    task::What,
};
use anyhow::{Context, Result};
use karez_core::{
    id::{Country, Institution},
    records::{DEVICES_MAX, DataClass, Tier},
    unit::{Credits, Portion, Rate},
};
use karez_node::human::{Price, Share, Size, Span};
use serde::Deserialize;
use serde_json::{Value, json};
use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// Bytes of a job file at most.
const FILE_MAX: u64 = 256 << 10;

/// What to do with each line of the input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum WorkName {
    Embed,
    Generate,
    Noop,
}

/// A job file.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    work: WorkName,
    #[serde(default)]
    model: Option<String>,
    input: PathBuf,
    #[serde(default)]
    output: Option<PathBuf>,
    #[serde(default)]
    label: String,
    #[serde(default)]
    generate: Option<GenerateTable>,
    #[serde(default)]
    noop: Option<NoopTable>,
    #[serde(default)]
    limits: Limits,
    #[serde(default, rename = "where")]
    place: Place,
    #[serde(default)]
    run: Run,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct GenerateTable {
    max_tokens: u32,
    temperature: f32,
    top_k: u32,
    top_p: f32,
    seed: u64,
    raw: bool,
    system: String,
}

impl Default for GenerateTable {
    fn default() -> Self {
        Self {
            max_tokens: 256,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            seed: 0,
            raw: false,
            system: String::new(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct NoopTable {
    millis_per_item: u32,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Limits {
    max_cost: Price,
    max_rate: Option<Price>,
    donated: bool,
    attempts: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_cost: Price(Rate(MAX_COST.0)),
            max_rate: None,
            donated: false,
            attempts: 3,
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Place {
    country: Vec<Country>,
    exclude_country: Vec<Country>,
    institution: Vec<Institution>,
    exclude_institution: Vec<Institution>,
    device: Option<String>,
    memory: Option<Size>,
    devices: Option<u32>,
    share: Option<Share>,
    isolation: Tier,
    data: DataClass,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Run {
    part_items: u32,
    wait: bool,
    deadline: Option<Span>,
    together: bool,
}

/// A job as a file describes it. The input is still to be read.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) what: What,
    pub(crate) input: PathBuf,
    pub(crate) options: JobOptions,
}

/// Reads and checks a job file. Paths in it are relative to the file.
pub(crate) fn read(path: &Path) -> Result<Job> {
    let name = path.display().to_string();
    let length = match fs::metadata(path) {
        Ok(meta) if meta.is_dir() => {
            return Err(fault(
                Kind::Refused,
                format!("{name} is a directory: give a job file, `karez schema job` shows what it holds"),
            ));
        }
        Ok(meta) => meta.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(fault(
                Kind::NotFound,
                format!("{name} does not exist: `karez schema job` shows what a job file holds"),
            ));
        }
        Err(error) => return Err(error).context(name),
    };
    if length > FILE_MAX {
        return Err(fault(
            Kind::Refused,
            format!("{name} has {length} bytes, a job file has at most {FILE_MAX}"),
        ));
    }
    let text = fs::read_to_string(path).with_context(|| name.clone())?;
    parse(&text, &name, path.parent().unwrap_or(Path::new("")))
}

fn parse(text: &str, name: &str, base: &Path) -> Result<Job> {
    let file: File =
        toml::from_str(text).map_err(|error| fault(Kind::Refused, located(text, name, &error)))?;
    let refuse = |key: &str, why: &str| {
        let line = text
            .lines()
            .position(|l| key_of(l) == key || l.trim() == format!("[{key}]"))
            .map_or(1, |i| i + 1);
        Err(fault(Kind::Refused, format!("{name}:{line}: {key}: {why}")))
    };
    let model = |file: &File| match &file.model {
        Some(model) => Ok(model.clone()),
        None => Err(fault(
            Kind::Refused,
            format!("{name}:1: model is missing: name one of `karez models`"),
        )),
    };
    let what = match file.work {
        WorkName::Embed => What::Embed { model: model(&file)? },
        WorkName::Generate => {
            let g = file.generate.clone().unwrap_or_default();
            if g.max_tokens == 0 || g.max_tokens > 131_072 {
                return refuse("max_tokens", "must be between 1 and 131072");
            }
            let sampling = generate::sampling(
                g.max_tokens,
                g.temperature,
                g.top_k,
                g.top_p,
                g.seed,
                g.raw,
                g.system,
            )
            .map_err(|error| fault(Kind::Refused, format!("{name}: [generate]: {error}")))?;
            What::Generate {
                model: model(&file)?,
                sampling,
            }
        }
        WorkName::Noop => match &file.noop {
            Some(noop) => What::Noop {
                millis_per_item: noop.millis_per_item,
            },
            None => return refuse("work", "noop needs a table [noop] with millis_per_item"),
        },
    };
    if file.generate.is_some() && file.work != WorkName::Generate {
        return refuse("generate", "this table belongs to work = \"generate\"");
    }
    if file.noop.is_some() && file.work != WorkName::Noop {
        return refuse("noop", "this table belongs to work = \"noop\"");
    }
    if let Err(why) = options::label(&file.label) {
        return refuse("label", &why);
    }
    if !(1..=100).contains(&file.limits.attempts) {
        return refuse("attempts", "must be between 1 and 100");
    }
    if file.limits.donated && file.limits.max_rate.is_some() {
        return refuse(
            "max_rate",
            "donated = true already means a price of zero: remove one of them",
        );
    }
    if let Some(devices) = file.place.devices
        && !(1..=DEVICES_MAX).contains(&devices)
    {
        return refuse("devices", &format!("must be between 1 and {DEVICES_MAX}"));
    }
    if file.place.share.is_some() && file.place.devices.is_some_and(|devices| devices > 1) {
        return refuse("share", "is of one device: remove devices");
    }
    let options = JobOptions {
        country: file.place.country,
        exclude_country: file.place.exclude_country,
        institution: file.place.institution,
        exclude_institution: file.place.exclude_institution,
        max_rate: file.limits.max_rate.map(|p| p.0),
        donated: file.limits.donated,
        max_cost: Credits(file.limits.max_cost.0.0),
        device: file.place.device,
        memory: file.place.memory.map(|s| s.0),
        devices: file.place.devices.unwrap_or(1),
        share: file.place.share.and_then(|share| Portion::share(share.0)),
        isolation: file.place.isolation,
        data: file.place.data,
        deadline: file.run.deadline.map(|s| s.0),
        together: file.run.together,
        part_items: file.run.part_items,
        attempts: file.limits.attempts,
        wait: file.run.wait,
        detach: false,
        label: file.label,
        output: file.output.map(|path| base.join(path)),
    };
    Ok(Job {
        what,
        input: base.join(file.input),
        options,
    })
}

/// `job.toml:7: country: …`: the parser knows where, the line knows the key.
fn located(text: &str, name: &str, error: &toml::de::Error) -> String {
    let at = error.span().map_or(0, |span| span.start.min(text.len()));
    let line = text[..at].matches('\n').count();
    let key = key_of(text.lines().nth(line).unwrap_or_default());
    let message = error.message().trim().replace('\n', " ");
    if key.is_empty() || message.contains(&format!("`{key}`")) {
        format!("{name}:{}: {message}", line + 1)
    } else {
        format!("{name}:{}: {key}: {message}", line + 1)
    }
}

fn key_of(line: &str) -> &str {
    match line.split_once('=') {
        Some((key, _)) => key.trim(),
        None => "",
    }
}

/// The JSON Schema of a job file.
pub(crate) fn schema() -> Value {
    let names = |what: &str| json!({"type": "array", "items": {"type": "string"}, "default": [], "description": what});
    let amount = |what: &str| json!({"type": ["number", "string"], "description": what});
    let table = |what: &str, properties: Value| json!({"type": "object", "description": what, "additionalProperties": false, "properties": properties});
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Karez job file",
        "description": "What `karez submit FILE` reads, as TOML. Paths are relative to the file.",
        "type": "object",
        "additionalProperties": false,
        "required": ["work", "input"],
        "properties": {
            "work": {"enum": ["embed", "generate", "noop"], "description": "what to do with each line of the input"},
            "model": {"type": "string", "description": "a name of `karez models`; needed unless work is noop"},
            "input": {"type": "string", "description": "plain text, one item per line, or JSON lines"},
            "output": {"type": "string", "description": "where the results go, as JSON lines"},
            "label": {"type": "string", "default": "", "maxLength": options::LABEL_MAX, "description": "a name to find the job by"},
            "generate": table("how to continue prompts", json!({
                "max_tokens": {"type": "integer", "minimum": 1, "maximum": 131_072, "default": 256},
                "temperature": {"type": "number", "minimum": 0, "maximum": 5, "default": 0},
                "top_k": {"type": "integer", "minimum": 0, "default": 0},
                "top_p": {"type": "number", "minimum": 0, "maximum": 1, "default": 1},
                "seed": {"type": "integer", "minimum": 0, "default": 0},
                "raw": {"type": "boolean", "default": false, "description": "without the model's chat template"},
                "system": {"type": "string", "default": ""},
            })),
            "noop": table("how long to wait per item", json!({
                "millis_per_item": {"type": "integer", "minimum": 0, "maximum": 3_600_000},
            })),
            "limits": table("what the job may cost", json!({
                "max_cost": amount("credits set aside for the whole job; 1 by default"),
                "max_rate": amount("the highest price, in credits per device-hour"),
                "donated": {"type": "boolean", "default": false, "description": "only capacity lent at price zero"},
                "attempts": {"type": "integer", "minimum": 1, "maximum": 100, "default": 3},
            })),
            "where": table("where it may run; empty lists exclude nobody", json!({
                "country": names("only these countries, like [\"KE\", \"BR\"]"),
                "exclude_country": names("none of these countries"),
                "institution": names("only nodes of these institutions"),
                "exclude_institution": names("no node of these institutions"),
                "device": {"type": "string", "description": "start of the device class: cuda, cpu/x86-64-v3"},
                "memory": {"type": ["string", "integer"], "description": "memory of one device, like \"8 GiB\""},
                "devices": {"type": "integer", "minimum": 1, "maximum": DEVICES_MAX, "default": 1, "description": "devices of one node that each part takes"},
                "share": {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "description": "share of one device for each part, of its memory too, like 0.25; only owners who lend shares are asked"},
                "isolation": {"enum": Tier::ALL.map(Tier::as_str), "default": "none", "description": "workers are cut off at least so far"},
                "data": {"enum": DataClass::ALL.map(DataClass::as_str), "default": "public", "description": "how delicate the input is; only owners who take such data are given it"},
            })),
            "run": table("how it is cut and queued", json!({
                "part_items": {"type": "integer", "minimum": 0, "default": 0, "description": "0: the scheduler chooses"},
                "wait": {"type": "boolean", "default": false, "description": "queue it even when no known node could run it"},
                "deadline": {"type": "string", "examples": ["6 h"], "description": "when it should be done, from the moment it is submitted, like \"6 h\""},
                "together": {"type": "boolean", "default": false, "description": "all parts run at the same time, inside one site, or not at all"},
            })),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One valid value for every key of the schema.
    fn sample(schema: &Value) -> String {
        if let Some(example) = schema["examples"].get(0) {
            return example.to_string();
        }
        match (&schema["enum"], schema["type"].as_str()) {
            (Value::Array(values), _) => values[0].to_string(),
            (_, Some("string")) => "\"x\"".into(),
            (_, Some("integer" | "number")) => "1".into(),
            (_, Some("boolean")) => "false".into(),
            (_, Some("array")) => "[]".into(),
            _ => "\"1\"".into(),
        }
    }

    #[test]
    fn the_schema_and_the_parser_know_the_same_keys() {
        let schema = schema();
        let (mut top, mut tables) = (String::new(), String::new());
        for (key, property) in schema["properties"].as_object().unwrap() {
            if let Some(inner) = property["properties"].as_object() {
                tables += &format!("[{key}]\n");
                for (key, property) in inner {
                    tables += &format!("{key} = {}\n", sample(property));
                }
            } else {
                top += &format!("{key} = {}\n", sample(property));
            }
        }
        let text = format!("{top}{tables}");
        let file: File = toml::from_str(&text).unwrap_or_else(|e| panic!("{e} in\n{text}"));
        assert_eq!(file.place.device.as_deref(), Some("x"));
        // And the other way round: what the parser lists as known, the schema describes.
        for table in [
            "",
            "[generate]\n",
            "[noop]\n",
            "[limits]\n",
            "[where]\n",
            "[run]\n",
        ] {
            let text = format!("work = \"embed\"\ninput = \"x\"\n{table}nonsense = 1\n");
            let error = toml::from_str::<File>(&text).unwrap_err().message().to_owned();
            let name = table.trim().trim_matches(['[', ']']);
            let scope = if name.is_empty() {
                &schema["properties"]
            } else {
                &schema["properties"][name]["properties"]
            };
            let known: Vec<&str> = error.split('`').skip(3).step_by(2).collect();
            assert!(!known.is_empty(), "{error}");
            for key in known {
                assert!(scope.get(key).is_some(), "the schema of {name:?} lacks {key}");
            }
        }
    }

    #[test]
    fn the_published_schema_is_this_one() {
        let published = include_str!("../docs/job.schema.json");
        let now = serde_json::to_string_pretty(&schema()).unwrap() + "\n";
        assert!(published == now, "run: karez schema job > docs/job.schema.json");
    }

    #[test]
    fn the_job_file_of_the_readme_is_understood() {
        let readme = include_str!("../README.md");
        let (_, block) = readme.split_once("```toml\n").unwrap();
        let (text, _) = block.split_once("```").unwrap();
        let job = parse(text, "README.md", Path::new("/data")).unwrap();
        assert_eq!(job.input, Path::new("/data/prompts.jsonl"));
    }

    #[test]
    fn errors_name_the_line_and_the_key() {
        for (text, expected) in [
            (
                "work = \"embed\"\ninput = \"a\"\nmodl = \"x\"\n",
                "job.toml:3: unknown field `modl`, expected one of ",
            ),
            (
                "work = \"bake\"\ninput = \"a\"\n",
                "job.toml:1: work: unknown variant `bake`, expected one of ",
            ),
            ("work = \"embed\"\n", "job.toml:1: work: missing field `input`"),
            (
                "work = \"embed\"\ninput = \"a\"\nmodel = \"m\"\n\n[where]\ncountry = [\"Kenya\"]\n",
                "job.toml:6: country: country \"Kenya\" is not valid: ",
            ),
            (
                "work = \"embed\"\ninput = \"a\"\nmodel = \"m\"\n[limits]\nmax_cost = \"cheap\"\n",
                "job.toml:5: max_cost: \"cheap\" is not an amount of credits",
            ),
            (
                "work = \"embed\"\ninput = \"a\"\nmodel = \"m\"\n[limits]\nattempts = 0\n",
                "job.toml:5: attempts: must be between 1 and 100",
            ),
            (
                "work = \"embed\"\ninput = \"a\"\nmodel = \"m\"\n[noop]\nmillis_per_item = 1\n",
                "job.toml:4: noop: this table belongs to",
            ),
            (
                "work = \"embed\"\ninput = \"a\"\n",
                "job.toml:1: model is missing",
            ),
            ("work = \n", "job.toml:1: "),
        ] {
            let error = parse(text, "job.toml", Path::new("")).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}\nexpected {expected}");
        }
    }

    #[test]
    fn a_whole_file_becomes_a_job() {
        let text = r#"
            work = "generate"
            model = "karez-tiny"
            input = "prompts.txt"
            output = "/tmp/answers.jsonl"
            label = "letters"
            [generate]
            max_tokens = 40
            temperature = 0.7
            [limits]
            max_cost = 0.5
            max_rate = "0.25"
            [where]
            country = ["ke", "BR"]
            memory = "2 GiB"
            [run]
            part_items = 10
        "#;
        let job = parse(text, "job.toml", Path::new("/data")).unwrap();
        assert_eq!(job.input, Path::new("/data/prompts.txt"));
        assert_eq!(
            job.options.output.as_deref(),
            Some(Path::new("/tmp/answers.jsonl"))
        );
        assert_eq!(job.options.max_cost, Credits(500_000));
        assert_eq!(job.options.max_rate, Some(Rate(250_000)));
        assert_eq!(
            job.options.country.iter().map(|c| c.as_str()).collect::<Vec<_>>(),
            ["KE", "BR"]
        );
        assert_eq!(job.options.memory.map(|m| m.0), Some(2 << 30));
        let What::Generate { sampling, .. } = job.what else {
            panic!("not generate")
        };
        assert_eq!(
            (
                sampling.max_tokens,
                sampling.temperature_milli,
                sampling.top_p_milli
            ),
            (40, 700, 1000)
        );
    }
}
