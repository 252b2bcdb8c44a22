//! JSON schemas as grammars of llama.cpp (GBNF): what a grammar lets through fits the schema.
//!
//! The other way round need not hold: of what a schema leaves open the grammar may allow less, such as properties
//! nobody named. A keyword that cannot be enforced is refused by name, never passed over.
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use crate::json::Json;

/// Rules of one grammar at most.
const RULES_MAX: usize = 2048;
/// Levels of a schema at most, references not counted.
const DEPTH_MAX: usize = 32;
/// Repetitions that a grammar counts at most.
const COUNT_MAX: u64 = 1000;

/// What every grammar here may use. Spaces are bounded: a model may otherwise write nothing else.
const BASE: [(&str, &str); 12] = [
    ("ws", r#"| " " | "\n" [ \t]{0,16}"#),
    ("boolean", r#""true" | "false""#),
    ("null", r#""null""#),
    (
        "char",
        r#"[^"\\\x7F\x00-\x1F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4})"#,
    ),
    ("string", r#""\"" char* "\"""#),
    ("natural", r#""0" | [1-9] [0-9]{0,15}"#),
    ("integer", r#""-"? natural"#),
    ("number", r#"integer ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,2})?"#),
    ("value", "object | array | string | number | boolean | null"),
    (
        "object",
        r#""{" ws (string ws ":" ws value (ws "," ws string ws ":" ws value)*)? ws "}""#,
    ),
    ("array", r#""[" ws (value (ws "," ws value)*)? ws "]""#),
    ("hex", "[0-9a-fA-F]"),
];

/// Keywords that say something about a schema and nothing about what fits it.
const NOTES: [&str; 15] = [
    "title",
    "description",
    "default",
    "examples",
    "$schema",
    "$id",
    "$comment",
    "$defs",
    "definitions",
    "deprecated",
    "readOnly",
    "writeOnly",
    "strict",
    "$anchor",
    "example",
];

/// Any JSON object.
pub(super) fn any_object() -> String {
    Writer::default().text("object")
}

/// What fits `schema`; an error names the place and the keyword at fault.
pub(super) fn of_schema(schema: &Json) -> Result<String, String> {
    let mut writer = Writer {
        whole: Some(schema),
        ..Writer::default()
    };
    let root = writer.schema(schema, "response_format", 0)?;
    Ok(writer.text(&root))
}

#[derive(Default)]
struct Writer<'a> {
    whole: Option<&'a Json>,
    rules: Vec<(String, String)>,
    /// Rules of what references point at; a name is there before its rule is, so that a schema may contain itself.
    references: BTreeMap<String, String>,
}

type Made = Result<String, String>;

impl Writer<'_> {
    fn text(&self, root: &str) -> String {
        let mut out = format!("root ::= {root}\n");
        let own = self
            .rules
            .iter()
            .map(|(name, body)| (name.as_str(), body.as_str()));
        for (name, body) in BASE.into_iter().chain(own) {
            let _ = writeln!(out, "{name} ::= {body}");
        }
        out
    }

    /// A name for `body`.
    fn rule(&mut self, body: String) -> Made {
        let name = self.reserve()?;
        self.define(&name, body);
        Ok(name)
    }

    fn reserve(&mut self) -> Made {
        if self.rules.len() >= RULES_MAX {
            return Err(format!(
                "response_format needs more than {RULES_MAX} rules; make the schema smaller"
            ));
        }
        let name = format!("r{}", self.rules.len());
        self.rules.push((name.clone(), String::new()));
        Ok(name)
    }

    fn define(&mut self, name: &str, body: String) {
        if let Some(rule) = self.rules.iter_mut().find(|(known, _)| known == name) {
            rule.1 = body;
        }
    }

    fn schema(&mut self, schema: &Json, place: &str, depth: usize) -> Made {
        if depth > DEPTH_MAX {
            return Err(format!("{place} is nested deeper than {DEPTH_MAX} levels"));
        }
        let fields = match schema {
            Json::Bool(true) => return Ok("value".into()),
            Json::Object(fields) => fields,
            _ => return Err(format!("{place} is not a schema: an object or true is expected")),
        };
        let known = |names: &[&str]| {
            let unknown = fields
                .iter()
                .map(|(name, _)| name.as_str())
                .find(|name| !names.contains(name) && !NOTES.contains(name));
            match unknown {
                Some(name) => Err(format!(
                    "{place}: the keyword {name:?} cannot be enforced here; leave it out"
                )),
                None => Ok(()),
            }
        };
        if let Some(target) = schema.get("$ref") {
            known(&["$ref"])?;
            return self.reference(target, place);
        }
        if let Some(value) = schema.get("const") {
            known(&["const", "type"])?;
            return Ok(literal(&value.to_string()));
        }
        if let Some(values) = schema.get("enum") {
            known(&["enum", "type"])?;
            let values = values.as_list().filter(|all| !all.is_empty());
            let values = values.ok_or_else(|| format!("{place}: enum is not a list of values"))?;
            let all: Vec<String> = values.iter().map(|value| literal(&value.to_string())).collect();
            return self.rule(all.join(" | "));
        }
        for keyword in ["anyOf", "oneOf", "allOf"] {
            let Some(of) = schema.get(keyword) else { continue };
            known(&[keyword, "type"])?;
            let of = of.as_list().filter(|all| !all.is_empty());
            let of = of.ok_or_else(|| format!("{place}: {keyword} is not a list of schemas"))?;
            if keyword == "allOf" && of.len() > 1 {
                return Err(format!(
                    "{place}: allOf of several schemas cannot be enforced here"
                ));
            }
            let mut all = Vec::new();
            for (at, one) in of.iter().enumerate() {
                all.push(self.schema(one, &format!("{place}.{keyword}[{at}]"), depth + 1)?);
            }
            return self.rule(all.join(" | "));
        }
        let kinds: Vec<&str> = match schema.get("type") {
            Some(Json::Text(one)) => vec![one],
            Some(Json::List(all)) => all.iter().filter_map(Json::as_str).collect(),
            Some(_) => return Err(format!("{place}: type is neither a name nor a list of names")),
            None if schema.get("properties").is_some() => vec!["object"],
            None if schema.get("items").is_some() => vec!["array"],
            None => {
                known(&[])?;
                return Ok("value".into());
            }
        };
        // Keywords of the types that are not asked for would be passed over in silence.
        let mut words = vec!["type"];
        for kind in &kinds {
            words.extend_from_slice(match *kind {
                "object" => &["properties", "required", "additionalProperties"][..],
                "array" => &["items", "minItems", "maxItems"],
                "string" => &["minLength", "maxLength", "format"],
                "integer" => &["minimum", "format"],
                "number" => &["format"],
                _ => &[],
            });
        }
        known(&words)?;
        let mut all = Vec::new();
        for kind in kinds {
            all.push(match kind {
                "object" => self.object(schema, place, depth)?,
                "array" => self.array(schema, place, depth)?,
                "string" => self.string(schema, place)?,
                "integer" => integer(schema, place)?,
                "number" | "boolean" | "null" => kind.to_owned(),
                other => return Err(format!("{place}: {other:?} is no type of JSON")),
            });
        }
        match all.as_slice() {
            [] => Err(format!("{place}: type names nothing")),
            [one] => Ok(one.clone()),
            _ => self.rule(all.join(" | ")),
        }
    }

    fn reference(&mut self, target: &Json, place: &str) -> Made {
        let target = target.as_str().unwrap_or_default();
        if let Some(name) = self.references.get(target) {
            return Ok(name.clone());
        }
        let mut found = self.whole.filter(|_| target == "#" || target.starts_with("#/"));
        for step in target.trim_start_matches('#').split('/').skip(1) {
            let step = step.replace("~1", "/").replace("~0", "~");
            found = found.and_then(|at| at.get(&step));
        }
        let found = found.ok_or_else(|| {
            format!("{place}: {target:?} is not in this schema; references to its own parts are followed")
        })?;
        let found = found.clone();
        let name = self.reserve()?;
        self.references.insert(target.to_owned(), name.clone());
        let body = self.schema(&found, target, 1)?;
        if body == name {
            return Err(format!("{place}: {target:?} refers to nothing but itself"));
        }
        self.define(&name, body);
        Ok(name)
    }

    /// The named properties in their order, optional ones left out or not.
    fn object(&mut self, schema: &Json, place: &str, depth: usize) -> Made {
        let none = Vec::new();
        let properties = match schema.get("properties") {
            None => &none,
            Some(Json::Object(fields)) => fields,
            Some(_) => return Err(format!("{place}: properties is not an object")),
        };
        let required: Vec<&str> = match schema.get("required") {
            None => Vec::new(),
            Some(Json::List(all)) => all.iter().filter_map(Json::as_str).collect(),
            Some(_) => return Err(format!("{place}: required is not a list of names")),
        };
        let anything = Json::Bool(true);
        let mut seen = BTreeSet::new();
        let mut named: Vec<(&str, &Json)> = Vec::new();
        for (name, of) in properties {
            if seen.insert(name.as_str()) {
                named.push((name, of));
            }
        }
        named.extend(
            required
                .iter()
                .filter(|name| seen.insert(name))
                .map(|name| (*name, &anything)),
        );
        if named.is_empty() {
            return match schema.get("additionalProperties") {
                None | Some(Json::Bool(true)) => Ok("object".into()),
                Some(Json::Bool(false)) => self.rule(r#""{" ws "}""#.into()),
                Some(of) => {
                    let value = self.schema(of, &format!("{place}.additionalProperties"), depth + 1)?;
                    self.rule(format!(
                        r#""{{" ws (string ws ":" ws {value} (ws "," ws string ws ":" ws {value})*)? ws "}}""#
                    ))
                }
            };
        }
        // From the last property to the first: what may follow when something, or nothing, is written already.
        let (mut after_some, mut after_none) = (String::new(), String::new());
        for (name, of) in named.iter().rev() {
            let value = self.schema(of, &format!("{place}.{name}"), depth + 1)?;
            let pair = format!(
                "{} ws \":\" ws {value}",
                literal(&Json::Text((*name).to_owned()).to_string())
            );
            let first = format!("{pair} {after_some}");
            let next = format!("ws \",\" ws {pair} {after_some}");
            // An empty choice must come first: after the last bar, the grammar would read on in the next rule.
            let (some, none) = if required.contains(name) {
                (next, first)
            } else {
                (
                    format!("{after_some} | {next}"),
                    format!("{after_none} | {first}"),
                )
            };
            (after_some, after_none) = (self.rule(some)?, self.rule(none)?);
        }
        self.rule(format!(r#""{{" ws {after_none} ws "}}""#))
    }

    fn array(&mut self, schema: &Json, place: &str, depth: usize) -> Made {
        let item = match schema.get("items") {
            None => "value".to_owned(),
            Some(of) => self.schema(of, &format!("{place}.items"), depth + 1)?,
        };
        let (least, most) = counts(schema, place, "minItems", "maxItems")?;
        if most == Some(0) {
            return self.rule(r#""[" ws "]""#.into());
        }
        let more = times(
            &format!(r#"(ws "," ws {item})"#),
            least.saturating_sub(1),
            most.map(|most| most - 1),
        );
        let items = format!("{item} {more}");
        self.rule(if least == 0 {
            format!(r#""[" ws ({items})? ws "]""#)
        } else {
            format!(r#""[" ws {items} ws "]""#)
        })
    }

    fn string(&mut self, schema: &Json, place: &str) -> Made {
        let date = r#"[0-9]{4} "-" ("0" [1-9] | "1" [0-2]) "-" ("0" [1-9] | [12] [0-9] | "3" [01])"#;
        let time = r#"([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{1,6})? ("Z" | [+-] ([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9])"#;
        match schema.get("format").and_then(Json::as_str) {
            None => {}
            Some("date") => return self.rule(format!(r#""\"" {date} "\"""#)),
            Some("time") => return self.rule(format!(r#""\"" {time} "\"""#)),
            Some("date-time") => return self.rule(format!(r#""\"" {date} "T" {time} "\"""#)),
            Some("uuid") => {
                return self.rule(r#""\"" hex{8} "-" hex{4} "-" hex{4} "-" hex{4} "-" hex{12} "\"""#.into());
            }
            Some(other) => {
                return Err(format!(
                    "{place}: the format {other:?} cannot be enforced here; date, time, date-time and uuid can"
                ));
            }
        }
        match counts(schema, place, "minLength", "maxLength")? {
            (0, None) => Ok("string".into()),
            (least, most) => self.rule(format!(r#""\"" {} "\"""#, times("char", least, most))),
        }
    }
}

fn integer(schema: &Json, place: &str) -> Made {
    match schema.get("minimum") {
        None => Ok("integer".into()),
        Some(n) if n.as_u64() == Some(0) => Ok("natural".into()),
        Some(n) if n.as_u64() == Some(1) => Ok("([1-9] [0-9]{0,15})".into()),
        Some(other) => Err(format!(
            "{place}: a minimum of {other} cannot be enforced here; 0 and 1 can"
        )),
    }
}

/// The least and the most; of the most, no more than a grammar counts.
fn counts(schema: &Json, place: &str, least: &str, most: &str) -> Result<(u64, Option<u64>), String> {
    let read = |name: &str| match schema.get(name) {
        None => Ok(None),
        Some(n) => n
            .as_u64()
            .map(Some)
            .ok_or_else(|| format!("{place}: {name} is not a whole number")),
    };
    let (low, high) = (read(least)?.unwrap_or(0), read(most)?);
    if low > COUNT_MAX {
        return Err(format!("{place}: {least} is {low}, {COUNT_MAX} can be enforced"));
    }
    if high.is_some_and(|high| high < low) {
        return Err(format!("{place}: {least} is more than {most}"));
    }
    Ok((low, high.map(|high| high.min(COUNT_MAX))))
}

fn times(what: &str, least: u64, most: Option<u64>) -> String {
    match most {
        None if least == 0 => format!("{what}*"),
        None => format!("{what}{{{least},}}"),
        Some(0) => String::new(),
        Some(most) => format!("{what}{{{least},{most}}}"),
    }
}

/// `text` as a grammar writes it.
fn literal(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            _ => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(schema: &str) -> Made {
        of_schema(&serde_json::from_str(schema).unwrap())
    }

    #[test]
    fn what_cannot_be_enforced_is_named() {
        for (schema, says) in [
            (
                r#"{"type":"string","pattern":"^a"}"#,
                "\"pattern\" cannot be enforced",
            ),
            (r#"{"type":"integer","minimum":7}"#, "a minimum of 7"),
            (
                r#"{"type":"object","properties":{"a":{"type":"text"}}}"#,
                "response_format.a: \"text\" is no type",
            ),
            (r##"{"$ref":"#/$defs/gone"}"##, "not in this schema"),
            (r##"{"$ref":"#"}"##, "refers to nothing but itself"),
            (r#"{"$ref":"https://example.org/x"}"#, "not in this schema"),
            (
                r#"{"type":"array","minItems":5,"maxItems":2}"#,
                "minItems is more than maxItems",
            ),
            (r#"{"type":"string","minLength":100000}"#, "1000 can be enforced"),
            (
                r#"{"allOf":[{"type":"string"},{"type":"null"}]}"#,
                "allOf of several",
            ),
            (
                r#"{"type":"string","properties":{}}"#,
                "\"properties\" cannot be enforced",
            ),
            ("7", "not a schema"),
        ] {
            let error = made(schema).unwrap_err();
            assert!(error.contains(says), "{schema}: {error}");
        }
        let mut deep = "{}".to_owned();
        for _ in 0..40 {
            deep = format!(r#"{{"type":"array","items":{deep}}}"#);
        }
        assert!(made(&deep).unwrap_err().contains("nested deeper"));
        let wide: Vec<String> = (0..3000)
            .map(|n| format!("\"p{n}\":{{\"type\":\"null\"}}"))
            .collect();
        let wide = format!("{{\"type\":\"object\",\"properties\":{{{}}}}}", wide.join(","));
        assert!(made(&wide).unwrap_err().contains("2048 rules"));
    }

    #[test]
    fn properties_keep_their_order_and_a_schema_may_contain_itself() {
        let text = made(
            r##"{"type":"object","required":["z"],"properties":{"z":{"enum":["a\"b",1]},"a":{"$ref":"#"}},
                "additionalProperties":false}"##,
        )
        .unwrap();
        assert!(text.contains(r#""\"a\\\"b\"" | "1""#), "{text}");
        let (z, a) = (text.find(r#""\"z\"""#).unwrap(), text.find(r#""\"a\"""#).unwrap());
        assert!(
            a < z,
            "rules are written from the last property to the first: {text}"
        );
    }
}
