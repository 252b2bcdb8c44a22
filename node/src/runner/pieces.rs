//! An answer told as it is written: in pieces, not word by word.
use super::{Piece, Tell, Told};
use karez_engine::protocol;
use std::time::Duration;
use tokio::time::Instant;

/// Answers are told so often at most: nobody reads faster, and a word of its own costs every hop more than it says.
const EVERY: Duration = Duration::from_millis(10);
/// Bytes of a piece that is not added to any more.
const BYTES: usize = 4 << 10;

/// How far the answer under way was told. What gets lost on the way is made good by the result.
pub(super) struct Telling {
    tell: Tell,
    /// Tokens that were told.
    told: u64,
    /// What was written since.
    untold: Option<(Piece, Vec<protocol::TokenLogprob>)>,
    /// When the next piece may be told.
    at: Instant,
}

impl Telling {
    pub(super) fn new(tell: Tell) -> Self {
        Self {
            tell,
            told: 0,
            untold: None,
            at: Instant::now(),
        }
    }

    /// Tells the first piece at once, and then what came within [`EVERY`] together. `first_token` tokens of the answer
    /// stand before this one.
    pub(super) fn add(&mut self, item: u64, first_token: u64, piece: protocol::Piece) {
        let ends = first_token + piece.tokens.len() as u64;
        // A worker that died begins again; what was told before stands, and pieces must not straddle its end.
        if ends <= self.told && !piece.tokens.is_empty() {
            return;
        }
        let (untold, logprobs) = self.untold.get_or_insert_with(|| {
            let empty = Piece {
                item,
                first_token,
                ..Piece::default()
            };
            (empty, Vec::new())
        });
        untold.text.push_str(&piece.text);
        untold.tokens.extend(piece.tokens);
        logprobs.extend(piece.logprobs);
        if untold.text.len() > BYTES || Instant::now() >= self.at {
            self.flush();
        }
    }

    /// When there is something to tell, if there is.
    pub(super) fn due(&self) -> Option<Instant> {
        self.untold.as_ref().map(|_| self.at)
    }

    /// Tells what there is.
    pub(super) fn flush(&mut self) {
        let Some((mut piece, logprobs)) = self.untold.take() else {
            return;
        };
        if !logprobs.is_empty() {
            piece.logprobs = serde_json::to_string(&logprobs).unwrap_or_default();
        }
        self.told = piece.first_token + piece.tokens.len() as u64;
        self.at = Instant::now() + EVERY;
        (self.tell)(Told::Piece(piece));
    }

    /// The answer has ended; another may follow.
    pub(super) fn end(&mut self) {
        self.flush();
        self.told = 0;
    }

    /// The worker died: the answer is written again from its beginning.
    pub(super) fn begin_again(&mut self) {
        self.untold = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[test]
    fn an_answer_that_is_written_twice_is_told_once() {
        let told: Arc<Mutex<Vec<(u64, String)>>> = Arc::default();
        let heard = told.clone();
        let mut telling = Telling::new(Arc::new(move |said| {
            if let Told::Piece(piece) = said {
                heard.lock().unwrap().push((piece.first_token, piece.text));
            }
        }));
        let word = |n: u64| protocol::Piece {
            text: format!("{n} "),
            tokens: vec![n as u32],
            logprobs: Vec::new(),
        };
        // The clock does not pass here but by hand.
        let later = Instant::now() + Duration::from_secs(3_600);
        telling.add(0, 0, word(0));
        telling.at = later;
        (1..5).for_each(|n| telling.add(0, n, word(n)));
        assert_eq!(telling.due(), Some(later));
        telling.at = Instant::now();
        telling.add(0, 5, word(5));
        telling.at = later;
        // Two more that nobody heard of before the worker died.
        (6..8).for_each(|n| telling.add(0, n, word(n)));
        telling.begin_again();
        assert!(telling.due().is_none());
        (0..9).for_each(|n| telling.add(0, n, word(n)));
        telling.end();
        let pieces = |list: &[(u64, &str)]| -> Vec<(u64, String)> {
            list.iter().map(|(n, text)| (*n, (*text).to_owned())).collect()
        };
        assert_eq!(
            *told.lock().unwrap(),
            pieces(&[(0, "0 "), (1, "1 2 3 4 5 "), (6, "6 7 8 ")])
        );
        telling.at = Instant::now();
        telling.add(0, 0, word(0));
        assert_eq!(told.lock().unwrap().last(), Some(&(0, "0 ".to_owned())));
    }
}
