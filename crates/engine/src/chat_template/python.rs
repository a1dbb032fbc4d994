//! The parts of Python and of Hugging Face's environment that templates expect beyond Jinja itself.

mod filters;
mod methods;
mod number;
mod operators;

use std::borrow::Cow;
use std::io::{self, Write};

use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, Error, ErrorKind, escape_formatter};
use serde::Serialize;
use serde_json::ser::{Formatter, Serializer};

/// The maximum indentation. Python has no limit, but no template needs more.
const INDENT_MAX: usize = 16;

pub(super) use operators::rewrite;

/// Adds Python's functions, filters and methods to a template environment.
pub(super) fn add(environment: &mut Environment<'_>) {
    environment.set_formatter(|output, state, value| match number::with_floats(value) {
        Some(text) => Ok(output.write_str(&text)?),
        None => escape_formatter(output, state, value),
    });
    environment.set_unknown_method_callback(methods::call);
    filters::add(environment);
    operators::add(environment);
    environment.add_filter("tojson", to_json);
    environment.add_filter("indent", indent);
    environment.add_test("iterable", is_iterable);
}

/// The filter `tojson`: Python's `json.dumps`, which escapes neither HTML nor non-ASCII characters.
fn to_json(value: &Value, indent: Option<usize>, options: Kwargs) -> Result<String, Error> {
    let fail = |reason: &'static str| Error::new(ErrorKind::InvalidOperation, reason);
    if value.is_undefined() {
        return Err(fail("an undefined value has no JSON"));
    }
    let indent = indent.or(options.get("indent")?).map(|indent| indent.min(INDENT_MAX));
    let ascii = options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sorted = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let separators: Option<Vec<String>> = options.get("separators")?;
    options.assert_all_used()?;
    let (item, key) = match separators.as_deref() {
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(fail("separators are a pair")),
    };
    let style = Style { item, key, indent, ascii, depth: 0, has_items: false };
    let mut written = Vec::new();
    let mut serializer = Serializer::with_formatter(&mut written, style);
    let done = if sorted {
        let mut value = serde_json::to_value(value).map_err(|_| fail("it has no JSON"))?;
        value.sort_all_objects();
        value.serialize(&mut serializer)
    } else {
        value.serialize(&mut serializer)
    };
    done.map_err(|_| fail("it has no JSON"))?;
    String::from_utf8(written).map_err(|_| fail("it has no JSON"))
}

/// The filter `indent`, which keeps trailing newlines.
fn indent(
    text: &str,
    width: Option<usize>,
    first: Option<bool>,
    blank: Option<bool>,
    options: Kwargs,
) -> Result<String, Error> {
    let width = width.or(options.get("width")?).unwrap_or(4).min(INDENT_MAX);
    let first = first.or(options.get("first")?).unwrap_or(false);
    let blank = blank.or(options.get("blank")?).unwrap_or(false);
    options.assert_all_used()?;
    let indented = text.split('\n').enumerate().map(|(number, line)| {
        let is_indented = if number == 0 { first } else { blank || !line.is_empty() };
        format!("{:1$}{line}", "", if is_indented { width } else { 0 })
    });
    Ok(indented.collect::<Vec<_>>().join("\n"))
}

/// The test `iterable`: strings are iterable, and `none` is not.
fn is_iterable(value: &Value) -> bool {
    !value.is_none() && (value.as_str().is_some() || value.try_iter().is_ok())
}

/// The JSON style of Python's `json.dumps`.
struct Style {
    item: String,
    key: String,
    indent: Option<usize>,
    ascii: bool,
    depth: usize,
    has_items: bool,
}

impl Style {
    fn line<W: ?Sized + Write>(&self, writer: &mut W) -> io::Result<()> {
        let Some(indent) = self.indent else { return Ok(()) };
        writer.write_all(b"\n")?;
        (0..self.depth * indent).try_for_each(|_| writer.write_all(b" "))
    }

    fn begin<W: ?Sized + Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.has_items = false;
        writer.write_all(bracket)
    }

    fn next<W: ?Sized + Write>(&self, writer: &mut W, first: bool) -> io::Result<()> {
        if !first {
            writer.write_all(self.item.as_bytes())?;
        }
        self.line(writer)
    }

    fn end<W: ?Sized + Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if self.has_items {
            self.line(writer)?;
        }
        self.has_items = true;
        writer.write_all(bracket)
    }
}

impl Formatter for Style {
    fn begin_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.begin(writer, b"[")
    }

    fn end_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.end(writer, b"]")
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.next(writer, first)
    }

    fn end_array_value<W: ?Sized + Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.has_items = true;
        Ok(())
    }

    fn begin_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.begin(writer, b"{")
    }

    fn end_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.end(writer, b"}")
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.next(writer, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }

    fn end_object_value<W: ?Sized + Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.has_items = true;
        Ok(())
    }

    fn write_f64<W: ?Sized + Write>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        writer.write_all(number::repr(value).as_bytes())
    }

    fn write_string_fragment<W: ?Sized + Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        if !self.ascii {
            return writer.write_all(fragment.as_bytes());
        }
        for character in fragment.chars() {
            if character.is_ascii() {
                writer.write_all(&[character as u8])?;
            } else {
                let mut units = [0; 2];
                character.encode_utf16(&mut units).iter().try_for_each(|unit| write!(writer, "\\u{unit:04x}"))?;
            }
        }
        Ok(())
    }
}

/// Turns `generation` blocks into plain conditions. Hugging Face marks with them which text a model is trained on.
pub(super) fn without_generation_tags(source: &str) -> Cow<'_, str> {
    if !source.contains("endgeneration") {
        return source.into();
    }
    let mut made = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, tag_on)) = rest.split_once("{%") {
        let Some((tag, after)) = tag_on.split_once("%}") else { break };
        made.push_str(before);
        let word = tag.trim_matches(|edge: char| edge.is_whitespace() || edge == '-' || edge == '+');
        let tag = match word {
            "generation" => tag.replacen(word, "if true", 1),
            "endgeneration" => tag.replacen(word, "endif", 1),
            _ => tag.to_owned(),
        };
        made.extend(["{%", &tag, "%}"]);
        rest = after;
    }
    made.push_str(rest);
    made.into()
}
