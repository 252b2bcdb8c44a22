//! A tokenizer without its model: how many tokens a text has. For nodes that front a server and check its word.
use std::path::Path;
use tokenizers::Tokenizer;

use super::{Desk, Engine};
use crate::error::EngineError;
use crate::protocol::{Isolation, ModelFacts, Output, TEXTS_MAX, Work};
use crate::unit::Bytes;

/// Bytes of a `tokenizer.json` at most.
const FILE_MAX: u64 = 64 << 20;

pub(super) struct Counter {
    tokenizer: Tokenizer,
    name: String,
}

impl Counter {
    pub(super) fn load(path: &Path) -> Result<Self, EngineError> {
        let bad = |why: String| EngineError::bad_model(path, why);
        let bytes = std::fs::metadata(path).map_err(|e| bad(e.to_string()))?.len();
        if bytes > FILE_MAX {
            return Err(bad(format!(
                "{bytes} bytes are too many for a tokenizer, {FILE_MAX} are allowed"
            )));
        }
        let mut tokenizer = Tokenizer::from_file(path).map_err(|e| bad(e.to_string()))?;
        // Some files ask for texts to be cut or filled up: what is counted is the text as it is.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| bad(e.to_string()))?;
        Ok(Self {
            tokenizer,
            name: path.display().to_string(),
        })
    }
}

impl Engine for Counter {
    fn facts(&self) -> ModelFacts {
        ModelFacts {
            name: self.name.clone(),
            architecture: "tokenizer".into(),
            context_tokens: 0,
            parameters: 0,
            dimensions: None,
            memory_estimate: Bytes(0),
            engine: "tokenizers".into(),
            threads: 1,
            isolation: Isolation::None,
        }
    }

    fn run(&mut self, work: Work, desk: &mut Desk<'_>) -> Result<Output, EngineError> {
        let Work::Count { texts } = work else {
            return Err(EngineError::bad_input(
                "this worker has a tokenizer and no model: it only counts",
            ));
        };
        if texts.len() > TEXTS_MAX {
            return Err(EngineError::bad_input(format!(
                "{} texts, {TEXTS_MAX} are allowed at a time",
                texts.len()
            )));
        }
        let mut tokens = Vec::with_capacity(texts.len());
        for text in texts {
            desk.check()?;
            let encoded = self.tokenizer.encode_fast(text, false);
            let encoded =
                encoded.map_err(|e| EngineError::bad_input(format!("a text cannot be counted: {e}")))?;
            tokens.push(encoded.len() as u64);
        }
        Ok(Output::Counts { tokens })
    }
}
