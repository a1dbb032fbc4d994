//! How Python writes numbers with a fraction.

use minijinja::value::{Value, ValueKind};

/// Returns Python's `str` of a value.
pub(super) fn display(value: &Value) -> String {
    match as_float(value) {
        Some(number) => repr(number),
        None => value.to_string(),
    }
}

/// Returns the number if it is one with a fraction in Python, `1.0` included.
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
