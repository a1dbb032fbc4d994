//! libsodium's `crypto_secretstream_xchacha20poly1305`, byte for byte and without copies.
//!
//! A sealed message is an encrypted tag byte, the ciphertext and an authenticator of 16 bytes. Each authenticator goes
//! into the next nonce, so messages open only when none is missing and all are in order.

use chacha20::ChaCha20;
use chacha20::cipher::consts::U10;
use chacha20::cipher::{KeyIvInit, StreamCipher, StreamCipherSeek};
use chacha20::hchacha;
use poly1305::Poly1305;
use poly1305::universal_hash::{KeyInit, UniversalHash};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

/// The length of a stream's header, which the sender draws at random.
pub(crate) const HEADER_BYTES: usize = 24;
/// How much longer a sealed message is than its plaintext.
pub(crate) const OVERHEAD_BYTES: usize = 17;
const AUTHENTICATOR_BYTES: usize = 16;
/// The first block of keystream keys the authenticator, the second encrypts the tag, and the rest encrypts the text.
const BLOCK_BYTES: usize = 64;
/// One run of the SIMD cipher: enough for a text of 128 bytes, so that short messages take a single run.
const FIRST_RUN_BYTES: usize = 256;
/// The size of a piece that stays in the L1 cache between the cipher and the authenticator. A multiple of 16.
const PIECE_BYTES: usize = 4096;
/// The tag bit that requests a rekey.
const TAG_REKEY: u8 = 2;

/// The authenticator does not match: the bytes were modified or are out of order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Forged;

/// The cipher of one direction of a stream. It seals or opens one message after the other.
pub(crate) struct Cipher {
    key: Zeroizing<[u8; 32]>,
    counter: u32,
    inner_nonce: [u8; 8],
}

impl Cipher {
    /// Starts the stream with this key and header.
    pub(crate) fn new(key: &[u8; 32], header: &[u8; HEADER_BYTES]) -> Self {
        let (input, inner_nonce) = header.split_at(16);
        let subkey = hchacha::<U10>(key.into(), input.into());
        let mut first_bytes = [0; 8];
        first_bytes.copy_from_slice(inner_nonce);
        Self { key: Zeroizing::new(subkey.into()), counter: 1, inner_nonce: first_bytes }
    }

    /// Seals a message in place. It consists of a tag byte, the text, and 16 bytes for the authenticator.
    pub(crate) fn seal(&mut self, message: &mut [u8]) {
        debug_assert!(message.len() >= OVERHEAD_BYTES);
        let (hidden, authenticator) = message.split_at_mut(message.len() - AUTHENTICATOR_BYTES);
        let (tag, text) = hidden.split_at_mut(1);
        let mut run = self.start();
        let plain_tag = tag[0];
        run.tag_block[0] ^= plain_tag;
        tag[0] = run.tag_block[0];
        run.authenticate_tag();
        run.seal_text(text);
        let computed = run.authenticator(text);
        authenticator.copy_from_slice(&computed);
        self.advance(&computed, plain_tag);
    }

    /// Opens a sealed message in place. The text is everything but the first byte and the last 16. Returns the tag.
    pub(crate) fn open(&mut self, message: &mut [u8]) -> Result<u8, Forged> {
        if message.len() < OVERHEAD_BYTES {
            return Err(Forged);
        }
        let (hidden, authenticator) = message.split_at_mut(message.len() - AUTHENTICATOR_BYTES);
        let (tag, text) = hidden.split_at_mut(1);
        let mut run = self.start();
        let plain_tag = run.tag_block[0] ^ tag[0];
        run.tag_block[0] = tag[0];
        run.authenticate_tag();
        let tail = text.len() % 16;
        let mut sealed_tail = [0; 16];
        sealed_tail[..tail].copy_from_slice(&text[text.len() - tail..]);
        // The text is decrypted in the caller's buffer before it is authenticated. The caller drops the buffer on
        // failure.
        run.open_text(text);
        let computed = run.authenticator_with_tail(text.len(), &sealed_tail[..tail]);
        if !bool::from(computed.ct_eq(authenticator)) {
            return Err(Forged);
        }
        self.advance(&computed, plain_tag);
        Ok(plain_tag)
    }

    fn nonce(&self) -> [u8; 12] {
        let mut nonce = [0; 12];
        nonce[..4].copy_from_slice(&self.counter.to_le_bytes());
        nonce[4..].copy_from_slice(&self.inner_nonce);
        nonce
    }

    fn start(&self) -> Run {
        let mut cipher = ChaCha20::new((&*self.key).into(), (&self.nonce()).into());
        let mut first_run = [0; FIRST_RUN_BYTES];
        cipher.apply_keystream(&mut first_run);
        let mut tag_block = [0; BLOCK_BYTES];
        tag_block.copy_from_slice(&first_run[BLOCK_BYTES..2 * BLOCK_BYTES]);
        let poly = Poly1305::new(first_run[..32].into());
        Run { cipher, first_run, tag_block, poly }
    }

    fn advance(&mut self, authenticator: &[u8; AUTHENTICATOR_BYTES], tag: u8) {
        for (byte, mixed_in) in self.inner_nonce.iter_mut().zip(authenticator) {
            *byte ^= mixed_in;
        }
        self.counter = self.counter.wrapping_add(1);
        if tag & TAG_REKEY != 0 || self.counter == 0 {
            self.rekey();
        }
    }

    fn rekey(&mut self) {
        let mut cipher = ChaCha20::new((&*self.key).into(), (&self.nonce()).into());
        let mut fresh = Zeroizing::new([0; 40]);
        fresh[..32].copy_from_slice(&*self.key);
        fresh[32..].copy_from_slice(&self.inner_nonce);
        cipher.apply_keystream(&mut *fresh);
        self.key.copy_from_slice(&fresh[..32]);
        self.inner_nonce.copy_from_slice(&fresh[32..]);
        self.counter = 1;
    }
}

/// The keystream and the authenticator of one message.
struct Run {
    cipher: ChaCha20,
    first_run: [u8; FIRST_RUN_BYTES],
    tag_block: [u8; BLOCK_BYTES],
    poly: Poly1305,
}

impl Run {
    fn authenticate_tag(&mut self) {
        self.poly.update_padded(&self.tag_block);
    }

    /// Encrypts the text and authenticates its whole blocks of 16 bytes. [`Run::authenticator`] handles the rest.
    fn seal_text(&mut self, text: &mut [u8]) {
        let mut offset = 0;
        for piece in pieces(text) {
            self.apply(offset, piece);
            self.poly.update_padded(&piece[..piece.len() / 16 * 16]);
            offset += piece.len();
        }
    }

    /// The inverse of [`Run::seal_text`].
    fn open_text(&mut self, text: &mut [u8]) {
        let mut offset = 0;
        for piece in pieces(text) {
            self.poly.update_padded(&piece[..piece.len() / 16 * 16]);
            self.apply(offset, piece);
            offset += piece.len();
        }
    }

    fn apply(&mut self, offset: usize, piece: &mut [u8]) {
        const READY_BYTES: usize = FIRST_RUN_BYTES - 2 * BLOCK_BYTES;
        if offset > 0 {
            self.cipher.apply_keystream(piece);
            return;
        }
        let (ready, beyond) = piece.split_at_mut(piece.len().min(READY_BYTES));
        for (byte, key) in ready.iter_mut().zip(&self.first_run[2 * BLOCK_BYTES..]) {
            *byte ^= key;
        }
        if !beyond.is_empty() {
            debug_assert_eq!(self.cipher.current_pos::<usize>(), FIRST_RUN_BYTES);
            self.cipher.apply_keystream(beyond);
        }
    }

    fn authenticator(self, sealed_text: &[u8]) -> [u8; AUTHENTICATOR_BYTES] {
        let tail = &sealed_text[sealed_text.len() / 16 * 16..];
        self.authenticator_with_tail(sealed_text.len(), tail)
    }

    fn authenticator_with_tail(mut self, text_bytes: usize, tail: &[u8]) -> [u8; AUTHENTICATOR_BYTES] {
        // libsodium pads the text with as many zeros as there are bytes beyond the last whole block, not with as many
        // as are missing.
        let mut last = [0; 48];
        last[..tail.len()].copy_from_slice(tail);
        let padded = tail.len() * 2;
        // The first length is that of the additional data, which is empty.
        last[padded + 8..padded + 16].copy_from_slice(&((BLOCK_BYTES + text_bytes) as u64).to_le_bytes());
        let length = padded + 16;
        let whole = length / 16 * 16;
        if whole == length {
            self.poly.update_padded(&last[..whole]);
            return self.poly.finalize().into();
        }
        self.poly.compute_unpadded(&last[..length]).into()
    }
}

fn pieces(text: &mut [u8]) -> impl Iterator<Item = &mut [u8]> {
    text.chunks_mut(PIECE_BYTES)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;
    use crate::crypto::hash;

    // Made with sodium-native: streams of messages with the text `(index * 7 + number) & 255`.
    const GOLDEN: &str = include_str!("golden.json");

    fn text(length: usize, number: usize) -> Vec<u8> {
        (0..length).map(|index| (index * 7 + number) as u8).collect()
    }

    fn sealed(cipher: &mut Cipher, tag: u8, text: &[u8]) -> Vec<u8> {
        let mut message = vec![tag];
        message.extend_from_slice(text);
        message.extend_from_slice(&[0; AUTHENTICATOR_BYTES]);
        cipher.seal(&mut message);
        message
    }

    #[test]
    fn streams_are_those_of_libsodium() {
        let golden: Value = serde_json::from_str(GOLDEN).unwrap();
        for session in golden["sessions"].as_array().unwrap() {
            let bytes = |name: &str| hex::decode(session[name].as_str().unwrap()).unwrap();
            let key: [u8; 32] = bytes("key").try_into().unwrap();
            let header: [u8; HEADER_BYTES] = bytes("header").try_into().unwrap();
            let (mut sealer, mut opener) = (Cipher::new(&key, &header), Cipher::new(&key, &header));
            sealer.counter = session["counter"].as_u64().unwrap() as u32;
            opener.counter = sealer.counter;
            for (number, message) in session["messages"].as_array().unwrap().iter().enumerate() {
                let length = message["length"].as_u64().unwrap() as usize;
                let tag = message["tag"].as_u64().unwrap() as u8;
                let mut bytes = sealed(&mut sealer, tag, &text(length, number));
                match message["sealed"].as_str() {
                    Some(expected) => assert_eq!(hex::encode(&bytes), expected, "{length} bytes"),
                    None => {
                        assert_eq!(hex::encode(hash(&[&bytes])), message["sealed_hash"].as_str().unwrap(), "{length}");
                    }
                }
                assert_eq!(opener.open(&mut bytes), Ok(tag));
                assert_eq!(bytes[1..=length], text(length, number));
            }
        }
    }

    proptest! {
        #[test]
        fn a_flipped_bit_is_refused(text in proptest::collection::vec(any::<u8>(), 0..600), bit: prop::sample::Index) {
            let (key, header) = ([7; 32], [9; HEADER_BYTES]);
            let mut message = sealed(&mut Cipher::new(&key, &header), 0, &text);
            let bit = bit.index(message.len() * 8);
            message[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(Cipher::new(&key, &header).open(&mut message), Err(Forged));
        }

        #[test]
        fn foreign_bytes_are_refused(mut message: Vec<u8>) {
            prop_assert_eq!(Cipher::new(&[7; 32], &[9; HEADER_BYTES]).open(&mut message), Err(Forged));
        }
    }

    #[test]
    fn messages_open_in_order_and_once() {
        let (key, header) = ([7; 32], [9; HEADER_BYTES]);
        let mut sealer = Cipher::new(&key, &header);
        let (first, second) = (sealed(&mut sealer, 0, b"first"), sealed(&mut sealer, 0, b"second"));
        assert_eq!(Cipher::new(&key, &header).open(&mut second.clone()), Err(Forged));
        let mut opener = Cipher::new(&key, &header);
        assert_eq!(opener.open(&mut first.clone()), Ok(0));
        assert_eq!(opener.open(&mut first.clone()), Err(Forged));
    }
}
