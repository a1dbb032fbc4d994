//! W3C trace context: the trace that a request belongs to.

use protocol::TraceId;

/// A request's place in a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceContext {
    pub trace_id: TraceId,
    /// The caller's span, zero at the root.
    pub parent_span: [u8; 8],
    /// Whether the caller records this trace.
    pub sampled: bool,
}

impl TraceContext {
    /// Parses a `traceparent` header, `00-<32 hex>-<16 hex>-<2 hex>`. Returns `None` if it is malformed: by the W3C
    /// specification, a malformed header starts a new trace.
    pub fn parse(header: &str) -> Option<Self> {
        let mut parts = header.trim().split('-');
        let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let version = byte(version)?;
        // Version 00 has four parts, later versions may have more, and ff is forbidden.
        if version == 0xff || (version == 0 && parts.next().is_some()) {
            return None;
        }
        let trace_id: TraceId = trace.parse().ok()?;
        if span.len() != 16 || trace_id.0 == [0; 16] {
            return None;
        }
        let mut parent_span = [0; 8];
        for (index, target) in parent_span.iter_mut().enumerate() {
            *target = byte(span.get(index * 2..index * 2 + 2)?)?;
        }
        (parent_span != [0; 8]).then_some(Self { trace_id, parent_span, sampled: byte(flags)? & 1 == 1 })
    }

    pub fn begin() -> Self {
        let mut trace = [0; 16];
        // If there is no randomness, an ambiguous trace id is better than a refused request.
        if getrandom::fill(&mut trace).is_err() {
            trace[15] = 1;
        }
        Self { trace_id: TraceId(trace), parent_span: [0; 8], sampled: false }
    }
}

fn byte(text: &str) -> Option<u8> {
    let hex = |digit: u8| matches!(digit, b'0'..=b'9' | b'a'..=b'f');
    (text.len() == 2 && text.bytes().all(hex)).then(|| u8::from_str_radix(text, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_traceparent_is_read() {
        let context = TraceContext::parse("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01").expect("good");
        assert_eq!(context.trace_id.to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(context.parent_span, [0, 0xf0, 0x67, 0xaa, 0x0b, 0xa9, 0x02, 0xb7]);
        assert!(context.sampled);
    }

    #[test]
    fn a_malformed_traceparent_is_as_none() {
        for bad in [
            "",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-é0f067aa0ba902b-01",
        ] {
            assert_eq!(TraceContext::parse(bad), None, "{bad}");
        }
    }
}
