//! Lists as OpenAI pages them: newest first, and only what stands on the page is put together.
use axum::http::Uri;
use serde_json::{Value, json};

/// Rows of one page at most.
const LIMIT_MAX: usize = 10_000;

/// What can stand in a list.
pub(super) trait Row: Clone {
    fn id(&self) -> &str;
    /// Seconds since 1970.
    fn created_at(&self) -> u64;
}

/// Some rows, and whether more follow.
pub(super) struct Page<T> {
    pub(super) rows: Vec<T>,
    more: bool,
}

/// The page that `after` and `limit` of the query choose, of rows in any order.
pub(super) fn newest<'a, T: Row + 'a>(
    uri: &Uri,
    default: usize,
    rows: impl Iterator<Item = &'a T>,
) -> Page<T> {
    let mut rows: Vec<&T> = rows.collect();
    rows.sort_unstable_by_key(|row| std::cmp::Reverse((row.created_at(), row.id())));
    let page = page(uri, default, rows, |row| row.id());
    Page {
        rows: page.rows.into_iter().cloned().collect(),
        more: page.more,
    }
}

/// The same of rows that stand in their order already.
pub(super) fn page<T>(uri: &Uri, default: usize, mut rows: Vec<T>, id: impl Fn(&T) -> &str) -> Page<T> {
    let query = uri.query().unwrap_or_default();
    let of = |name: &str| {
        let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        pairs.find(|(key, _)| *key == name).map(|(_, value)| value)
    };
    let limit = of("limit")
        .and_then(|n| n.parse().ok())
        .unwrap_or(default)
        .clamp(1, LIMIT_MAX);
    if let Some(after) = of("after") {
        let at = rows.iter().position(|row| id(row) == after);
        rows.drain(..at.map_or(rows.len(), |at| at + 1));
    }
    let more = rows.len() > limit;
    rows.truncate(limit);
    Page { rows, more }
}

impl<T> Page<T> {
    /// The page as a body; `shown` are its rows.
    pub(super) fn body(&self, shown: &[Value]) -> Value {
        let id = |row: Option<&Value>| row.map_or(Value::Null, |row| row["id"].clone());
        json!({
            "object": "list", "has_more": self.more,
            "first_id": id(shown.first()), "last_id": id(shown.last()), "data": shown,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone)]
    struct Made(&'static str, u64);

    impl Row for Made {
        fn id(&self) -> &str {
            self.0
        }
        fn created_at(&self) -> u64 {
            self.1
        }
    }

    #[test]
    fn pages_are_newest_first_and_go_on_where_the_last_one_ended() {
        let rows = [Made("b", 2), Made("c", 1), Made("a", 3), Made("d", 1)];
        let page = |query: &str| {
            let page = newest(&format!("/v1/files{query}").parse().unwrap(), 20, rows.iter());
            let shown: Vec<Value> = page.rows.iter().map(|row| json!({"id": row.0})).collect();
            let ids = page.rows.iter().map(|row| row.0).collect::<String>();
            (ids, page.body(&shown))
        };
        assert_eq!(page("").0, "abdc");
        let (ids, body) = page("?limit=2");
        assert_eq!(
            (ids.as_str(), &body["has_more"], &body["last_id"]),
            ("ab", &json!(true), &json!("b"))
        );
        let (ids, body) = page("?limit=2&after=b");
        assert_eq!((ids.as_str(), &body["has_more"]), ("dc", &json!(false)));
        let (ids, body) = page("?after=zzz");
        assert_eq!((ids.as_str(), &body["first_id"]), ("", &Value::Null));
    }
}
