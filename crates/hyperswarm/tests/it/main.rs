//! Peers of this crate among themselves and with Node's.

mod failure;
mod firewalls;
mod golden;
mod idle;
mod loss;
mod matrix;
mod net;
mod node;
mod pattern;
mod peers;
mod proxy;
mod rust;
mod scenarios;
