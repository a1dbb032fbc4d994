//! Finds the end of a JSON object or array without parsing its contents.

/// A place within nested brackets.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct JsonSpan {
    depth: u32,
    in_string: bool,
    escaped: bool,
}

impl JsonSpan {
    /// Begins within an object.
    pub(super) fn within() -> Self {
        Self { depth: 1, ..Self::default() }
    }

    /// Reads on; returns how many bytes belong to the value once its end has come.
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

/// Returns where the value ends that a text begins with, or `None` while more of it may come.
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
