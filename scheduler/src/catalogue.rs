//! Names of models: which artifact `all-MiniLM-L6-v2` means here.
//!
//! A name belongs to the key that gave it first; only that key or the scheduler's own may point it elsewhere.
use crate::mind::lock;
use karez_core::{artifact::ArtifactRef, key::PublicKey};
use karez_ledger::{Op, StoreError, Tables, Transaction, Writer};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, sync::Mutex};

/// The format of a model that providers' own servers answer for: known by its name alone.
pub(crate) const SERVED: &str = "served";
/// The table of the durable writer.
pub(crate) const TABLE: &str = "models";
/// The most names.
const NAMES_MAX: usize = 10_000;
/// The most names of one key.
const NAMES_OF_KEY_MAX: usize = 256;

/// What a name stands for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Named {
    pub(crate) artifact: ArtifactRef,
    pub(crate) format: String,
    pub(crate) licence: String,
    pub(crate) by: PublicKey,
}

/// Why a name was not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NameError {
    #[error(
        "{0:?} is no model name: use 1 to 100 letters, digits, dots, dashes and underscores, starting with a letter or digit"
    )]
    Name(String),
    #[error("{0:?} is no model format: use up to 32 of a-z, 0-9 and dash, like gguf or safetensors")]
    Format(String),
    #[error(
        "the licence {0:?} is longer than 128 bytes or holds control characters: name it, like Apache-2.0"
    )]
    Licence(String),
    #[error("the name {name:?} was given by key {owner}: choose another name, or ask its owner")]
    Taken { name: String, owner: String },
    #[error("{have} models are named, the limit is {max}: ask the operator to remove some")]
    Full { have: usize, max: usize },
    #[error(transparent)]
    Store(Box<StoreError>),
}

#[derive(Default)]
pub(crate) struct Catalogue {
    names: Mutex<BTreeMap<String, Named>>,
    /// One change at a time, so that disk and memory agree on the order.
    changing: tokio::sync::Mutex<()>,
}

impl Catalogue {
    /// The names on disk. A row that cannot be read is left out, with a warning.
    pub(crate) fn restore(tables: &Tables) -> Self {
        let mut names = BTreeMap::new();
        for (key, value) in tables.rows(TABLE) {
            match (String::from_utf8(key.to_vec()), serde_json::from_slice(value)) {
                (Ok(name), Ok(named)) => drop(names.insert(name, named)),
                (name, _) => tracing::warn!(?name, "a stored model name cannot be read: left out"),
            }
        }
        Self {
            names: Mutex::new(names),
            changing: tokio::sync::Mutex::default(),
        }
    }

    pub(crate) fn list(&self) -> Vec<(String, Named)> {
        lock(&self.names)
            .iter()
            .map(|(name, named)| (name.clone(), named.clone()))
            .collect()
    }

    /// What `name` stands for.
    pub(crate) fn get(&self, name: &str) -> Option<Named> {
        lock(&self.names).get(name).cloned()
    }

    /// Points `name` at an artifact. On disk when it returns `Ok`.
    pub(crate) async fn name(
        &self,
        writer: &Writer,
        name: String,
        named: Named,
        operator: bool,
    ) -> Result<(), NameError> {
        check(&name, &named)?;
        let _one = self.changing.lock().await;
        {
            let names = lock(&self.names);
            match names.get(&name) {
                Some(known) if known.by != named.by && !operator => {
                    return Err(NameError::Taken {
                        name,
                        owner: known.by.short(),
                    });
                }
                Some(_) => {}
                None => {
                    let of_key = names.values().filter(|n| n.by == named.by).count();
                    if names.len() >= NAMES_MAX {
                        return Err(NameError::Full {
                            have: names.len(),
                            max: NAMES_MAX,
                        });
                    }
                    if of_key >= NAMES_OF_KEY_MAX && !operator {
                        return Err(NameError::Full {
                            have: of_key,
                            max: NAMES_OF_KEY_MAX,
                        });
                    }
                }
            }
        }
        // Only maps with keys that are not text can fail here.
        let value = serde_json::to_vec(&named).unwrap_or_default();
        let put = Op::Put {
            table: TABLE,
            key: name.clone().into_bytes(),
            value,
        };
        let put = writer.commit(Transaction { ops: vec![put] }).await;
        put.map_err(|e| NameError::Store(Box::new(e)))?;
        lock(&self.names).insert(name, named);
        Ok(())
    }
}

fn check(name: &str, named: &Named) -> Result<(), NameError> {
    let start = |text: &str| text.chars().take(80).collect::<String>();
    let letters = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    if name.is_empty()
        || name.len() > 100
        || !name.starts_with(|c: char| c.is_ascii_alphanumeric())
        || !name.chars().all(letters)
    {
        return Err(NameError::Name(start(name)));
    }
    let format = &named.format;
    if format.is_empty()
        || format.len() > 32
        || !format
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
    {
        return Err(NameError::Format(start(format)));
    }
    if named.licence.len() > 128 || named.licence.chars().any(char::is_control) {
        return Err(NameError::Licence(start(&named.licence)));
    }
    Ok(())
}
