//! The published contracts, as others see them.

mod replays;
mod schemas;
