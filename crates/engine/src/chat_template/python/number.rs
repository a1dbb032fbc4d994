//! Formats floating-point numbers as Python does.

use minijinja::value::{Value, ValueKind};

/// The maximum nesting depth at which lists and mappings are searched for floats.
const DEPTH_MAX: u32 = 32;

/// Returns Python's `str` of a value.
pub(super) fn display(value: &Value) -> String {
    with_floats(value).unwrap_or_else(|| value.to_string())
}

/// Returns Python's `str` of a float, or of a list or mapping with floats that minijinja formats differently. `None`:
/// minijinja's own format will do.
pub(super) fn with_floats(value: &Value) -> Option<String> {
    match as_float(value) {
        Some(number) => Some(repr(number)),
        None => has_odd_float(value, DEPTH_MAX).then(|| written(value, DEPTH_MAX)),
    }
}

fn has_odd_float(value: &Value, levels: u32) -> bool {
    let Some(below) = levels.checked_sub(1) else { return false };
    let is_odd = |item: &Value| has_odd_float(item, below);
    match value.kind() {
        ValueKind::Number => as_float(value).is_some_and(|number| repr(number) != value.to_string()),
        ValueKind::Seq => value.try_iter().is_ok_and(|mut items| items.any(|item| is_odd(&item))),
        ValueKind::Map => value
            .try_iter()
            .is_ok_and(|mut keys| keys.any(|key| is_odd(&key) || value.get_item(&key).is_ok_and(|item| is_odd(&item)))),
        _ => false,
    }
}

fn written(value: &Value, levels: u32) -> String {
    let (Some(below), Ok(items)) = (levels.checked_sub(1), value.try_iter()) else { return format!("{value:?}") };
    let item = |item: &Value| as_float(item).map_or_else(|| written(item, below), repr);
    match value.kind() {
        ValueKind::Seq => {
            let items: Vec<String> = items.map(|value| item(&value)).collect();
            let is_tuple = value.to_string().starts_with('(');
            let (open, close) = if is_tuple { ('(', ')') } else { ('[', ']') };
            format!("{open}{}{close}", items.join(", "))
        }
        ValueKind::Map => {
            let pair = |key: Value| format!("{}: {}", item(&key), item(&value.get_item(&key).unwrap_or_default()));
            format!("{{{}}}", items.map(pair).collect::<Vec<_>>().join(", "))
        }
        _ => format!("{value:?}"),
    }
}

/// Returns the number if it is a float in Python, `1.0` included.
pub(super) fn as_float(value: &Value) -> Option<f64> {
    if value.kind() == ValueKind::Number && !value.is_integer() { f64::try_from(value.clone()).ok() } else { None }
}

/// Returns Python's `repr` of a float: the shortest digits, with an exponent below 1e-4 and from 1e16.
pub(super) fn repr(number: f64) -> String {
    if number.is_nan() {
        return "nan".into();
    }
    if number.is_infinite() {
        return if number > 0.0 { "inf" } else { "-inf" }.into();
    }
    let scientific = format!("{number:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>() {
        Ok(power) if !(-4..16).contains(&power) => {
            let sign = if power < 0 { '-' } else { '+' };
            format!("{mantissa}e{sign}{:02}", power.abs())
        }
        _ => format!("{number:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_written_as_python_writes_them() {
        let written: Vec<String> = [1.0, -0.5, 1e15, 1e16, 1.5e-7, 1e-4, 1e-5, 123_456.789, 1e300].map(repr).to_vec();
        let expected =
            ["1.0", "-0.5", "1000000000000000.0", "1e+16", "1.5e-07", "0.0001", "1e-05", "123456.789", "1e+300"];
        assert_eq!(written, expected);
    }
}
