//! Jinja2 filters, tests and functions that minijinja lacks or implements differently.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use minijinja::value::{Kwargs, Object, Rest, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State};

use super::number::display;

/// The maximum width of padded text.
const WIDTH_MAX: i64 = 10_000;

pub(in super::super) fn add(environment: &mut Environment<'_>) {
    for name in ["length", "count"] {
        environment.add_filter(name, length);
    }
    for name in ["default", "d"] {
        environment.add_filter(name, default);
    }
    environment.add_filter("replace", replace);
    environment.add_filter("string", |value: &Value| match value.kind() {
        ValueKind::String => value.clone(),
        _ => display(value).into(),
    });
    environment.add_filter("truncate", truncate);
    environment.add_filter("wordwrap", wordwrap);
    environment.add_filter("wordcount", |text: &str| {
        text.split(|letter: char| !letter.is_alphanumeric() && letter != '_').filter(|word| !word.is_empty()).count()
    });
    environment.add_filter("center", |text: &str, args: Rest<Value>, options: Kwargs| {
        let [width] = named(["width"], &args, &options)?;
        center(text, width.map_or(Ok(80), i64::try_from)?, " ")
    });
    environment.add_filter("xmlattr", xmlattr);
    // Any item is valid, and always returning the same one keeps prompts reproducible.
    environment.add_filter("random", |items: &Value| -> Result<Value, Error> {
        Ok(items.try_iter()?.next().unwrap_or(Value::UNDEFINED))
    });
    environment.add_filter("filesizeformat", minijinja_contrib::filters::filesizeformat);
    environment.add_filter("striptags", minijinja_contrib::filters::striptags);
    environment.add_filter("first", |items: &Value| -> Result<Value, Error> {
        Ok(items.try_iter()?.next().unwrap_or(Value::UNDEFINED))
    });
    environment.add_filter("last", |items: &Value| -> Result<Value, Error> {
        Ok(items.try_iter()?.last().unwrap_or(Value::UNDEFINED))
    });
    for name in ["escape", "e"] {
        environment.add_filter(name, |value: &Value| {
            if value.is_safe() { value.clone() } else { Value::from_safe_string(escaped(&display(value))) }
        });
    }
    environment.add_filter("join", join);
    environment.add_filter("urlencode", urlencode);
    environment.add_function("cycler", |items: Rest<Value>| {
        if items.0.is_empty() {
            return Err(invalid("at least one item has to be provided"));
        }
        Ok(Value::from_object(Cycler { items: items.0, position: AtomicUsize::new(0) }))
    });
    environment.add_function("joiner", minijinja_contrib::globals::joiner);
    // Any value with a length and items.
    environment.add_test("sequence", |value: &Value| {
        let kinds = [ValueKind::String, ValueKind::Seq, ValueKind::Map, ValueKind::Undefined];
        kinds.contains(&value.kind()) || (value.kind() == ValueKind::Iterable && value.len().is_some())
    });
    // In Python, an undefined value is callable and fails only when it is called.
    environment.add_test("callable", |value: &Value| matches!(value.kind(), ValueKind::Plain | ValueKind::Undefined));
}

/// The filter `join`, which also joins the characters of a string.
fn join(items: &Value, args: Rest<Value>, options: Kwargs) -> Result<String, Error> {
    let [between, attribute] = named(["d", "attribute"], &args, &options)?;
    let item = |item: Value| match &attribute {
        Some(name) => item.get_item(name).map(|item| display(&item)),
        None => Ok(display(&item)),
    };
    let items: Vec<String> = match items.as_str() {
        Some(text) => text.chars().map(String::from).collect(),
        None => items.try_iter()?.map(item).collect::<Result<_, _>>()?,
    };
    Ok(items.join(&between.map_or_else(String::new, |between| display(&between))))
}

/// Returns its items in turn, forever.
#[derive(Debug)]
struct Cycler {
    items: Vec<Value>,
    position: AtomicUsize,
}

impl Cycler {
    fn current(&self) -> Value {
        self.items[self.position.load(Ordering::Relaxed)].clone()
    }
}

impl Object for Cycler {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        (key.as_str() == Some("current")).then(|| self.current())
    }

    fn call_method(self: &Arc<Self>, _: &mut State<'_, '_>, method: &str, args: &[Value]) -> Result<Value, Error> {
        let position = self.position.load(Ordering::Relaxed);
        let (given, next) = match method {
            "next" if args.is_empty() => (self.current(), (position + 1) % self.items.len()),
            "reset" if args.is_empty() => (Value::from(()), 0),
            _ => return Err(ErrorKind::UnknownMethod.into()),
        };
        self.position.store(next, Ordering::Relaxed);
        Ok(given)
    }
}

/// The filter `urlencode`: encodes a string as part of a path, and pairs as a query.
fn urlencode(value: &Value) -> Result<String, Error> {
    let quoted = |value: &Value| percent_encoded(&display(value), "").replace("%20", "+");
    let pairs: Vec<String> = match value.kind() {
        ValueKind::Map => {
            let pair = |key: Value| Ok(format!("{}={}", quoted(&key), quoted(&value.get_item(&key)?)));
            value.try_iter()?.map(pair).collect::<Result<_, Error>>()?
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let pair = |pair: Value| {
                let pair: Vec<Value> = pair.try_iter()?.collect();
                let [key, value] = &pair[..] else { return Err(invalid("a query is made of pairs")) };
                Ok(format!("{}={}", quoted(key), quoted(value)))
            };
            value.try_iter()?.map(pair).collect::<Result<_, Error>>()?
        }
        _ => return Ok(percent_encoded(&display(value), "/")),
    };
    Ok(pairs.join("&"))
}

/// Percent-encodes bytes, except letters, digits, `_.-~` and the bytes in `kept`.
fn percent_encoded(text: &str, kept: &str) -> String {
    let is_plain =
        |byte: u8| byte.is_ascii_alphanumeric() || b"_.-~".contains(&byte) || kept.as_bytes().contains(&byte);
    let encoded = |byte: u8| if is_plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    text.bytes().map(encoded).collect()
}

/// An undefined value has length 0.
fn length(value: &Value) -> Result<usize, Error> {
    if value.is_undefined() {
        return Ok(0);
    }
    value.len().ok_or_else(|| invalid(format!("a value of type {} has no length", value.kind())))
}

fn default(value: &Value, args: Rest<Value>, options: Kwargs) -> Result<Value, Error> {
    let other = args.first().cloned().or(options.get("default_value")?).unwrap_or_else(|| Value::from(""));
    let or_false = args.get(1).cloned().or(options.get("boolean")?).is_some_and(|wanted| wanted.is_true());
    options.assert_all_used()?;
    if args.len() > 2 {
        return Err(ErrorKind::TooManyArguments.into());
    }
    Ok(if value.is_undefined() || (or_false && !value.is_true()) { other } else { value.clone() })
}

fn replace(text: &Value, old: &Value, new: &Value, count: Option<i64>, options: Kwargs) -> Result<String, Error> {
    let count = count.or(options.get("count")?).and_then(|count| usize::try_from(count).ok());
    options.assert_all_used()?;
    let (text, old, new) = (display(text), display(old), display(new));
    Ok(match count {
        Some(count) => text.replacen(&old, &new, count),
        None => text.replace(&old, &new),
    })
}

fn truncate(text: &str, args: Rest<Value>, options: Kwargs) -> Result<String, Error> {
    let names = ["length", "killwords", "end", "leeway"];
    let [length, kill_words, end, leeway] = named(names, &args, &options)?;
    let length = length.map_or(Ok(255), usize::try_from)?;
    let kill_words = kill_words.is_some_and(|wanted| wanted.is_true());
    let end = end.map_or_else(|| "...".into(), |end| display(&end));
    let leeway = leeway.map_or(Ok(5), usize::try_from)?;
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(text.to_owned());
    }
    let kept = length.checked_sub(end.chars().count()).ok_or_else(|| invalid("length is shorter than end"))?;
    let cut: String = text.chars().take(kept).collect();
    let cut = if kill_words { cut.as_str() } else { cut.rsplit_once(' ').map_or(cut.as_str(), |(before, _)| before) };
    Ok(format!("{cut}{end}"))
}

fn wordwrap(text: &str, args: Rest<Value>, options: Kwargs) -> Result<String, Error> {
    let names = ["width", "break_long_words", "wrapstring", "break_on_hyphens"];
    let [width, break_long, line_end, on_hyphens] = named(names, &args, &options)?;
    let width = width.map_or(Ok(79), usize::try_from)?;
    let break_long = break_long.is_none_or(|wanted| wanted.is_true());
    let line_end = line_end.map_or_else(|| "\n".into(), |end| display(&end));
    let on_hyphens = on_hyphens.is_none_or(|wanted| wanted.is_true());
    if width == 0 {
        return Err(invalid("width must be above 0"));
    }
    let lines = text.lines().flat_map(|line| {
        let wrapped = wrap(line, width, break_long, on_hyphens);
        if wrapped.is_empty() { vec![String::new()] } else { wrapped }
    });
    Ok(lines.collect::<Vec<_>>().join(&line_end))
}

/// Wraps one line as Python's `textwrap` does with `replace_whitespace` and `expand_tabs` off.
fn wrap(line: &str, width: usize, break_long: bool, on_hyphens: bool) -> Vec<String> {
    let length = |text: &str| text.chars().count();
    let mut chunks: Vec<String> = chunks(line, on_hyphens);
    chunks.reverse();
    let mut lines: Vec<String> = Vec::new();
    while let Some(first) = chunks.pop() {
        if !lines.is_empty() && first.trim().is_empty() {
            continue;
        }
        let mut made = Vec::new();
        let mut used = 0;
        let mut next = Some(first);
        while let Some(chunk) = next.take() {
            if used + length(&chunk) <= width {
                used += length(&chunk);
                made.push(chunk);
                next = chunks.pop();
                continue;
            }
            if length(&chunk) > width && break_long {
                let fits = width - used;
                let at = chunk.char_indices().nth(fits).map_or(chunk.len(), |(at, _)| at);
                let (head, tail) = chunk.split_at(at);
                made.push(head.to_owned());
                chunks.push(tail.to_owned());
            } else if length(&chunk) > width && made.is_empty() {
                made.push(chunk);
            } else {
                chunks.push(chunk);
            }
            break;
        }
        if made.last().is_some_and(|chunk| chunk.trim().is_empty()) {
            made.pop();
        }
        if !made.is_empty() {
            lines.push(made.concat());
        }
    }
    lines
}

/// Splits a line into words and the whitespace between them. With `on_hyphens`, also splits after a hyphen between
/// letters.
fn chunks(line: &str, on_hyphens: bool) -> Vec<String> {
    let mut chunks: Vec<String> = Vec::new();
    let letters: Vec<char> = line.chars().collect();
    for (at, letter) in letters.iter().enumerate() {
        let previous = at.checked_sub(1).map(|before| letters[before]);
        let is_letter =
            |at: Option<usize>| at.and_then(|at| letters.get(at)).is_some_and(|letter| letter.is_alphabetic());
        let behind_hyphen = on_hyphens
            && previous == Some('-')
            && is_letter(at.checked_sub(2))
            && is_letter(at.checked_sub(3))
            && is_letter(Some(at))
            && is_letter(Some(at + 1));
        let begins =
            previous.is_none_or(|previous| previous.is_whitespace() != letter.is_whitespace()) || behind_hyphen;
        match chunks.last_mut() {
            Some(chunk) if !begins => chunk.push(*letter),
            _ => chunks.push(letter.to_string()),
        }
    }
    chunks
}

/// Centres a string as Python does.
pub(super) fn center(text: &str, width: i64, fill: &str) -> Result<String, Error> {
    let padding = padding(text, width, fill)?;
    let count = padding.chars().count();
    let left = count / 2 + (count & width.unsigned_abs() as usize & 1);
    let at = padding.char_indices().nth(left).map_or(padding.len(), |(at, _)| at);
    Ok(format!("{}{text}{}", &padding[..at], &padding[at..]))
}

/// Returns the padding that a string needs to reach a width.
pub(super) fn padding(text: &str, width: i64, fill: &str) -> Result<String, Error> {
    if fill.chars().count() != 1 {
        return Err(invalid("the fill character must be exactly one character"));
    }
    let width = usize::try_from(width.min(WIDTH_MAX)).unwrap_or(0);
    Ok(fill.repeat(width.saturating_sub(text.chars().count())))
}

fn xmlattr(attributes: &Value, autospace: Option<bool>) -> Result<String, Error> {
    let mut written = Vec::new();
    for key in attributes.try_iter()? {
        let value = attributes.get_item(&key)?;
        if !value.is_none() && !value.is_undefined() {
            written.push(format!("{}=\"{}\"", escaped(&display(&key)), escaped(&display(&value))));
        }
    }
    let joined = written.join(" ");
    Ok(if autospace.unwrap_or(true) && !joined.is_empty() { format!(" {joined}") } else { joined })
}

/// Escapes a string as `markupsafe` does.
pub(super) fn escaped(text: &str) -> String {
    let mut written = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => written.push_str("&amp;"),
            '<' => written.push_str("&lt;"),
            '>' => written.push_str("&gt;"),
            '\'' => written.push_str("&#39;"),
            '"' => written.push_str("&#34;"),
            other => written.push(other),
        }
    }
    written
}

/// Returns arguments that are passed by position or by name. `none` counts as omitted.
fn named<const N: usize>(names: [&str; N], args: &[Value], options: &Kwargs) -> Result<[Option<Value>; N], Error> {
    if args.len() > N {
        return Err(ErrorKind::TooManyArguments.into());
    }
    let mut values = [const { None }; N];
    for (index, name) in names.into_iter().enumerate() {
        let value: Option<Value> = args.get(index).cloned().or(options.get(name)?);
        values[index] = value.filter(|value| !value.is_none());
    }
    options.assert_all_used()?;
    Ok(values)
}

fn invalid(reason: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason.into())
}
