//! Work without a model: it waits. For tests, and for measuring everything around an engine.
use std::time::{Duration, Instant};

use super::{Desk, Engine};
use crate::error::EngineError;
use crate::protocol::{Isolation, ModelFacts, Output, Work};
use crate::unit::Bytes;

pub(super) struct Noop;

impl Engine for Noop {
    fn facts(&self) -> ModelFacts {
        ModelFacts {
            name: "noop".into(),
            architecture: "none".into(),
            context_tokens: 0,
            parameters: 0,
            dimensions: None,
            memory_estimate: Bytes(0),
            engine: "noop".into(),
            threads: 1,
            isolation: Isolation::None,
        }
    }

    fn run(&mut self, work: Work, desk: &mut Desk<'_>) -> Result<Output, EngineError> {
        let Work::Noop { wait } = work else {
            return Err(EngineError::bad_input("this worker has no model; it only waits"));
        };
        let began = Instant::now();
        let wait = Duration::from_millis(wait.0);
        let mut told = began;
        while let Some(left) = wait.checked_sub(began.elapsed()).filter(|left| !left.is_zero()) {
            desk.check()?;
            if told.elapsed() > Duration::from_secs(1) {
                desk.alive();
                told = Instant::now();
            }
            std::thread::sleep(left.min(Duration::from_millis(10)));
        }
        Ok(Output::Nothing)
    }
}
