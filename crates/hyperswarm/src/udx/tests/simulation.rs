//! Tests of the state machines over a simulated link.

use std::time::Duration;

use bytes::Bytes;
use proptest::prelude::*;
use tokio::time::Instant;

use super::link::{Chance, Link, Weather};
use super::pattern;
use crate::udx::connection::Connection;
use crate::udx::packet::{DATA, DESTROY, END, HEADER_BYTES, HEARTBEAT, Header, Packet, SACK};
use crate::udx::{StreamError, StreamOptions};

const MINUTE: Duration = Duration::from_mins(1);

fn assert_exchanged(link: &Link, here: &[u8], there: &[u8]) {
    assert_eq!(link.sides[0].connection.closed(), Some(Ok(())));
    assert_eq!(link.sides[1].connection.closed(), Some(Ok(())));
    assert!(link.sides[1].received == here, "what was sent here arrived there");
    assert!(link.sides[0].received == there, "what was sent there arrived here");
}

fn exchange(weather: Weather, seed: u64, length: usize) -> (Link, Duration) {
    let mut link = Link::new(weather, seed);
    let (here, there) = (pattern(length), pattern(length / 2));
    let took = link.exchange(&here, &there, MINUTE).expect("ends in time");
    assert_exchanged(&link, &here, &there);
    (link, took)
}

#[test]
fn a_clear_link_is_used_fully_and_nothing_is_sent_twice() {
    let (link, took) = exchange(Weather { queue_bytes: 64 * 1024 * 1024, ..Weather::default() }, 1, 8_000_000);
    assert_eq!(link.sides[0].connection.sender().resends, 0);
    // 8 MB take 0.64 s at 12.5 MB/s.
    assert!(took < Duration::from_secs(1), "took {took:?}");
    assert_eq!(link.sides[0].connection.sender().mtu(), 1500);
}

#[test]
fn a_short_queue_costs_little() {
    let (link, took) = exchange(Weather { queue_bytes: 128 * 1024, ..Weather::default() }, 2, 8_000_000);
    assert!(took < Duration::from_millis(1_300), "took {took:?}");
    assert_eq!(link.sides[0].connection.sender().timeouts, 0);
}

#[test]
fn one_percent_loss_slows_down_without_stalls() {
    for seed in 0..10 {
        let (link, took) = exchange(Weather { loss_percent: 1.0, ..Weather::default() }, seed, 1_000_000);
        assert!(took < Duration::from_secs(3), "seed {seed} took {took:?}");
        assert!(link.sides[0].connection.sender().timeouts <= 2, "seed {seed}");
    }
}

#[test]
fn five_percent_loss_is_survived() {
    for seed in 0..10 {
        let (_, took) = exchange(Weather { loss_percent: 5.0, ..Weather::default() }, seed, 500_000);
        assert!(took < Duration::from_secs(6), "seed {seed} took {took:?}");
    }
}

#[test]
fn doubled_packets_change_nothing() {
    let (link, _) = exchange(Weather { double_percent: 30.0, ..Weather::default() }, 3, 2_000_000);
    assert_eq!(link.sides[0].connection.sender().timeouts, 0);
}

#[test]
fn reordering_makes_few_packets_be_sent_again() {
    let weather = Weather {
        late_percent: 10.0,
        late_by: Duration::from_millis(8),
        queue_bytes: 64 * 1024 * 1024,
        ..Weather::default()
    };
    let (link, took) = exchange(weather, 4, 10_000_000);
    let stats = link.sides[0].connection.traffic;
    let resends = link.sides[0].connection.sender().resends;
    assert!(resends * 100 < stats.packets_sent, "{resends} of {}", stats.packets_sent);
    assert!(took < Duration::from_secs(2), "took {took:?}");
}

#[test]
fn sequence_numbers_wrap() {
    let weather = Weather { loss_percent: 2.0, double_percent: 2.0, late_percent: 5.0, ..Weather::default() };
    let mut link = Link::starting_at(weather, 5, &StreamOptions::default(), [u32::MAX - 300, u32::MAX - 50]);
    let (here, there) = (pattern(1_000_000), pattern(1_000_000));
    link.exchange(&here, &there, MINUTE).expect("ends in time");
    assert_exchanged(&link, &here, &there);
}

#[test]
fn a_reader_that_stops_stops_the_sender_and_reading_starts_it_again() {
    let options = StreamOptions { receive_window_bytes: 100_000, ..StreamOptions::default() };
    let mut link = Link::starting_at(Weather::default(), 6, &options, [0, 0]);
    let sent = pattern(1_000_000);
    link.sides[0].to_write = Bytes::copy_from_slice(&sent);
    link.sides[1].reads = false;
    assert_eq!(link.run_until(Duration::from_secs(5), |_| false), None);
    let mut waiting = 0;
    while let Some(bytes) = link.sides[1].connection.read() {
        waiting += bytes.len();
        link.sides[1].received.extend_from_slice(&bytes);
    }
    assert!((90_000..=100_000).contains(&waiting), "{waiting} bytes waited");
    assert_eq!(link.sides[0].connection.sender().timeouts, 0, "what the window forbids isn't sent");
    link.sides[1].reads = true;
    let took = link.exchange_rest(&sent, Duration::from_secs(5));
    assert!(took.is_some());
    assert_eq!(link.sides[1].received, sent);
}

#[test]
fn a_lost_window_update_is_asked_for() {
    let options = StreamOptions { receive_window_bytes: 50_000, ..StreamOptions::default() };
    let mut link = Link::starting_at(Weather::default(), 7, &options, [0, 0]);
    let sent = pattern(200_000);
    link.sides[0].to_write = Bytes::copy_from_slice(&sent);
    link.sides[1].reads = false;
    link.run_until(Duration::from_secs(1), |_| false);
    link.drops.insert(0);
    link.sides[1].reads = true;
    link.run_until(Duration::from_millis(20), |_| false);
    link.drops.clear();
    assert!(link.exchange_rest(&sent, Duration::from_secs(20)).is_some());
    assert!(link.sent.iter().any(|(_, packet)| packet[2] == HEARTBEAT));
}

#[test]
fn ends_that_cross_data_in_flight_close_both_sides() {
    for seed in 0..20 {
        let weather = Weather { loss_percent: 20.0, ..Weather::default() };
        let mut link = Link::new(weather, seed);
        let (here, there) = (pattern(20_000), pattern(17));
        link.exchange(&here, &there, MINUTE).unwrap_or_else(|| panic!("seed {seed} ends in time"));
        assert_exchanged(&link, &here, &there);
    }
}

#[test]
fn an_end_that_a_forgetful_peer_never_acknowledges_closes_all_the_same() {
    let mut link = Link::new(Weather::default(), 14);
    link.sides[1].ends = true;
    link.run_until(Duration::from_millis(500), |_| false);
    link.weather.loss_percent = 100.0;
    link.sides[0].ends = true;
    let took = link.run_until(MINUTE, |sides| sides[0].is_complete()).expect("closes");
    assert_eq!(link.sides[0].connection.closed(), Some(Ok(())));
    assert!(took < Duration::from_secs(8), "took {took:?}");
}

#[test]
fn an_empty_stream_ends() {
    let (link, took) = exchange(Weather::default(), 8, 0);
    assert!(took < Duration::from_millis(100), "took {took:?}");
    assert!(link.sent.iter().any(|(_, packet)| packet[2] == END));
}

#[test]
fn a_peer_that_falls_silent_is_given_up_after_some_seconds() {
    let mut link = Link::new(Weather::default(), 9);
    link.sides[0].to_write = Bytes::from(pattern(100));
    link.run_until(Duration::from_secs(1), |_| false);
    link.weather.loss_percent = 100.0;
    link.sides[0].to_write = Bytes::from(pattern(200));
    let took = link.run_until(MINUTE, |sides| sides[0].is_complete()).expect("gives up");
    assert_eq!(link.sides[0].connection.closed(), Some(Err(StreamError::TimedOut)));
    assert!((Duration::from_secs(10)..Duration::from_secs(20)).contains(&took), "took {took:?}");
}

#[test]
fn silence_is_survived_when_it_is_short() {
    let mut link = Link::new(Weather::default(), 10);
    link.sides[0].to_write = Bytes::from(pattern(50_000));
    link.run_until(Duration::from_secs(1), |_| false);
    link.weather.loss_percent = 100.0;
    link.sides[0].to_write = Bytes::from(pattern(100_000));
    link.run_until(Duration::from_secs(6), |_| false);
    link.weather.loss_percent = 0.0;
    let sent = pattern(100_000);
    let took = link.exchange_rest(&sent, Duration::from_secs(10)).expect("goes on");
    assert!(took < Duration::from_secs(5), "took {took:?}");
}

#[test]
fn packets_too_large_for_the_path_are_not_insisted_on() {
    for mtu in [1200, 1250, 1280, 1400, 1420, 1492] {
        let (link, took) = exchange(Weather { mtu, ..Weather::default() }, 11, 2_000_000);
        let found = link.sides[0].connection.sender().mtu();
        assert!(found <= mtu && found + 70 >= mtu, "{found} of {mtu}");
        assert_eq!(link.sides[0].connection.sender().timeouts, 0);
        assert!(took < Duration::from_secs(2), "took {took:?}");
    }
}

#[test]
fn destroying_tells_the_other_side_even_when_the_first_word_is_lost() {
    let mut link = Link::new(Weather::default(), 12);
    link.sides[0].to_write = Bytes::from(pattern(100));
    link.run_until(Duration::from_secs(1), |_| false);
    link.drops.insert(DESTROY);
    let now = link.now;
    link.sides[0].connection.destroy(now);
    link.run_until(Duration::from_millis(100), |_| false);
    link.drops.clear();
    assert_eq!(link.sides[1].connection.closed(), None);
    link.sides[1].to_write = Bytes::from(pattern(100));
    link.run_until(Duration::from_secs(1), |sides| sides[1].is_complete()).expect("is told");
    assert_eq!(link.sides[1].connection.closed(), Some(Err(StreamError::Reset)));
    assert_eq!(link.sides[1].received, pattern(100), "what arrived before can still be read");
    link.run_until(Duration::from_secs(10), |_| false);
    assert!(link.sides.iter().all(|side| side.connection.is_gone()));
}

#[test]
fn what_was_ended_and_let_go_of_is_delivered_but_not_waited_for_without_end() {
    for (reads, closes) in [(true, Duration::from_secs(1)), (false, Duration::from_secs(40))] {
        let options = StreamOptions { receive_window_bytes: 50_000, ..StreamOptions::default() };
        let mut link = Link::starting_at(Weather::default(), 15, &options, [0, 0]);
        let sent = pattern(60_000);
        link.sides[0].to_write = Bytes::copy_from_slice(&sent);
        link.sides[0].ends = true;
        link.sides[1].reads = reads;
        link.run_until(Duration::from_millis(1), |_| false);
        let now = link.now;
        link.sides[0].connection.abandon(now);
        let took = link.run_until(MINUTE, |sides| sides[0].is_complete()).expect("closes");
        assert!(took < closes, "took {took:?}");
        assert_eq!(link.sides[1].received == sent, reads);
    }
}

#[test]
fn an_idle_connection_keeps_itself_alive_only_when_asked_to() {
    for (keep_alive, expected) in [(None, 0), (Some(Duration::from_secs(5)), 2)] {
        let options = StreamOptions { keep_alive, ..StreamOptions::default() };
        let mut link = Link::starting_at(Weather::default(), 13, &options, [0, 0]);
        link.run_until(Duration::from_secs(12), |_| false);
        let heartbeats = link.sent.iter().filter(|(from, packet)| *from == 0 && packet[2] == HEARTBEAT).count();
        assert!(heartbeats >= expected, "{heartbeats} heartbeats");
        assert_eq!(heartbeats > 0, expected > 0);
    }
}

#[test]
fn a_watched_connection_sends_heartbeats_only_while_it_is_silent() {
    let mut link = Link::new(Weather::default(), 16);
    let heartbeats = |link: &Link| link.sent.iter().filter(|(_, packet)| packet[2] == HEARTBEAT).count();
    let now = link.now;
    link.sides[0].connection.watch(true, now);
    link.run_until(Duration::from_millis(7_600), |_| false);
    assert_eq!(heartbeats(&link), 9, "one after each 750 ms and a round trip of 20 ms");
    for _ in 0..100 {
        let more = [&link.sides[1].to_write[..], b"x"].concat();
        link.sides[1].to_write = Bytes::from(more);
        link.run_until(Duration::from_millis(100), |_| false);
    }
    assert_eq!(heartbeats(&link), 9, "none while the other side is heard");
    let now = link.now;
    link.sides[0].connection.watch(false, now);
    link.run_until(Duration::from_secs(10), |_| false);
    assert_eq!(heartbeats(&link), 9);
}

#[test]
fn reports_of_a_closed_port_end_no_connection_whose_peer_responds() {
    for (loss_percent, delay) in [(0.0, 10), (2.0, 10), (0.0, 900)] {
        let weather = Weather { loss_percent, delay: Duration::from_millis(delay), ..Weather::default() };
        let mut link = Link::new(weather, 17);
        link.sides[0].to_write = Bytes::from(pattern(100));
        link.run_until(Duration::from_secs(10), |_| false);
        let before = link.sent.len();
        for _ in 0..600 {
            let now = link.now;
            link.sides[0].connection.on_port_closed(now);
            link.run_until(Duration::from_millis(100), |_| false);
        }
        assert_eq!(link.sides[0].connection.closed(), None, "loss of {loss_percent} %, delay of {delay} ms");
        assert!(link.sent.len() - before <= 1_000, "{} packets", link.sent.len() - before);
        link.weather.loss_percent = 100.0;
        let since = link.now;
        while link.sides[0].connection.closed().is_none() {
            let now = link.now;
            link.sides[0].connection.on_port_closed(now);
            link.run_until(Duration::from_millis(100), |_| false);
        }
        assert_eq!(link.sides[0].connection.closed(), Some(Err(StreamError::PortClosed)));
        let limit = Duration::from_millis(600).max(Duration::from_millis(delay) * 8);
        assert!(link.now - since <= limit, "took {:?}", link.now - since);
    }
}

fn header(kind: u8, sequence: u32, ack: u32) -> Header {
    Header { kind, stream_id: 1, window_bytes: 1 << 20, sequence, ack }
}

fn receive(connection: &mut Connection, header: Header, payload: &[u8]) {
    let mut bytes = Vec::new();
    header.encode(0, &mut bytes);
    bytes.extend_from_slice(payload);
    connection.receive(&Packet::decode(&bytes).unwrap(), Instant::now(), payload.len());
}

fn transmit(connection: &mut Connection) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    connection.transmit(Instant::now(), &mut bytes).then_some(bytes)
}

fn connected() -> Connection {
    let mut connection = Connection::new(&StreamOptions::default());
    connection.connect(7, Instant::now());
    connection
}

#[test]
fn packets_before_connecting_are_kept_bounded_and_acknowledged_later() {
    let mut connection = Connection::new(&StreamOptions::default());
    for sequence in 0..1000 {
        receive(&mut connection, header(DATA, sequence, 0), &[sequence as u8; 1000]);
    }
    assert_eq!(transmit(&mut connection), None, "nobody is known to be answered");
    connection.connect(7, Instant::now());
    let ack = transmit(&mut connection).unwrap();
    let packet = Packet::decode(&ack).unwrap();
    assert_eq!((packet.header.stream_id, packet.header.kind), (7, 0));
    let mut kept = 0;
    while let Some(bytes) = connection.read() {
        kept += bytes.len() as u32;
    }
    assert_eq!(packet.header.ack * 1000, kept);
    assert!((60_000..70_000).contains(&kept), "{kept} bytes were kept");
}

#[test]
fn heartbeats_are_answered() {
    let mut connection = connected();
    receive(&mut connection, header(HEARTBEAT, 0, 0), &[]);
    assert_eq!(transmit(&mut connection).unwrap()[2], 0);
    assert_eq!(transmit(&mut connection), None);
}

#[test]
fn early_packets_are_told_as_ranges() {
    let mut connection = connected();
    for sequence in [2, 3, 5, 9, 4, 7] {
        receive(&mut connection, header(DATA, sequence, 0), b"x");
    }
    let ack = transmit(&mut connection).unwrap();
    let packet = Packet::decode(&ack).unwrap();
    assert_eq!((packet.header.kind, packet.header.ack, ack[3]), (SACK, 0, 0));
    assert_eq!(packet.ranges().collect::<Vec<_>>(), [(2, 6), (7, 8), (9, 10)]);
}

#[test]
fn early_packets_take_no_more_than_the_window() {
    let options = StreamOptions { receive_window_bytes: 20_000, ..StreamOptions::default() };
    let mut connection = Connection::new(&options);
    connection.connect(7, Instant::now());
    for sequence in 1..1000 {
        receive(&mut connection, header(DATA, sequence, 0), &[0; 1000]);
    }
    receive(&mut connection, header(DATA, 1, 0), &[0; 1000]);
    let ack = transmit(&mut connection).unwrap();
    let packet = Packet::decode(&ack).unwrap();
    assert_eq!(packet.header.window_bytes, 0);
    assert_eq!(packet.ranges().collect::<Vec<_>>(), [(1, 19)]);
    receive(&mut connection, header(DATA, 0, 0), &[0; 1000]);
    let mut received = 0;
    while let Some(bytes) = connection.read() {
        received += bytes.len();
    }
    assert_eq!(received, 19_000);
}

#[test]
fn blind_packets_with_numbers_of_another_time_are_ignored() {
    let mut connection = connected();
    connection.write(Bytes::from_static(b"hello"));
    assert!(transmit(&mut connection).is_some());
    // A packet that acknowledges what was never sent.
    receive(&mut connection, header(DATA, 0, 2), b"forged");
    receive(&mut connection, header(DESTROY, 0, 2), &[]);
    // Packets with numbers far from any in use.
    receive(&mut connection, header(DATA, 1 << 20, 0), b"forged");
    receive(&mut connection, header(DESTROY, 1 << 20, 0), &[]);
    receive(&mut connection, header(DESTROY, u32::MAX, 0), &[]);
    receive(&mut connection, header(0, 0, 1 << 31), &[]);
    assert_eq!(connection.read(), None);
    assert_eq!(connection.closed(), None);
    assert_eq!(connection.sender().in_flight(), HEADER_BYTES as u64 + 5);
    assert_eq!(transmit(&mut connection), None);
    receive(&mut connection, header(DESTROY, 0, 1), &[]);
    assert_eq!(connection.closed(), Some(Err(StreamError::Reset)));
}

#[test]
fn packets_beyond_what_libudx_can_report_are_not_taken_for_lost() {
    let mut connection = connected();
    let started = Instant::now();
    for _ in 0..200 {
        connection.write(Bytes::from_static(b"x"));
        assert!(transmit(&mut connection).is_some());
    }
    // Fifty ranges of one packet each: every second up to 100. Packets beyond may have arrived as well.
    let mut bytes = Vec::new();
    header(SACK, 0, 0).encode(0, &mut bytes);
    for start in (1..100u32).step_by(2) {
        bytes.extend_from_slice(&start.to_le_bytes());
        bytes.extend_from_slice(&(start + 1).to_le_bytes());
    }
    let later = started + Duration::from_millis(50);
    connection.receive(&Packet::decode(&bytes).unwrap(), later, 0);
    // The resent packets arrive, which makes all older packets suspect.
    let mut again = Vec::new();
    let mut packet = Vec::new();
    while connection.transmit(later, &mut packet) {
        again.push(u32::from_le_bytes(packet[12..16].try_into().unwrap()));
        packet.clear();
    }
    assert_eq!(again[..3], [0, 2, 4]);
    bytes[16..20].copy_from_slice(&2u32.to_le_bytes());
    connection.receive(&Packet::decode(&bytes).unwrap(), later + Duration::from_millis(50), 0);
    while connection.transmit(later + Duration::from_millis(50), &mut packet) {
        again.push(u32::from_le_bytes(packet[12..16].try_into().unwrap()));
        packet.clear();
    }
    assert!(again.iter().all(|sequence| *sequence < 100), "{again:?}");
}

#[test]
fn answers_carry_the_acknowledgement() {
    let mut connection = connected();
    receive(&mut connection, header(DATA, 0, 0), b"question");
    connection.write(Bytes::from_static(b"answer"));
    let answer = transmit(&mut connection).unwrap();
    let packet = Packet::decode(&answer).unwrap();
    assert_eq!((packet.header.kind, packet.header.ack, packet.payload), (DATA, 1, &b"answer"[..]));
    assert_eq!(transmit(&mut connection), None);
}

#[test]
fn small_writes_share_packets() {
    let mut connection = connected();
    for _ in 0..100 {
        connection.write(Bytes::from_static(b"0123456789"));
    }
    assert_eq!(transmit(&mut connection).unwrap().len(), HEADER_BYTES + 1000);
    assert_eq!(transmit(&mut connection), None);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    // Loss stays below 10 %. At 20 % each way, one packet in some thousands is lost seven times in a row, and giving up
    // is right.
    #[test]
    fn whatever_the_weather_bytes_arrive_once_and_in_order(
        seed: u64, loss in 0.0..10.0f64, double in 0.0..20.0f64, late in 0.0..30.0f64,
        late_by in 1..40u64, delay in 1..60u64, mtu in 1200..1500usize, window in 4_000..200_000u32,
        first: [u32; 2], lengths in [0..200_000usize, 0..60_000usize],
    ) {
        let weather = Weather {
            loss_percent: loss, double_percent: double, late_percent: late, mtu,
            late_by: Duration::from_millis(late_by), delay: Duration::from_millis(delay), ..Weather::default()
        };
        let options = StreamOptions { receive_window_bytes: window, ..StreamOptions::default() };
        let mut link = Link::starting_at(weather, seed, &options, first);
        let (here, there) = (pattern(lengths[0]), pattern(lengths[1]));
        prop_assert!(link.exchange(&here, &there, MINUTE * 5).is_some());
        assert_exchanged(&link, &here, &there);
    }

    #[test]
    fn no_datagram_makes_it_panic(seed: u64, datagrams in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..80), 1..40)) {
        let mut chance = Chance::new(seed);
        let mut connection = connected();
        connection.write(Bytes::from(pattern(20_000)));
        while transmit(&mut connection).is_some() {}
        for mut datagram in datagrams {
            // Packets with numbers near those in use reach deeper code.
            if datagram.len() >= HEADER_BYTES {
                datagram[..2].copy_from_slice(&[0xff, 1]);
                datagram[3] &= 15;
                datagram[12..16].copy_from_slice(&(chance.below(40) as u32).to_le_bytes());
                datagram[16..20].copy_from_slice(&(chance.below(20) as u32).to_le_bytes());
                for at in (HEADER_BYTES..datagram.len().saturating_sub(4)).step_by(4) {
                    datagram[at..at + 4].copy_from_slice(&(chance.below(30) as u32).to_le_bytes());
                }
            }
            if let Some(packet) = Packet::decode(&datagram) {
                connection.receive(&packet, Instant::now(), chance.below(3000) as usize);
            }
            connection.on_deadline(Instant::now());
            while transmit(&mut connection).is_some() {}
            if chance.happens(30.0) {
                connection.read();
            }
        }
    }

    #[test]
    fn foreign_bytes_are_taken_apart_or_refused(datagram in prop::collection::vec(any::<u8>(), 0..100)) {
        let mut datagram = datagram;
        if let Some(packet) = Packet::decode(&datagram) {
            packet.ranges().count();
        }
        if datagram.len() >= 2 {
            datagram[..2].copy_from_slice(&[0xff, 1]);
            if let Some(packet) = Packet::decode(&datagram) {
                packet.ranges().count();
            }
        }
    }
}
