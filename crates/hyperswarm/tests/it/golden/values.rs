use std::net::{SocketAddrV4, SocketAddrV6};

use tether_hyperswarm::compact_encoding::{Decoder, Encoder};

use super::{bytes, cases, parsed, read};

#[test]
fn values_become_the_bytes_of_compact_encoding() {
    for case in cases(&read("compact_encoding")["cases"]) {
        let (kind, value) = (case["kind"].as_str().expect("a kind"), &case["value"]);
        let mut out = Vec::new();
        match kind {
            "uint" => out.write_uint(parsed(value)),
            "uint16" => out.write_uint16(parsed(value)),
            "uint32" => out.write_uint32(parsed(value)),
            "string" => out.write_string(value.as_str().expect("a text")),
            "buffer" | "optional_buffer" => out.write_buffer(&bytes(value)),
            "raw" | "fixed32" | "fixed64" => out.write_raw(&bytes(value)),
            "ipv4" => out.write_ipv4(parsed(value)),
            "ipv6" => out.write_ipv6(parsed(value)),
            "array_of_uint" => out.write_array(&parsed::<Vec<u64>>(value), |out, item| out.write_uint(*item)),
            other => panic!("{other} is not known here"),
        }
        assert_eq!(out, bytes(&case["bytes"]), "{case}");
    }
}

#[test]
fn the_bytes_of_compact_encoding_become_values() {
    for case in cases(&read("compact_encoding")["cases"]) {
        let (kind, value, wire) = (case["kind"].as_str().expect("a kind"), &case["value"], bytes(&case["bytes"]));
        let mut decoder = Decoder::new(&wire);
        let same = match kind {
            "uint" => decoder.uint() == Ok(parsed(value)),
            "uint16" => decoder.u16() == Ok(parsed(value)),
            "uint32" => decoder.u32() == Ok(parsed(value)),
            "string" => decoder.string() == Ok(value.as_str().expect("a text")),
            "buffer" => decoder.buffer() == Ok(&bytes(value)),
            "optional_buffer" => decoder.optional_buffer() == Ok(super::optional_bytes(value).as_deref()),
            "raw" => decoder.raw() == bytes(value),
            "fixed32" => decoder.fixed::<32>() == Ok(super::fixed(value)),
            "fixed64" => decoder.fixed::<64>() == Ok(super::fixed(value)),
            "ipv4" => decoder.ipv4() == Ok(parsed::<SocketAddrV4>(value)),
            "ipv6" => decoder.ipv6() == Ok(parsed::<SocketAddrV6>(value)),
            "array_of_uint" => decoder.array(8, Decoder::uint) == Ok(parsed(value)),
            other => panic!("{other} is not known here"),
        };
        assert!(same, "{case}");
        assert!(decoder.is_empty(), "{case}");
    }
}

#[test]
fn cut_values_are_refused() {
    for case in cases(&read("compact_encoding")["refused"]) {
        let wire = bytes(&case["bytes"]);
        let mut decoder = Decoder::new(&wire);
        let refused = match case["kind"].as_str().expect("a kind") {
            "uint" => decoder.uint().is_err(),
            "buffer" => decoder.buffer().is_err(),
            "ipv4" => decoder.ipv4().is_err(),
            "array_of_uint" => decoder.array(8, Decoder::uint).is_err(),
            other => panic!("{other} is not known here"),
        };
        assert!(refused, "{case}");
    }
}
