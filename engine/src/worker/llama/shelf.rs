//! Beginnings of texts that are computed and may come again, kept beside the cache.
//!
//! Every token in the cache costs time in every step, whoever it belongs to: llama.cpp's attention looks at all cells in use. Only
//! what is being computed stays there. The rest lies here, as copies in memory, and is copied back when it is wanted.
use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::session::{LlamaStateSeqFlags, SeqState};
use llama_cpp_2::token::LlamaToken;

use super::adapters::Attached;

/// A shorter beginning is computed again as fast as it is copied.
pub(super) const SHORTEST: usize = 16;

pub(super) struct Shelf {
    kept: Vec<Kept>,
    /// Tokens that may be kept in all; none where sequences keep their own.
    room: usize,
    uses: u64,
}

struct Kept {
    tokens: Vec<LlamaToken>,
    adapter: Attached,
    state: SeqState,
    /// When it was last put here or wanted.
    used: u64,
}

/// How many tokens two texts have in common at their beginning.
pub(super) fn common(a: &[LlamaToken], b: &[LlamaToken]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

impl Shelf {
    pub(super) fn new(room: usize) -> Self {
        Self {
            kept: Vec::new(),
            room,
            uses: 0,
        }
    }

    pub(super) fn is_used(&self) -> bool {
        self.room > 0
    }

    /// Keeps what `sequence` holds of `tokens`; what was used longest ago makes room.
    pub(super) fn put(
        &mut self,
        context: &LlamaContext<'_>,
        sequence: i32,
        tokens: Vec<LlamaToken>,
        adapter: Attached,
    ) {
        if tokens.len() < SHORTEST || tokens.len() > self.room {
            return;
        }
        let within = |kept: &Kept| kept.adapter == adapter && common(&kept.tokens, &tokens) == tokens.len();
        self.uses += 1;
        if let Some(known) = self.kept.iter_mut().find(|kept| within(kept)) {
            known.used = self.uses;
            return;
        }
        self.kept
            .retain(|kept| kept.adapter != adapter || common(&kept.tokens, &tokens) < kept.tokens.len());
        let mut held: usize = self.kept.iter().map(|kept| kept.tokens.len()).sum();
        while held + tokens.len() > self.room {
            let oldest = (0..self.kept.len()).min_by_key(|at| self.kept[*at].used);
            let Some(oldest) = oldest else { return };
            held -= self.kept.swap_remove(oldest).tokens.len();
        }
        // Not before there is room. A copy that fails is only a beginning that will be computed again.
        let Ok(state) = context.state_seq_get(sequence, LlamaStateSeqFlags::empty()) else {
            return;
        };
        self.kept.push(Kept {
            tokens,
            adapter,
            state,
            used: self.uses,
        });
    }

    /// Which of what is kept has most in common with `tokens`, and how much.
    pub(super) fn best(&self, tokens: &[LlamaToken], adapter: Attached) -> Option<(usize, usize)> {
        let alike = (0..).zip(&self.kept).filter(|(_, kept)| kept.adapter == adapter);
        alike
            .map(|(at, kept)| (at, common(&kept.tokens, tokens)))
            .max_by_key(|(_, common)| *common)
            .filter(|(_, common)| *common >= SHORTEST)
    }

    /// Copies the first `length` tokens of what is kept at `at` into a sequence that is empty; says whether it did.
    pub(super) fn fetch(
        &mut self,
        context: &mut LlamaContext<'_>,
        at: usize,
        sequence: i32,
        length: usize,
    ) -> bool {
        self.uses += 1;
        let Some(kept) = self.kept.get_mut(at) else {
            return false;
        };
        kept.used = self.uses;
        if context.state_seq_set(&kept.state, sequence).is_err() {
            return false;
        }
        let Ok(rest) = u32::try_from(length) else {
            return false;
        };
        length == kept.tokens.len() || context.kv_cache_seq_rm(sequence, Some(rest), None).is_ok()
    }
}
