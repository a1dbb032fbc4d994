//! Derives this node's own address from what other nodes report about it.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddrV4};

const SAMPLES_MAX: usize = 16;
const RECENT: usize = 4;

/// The address that most of the recent samples agree on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reflexive {
    /// The address of this node, or of the NAT in front of it.
    pub host: Ipv4Addr,
    /// The port, if every node sees the same one.
    pub port: Option<u16>,
}

/// Counts the addresses that other nodes report. Only the last 16 samples count, and only the last one of each host, so
/// that a host with many ports does not outvote the others.
#[derive(Debug, Default)]
pub struct NatSampler {
    /// The last samples with the hosts that reported them, oldest first.
    samples: VecDeque<(Ipv4Addr, SocketAddrV4)>,
    address: Option<Reflexive>,
}

impl NatSampler {
    /// Adds an address that a node of this host reported.
    pub fn add(&mut self, reporter: Ipv4Addr, sample: SocketAddrV4) {
        self.samples.retain(|(other, _)| *other != reporter);
        if self.samples.len() == SAMPLES_MAX {
            self.samples.pop_front();
        }
        self.samples.push_back((reporter, sample));
        self.address = self.agreed();
    }

    /// Returns the address that enough samples agree on.
    pub fn address(&self) -> Option<Reflexive> {
        self.address
    }

    /// Returns host and port, if the samples agree on both.
    pub fn host_and_port(&self) -> Option<SocketAddrV4> {
        let address = self.address?;
        address.port.map(|port| SocketAddrV4::new(address.host, port))
    }

    fn agreed(&self) -> Option<Reflexive> {
        // A few dissenting samples are tolerated, once there are enough samples to outvote them.
        let dissenters = self.samples.len() / RECENT;
        let threshold = self.samples.len() - dissenters.min(3);
        let samples = || self.samples.iter().map(|(_, sample)| sample);
        let hits = |counts: &dyn Fn(&SocketAddrV4) -> bool| samples().filter(|one| counts(one)).count();
        let best = samples().max_by_key(|sample| hits(&|other| other == *sample))?;
        if hits(&|other| other == best) >= threshold {
            return Some(Reflexive { host: *best.ip(), port: Some(best.port()) });
        }
        let best = samples().max_by_key(|sample| hits(&|other| other.ip() == sample.ip()))?;
        let agrees = hits(&|other| other.ip() == best.ip()) >= threshold;
        agrees.then(|| Reflexive { host: *best.ip(), port: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reporter(number: usize) -> Ipv4Addr {
        Ipv4Addr::from(0x0a00_0000 + number as u32)
    }

    fn sampler(samples: &[(&str, u16)]) -> NatSampler {
        let mut sampler = NatSampler::default();
        for (number, (host, port)) in samples.iter().enumerate() {
            sampler.add(reporter(number), SocketAddrV4::new(host.parse().unwrap(), *port));
        }
        sampler
    }

    #[test]
    fn one_sample_is_believed_until_another_contradicts() {
        let mut one = sampler(&[("1.1.1.1", 7)]);
        assert_eq!(one.host_and_port(), Some("1.1.1.1:7".parse().unwrap()));
        one.add(reporter(1), "2.2.2.2:7".parse().unwrap());
        assert_eq!(one.address(), None);
    }

    #[test]
    fn ports_that_differ_leave_the_host() {
        let random = sampler(&[("1.1.1.1", 7), ("1.1.1.1", 8), ("1.1.1.1", 9)]);
        assert_eq!(random.address(), Some(Reflexive { host: "1.1.1.1".parse().unwrap(), port: None }));
    }

    #[test]
    fn one_liar_in_four_is_outvoted() {
        let mostly = sampler(&[("1.1.1.1", 7), ("1.1.1.1", 7), ("9.9.9.9", 9), ("1.1.1.1", 7)]);
        assert_eq!(mostly.host_and_port(), Some("1.1.1.1:7".parse().unwrap()));
    }

    #[test]
    fn a_move_is_noticed_once_the_old_samples_are_gone() {
        let mut moved = sampler(&[("1.1.1.1", 7); 16]);
        for number in 0..13 {
            moved.add(reporter(100 + number), "2.2.2.2:7".parse().unwrap());
        }
        assert_eq!(moved.host_and_port(), Some("2.2.2.2:7".parse().unwrap()));
    }

    #[test]
    fn a_host_has_one_vote_however_often_it_reports() {
        let mut mostly = sampler(&[("1.1.1.1", 7); 4]);
        for _ in 0..20 {
            mostly.add(reporter(66), "9.9.9.9:7".parse().unwrap());
        }
        assert_eq!(mostly.host_and_port(), Some("1.1.1.1:7".parse().unwrap()));
    }
}
