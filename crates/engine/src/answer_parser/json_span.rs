//! Finds the end of a JSON object or array without parsing its contents.

/// A position within nested brackets.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct JsonSpan {
    depth: u32,
    in_string: bool,
    escaped: bool,
}

impl JsonSpan {
    /// Starts inside an object.
    pub(super) fn within() -> Self {
        Self { depth: 1, ..Self::default() }
    }

    /// Reads more text. Returns how many of its bytes belong to the value once the end is found.
    pub(super) fn read(&mut self, text: &str) -> Option<usize> {
        for (index, byte) in text.bytes().enumerate() {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' if self.in_string => self.escaped = true,
                b'"' => self.in_string = !self.in_string,
                _ if self.in_string => {}
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.depth == 0 {
                        return Some(index + 1);
                    }
                }
                _ => {}
            }
        }
        None
    }
}

/// Returns the end of the value that the text starts with, or `None` if the value may be incomplete.
pub(super) fn value_end(text: &str) -> Option<usize> {
    match text.bytes().next()? {
        b'{' | b'[' => JsonSpan::default().read(text),
        b'"' => {
            let mut escaped = false;
            let end = text.bytes().skip(1).position(|byte| {
                let is_end = byte == b'"' && !escaped;
                escaped = byte == b'\\' && !escaped;
                is_end
            });
            end.map(|index| index + 2)
        }
        _ => text.find([',', '}', ']']),
    }
}
