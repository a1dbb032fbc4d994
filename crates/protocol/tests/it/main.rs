//! The published contracts, as others see them.

mod schemas;
