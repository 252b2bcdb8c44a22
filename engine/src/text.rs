//! Turning a model's bytes into text that can be shown as it grows.

/// Collects the bytes of tokens and gives out text: never half a code point, never the beginning of a stop string.
#[derive(Debug, Default)]
pub struct TextStream {
    stops: Vec<String>,
    /// The beginning of a code point whose rest is still to come.
    bytes: Vec<u8>,
    /// Text that may yet turn out to begin a stop string.
    held: String,
    stopped: bool,
}

impl TextStream {
    /// A stream that ends at the first of `stops`.
    pub fn new(stops: Vec<String>) -> Self {
        Self {
            stops: stops.into_iter().filter(|stop| !stop.is_empty()).collect(),
            ..Self::default()
        }
    }

    /// Takes the bytes of one more token; gives the text that can be shown now, perhaps none.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        if self.stopped {
            return String::new();
        }
        self.bytes.extend_from_slice(bytes);
        let mut from = 0;
        loop {
            match std::str::from_utf8(&self.bytes[from..]) {
                Ok(text) => {
                    self.held.push_str(text);
                    from = self.bytes.len();
                    break;
                }
                Err(error) => {
                    let valid = from + error.valid_up_to();
                    self.held
                        .push_str(&String::from_utf8_lossy(&self.bytes[from..valid]));
                    from = valid;
                    let Some(wrong) = error.error_len() else { break };
                    self.held.push(char::REPLACEMENT_CHARACTER);
                    from += wrong;
                }
            }
        }
        self.bytes.drain(..from);
        self.release()
    }

    /// What was held back when nothing more will come.
    pub fn finish(&mut self) -> String {
        if self.stopped {
            return String::new();
        }
        if !self.bytes.is_empty() {
            self.bytes.clear();
            self.held.push(char::REPLACEMENT_CHARACTER);
        }
        self.stopped = true;
        std::mem::take(&mut self.held)
    }

    /// Whether a stop string was met.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    fn release(&mut self) -> String {
        if let Some(at) = self
            .stops
            .iter()
            .filter_map(|stop| self.held.find(stop.as_str()))
            .min()
        {
            self.stopped = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let keep = self.held.char_indices().map(|(at, _)| at).find(|at| {
            let tail = &self.held[*at..];
            self.stops.iter().any(|stop| stop.starts_with(tail))
        });
        let rest = self.held.split_off(keep.unwrap_or(self.held.len()));
        std::mem::replace(&mut self.held, rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(chunks: &[&[u8]], stops: &[&str]) -> Vec<String> {
        let mut stream = TextStream::new(stops.iter().map(|s| s.to_string()).collect());
        let mut out: Vec<String> = chunks.iter().map(|chunk| stream.push(chunk)).collect();
        out.push(stream.finish());
        out
    }

    #[test]
    fn code_points_stay_whole_however_they_are_cut() {
        let text = "水 kārez 🐪 été";
        for size in 1..text.len() {
            let pieces = stream(&text.as_bytes().chunks(size).collect::<Vec<_>>(), &[]);
            assert_eq!(pieces.concat(), text, "cut every {size} bytes");
            assert!(
                pieces
                    .iter()
                    .all(|piece| !piece.contains(char::REPLACEMENT_CHARACTER))
            );
        }
    }

    #[test]
    fn broken_bytes_become_one_mark_each() {
        assert_eq!(
            stream(&[b"a\xff", b"b\xe6\xb0"], &[]).concat(),
            "a\u{fffd}b\u{fffd}"
        );
        assert_eq!(stream(&[b"\xe6\xb0", b"x"], &[]).concat(), "\u{fffd}x");
    }

    #[test]
    fn stop_strings_never_show() {
        assert_eq!(
            stream(&[b"one\n", b"\nUs", b"er: two"], &["\n\nUser:"]),
            ["one", "", "", ""]
        );
        assert_eq!(stream(&[b"one\n", b"two"], &["\n\n"]), ["one", "\ntwo", ""]);
        assert_eq!(stream(&[b"one\n"], &["\n\n"]), ["one", "\n"]);
        assert_eq!(
            stream(
                "a水b水c".as_bytes().chunks(1).collect::<Vec<_>>().as_slice(),
                &["水c", "b水d"]
            )
            .concat(),
            "a水b"
        );
    }
}
