//! Operators that do more in Python than in minijinja, whose built-in operators cannot be replaced: `%` with a string
//! on its left, `~` with floats, `+` with a string marked as safe, and a loop over the characters of a string.
//!
//! [`rewrite`] turns them into calls of functions that [`add`] registers. It parses just enough of Jinja's grammar to
//! find the operands, and leaves everything else unchanged.

use minijinja::formatting::{self, FormatStyle};
use minijinja::value::{Rest, Value};
use minijinja::{Environment, Error, ErrorKind};

use super::filters::escaped;
use super::number::{as_float, display, with_floats};

const MOD: &str = "__tether_mod";
const CONCAT: &str = "__tether_concat";
const ADD: &str = "__tether_add";
const EACH: &str = "__tether_each";

/// The maximum nesting of brackets; minijinja allows 150 levels.
const DEPTH_MAX: usize = 64;
/// The maximum number of operators in a tag that are rewritten as nested calls.
const CALLS_MAX: usize = 100;

/// Words that end an operand and never begin one.
const KEYWORDS: [&str; 26] = [
    "if",
    "elif",
    "else",
    "for",
    "in",
    "is",
    "and",
    "or",
    "not",
    "set",
    "recursive",
    "macro",
    "call",
    "filter",
    "block",
    "with",
    "import",
    "from",
    "include",
    "extends",
    "as",
    "do",
    "autoescape",
    "ignore",
    "missing",
    "without",
];

/// Registers the functions that rewritten templates call.
pub(in super::super) fn add(environment: &mut Environment<'_>) {
    environment.add_function(MOD, modulo);
    environment.add_function(CONCAT, |parts: Rest<Value>| parts.iter().map(display).collect::<String>());
    environment.add_function(ADD, add_marked);
    environment.add_function(EACH, |value: Value| match value.as_str() {
        // Such a list knows which item is the last one; the characters of a string do not.
        Some(text) => text.chars().map(|letter| Value::from(letter.to_string())).collect(),
        None => value,
    });
}

/// Python's `%`: with a string on the left, it formats the values.
fn modulo(left: &Value, right: &Value) -> Result<Value, Error> {
    if let Some(text) = left.as_str() {
        let values: Vec<Value> = if right.is_tuple() { right.try_iter()?.collect() } else { vec![right.clone()] };
        let values: Vec<Value> = values.into_iter().map(|value| as_whole(&value).unwrap_or(value)).collect();
        return formatting::format(FormatStyle::Printf, text, &values).map(Value::from);
    }
    let fail = || Error::new(ErrorKind::InvalidOperation, "% takes numbers, or a text on its left");
    match (as_float(left), as_float(right)) {
        (None, None) => {
            let (left, right) = (i128::try_from(left.clone())?, i128::try_from(right.clone())?);
            let rest = left.checked_rem(right).ok_or_else(fail)?;
            Ok(Value::from(if rest != 0 && (rest < 0) != (right < 0) { rest + right } else { rest }))
        }
        _ => {
            let (left, right) = (f64::try_from(left.clone())?, f64::try_from(right.clone())?);
            let rest = left % right;
            Ok(Value::from(if rest != 0.0 && (rest < 0.0) != (right < 0.0) { rest + right } else { rest }))
        }
    }
}

/// Returns a float, or a value that contains floats, as Python's `%s` formats it, if minijinja would format it
/// differently.
fn as_whole(value: &Value) -> Option<Value> {
    let python = with_floats(value)?;
    (python != value.to_string()).then(|| Value::from(python))
}

/// Python's `+` where one side may be marked as safe, in which case the other side is escaped.
fn add_marked(left: &Value, right: &Value) -> Result<Value, Error> {
    match (left.as_str(), right.as_str()) {
        (Some(one), Some(other)) if left.is_safe() || right.is_safe() => {
            let part = |value: &Value, text: &str| if value.is_safe() { text.to_owned() } else { escaped(text) };
            Ok(Value::from_safe_string(part(left, one) + &part(right, other)))
        }
        (Some(one), Some(other)) => Ok(Value::from(one.to_owned() + other)),
        _ => Err(Error::new(ErrorKind::InvalidOperation, format!("tried to add {} to {}", left.kind(), right.kind()))),
    }
}

/// Rewrites the operators of a template as calls.
pub(in super::super) fn rewrite(source: &str) -> String {
    let mut made = String::with_capacity(source.len() + 64);
    let mut rest = source;
    while let Some(at) = rest.find('{') {
        let (before, tag) = rest.split_at(at);
        made.push_str(before);
        let end = match tag.as_bytes().get(1) {
            Some(b'#') => tag.find("#}").map(|end| end + 2),
            Some(b'{' | b'%') => tag_end(tag),
            _ => Some(1),
        };
        let Some(end) = end else {
            // minijinja's parser gives a better error message.
            rest = tag;
            break;
        };
        let (tag, after) = tag.split_at(end);
        rest = after;
        if matches!(tag.as_bytes().get(1), Some(b'{' | b'%')) {
            made.push_str(&rewrite_tag(tag));
            if is_raw(tag)
                && let Some(end) = after_raw(rest)
            {
                made.push_str(&rest[..end]);
                rest = &rest[end..];
            }
        } else {
            made.push_str(tag);
        }
    }
    made.push_str(rest);
    made
}

fn is_raw(tag: &str) -> bool {
    tag.starts_with("{%") && tag[2..tag.len() - 2].trim_matches(['-', '+']).trim() == "raw"
}

/// Returns the end of the text after `{% raw %}`, including its closing tag.
fn after_raw(text: &str) -> Option<usize> {
    let mut from = 0;
    loop {
        let open = from + text[from..].find("{%")?;
        let end = open + text[open..].find("%}")? + 2;
        if text[open + 2..end - 2].trim_matches(['-', '+']).trim() == "endraw" {
            return Some(end);
        }
        from = open + 2;
    }
}

/// Returns the end of the tag that the text starts with.
fn tag_end(tag: &str) -> Option<usize> {
    let close = if tag.starts_with("{{") { "}}" } else { "%}" };
    let mut depth = 0_usize;
    let mut at = 2;
    while at < tag.len() {
        let rest = &tag[at..];
        if depth == 0 && rest.starts_with(close) {
            return Some(at + 2);
        }
        match rest.as_bytes()[0] {
            b'"' | b'\'' => at += text_end(rest)?,
            b'(' | b'[' | b'{' => {
                depth += 1;
                at += 1;
            }
            b')' | b']' | b'}' => {
                depth = depth.saturating_sub(1);
                at += 1;
            }
            _ => at += rest.chars().next().map_or(1, char::len_utf8),
        }
    }
    None
}

/// Returns the end of a quoted string, including its quotes.
fn text_end(text: &str) -> Option<usize> {
    let quote = text.as_bytes()[0];
    let mut escaped = false;
    let end = text.bytes().skip(1).position(|byte| {
        let is_end = byte == quote && !escaped;
        escaped = byte == b'\\' && !escaped;
        is_end
    });
    end.map(|end| end + 2)
}

fn rewrite_tag(tag: &str) -> String {
    let mut inner = &tag[2..tag.len() - 2];
    let mut open = 2;
    if inner.starts_with(['-', '+']) {
        inner = &inner[1..];
        open += 1;
    }
    let mut close = 2;
    if inner.ends_with('-') || (inner.ends_with('+') && tag.starts_with("{%")) {
        inner = &inner[..inner.len() - 1];
        close += 1;
    }
    let Some(tokens) = tokens(inner) else { return tag.to_owned() };
    let mut reader = Reader { text: inner, tokens: &tokens, at: 0, written: 0, depth: 0, calls: 0 };
    let is_loop = tag.starts_with("{%") && reader.word() == Some("for");
    let body = if is_loop { reader.for_loop() } else { reader.segment() };
    format!("{}{body}{}{}", &tag[..open], &inner[reader.written..], &tag[tag.len() - close..])
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Text,
    Number,
    Name,
    Sign,
}

#[derive(Debug, Clone, Copy)]
struct Token {
    kind: Kind,
    from: usize,
    to: usize,
}

fn tokens(text: &str) -> Option<Vec<Token>> {
    let mut tokens = Vec::new();
    let mut at = 0;
    while let Some(first) = text[at..].chars().next() {
        let rest = &text[at..];
        let span = |is: fn(char) -> bool| rest.find(|letter| !is(letter)).unwrap_or(rest.len());
        let (kind, length) = match first {
            _ if first.is_whitespace() => {
                at += first.len_utf8();
                continue;
            }
            '"' | '\'' => (Kind::Text, text_end(rest)?),
            '0'..='9' => {
                let whole = span(|letter| letter.is_ascii_alphanumeric() || letter == '_');
                let fraction = rest[whole..]
                    .strip_prefix('.')
                    .filter(|after| after.starts_with(|digit: char| digit.is_ascii_digit()));
                let length = fraction.map_or(whole, |after| {
                    whole + 1 + after.find(|letter: char| !letter.is_ascii_alphanumeric()).unwrap_or(after.len())
                });
                (Kind::Number, length)
            }
            _ if first.is_alphabetic() || first == '_' => {
                (Kind::Name, span(|letter| letter.is_alphanumeric() || letter == '_'))
            }
            _ => {
                let double = ["**", "//", "==", "!=", "<=", ">="].iter().any(|sign| rest.starts_with(sign));
                (Kind::Sign, if double { 2 } else { first.len_utf8() })
            }
        };
        tokens.push(Token { kind, from: at, to: at + length });
        at += length;
    }
    Some(tokens)
}

/// Reads the tokens of a tag.
struct Reader<'a> {
    text: &'a str,
    tokens: &'a [Token],
    at: usize,
    /// The end of the text that was copied to the output.
    written: usize,
    /// The number of open brackets.
    depth: usize,
    /// The number of operators rewritten as calls.
    calls: usize,
}

struct Operand {
    text: String,
    /// Whether the operand, or a part of it, is marked as safe.
    is_marked: bool,
}

impl<'a> Reader<'a> {
    fn peek(&self) -> Option<(Kind, &'a str)> {
        self.tokens.get(self.at).map(|token| (token.kind, &self.text[token.from..token.to]))
    }

    fn sign(&self) -> Option<&'a str> {
        self.peek().filter(|(kind, _)| *kind == Kind::Sign).map(|(_, sign)| sign)
    }

    fn word(&self) -> Option<&'a str> {
        self.peek().filter(|(kind, _)| *kind == Kind::Name).map(|(_, word)| word)
    }

    /// Takes the next token, including the whitespace before it.
    fn take(&mut self) -> &'a str {
        let to = self.tokens[self.at].to;
        let text = &self.text[self.written..to];
        self.at += 1;
        self.written = to;
        text
    }

    fn begins_operand(&self) -> bool {
        match self.peek() {
            Some((Kind::Text | Kind::Number, _)) => true,
            Some((Kind::Name, word)) => !KEYWORDS.contains(&word),
            Some((Kind::Sign, sign)) => ["(", "[", "{", "-", "+"].contains(&sign),
            None => false,
        }
    }

    /// Rewrites up to a closing bracket or the end.
    fn segment(&mut self) -> String {
        self.until(|_| false)
    }

    fn until(&mut self, ends: impl Fn(&Self) -> bool) -> String {
        let mut made = String::new();
        while self.peek().is_some() && !matches!(self.sign(), Some(")" | "]" | "}")) && !ends(self) {
            if self.begins_operand() {
                made.push_str(&self.sum().text);
            } else {
                made.push_str(self.take());
            }
        }
        made
    }

    /// `for … in … if … recursive`.
    fn for_loop(&mut self) -> String {
        let mut made = self.until(|reader| reader.word() == Some("in"));
        if self.word() != Some("in") {
            return made + &self.segment();
        }
        made.push_str(self.take());
        let items = self.until(|reader| matches!(reader.word(), Some("if" | "recursive")));
        made + " " + EACH + "((" + &items + "))" + &self.segment()
    }

    fn sum(&mut self) -> Operand {
        let mut left = self.concatenation();
        while let Some(sign @ ("+" | "-")) = self.sign() {
            let between = self.take();
            let right = self.concatenation();
            let is_marked = left.is_marked || right.is_marked;
            if sign == "+" && is_marked {
                left = self.call(ADD, left, right);
            } else {
                left.text = left.text + between + &right.text;
            }
            left.is_marked = is_marked;
        }
        left
    }

    fn concatenation(&mut self) -> Operand {
        let mut left = self.product();
        if self.sign() != Some("~") {
            return left;
        }
        // One call for all operands, since each level of nesting costs the parser.
        let space = left.text.len() - left.text.trim_start().len();
        left.text.insert(space, '(');
        left.text.insert_str(space, CONCAT);
        while self.sign() == Some("~") {
            self.take();
            left.text = left.text + ", " + self.product().text.trim();
        }
        left.text.push(')');
        Operand { text: left.text, is_marked: false }
    }

    fn product(&mut self) -> Operand {
        let mut left = self.power();
        while let Some(sign @ ("*" | "/" | "//" | "%")) = self.sign() {
            let between = self.take();
            let right = self.power();
            if sign == "%" {
                left = self.call(MOD, left, right);
            } else {
                left.is_marked |= right.is_marked;
                left.text = left.text + between + &right.text;
            }
        }
        left
    }

    fn power(&mut self) -> Operand {
        let mut left = self.operand();
        while self.sign() == Some("**") {
            let between = self.take();
            left.text = left.text + between + &self.operand().text;
        }
        left
    }

    /// A value with its attributes, calls, filters and tests.
    fn operand(&mut self) -> Operand {
        let mut text = String::new();
        while let Some("-" | "+") = self.sign() {
            text.push_str(self.take());
        }
        let mut is_marked = self.primary(&mut text);
        loop {
            match self.peek() {
                Some((Kind::Sign, ".")) => {
                    text.push_str(self.take());
                    if self.peek().is_some() {
                        text.push_str(self.take());
                    }
                }
                Some((Kind::Sign, "[" | "(")) => {
                    self.group(&mut text);
                }
                Some((Kind::Sign, "|")) => {
                    text.push_str(self.take());
                    is_marked |= matches!(self.word(), Some("safe" | "escape" | "e" | "forceescape"));
                    if self.word().is_some() {
                        text.push_str(self.take());
                    }
                }
                Some((Kind::Name, "is")) => {
                    text.push_str(self.take());
                    if self.word() == Some("not") {
                        text.push_str(self.take());
                    }
                    if self.word().is_some() || self.begins_operand() {
                        text.push_str(self.take());
                    }
                    let takes_value = matches!(self.peek(), Some((Kind::Text | Kind::Number, _)))
                        || (self.word().is_some() && self.begins_operand());
                    if takes_value {
                        self.primary(&mut text);
                    }
                }
                _ => return Operand { text, is_marked },
            }
        }
    }

    fn primary(&mut self, text: &mut String) -> bool {
        match self.peek() {
            Some((Kind::Sign, "(" | "[" | "{")) => self.group(text),
            Some((Kind::Text, _)) => {
                while let Some((Kind::Text, _)) = self.peek() {
                    text.push_str(self.take());
                }
                false
            }
            Some(_) if self.begins_operand() => {
                text.push_str(self.take());
                false
            }
            _ => false,
        }
    }

    /// A pair of brackets and its contents.
    fn group(&mut self, text: &mut String) -> bool {
        if self.depth == DEPTH_MAX {
            // minijinja's parser rejects this anyway.
            while self.peek().is_some() {
                text.push_str(self.take());
            }
            return false;
        }
        text.push_str(self.take());
        self.depth += 1;
        let held = self.segment();
        self.depth -= 1;
        let is_marked = held.contains("|safe") || held.contains("| safe") || held.contains(ADD);
        text.push_str(&held);
        if self.peek().is_some() {
            text.push_str(self.take());
        }
        is_marked
    }

    /// Rewrites an operator as a call. Each call copies its left side, so beyond `CALLS_MAX` the operators stay as
    /// they are.
    fn call(&mut self, function: &str, left: Operand, right: Operand) -> Operand {
        let is_marked = left.is_marked || right.is_marked;
        self.calls += 1;
        if self.calls > CALLS_MAX {
            let sign = if function == MOD { "%" } else { "+" };
            return Operand { text: left.text + sign + &right.text, is_marked };
        }
        let space = left.text.len() - left.text.trim_start().len();
        let (space, left) = left.text.split_at(space);
        Operand { text: format!("{space}{function}({}, {})", left.trim(), right.text.trim()), is_marked }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_operators_are_written_anew() {
        for (source, expected) in [
            ("{{ a ~ b ~ c }}", "{{ __tether_concat(a, b, c) }}"),
            ("{{- x | f(a % 2) -}}", "{{- x | f(__tether_mod(a, 2)) -}}"),
            ("{{ a * b % c + d }}", "{{ __tether_mod(a * b, c) + d }}"),
            ("{{ a ~ b is string and c }}", "{{ __tether_concat(a, b is string) and c }}"),
            ("{{ 'a' + (b | safe) }}", "{{ __tether_add('a', (b | safe)) }}"),
            ("{% for x in a if x % 2 %}", "{% for x in __tether_each(( a)) if __tether_mod(x, 2) %}"),
            ("{% for x, y in d.items() recursive -%}", "{% for x, y in __tether_each(( d.items())) recursive -%}"),
            ("{% set x = {'a': b ~ 'c'}['}}'] %}", "{% set x = {'a': __tether_concat(b, 'c')}['}}'] %}"),
            (
                "{% raw %}{{ a ~ b }}{%- endraw %}{{ a~b }}",
                "{% raw %}{{ a ~ b }}{%- endraw %}{{ __tether_concat(a, b) }}",
            ),
            ("{# a ~ b #} { a ~ b } {{ 'a ~ b' }}", "{# a ~ b #} { a ~ b } {{ 'a ~ b' }}"),
            ("{{ a[1:-1] + b[::2] - 3.5e2 ** -x }}{{ a", "{{ a[1:-1] + b[::2] - 3.5e2 ** -x }}{{ a"),
            ("{{ 'open }}", "{{ 'open }}"),
        ] {
            assert_eq!(rewrite(source), expected);
        }
    }

    #[test]
    fn what_a_stranger_nests_costs_little() {
        let begun = std::time::Instant::now();
        for source in [
            format!("{{{{ {}1{} }}}}", "(".repeat(50_000), ")".repeat(50_000)),
            format!("{{{{ 1{} }}}}", " ~ 1".repeat(50_000)),
            format!("{{{{ 1{} }}}}", " % 1".repeat(50_000)),
            format!("{{{{ {}1 }}}}", "-".repeat(50_000)),
            "{{".repeat(20_000),
            "{{ '".repeat(20_000),
        ] {
            assert!(rewrite(&source).len() < 10 * source.len());
        }
        assert!(begun.elapsed() < std::time::Duration::from_secs(20));
    }
}
