//! The small model that comes with Karez, so that a fresh node can do real work before it has fetched anything.
//!
//! `karez-tiny` knows a few hundred questions and answers in ten languages by heart, and nothing else: enough to run,
//! stream and meter something real, and for tests to demand exact answers. Its card is `models/README.md`.

/// Its name in catalogues.
pub const NAME: &str = "karez-tiny";

/// The whole GGUF file.
pub const MODEL: &[u8] = include_bytes!("../models/karez-tiny.gguf");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_a_model_with_a_chat_template() {
        let file = crate::inspect::inspect_gguf_bytes(MODEL, NAME).unwrap();
        assert!(
            file.chat_template && file.architecture == "llama" && file.parameters > 1_000_000,
            "{file:?}"
        );
    }
}
