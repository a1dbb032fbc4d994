//! Methods of Python's strings and lists that `minijinja_contrib` does not have.

use minijinja::value::{Tuple, Value, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State};
use minijinja_contrib::pycompat;

use super::filters::{center, padding};

/// Calls a method that minijinja does not have.
pub(in super::super) fn call(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let unknown = || Error::from(ErrorKind::UnknownMethod);
    let called = match (value.kind(), value.as_str()) {
        (ValueKind::String, Some(text)) => of_text(text, method, args),
        (ValueKind::Seq | ValueKind::Iterable, _) => of_list(value, method, args),
        (ValueKind::Map, _) if method == "copy" => from_args::<()>(args).map(|()| value.clone()),
        _ => Err(unknown()),
    };
    match called {
        Err(error) if error.kind() == ErrorKind::UnknownMethod => {
            pycompat::unknown_method_callback(state, value, method, args)
        }
        called => called,
    }
}

fn of_text(text: &str, method: &str, args: &[Value]) -> Result<Value, Error> {
    Ok(match method {
        "rsplit" => {
            let (separator, most): (Option<Value>, Option<i64>) = from_args(args)?;
            rsplit(text, separator.as_ref().and_then(Value::as_str), most.unwrap_or(-1))
        }
        "partition" => {
            let (separator,): (&str,) = from_args(args)?;
            let (before, found, after) = match text.split_once(separator) {
                Some((before, after)) => (before, separator, after),
                None => (text, "", ""),
            };
            tuple([before, found, after])
        }
        "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let (before, found, after) = match text.rsplit_once(separator) {
                Some((before, after)) => (before, separator, after),
                None => ("", "", text),
            };
            tuple([before, found, after])
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            text.strip_prefix(prefix).unwrap_or(text).into()
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            text.strip_suffix(suffix).unwrap_or(text).into()
        }
        "zfill" => {
            let (width,): (i64,) = from_args(args)?;
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['+', '-'])));
            format!("{sign}{}{digits}", padding(text, width, "0")?).into()
        }
        "ljust" | "rjust" | "center" => {
            let (width, fill): (i64, Option<&str>) = from_args(args)?;
            let fill = fill.unwrap_or(" ");
            match method {
                "ljust" => format!("{text}{}", padding(text, width, fill)?).into(),
                "rjust" => format!("{}{text}", padding(text, width, fill)?).into(),
                _ => center(text, width, fill)?.into(),
            }
        }
        "index" | "rindex" => {
            let (part,): (&str,) = from_args(args)?;
            let found = if method == "index" { text.find(part) } else { text.rfind(part) };
            let at = found.ok_or_else(|| Error::new(ErrorKind::InvalidOperation, "substring not found"))?;
            text[..at].chars().count().into()
        }
        "swapcase" => {
            from_args::<()>(args)?;
            let swap = |letter: char| {
                if letter.is_uppercase() {
                    letter.to_lowercase().to_string()
                } else {
                    letter.to_uppercase().to_string()
                }
            };
            text.chars().map(swap).collect::<String>().into()
        }
        "casefold" => {
            from_args::<()>(args)?;
            text.to_lowercase().into()
        }
        "isdecimal" => {
            from_args::<()>(args)?;
            (!text.is_empty() && text.chars().all(|letter| letter.is_ascii_digit())).into()
        }
        _ => return Err(ErrorKind::UnknownMethod.into()),
    })
}

fn of_list(list: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    match method {
        "index" => {
            let (wanted,): (&Value,) = from_args(args)?;
            let at = list.try_iter()?.position(|item| item == *wanted);
            at.map(Value::from).ok_or_else(|| Error::new(ErrorKind::InvalidOperation, "the value is not in the list"))
        }
        "copy" => from_args::<()>(args).map(|()| list.clone()),
        _ => Err(ErrorKind::UnknownMethod.into()),
    }
}

/// Splits from the end, at most `most` times. A negative number means no limit.
fn rsplit(text: &str, separator: Option<&str>, most: i64) -> Value {
    let most = usize::try_from(most).unwrap_or(usize::MAX);
    let mut parts: Vec<&str> = match separator {
        Some(separator) => text.rsplitn(most.saturating_add(1), separator).collect(),
        None => {
            let mut parts = Vec::new();
            let mut rest = text.trim_end();
            while !rest.is_empty() {
                match rest.rfind(char::is_whitespace).filter(|_| parts.len() < most) {
                    Some(at) => {
                        let after = at + rest[at..].chars().next().map_or(1, char::len_utf8);
                        parts.push(&rest[after..]);
                        rest = rest[..at].trim_end();
                    }
                    None => {
                        parts.push(if parts.len() < most { rest } else { rest.trim_end() });
                        break;
                    }
                }
            }
            parts
        }
    };
    parts.reverse();
    parts.into_iter().map(Value::from).collect()
}

fn tuple(parts: [&str; 3]) -> Value {
    Value::from(Tuple::from(parts.map(Value::from)))
}
