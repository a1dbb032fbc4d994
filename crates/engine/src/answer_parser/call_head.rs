//! Parses the head of a tool call that is written as one JSON object.

use super::json_span::value_end;

/// A head is decided within this many bytes.
const BYTES_MAX: usize = 4_096;

/// The result of parsing the beginning of an object.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum CallHead {
    /// More text is needed.
    Open,
    /// The object is not a call.
    NoCall,
    /// A call whose arguments, an object, begin at this offset.
    Begun { name: String, arguments_at: usize },
    /// A complete call that ends at this offset.
    Whole { name: String, arguments: String, end: usize },
}

/// Parses `{"name": …, "arguments": …}` as far as it has arrived. Some families write `parameters` for the second
/// key. With `is_strict`, other keys are rejected.
pub(super) fn read(text: &str, at_end: bool, is_strict: bool) -> CallHead {
    // The decision must not depend on how much text arrived at once.
    let within = &text[..text.floor_char_boundary(BYTES_MAX)];
    match read_fields(&mut Cursor { text: within, at: 0 }, is_strict) {
        Ok(head) => head,
        Err(Stop::Open) if !at_end && text.len() < BYTES_MAX => CallHead::Open,
        Err(_) => CallHead::NoCall,
    }
}

enum Stop {
    Open,
    /// The text is not a call.
    NoCall,
}

struct Cursor<'a> {
    text: &'a str,
    at: usize,
}

fn read_fields(cursor: &mut Cursor<'_>, is_strict: bool) -> Result<CallHead, Stop> {
    let mut name: Option<String> = None;
    let mut arguments: Option<String> = None;
    cursor.expect(b'{')?;
    loop {
        let key: String = cursor.text()?;
        cursor.expect(b':')?;
        let is_arguments = key == "arguments" || key == "parameters";
        let first = cursor.peek()?;
        match &name {
            Some(name) if is_arguments && first == b'{' => {
                return Ok(CallHead::Begun { name: name.clone(), arguments_at: cursor.at });
            }
            _ if is_arguments && first == b'"' => {
                // Some models write the arguments as JSON inside a string.
                arguments = Some(cursor.text()?);
            }
            _ if is_arguments => arguments = Some(cursor.value()?.trim_end().to_owned()),
            _ if key == "name" => name = Some(cursor.text()?),
            _ if is_strict && !["type", "id"].contains(&key.as_str()) => return Err(Stop::NoCall),
            _ => {
                cursor.value()?;
            }
        }
        if cursor.peek()? == b'}' {
            let name = name.ok_or(Stop::NoCall)?;
            let arguments = arguments.unwrap_or_else(|| "{}".into());
            return Ok(CallHead::Whole { name, arguments, end: cursor.at + 1 });
        }
        cursor.expect(b',')?;
    }
}

impl<'a> Cursor<'a> {
    /// Skips whitespace and returns the next byte.
    fn peek(&mut self) -> Result<u8, Stop> {
        let rest = self.text[self.at..].trim_start();
        self.at = self.text.len() - rest.len();
        rest.bytes().next().ok_or(Stop::Open)
    }

    fn expect(&mut self, byte: u8) -> Result<(), Stop> {
        if self.peek()? != byte {
            return Err(Stop::NoCall);
        }
        self.at += 1;
        Ok(())
    }

    fn value(&mut self) -> Result<&'a str, Stop> {
        self.peek()?;
        let end = self.at + value_end(&self.text[self.at..]).ok_or(Stop::Open)?;
        let value = &self.text[self.at..end];
        self.at = end;
        Ok(value)
    }

    fn text(&mut self) -> Result<String, Stop> {
        if self.peek()? != b'"' {
            return Err(Stop::NoCall);
        }
        serde_json::from_str(self.value()?).map_err(|_| Stop::NoCall)
    }
}
