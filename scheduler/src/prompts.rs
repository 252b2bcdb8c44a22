//! How a question's prompt begins, for routing: read from the one line of its input.
use karez_core::{
    records::{Generate, Order, Work},
    routing::{Prefix, TOOLS, text_of},
    unit::Bytes,
};
use karez_net::store::ArtifactStore;
use serde_json::{Value, value::RawValue};

/// Longer inputs are not read for this.
const INPUT_MAX: Bytes = Bytes(1 << 20);

/// The beginning of the prompt of a question; empty when it is none, or cannot be read here. Reads the disk.
pub(crate) fn prefix(store: &ArtifactStore, order: &Order) -> Prefix {
    let Work::Generate(g) = &order.work else {
        return Prefix::default();
    };
    if order.items != 1 || order.input.bytes > INPUT_MAX {
        return Prefix::default();
    }
    let Ok(line) = store.read(&order.input, INPUT_MAX) else {
        return Prefix::default();
    };
    let adapter = g.adapter.as_ref().map(|adapter| &adapter.digest);
    match serde_json::from_slice(&line) {
        Ok(parsed) => Prefix::of(
            &g.model.digest,
            adapter,
            &text(g, &parsed, tools(&line).as_deref()),
        ),
        Err(_) => Prefix::default(),
    }
}

/// The tools of a line as they stand in it: in another order they would be another prompt.
fn tools(line: &[u8]) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Tools<'a> {
        #[serde(borrow)]
        tools: Option<&'a RawValue>,
    }
    let tools = serde_json::from_slice::<Tools<'_>>(line).ok()?.tools?.get();
    (tools.starts_with('[') && tools != "[]").then(|| tools.to_owned())
}

/// As the node will see it: see `karez_node::runner`.
fn text(g: &Generate, line: &Value, tools: Option<&str>) -> String {
    let told = line.get("system").and_then(Value::as_str).unwrap_or(&g.system);
    let system = Some(told).filter(|system| !system.is_empty());
    let prompt = line
        .as_str()
        .or_else(|| line.get("prompt").and_then(Value::as_str));
    if let Some(prompt) = prompt {
        return match g.raw {
            true => text_of([("", prompt)].into_iter()),
            false => text_of(
                system
                    .map(|s| ("system", s))
                    .into_iter()
                    .chain([("user", prompt)]),
            ),
        };
    }
    let Some(messages) = line.get("messages").and_then(Value::as_array) else {
        return String::new();
    };
    let turns: Vec<(&str, String)> = messages
        .iter()
        .map(|message| {
            let role = message.get("role").and_then(Value::as_str).unwrap_or_default();
            let said = match message.get("content") {
                Some(Value::String(text)) => text.clone(),
                Some(Value::Array(parts)) => parts
                    .iter()
                    .filter_map(|part| part.get("text")?.as_str())
                    .collect(),
                _ => String::new(),
            };
            (role, said)
        })
        .collect();
    let own = turns.first().is_some_and(|(role, _)| *role == "system");
    let first = system.filter(|_| !own).map(|s| ("system", s));
    let tools = tools.map(|tools| (TOOLS, tools));
    text_of(
        tools
            .into_iter()
            .chain(first)
            .chain(turns.iter().map(|(role, said)| (*role, said.as_str()))),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use karez_core::artifact::ArtifactRef;
    use serde_json::json;

    #[test]
    fn a_prompt_reads_the_same_however_it_is_asked() {
        let plain = Generate::greedy(ArtifactRef::served("m"), "m", 1);
        let told = Generate {
            system: "be brief".into(),
            ..plain.clone()
        };
        let user = json!([{"role": "user", "content": "hi"}]);
        let parts = json!([{"role": "user", "content": [{"type": "text", "text": "hi"}]}]);
        let text =
            |g: &Generate, line: &Value| super::text(g, line, tools(line.to_string().as_bytes()).as_deref());
        let want = text(&plain, &json!("hi"));
        for line in [
            json!({"prompt": "hi"}),
            json!({"messages": user}),
            json!({ "messages": parts }),
        ] {
            assert_eq!(text(&plain, &line), want, "{line}");
        }
        let system = json!([{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]);
        assert_eq!(
            text(&told, &json!({"prompt": "hi"})),
            text(&plain, &json!({ "messages": system }))
        );
        // A line's own word comes before the order's.
        assert_eq!(
            text(&plain, &json!({"prompt": "hi", "system": "be brief"})),
            text(&told, &json!("hi"))
        );
        // Tools stand before everything, as templates write them; none are none.
        let armed = |tools: Value| text(&plain, &json!({"messages": user, "tools": tools}));
        assert_eq!(armed(json!([])), want);
        assert_ne!(armed(json!([{"type": "function"}])), want);
        assert!(armed(json!([{"type": "function"}])).starts_with("tools"));
        assert_ne!(text(&told, &json!("hi")), want);
    }
}
