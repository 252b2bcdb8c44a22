//! Chat examples: ChatML around a question and its answer, and padded batches that count loss on the answer alone.

use candle_core::{Device, Tensor};
use tokenizers::Tokenizer;

use super::TrainError;

/// Text of ChatML, with the ids of a tokenizer that knows its two marks.
pub struct ChatFormat<'a> {
    tokenizer: &'a Tokenizer,
    end: u32,
}

/// One conversation as tokens. Those from `answer_from` on are to be learnt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// Prompt, answer and the end mark.
    pub ids: Vec<u32>,
    /// Index of the answer's first token.
    pub answer_from: usize,
}

impl<'a> ChatFormat<'a> {
    /// Begins a message; the role and a newline follow.
    pub const START: &'static str = "<|im_start|>";
    /// Ends a message; the model says it when it has finished.
    pub const END: &'static str = "<|im_end|>";
    /// The template as Hugging Face and llama.cpp know it.
    pub const TEMPLATE: &'static str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + \
        message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}\
        {{ '<|im_start|>assistant\\n' }}{% endif %}";

    /// Needs both marks in the tokenizer's vocabulary.
    pub fn new(tokenizer: &'a Tokenizer) -> Result<Self, TrainError> {
        let id = |mark: &str| {
            tokenizer
                .token_to_id(mark)
                .ok_or_else(|| TrainError::Missing(mark.to_owned()))
        };
        id(Self::START)?;
        Ok(Self {
            tokenizer,
            end: id(Self::END)?,
        })
    }

    /// The id that ends an answer.
    pub fn end(&self) -> u32 {
        self.end
    }

    /// What a model reads before it answers `question`.
    pub fn prompt_text(question: &str) -> String {
        format!("{0}user\n{question}{1}\n{0}assistant\n", Self::START, Self::END)
    }

    /// The prompt as tokens.
    pub fn prompt(&self, question: &str) -> Result<Vec<u32>, TrainError> {
        self.encode(&Self::prompt_text(question))
    }

    /// Prompt, answer and end mark. Prompt and answer are tokenised apart, as they are in use.
    pub fn example(&self, question: &str, answer: &str) -> Result<Example, TrainError> {
        let mut ids = self.prompt(question)?;
        let answer_from = ids.len();
        ids.extend(self.encode(answer)?);
        ids.push(self.end);
        Ok(Example { ids, answer_from })
    }

    /// Tokens back to text, marks left out.
    pub fn text(&self, ids: &[u32]) -> Result<String, TrainError> {
        self.tokenizer
            .decode(ids, true)
            .map_err(|error| TrainError::Tokenizer(error.to_string()))
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>, TrainError> {
        let encoding = self
            .tokenizer
            .encode(text, false)
            .map_err(|error| TrainError::Tokenizer(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }
}

/// Examples side by side, padded on the right. Attention is causal, so padding changes nothing before it.
#[derive(Debug, Clone)]
pub struct Batch {
    /// Input tokens, u32 `[examples, length]`.
    pub ids: Tensor,
    /// Positions, in the flattened input, whose next token counts, u32 `[n]`.
    pub picks: Tensor,
    /// Those next tokens, u32 `[n]`.
    pub targets: Tensor,
    /// How many of the `n` belong to each example, in order.
    pub counts: Vec<usize>,
}

impl Batch {
    /// Lays out `examples`; `None` when nothing in them is to be learnt.
    pub fn new(examples: &[&Example], padding: u32, device: &Device) -> Result<Option<Self>, TrainError> {
        // The last token is only ever a target.
        let length = examples
            .iter()
            .map(|example| example.ids.len().saturating_sub(1))
            .max()
            .unwrap_or(0);
        let (mut ids, mut picks, mut targets, mut counts) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (row, example) in examples.iter().enumerate() {
            let input = &example.ids[..example.ids.len().saturating_sub(1)];
            ids.extend_from_slice(input);
            ids.resize((row + 1) * length, padding);
            let from = example.answer_from.max(1);
            for (position, target) in example.ids.iter().enumerate().skip(from) {
                picks.push((row * length + position - 1) as u32);
                targets.push(*target);
            }
            counts.push(example.ids.len().saturating_sub(from));
        }
        if targets.is_empty() {
            return Ok(None);
        }
        let count = targets.len();
        Ok(Some(Self {
            ids: Tensor::from_vec(ids, (examples.len(), length), device)?,
            picks: Tensor::from_vec(picks, count, device)?,
            targets: Tensor::from_vec(targets, count, device)?,
            counts,
        }))
    }
}
