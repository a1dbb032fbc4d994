//! Fuzzing entry point: one side of a stream that receives any packets, in any order, at any time.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::StreamOptions;
use super::connection::Connection;
use super::packet::{HEADER_BYTES, Header, Packet};

/// The largest datagram that fits into an Ethernet frame.
const DATAGRAM_BYTES_MAX: usize = 1500 - 28;

/// Runs a script of steps. Each has one byte for what happens, one byte for an amount, and the data that it needs.
pub fn play(script: &[u8]) {
    let mut rest = script;
    let mut now = Instant::now();
    let mut connection =
        Connection::new(&StreamOptions { keep_alive: Some(Duration::from_secs(5)), ..StreamOptions::default() });
    while let [step, amount, more @ ..] = rest {
        let (amount, taken) = (usize::from(*amount), more.len().min(usize::from(*amount)));
        rest = more;
        match step % 8 {
            // A packet of arbitrary bytes, or one that is close to what the stream expects.
            0 | 1 => {
                let (bytes, more) = rest.split_at(taken);
                rest = more;
                let datagram = if step % 8 == 0 { bytes.to_vec() } else { plausible(bytes) };
                if let Some(packet) = Packet::decode(&datagram) {
                    connection.receive(&packet, now, packet.payload.len());
                }
            }
            2 if connection.is_writable() => connection.write(Bytes::from(vec![*step; amount * 64])),
            3 => {
                now += Duration::from_millis(amount as u64 * 20);
                connection.on_deadline(now);
            }
            4 => while connection.read().is_some() {},
            5 => connection.end(),
            6 if amount == 0 => connection.destroy(now),
            _ => connection.connect(7, now),
        }
        let mut datagram = Vec::new();
        while connection.transmit(now, &mut datagram) {
            assert!(datagram.len() <= DATAGRAM_BYTES_MAX, "{} bytes in a packet", datagram.len());
            assert!(Packet::decode(&datagram).is_some(), "this side's own packets are sound");
            datagram.clear();
        }
    }
}

/// Makes a packet from a few bytes: its kind, data offset, sequence, ack, window and payload.
fn plausible(bytes: &[u8]) -> Vec<u8> {
    let [kind, data_offset, sequence, ack, window, payload @ ..] = bytes else { return Vec::new() };
    let mut datagram = Vec::with_capacity(HEADER_BYTES + payload.len());
    let header = Header {
        kind: *kind,
        stream_id: 0,
        window_bytes: u32::from(*window) << 10,
        sequence: i32::from(sequence.cast_signed()) as u32,
        ack: i32::from(ack.cast_signed()) as u32,
    };
    header.encode(*data_offset, &mut datagram);
    datagram.extend_from_slice(payload);
    datagram
}
