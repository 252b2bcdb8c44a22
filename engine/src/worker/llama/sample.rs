//! Choosing the next token of one request.
//!
//! Penalties and biases are applied to the scores first, then the grammar, then top_k, top_p, min_p and temperature
//! in llama.cpp's own samplers, and at last one is drawn. The draw at a place of the answer depends on the seed and the
//! place alone, so an answer that moves to another worker goes on with the very draws it would have had.
use std::collections::HashMap;

use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::sampling::LlamaSampler;
use llama_cpp_2::token::LlamaToken;
use llama_cpp_2::token::data::LlamaTokenData;
use llama_cpp_2::token::data_array::LlamaTokenDataArray;

use super::grammar;
use crate::error::EngineError;
use crate::protocol::{Generate, ResponseFormat, TokenLogprob, TopLogprob};

pub(super) struct Sampler {
    /// top_k, top_p, min_p and temperature; none when the likeliest is wanted.
    chain: Option<LlamaSampler>,
    grammar: Option<LlamaSampler>,
    biases: Vec<(u32, f32)>,
    repetition: f32,
    presence: f32,
    frequency: f32,
    /// How often each token stands in the answer; those of the prompt alone stand at 0.
    seen: HashMap<i32, u32>,
    seed: u64,
    place: u64,
    top_logprobs: Option<u8>,
    /// Kept between tokens, so that a large vocabulary is not allocated for each.
    candidates: Vec<LlamaTokenData>,
}

impl Sampler {
    /// Checks the request's settings; an error names the one at fault and what is allowed.
    pub(super) fn new(request: &Generate, model: &LlamaModel) -> Result<Self, EngineError> {
        check(request, model.n_vocab())?;
        let chain = (request.temperature > 0.0).then(|| {
            let mut chain = Vec::new();
            if request.top_k > 0 {
                chain.push(LlamaSampler::top_k(
                    i32::try_from(request.top_k).unwrap_or(i32::MAX),
                ));
            }
            if request.top_p < 1.0 {
                chain.push(LlamaSampler::top_p(request.top_p, 1));
            }
            if request.min_p > 0.0 {
                chain.push(LlamaSampler::min_p(request.min_p, 1));
            }
            chain.push(LlamaSampler::temp(request.temperature));
            LlamaSampler::chain_simple(chain)
        });
        let grammar = match &request.response_format {
            None | Some(ResponseFormat::Text) => None,
            Some(ResponseFormat::JsonObject) => Some(grammar::any_object()),
            Some(ResponseFormat::JsonSchema { json_schema }) => {
                Some(grammar::of_schema(&json_schema.schema).map_err(EngineError::bad_input)?)
            }
        };
        let grammar = grammar
            .map(|text| {
                LlamaSampler::grammar(model, &text, "root").map_err(|error| {
                    EngineError::bad_input(format!("response_format cannot be enforced: {error}"))
                })
            })
            .transpose()?;
        Ok(Self {
            chain,
            grammar,
            biases: request.logit_bias.clone(),
            repetition: request.repetition_penalty,
            presence: request.presence_penalty,
            frequency: request.frequency_penalty,
            seen: HashMap::new(),
            seed: request.seed,
            place: 0,
            top_logprobs: request.top_logprobs,
            candidates: Vec::new(),
        })
    }

    /// Tells it the prompt, which the repetition penalty counts too.
    pub(super) fn prompt(&mut self, tokens: &[LlamaToken]) {
        if self.repetition != 1.0 {
            for token in tokens {
                self.seen.entry(token.0).or_insert(0);
            }
        }
    }

    /// Takes a token of the answer that was generated elsewhere.
    pub(super) fn resume(&mut self, token: LlamaToken) -> Result<(), EngineError> {
        if !self.allows(token) {
            return Err(EngineError::bad_input(format!(
                "the token {} of resume does not fit response_format",
                token.0
            )));
        }
        self.accept(token);
        Ok(())
    }

    /// The next token, given the scores of the whole vocabulary. `piece` gives a token's bytes.
    pub(super) fn next(
        &mut self,
        scores: &[f32],
        piece: &dyn Fn(LlamaToken) -> Vec<u8>,
    ) -> Result<(LlamaToken, Option<TokenLogprob>), EngineError> {
        let plain = self.biases.is_empty() && (self.seen.is_empty() || !self.penalises());
        let token = if plain && self.chain.is_none() {
            let likeliest = likeliest(scores)?;
            if self.allows(likeliest) {
                likeliest
            } else {
                self.draw(scores, true)?
            }
        } else {
            let drawn = self.draw(scores, false)?;
            // Checking one candidate is much cheaper than a whole vocabulary, and mostly enough.
            if self.allows(drawn) {
                drawn
            } else {
                self.draw(scores, true)?
            }
        };
        let logprob = self.top_logprobs.map(|top| logprob(scores, token, top, piece));
        self.accept(token);
        Ok((token, logprob))
    }

    fn penalises(&self) -> bool {
        self.repetition != 1.0 || self.presence != 0.0 || self.frequency != 0.0
    }

    /// Whether the grammar has room for it.
    fn allows(&mut self, token: LlamaToken) -> bool {
        let Some(grammar) = &mut self.grammar else {
            return true;
        };
        let mut one = LlamaTokenDataArray::new(vec![LlamaTokenData::new(token, 0.0, 0.0)], false);
        one.apply_sampler(grammar);
        one.data.first().is_some_and(|data| data.logit().is_finite())
    }

    fn accept(&mut self, token: LlamaToken) {
        if let Some(grammar) = &mut self.grammar {
            grammar.accept(token);
        }
        *self.seen.entry(token.0).or_insert(0) += 1;
        self.place += 1;
    }

    fn draw(&mut self, scores: &[f32], constrained: bool) -> Result<LlamaToken, EngineError> {
        let mut data = std::mem::take(&mut self.candidates);
        data.clear();
        data.extend(
            (0..)
                .zip(scores)
                .map(|(id, score)| LlamaTokenData::new(LlamaToken(id), *score, 0.0)),
        );
        for (token, bias) in &self.biases {
            if let Some(entry) = data.get_mut(*token as usize) {
                entry.set_logit(entry.logit() + bias);
            }
        }
        if self.penalises() {
            for (token, times) in &self.seen {
                let Some(entry) = usize::try_from(*token).ok().and_then(|at| data.get_mut(at)) else {
                    continue;
                };
                let mut score = entry.logit();
                score = if score > 0.0 {
                    score / self.repetition
                } else {
                    score * self.repetition
                };
                score -= self.frequency * *times as f32 + if *times > 0 { self.presence } else { 0.0 };
                entry.set_logit(score);
            }
        }
        let mut array = LlamaTokenDataArray::new(data, false);
        if let Some(grammar) = self.grammar.as_mut().filter(|_| constrained) {
            array.apply_sampler(grammar);
        }
        let token = match &mut self.chain {
            None => {
                let scores: Vec<f32> = array.data.iter().map(LlamaTokenData::logit).collect();
                likeliest(&scores)
            }
            Some(chain) => {
                array.apply_sampler(chain);
                pick(&array.data, draw_of(self.seed, self.place))
            }
        };
        self.candidates = array.data;
        token
    }
}

fn no_number() -> EngineError {
    EngineError::Crashed {
        how: "the model computed no usable score for any token".into(),
    }
}

/// The first of the highest scores.
fn likeliest(scores: &[f32]) -> Result<LlamaToken, EngineError> {
    let mut best = (f32::NEG_INFINITY, None);
    for (id, score) in (0..).zip(scores) {
        if *score > best.0 {
            best = (*score, Some(LlamaToken(id)));
        }
    }
    best.1.filter(|_| best.0.is_finite()).ok_or_else(no_number)
}

/// The candidate at `share` (0 to 1) of the probability, in the order given.
fn pick(candidates: &[LlamaTokenData], share: f64) -> Result<LlamaToken, EngineError> {
    let highest = candidates
        .iter()
        .map(LlamaTokenData::logit)
        .fold(f32::NEG_INFINITY, f32::max);
    if !highest.is_finite() {
        return Err(no_number());
    }
    let weight = |data: &LlamaTokenData| f64::from(data.logit() - highest).exp();
    let total: f64 = candidates.iter().map(weight).sum();
    let mut left = share * total;
    let mut chosen = None;
    for data in candidates {
        let weight = weight(data);
        if weight > 0.0 {
            chosen = Some(data.id());
            left -= weight;
            if left < 0.0 {
                break;
            }
        }
    }
    chosen.ok_or_else(no_number)
}

/// A number from 0 up to, not including, 1, that is the same for equal arguments everywhere.
/// Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014).
fn draw_of(seed: u64, place: u64) -> f64 {
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let mixed =
        mix(mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15))
            .wrapping_add(place.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    (mixed >> 11) as f64 / (1u64 << 53) as f64
}

fn logprob(
    scores: &[f32],
    token: LlamaToken,
    top: u8,
    piece: &dyn Fn(LlamaToken) -> Vec<u8>,
) -> TokenLogprob {
    let highest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = scores.iter().map(|score| f64::from(score - highest).exp()).sum();
    let whole = f64::from(highest) + sum.ln();
    // Zero probability has no number in JSON.
    let of = |score: f32| ((f64::from(score) - whole) as f32).max(-9999.0);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let mut best: Vec<(f32, i32)> = Vec::with_capacity(usize::from(top) + 1);
    if top > 0 {
        for (id, score) in (0..).zip(scores) {
            if best.len() < usize::from(top) || best.last().is_some_and(|last| *score > last.0) {
                let at = best.partition_point(|better| better.0 >= *score);
                best.insert(at, (*score, id));
                best.truncate(usize::from(top));
            }
        }
    }
    let bytes = piece(token);
    TokenLogprob {
        token: text(&bytes),
        logprob: of(usize::try_from(token.0)
            .ok()
            .and_then(|at| scores.get(at))
            .copied()
            .unwrap_or(f32::MIN)),
        bytes,
        top_logprobs: best
            .into_iter()
            .map(|(score, id)| {
                let bytes = piece(LlamaToken(id));
                TopLogprob {
                    token: text(&bytes),
                    logprob: of(score),
                    bytes,
                }
            })
            .collect(),
    }
}

/// What only the model can tell.
fn check(request: &Generate, vocabulary: i32) -> Result<(), EngineError> {
    request.check()?;
    let unknown = |token: &u32| i64::from(*token) >= i64::from(vocabulary);
    let tokens = request.logit_bias.iter().map(|(token, _)| ("logit_bias", token));
    let tokens = tokens.chain(request.resume.iter().map(|token| ("resume", token)));
    match tokens.into_iter().find(|(_, token)| unknown(token)) {
        Some((name, token)) => Err(EngineError::bad_input(format!(
            "{name} names token {token}; the model has {vocabulary}"
        ))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates(scores: &[f32]) -> Vec<LlamaTokenData> {
        (0..)
            .zip(scores)
            .map(|(id, s)| LlamaTokenData::new(LlamaToken(id), *s, 0.0))
            .collect()
    }

    #[test]
    fn draws_are_even_and_depend_on_seed_and_place() {
        let mean: f64 = (0..4000).map(|place| draw_of(3, place)).sum::<f64>() / 4000.0;
        assert!((mean - 0.5).abs() < 0.03, "{mean}");
        assert_eq!(draw_of(1, 2).to_bits(), draw_of(1, 2).to_bits());
        assert!(draw_of(1, 2) != draw_of(2, 1) && draw_of(0, 0) != draw_of(0, 1));
    }

    #[test]
    fn a_pick_follows_the_probabilities() {
        let three = candidates(&[0.0, f32::NEG_INFINITY, (3.0f32).ln()]);
        assert_eq!(pick(&three, 0.0).unwrap(), LlamaToken(0));
        assert_eq!(pick(&three, 0.24).unwrap(), LlamaToken(0));
        assert_eq!(pick(&three, 0.26).unwrap(), LlamaToken(2));
        assert_eq!(pick(&three, 0.999_999_999).unwrap(), LlamaToken(2));
        assert!(pick(&candidates(&[f32::NAN, f32::NEG_INFINITY]), 0.5).is_err());
    }

    #[test]
    fn logprobs_are_those_of_the_whole_vocabulary() {
        let scores = [1.0f32.ln(), 2.0f32.ln(), 5.0f32.ln()];
        let told = logprob(&scores, LlamaToken(0), 2, &|token| vec![b'a' + token.0 as u8]);
        assert!((told.logprob.exp() - 0.125).abs() < 1e-6);
        assert_eq!(
            (told.token.as_str(), told.top_logprobs[0].token.as_str()),
            ("a", "c")
        );
        assert!((told.top_logprobs[1].logprob.exp() - 0.25).abs() < 1e-6);
        assert_eq!(told.top_logprobs.len(), 2);
    }
}
