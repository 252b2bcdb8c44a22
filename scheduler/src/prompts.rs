//! How a question's prompt begins, for routing: read from the one line of its input.
use karez_core::{
    records::{Generate, Order, Work},
    routing::{Prefix, text_of},
    unit::Bytes,
};
use karez_net::store::ArtifactStore;
use serde_json::Value;

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
    match serde_json::from_slice(&line) {
        Ok(line) => Prefix::of(&g.model.digest, &text(g, &line)),
        Err(_) => Prefix::default(),
    }
}

/// As the node will see it: see `karez_node::runner`.
fn text(g: &Generate, line: &Value) -> String {
    let system = Some(g.system.as_str()).filter(|system| !system.is_empty());
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
    text_of(
        first
            .into_iter()
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
        assert_ne!(text(&told, &json!("hi")), want);
    }
}
