//! The demo's sentences and the check that their vectors mean something.
//!
//! A sentence knows its language and, where texts are translations of each other, which passage it belongs to.
//! Meaning is then measured: the nearest sentence in another language should belong to the same passage.
use crate::fault::{Kind, fault};
use anyhow::{Context, Result};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// The questions and answers that come with the engine: the same 24 in each language, in the same order.
const CORPUS: [(&str, &str); 10] = [
    ("en", include_str!("../engine/corpus/en.jsonl")),
    ("ar", include_str!("../engine/corpus/ar.jsonl")),
    ("bn", include_str!("../engine/corpus/bn.jsonl")),
    ("es", include_str!("../engine/corpus/es.jsonl")),
    ("fr", include_str!("../engine/corpus/fr.jsonl")),
    ("hi", include_str!("../engine/corpus/hi.jsonl")),
    ("id", include_str!("../engine/corpus/id.jsonl")),
    ("pt", include_str!("../engine/corpus/pt.jsonl")),
    ("sw", include_str!("../engine/corpus/sw.jsonl")),
    ("zh", include_str!("../engine/corpus/zh.jsonl")),
];
/// Sentences the demo embeds at most: it promises to be done within a minute.
const SENTENCES_MAX: usize = 360;

/// One line to embed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sentence {
    pub(crate) language: String,
    /// The passage it belongs to in every language; none when that is not known.
    pub(crate) passage: Option<u32>,
    pub(crate) text: String,
}

/// A question with the answer it should get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Question {
    pub(crate) language: &'static str,
    pub(crate) question: String,
    pub(crate) answer: String,
}

fn corpus() -> impl Iterator<Item = (u32, Question)> {
    CORPUS.iter().flat_map(|(language, lines)| {
        lines.lines().enumerate().filter_map(|(i, line)| {
            let line: Value = serde_json::from_str(line).ok()?;
            let field = |name: &str| Some(line.get(name)?.as_str()?.to_owned());
            let number = u32::try_from(i).ok()?;
            Some((
                number,
                Question {
                    language,
                    question: field("question")?,
                    answer: field("answer")?,
                },
            ))
        })
    })
}

/// One question in each language of the shipped model.
pub(crate) fn questions() -> Vec<Question> {
    let mut seen = BTreeSet::new();
    corpus()
        .map(|(_, q)| q)
        .filter(|q| seen.insert(q.language))
        .collect()
}

/// The sentences that come with the engine.
pub(crate) fn shipped() -> Vec<Sentence> {
    corpus()
        .flat_map(|(number, q)| {
            let sentence = |text| Sentence {
                language: q.language.to_owned(),
                passage: Some(number),
                text,
            };
            [sentence(q.question.clone()), sentence(q.answer.clone())]
        })
        .collect()
}

/// Sentences from files, or from all `udhr_*.txt` of a directory, evenly thinned to what the demo can do in time.
pub(crate) fn read(paths: &[PathBuf]) -> Result<Vec<Sentence>> {
    let mut files = Vec::new();
    for path in paths {
        if path.is_dir() {
            let listed = fs::read_dir(path).with_context(|| path.display().to_string())?;
            let mut found: Vec<PathBuf> = listed
                .filter_map(|e| Some(e.ok()?.path()))
                .filter(|p| is_udhr(p))
                .collect();
            found.sort();
            if found.is_empty() {
                return Err(fault(
                    Kind::NotFound,
                    format!(
                        "{} holds no udhr_*.txt: name files, or another folder",
                        path.display()
                    ),
                ));
            }
            files.extend(found);
        } else {
            files.push(path.clone());
        }
    }
    let mut all = Vec::new();
    for file in &files {
        let text = fs::read_to_string(file).map_err(|error| {
            let kind = if error.kind() == std::io::ErrorKind::NotFound {
                Kind::NotFound
            } else {
                Kind::Refused
            };
            fault(kind, format!("{}: {error}", file.display()))
        })?;
        all.extend(sentences(&text, &language_of(file)));
    }
    if all.is_empty() {
        return Err(fault(
            Kind::Refused,
            "the given files hold no sentences: there is nothing to embed",
        ));
    }
    Ok(thinned(all))
}

/// At most about [`SENTENCES_MAX`] of them. Whole passages stay, the same in every language, so that each sentence
/// that stays can still find its translation.
fn thinned(mut all: Vec<Sentence>) -> Vec<Sentence> {
    if all.len() <= SENTENCES_MAX {
        return all;
    }
    if all.iter().any(|s| s.passage.is_some()) {
        all.retain(|s| s.passage.is_some());
        let step = u32::try_from(all.len().div_ceil(SENTENCES_MAX)).unwrap_or(u32::MAX);
        all.retain(|s| s.passage.is_some_and(|p| p % step == 1 % step));
        return all;
    }
    let step = all.len().div_ceil(SENTENCES_MAX);
    all.into_iter().step_by(step).collect()
}

fn is_udhr(path: &Path) -> bool {
    path.file_name()
        .and_then(|n| n.to_str())
        .is_some_and(|n| n.starts_with("udhr_") && n.ends_with(".txt"))
}

fn language_of(path: &Path) -> String {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let name = stem.strip_prefix("udhr_").unwrap_or(&stem);
    name.split('_').next().unwrap_or(name).chars().take(8).collect()
}

/// Lines as sentences. A short line with a number is a heading; thirty of them make the articles of the declaration.
fn sentences(text: &str, language: &str) -> Vec<Sentence> {
    const ARTICLES: u32 = 30;
    let mut article = 0;
    let mut found = Vec::new();
    for line in text.lines().map(str::trim).filter(|l| !l.is_empty()) {
        if is_heading(line) {
            article += 1;
        } else if line.chars().count() > 8 {
            let passage = (article > 0).then_some(article);
            found.push(Sentence {
                language: language.to_owned(),
                passage,
                text: line.to_owned(),
            });
        }
    }
    if article != ARTICLES {
        // Its headings were not understood: better no passage than a wrong one.
        found.iter_mut().for_each(|s| s.passage = None);
    }
    found
}

fn is_heading(line: &str) -> bool {
    let roman = |word: &str| {
        let word = word.trim_end_matches('.');
        !word.is_empty() && word.chars().all(|c| "IVX".contains(c))
    };
    let numbered = line.chars().any(char::is_numeric)
        || (line.starts_with('第') && line.contains('条'))
        || line.split_whitespace().last().is_some_and(roman);
    numbered && line.chars().count() <= 24
}

/// How often the nearest sentence of the reference language belongs to the same passage, in one language.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Score {
    pub(crate) language: String,
    pub(crate) hits: usize,
    pub(crate) of: usize,
    /// Hits to expect of a blind guess.
    blind: f64,
}

impl Score {
    /// How far beyond guessing: standard deviations of as many blind guesses.
    fn beyond(&self) -> f64 {
        let spread = (self.blind * (1.0 - self.blind / self.of.max(1) as f64)).sqrt();
        (self.hits as f64 - self.blind) / spread.max(f64::MIN_POSITIVE)
    }
}

/// What the check found.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Meaning {
    pub(crate) reference: String,
    /// Best first.
    pub(crate) scores: Vec<Score>,
    /// How often a blind guess would be right.
    pub(crate) chance: f64,
    /// Sentence, its nearest neighbour, their cosine: one example of each of the best languages.
    pub(crate) examples: Vec<(String, String, f32)>,
}

impl Meaning {
    pub(crate) fn rate(&self) -> f64 {
        let (hits, of) = self
            .scores
            .iter()
            .fold((0, 0), |(h, o), s| (h + s.hits, o + s.of));
        hits as f64 / of.max(1) as f64
    }

    /// Above chance over all languages, and in one of them beyond what luck explains.
    ///
    /// The model learnt English, so most languages are hardly more than guessed. Of noise, about one in a hundred passes.
    pub(crate) fn holds(&self) -> bool {
        self.rate() > self.chance && self.scores.iter().any(|s| s.beyond() >= 4.0)
    }
}

/// Measures `vectors` of `sentences` against the sentences in English. `None` when no two languages can be compared.
pub(crate) fn meaning(sentences: &[Sentence], vectors: &[Vec<f32>]) -> Option<Meaning> {
    let known: Vec<(&Sentence, &[f32])> = sentences
        .iter()
        .zip(vectors)
        .filter(|(s, _)| s.passage.is_some())
        .map(|(s, v)| (s, v.as_slice()))
        .collect();
    let languages: BTreeSet<&str> = known.iter().map(|(s, _)| s.language.as_str()).collect();
    let reference = *languages
        .iter()
        .find(|l| l.starts_with("en"))
        .or_else(|| languages.first())?;
    let (reference_side, others): (Vec<_>, Vec<_>) =
        known.into_iter().partition(|(s, _)| s.language == reference);
    // What has no counterpart cannot be found, however good the vectors are.
    let passages: BTreeSet<Option<u32>> = reference_side.iter().map(|(s, _)| s.passage).collect();
    let others: Vec<_> = others
        .into_iter()
        .filter(|(s, _)| passages.contains(&s.passage))
        .collect();
    if reference_side.is_empty() || others.is_empty() {
        return None;
    }
    let mut scores: BTreeMap<&str, Score> = BTreeMap::new();
    let mut examples: BTreeMap<&str, (String, String, f32)> = BTreeMap::new();
    let mut chance = 0.0;
    for (sentence, vector) in &others {
        let near = reference_side.iter().map(|(r, v)| (*r, cosine(vector, v)));
        let (nearest, likeness) = near.max_by(|a, b| a.1.total_cmp(&b.1))?;
        let hit = nearest.passage == sentence.passage;
        let same = reference_side
            .iter()
            .filter(|(r, _)| r.passage == sentence.passage)
            .count();
        let blind = same as f64 / reference_side.len() as f64;
        chance += blind;
        let score = scores.entry(&sentence.language).or_insert_with(|| Score {
            language: sentence.language.clone(),
            hits: 0,
            of: 0,
            blind: 0.0,
        });
        score.of += 1;
        score.blind += blind;
        score.hits += usize::from(hit);
        if hit {
            let example = (sentence.text.clone(), nearest.text.clone(), likeness);
            examples.entry(&sentence.language).or_insert(example);
        }
    }
    let mut scores: Vec<Score> = scores.into_values().collect();
    scores.sort_by(|a, b| {
        (b.hits * a.of)
            .cmp(&(a.hits * b.of))
            .then_with(|| a.language.cmp(&b.language))
    });
    let shown = scores
        .iter()
        .take(3)
        .filter_map(|s| examples.remove(s.language.as_str()))
        .collect();
    Some(Meaning {
        reference: reference.to_owned(),
        scores,
        chance: chance / others.len() as f64,
        examples: shown,
    })
}

fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(p, q)| p * q).sum::<f32>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt().max(f32::MIN_POSITIVE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_sentences_are_several_hundred_in_ten_languages() {
        let all = shipped();
        assert!(all.len() >= 300, "{}", all.len());
        assert_eq!(all.iter().map(|s| &s.language).collect::<BTreeSet<_>>().len(), 10);
        assert_eq!(questions().len(), 10);
        assert!(
            all.iter()
                .all(|s| s.passage.is_some_and(|p| p < 24) && !s.text.is_empty())
        );
    }

    #[test]
    fn articles_are_told_apart_in_every_script() {
        let text = |heading: &dyn Fn(u32) -> String| {
            (1..=30)
                .map(|n| format!("{}\nA sentence of article {n} in full.\n", heading(n)))
                .collect::<String>()
        };
        for headings in [
            text(&|n| format!("Article {n}")),
            text(&|n| format!("第{n}条")),
            text(&|_| "অনুচ্ছেদ ৭".into()),
        ] {
            let found = sentences(&format!("A preamble without number\n{headings}"), "xx");
            assert_eq!(found.len(), 31);
            assert_eq!((found[0].passage, found[30].passage), (None, Some(30)));
        }
        assert!(
            sentences("Article 1\nOnly one of them here.\n", "xx")
                .iter()
                .all(|s| s.passage.is_none())
        );
    }

    #[test]
    fn thinning_keeps_translations_together() {
        let sentence = |l: usize, p| Sentence {
            language: format!("l{l}"),
            passage: Some(p),
            text: format!("{l} {p}"),
        };
        let all: Vec<_> = (0..30)
            .flat_map(|l| (1..=30).map(move |p| sentence(l, p)))
            .collect();
        let kept = thinned(all);
        assert!((200..=SENTENCES_MAX).contains(&kept.len()), "{}", kept.len());
        let passages = |l: &str| {
            kept.iter()
                .filter(|s| s.language == l)
                .map(|s| s.passage)
                .collect::<Vec<_>>()
        };
        assert!((0..30).all(|l| passages(&format!("l{l}")) == passages("l0")));
    }

    #[test]
    fn meaning_is_told_from_noise() {
        let sentence = |language: &str, passage, text: &str| Sentence {
            language: language.into(),
            passage: Some(passage),
            text: text.into(),
        };
        let sentences: Vec<Sentence> = ["en", "es"]
            .iter()
            .flat_map(|l| (0..8).map(move |p| sentence(l, p, &format!("{l}{p}"))))
            .collect();
        let unit = |p: usize| {
            (0..8)
                .map(|i| if i == p { 1.0 } else { 0.0 })
                .collect::<Vec<f32>>()
        };
        let good: Vec<_> = (0..16).map(|i| unit(i % 8)).collect();
        let found = meaning(&sentences, &good).unwrap();
        assert!(
            found.holds() && found.rate() == 1.0 && (found.chance - 0.125).abs() < 1e-9,
            "{found:?}"
        );
        let same: Vec<_> = (0..16).map(|_| unit(0)).collect();
        assert!(!meaning(&sentences, &same).unwrap().holds());
        assert_eq!(meaning(&sentences[..8], &good[..8]), None);
    }

    #[test]
    fn one_language_understood_is_enough_and_luck_is_not() {
        let languages = ["en", "bn", "fr", "sw", "zh"];
        let sentences: Vec<Sentence> = languages
            .iter()
            .flat_map(|l| {
                (0..24).map(move |p| Sentence {
                    language: (*l).into(),
                    passage: Some(p),
                    text: format!("{l}{p}"),
                })
            })
            .collect();
        let mut state = 1_u64;
        let mut random = || {
            // splitmix64
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        let mut lucky = 0;
        for _ in 0..60 {
            let mut vectors: Vec<Vec<f32>> = (0..sentences.len())
                .map(|_| (0..24).map(|_| random()).collect())
                .collect();
            lucky += usize::from(meaning(&sentences, &vectors).unwrap().holds());
            // Now every third French sentence says what its English counterpart says.
            for p in (0..24).step_by(3) {
                vectors[48 + p] = vectors[p].clone();
            }
            let found = meaning(&sentences, &vectors).unwrap();
            assert!(found.holds(), "{found:?}");
        }
        assert!(lucky <= 4, "noise passed {lucky} times of 60");
    }
}
