//! A signed value, stored under a public key, that the owner of the key may replace.

use bytes::Bytes;

use crate::compact_encoding::{DecodeError, Decoder, Encoder};
use crate::crypto::{KeyPair, PublicKey, hash, namespace};
use crate::hyperdht::commands::MUTABLE_PUT;

/// A signed value. A higher sequence number replaces a lower one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MutableValue {
    /// The sequence number.
    pub seq: u64,
    /// The value.
    pub value: Bytes,
    /// The owner's signature of both.
    pub signature: [u8; 64],
}

impl MutableValue {
    /// Signs a value.
    pub fn sign(seq: u64, value: Bytes, key_pair: &KeyPair) -> Self {
        let signature = key_pair.sign(&signable(seq, &value));
        Self { seq, value, signature }
    }

    /// Returns whether the owner of the key signed the value.
    pub fn is_of(&self, public_key: &PublicKey) -> bool {
        public_key.verify(&signable(self.seq, &self.value), &self.signature)
    }

    /// Decodes the response to a MUTABLE_GET.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        Self::read(&mut Decoder::new(bytes))
    }

    /// Encodes the response to a MUTABLE_GET.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(80 + self.value.len());
        self.write(&mut bytes);
        bytes
    }

    /// Decodes the value of a MUTABLE_PUT request.
    pub fn decode_put(bytes: &[u8]) -> Result<(PublicKey, Self), DecodeError> {
        let mut decoder = Decoder::new(bytes);
        Ok((PublicKey(decoder.fixed()?), Self::read(&mut decoder)?))
    }

    /// Encodes the value of a MUTABLE_PUT request.
    pub fn encode_put(&self, public_key: &PublicKey) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(112 + self.value.len());
        bytes.write_raw(public_key.as_bytes());
        self.write(&mut bytes);
        bytes
    }

    fn read(decoder: &mut Decoder<'_>) -> Result<Self, DecodeError> {
        let seq = decoder.uint()?;
        Ok(Self { seq, value: Bytes::copy_from_slice(decoder.buffer()?), signature: decoder.fixed()? })
    }

    fn write(&self, out: &mut impl Encoder) {
        out.write_uint(self.seq);
        out.write_buffer(&self.value);
        out.write_raw(&self.signature);
    }
}

fn signable(seq: u64, value: &[u8]) -> [u8; 64] {
    let mut signed = Vec::with_capacity(18 + value.len());
    signed.write_uint(seq);
    signed.write_buffer(value);
    let mut message = [0; 64];
    message[..32].copy_from_slice(&namespace("hyperswarm/dht", MUTABLE_PUT as u8));
    message[32..].copy_from_slice(&hash(&[&signed]));
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "8a88e3dd7409f195fd52db2d3cba5d72ca6709bf1d94121bf3748801b40f6f5c";
    const VALUE: &str = "030568656c6c6fcc5eabe16d1e02fb51cbf3f376316b1bc60e14215a210c55e452cae03149fc641f11bb65020b237f99bc\
                         01b7c51e08d82ef1e6549d6517ae889b6ef903f9a207";

    #[test]
    fn values_are_those_of_the_node_package() {
        let key_pair = KeyPair::from_seed(&[1; 32]);
        let value = MutableValue::sign(3, Bytes::from_static(b"hello"), &key_pair);
        assert_eq!(hex::encode(value.encode()), VALUE);
        let put = value.encode_put(&key_pair.public_key());
        assert_eq!(hex::encode(&put), format!("{KEY}{VALUE}"));
        assert_eq!(MutableValue::decode_put(&put), Ok((key_pair.public_key(), value.clone())));
        assert_eq!(MutableValue::decode(&value.encode()), Ok(value));
    }

    #[test]
    fn another_number_or_key_breaks_the_signature() {
        let key_pair = KeyPair::from_seed(&[1; 32]);
        let value = MutableValue::sign(3, Bytes::from_static(b"hello"), &key_pair);
        assert!(value.is_of(&key_pair.public_key()));
        assert!(!value.is_of(&KeyPair::from_seed(&[2; 32]).public_key()));
        assert!(!MutableValue { seq: 4, ..value }.is_of(&key_pair.public_key()));
    }
}
