//! Authenticated encryption with a shared key: XSalsa20-Poly1305, libsodium's `crypto_secretbox`.

use crypto_secretbox::aead::AeadInPlace;
use crypto_secretbox::{KeyInit, Nonce, Tag, XSalsa20Poly1305};

use super::random;

const NONCE_LENGTH: usize = 24;
const TAG_LENGTH: usize = 16;

/// Encrypts a text. Returns a random nonce, the tag and the ciphertext, in this order.
pub fn seal(key: &[u8; 32], text: &[u8]) -> Vec<u8> {
    seal_with_nonce(key, text, random())
}

/// Decrypts the output of [`seal`]; `None` if it was made with another key, or modified.
pub fn open(key: &[u8; 32], sealed: &[u8]) -> Option<Vec<u8>> {
    let (nonce, rest) = sealed.split_first_chunk::<NONCE_LENGTH>()?;
    let (tag, text) = rest.split_first_chunk::<TAG_LENGTH>()?;
    let mut text = text.to_vec();
    XSalsa20Poly1305::new(key.into())
        .decrypt_in_place_detached(Nonce::from_slice(nonce), &[], &mut text, Tag::from_slice(tag))
        .ok()?;
    Some(text)
}

fn seal_with_nonce(key: &[u8; 32], text: &[u8], nonce: [u8; NONCE_LENGTH]) -> Vec<u8> {
    let mut sealed = Vec::with_capacity(NONCE_LENGTH + TAG_LENGTH + text.len());
    sealed.extend_from_slice(&nonce);
    sealed.extend_from_slice(&[0; TAG_LENGTH]);
    sealed.extend_from_slice(text);
    let (head, text) = sealed.split_at_mut(NONCE_LENGTH + TAG_LENGTH);
    let tag = XSalsa20Poly1305::new(key.into())
        .encrypt_in_place_detached(Nonce::from_slice(&nonce), &[], text)
        .expect("a text in memory is below the cipher's limit");
    head[NONCE_LENGTH..].copy_from_slice(&tag);
    sealed
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Made with `sodium.crypto_secretbox_easy`.
    const SEALED: &str =
        "090909090909090909090909090909090909090909090909c8da04e0e5a717b1c0ed766b67f7dd56e42f7f9a50714583761876";

    #[test]
    fn a_box_is_that_of_libsodium() {
        let sealed = seal_with_nonce(&[7; 32], b"hello world", [9; NONCE_LENGTH]);
        assert_eq!(hex::encode(&sealed), SEALED);
        assert_eq!(open(&[7; 32], &sealed).as_deref(), Some(b"hello world".as_slice()));
    }

    #[test]
    fn an_altered_box_stays_shut() {
        let sealed = seal(&[7; 32], b"hello");
        assert_eq!(open(&[8; 32], &sealed), None);
        for index in 0..sealed.len() {
            let mut altered = sealed.clone();
            altered[index] ^= 1;
            assert_eq!(open(&[7; 32], &altered), None);
            assert_eq!(open(&[7; 32], &sealed[..index]), None);
        }
    }
}
