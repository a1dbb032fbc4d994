//! The tokens of a model and their texts.

use std::ffi::{CStr, c_char};
use std::marker::PhantomData;

use llama_cpp_sys_2 as sys;

use super::Model;

/// A token as llama.cpp counts it; never negative within a vocabulary.
pub(crate) type Token = i32;

/// The vocabulary of a loaded model. It never changes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Vocabulary<'model> {
    pointer: *const sys::llama_vocab,
    model: PhantomData<&'model Model>,
}

// SAFETY: it is only read.
unsafe impl Send for Vocabulary<'_> {}
// SAFETY: as above.
unsafe impl Sync for Vocabulary<'_> {}

impl Vocabulary<'_> {
    /// # Safety
    /// The pointer must be the vocabulary of a model that outlives the result.
    pub(super) unsafe fn new(pointer: *const sys::llama_vocab) -> Self {
        Self { pointer, model: PhantomData }
    }

    /// Returns how many tokens there are.
    pub(crate) fn len(self) -> u32 {
        // SAFETY: the pointer is valid, here and below, as long as the model lives.
        unsafe { sys::llama_vocab_n_tokens(self.pointer) }.unsigned_abs()
    }

    /// Returns all tokens.
    pub(crate) fn tokens(self) -> std::ops::Range<Token> {
        0..self.len().cast_signed()
    }

    /// Returns the text under which the vocabulary lists a token.
    pub(crate) fn text(self, token: Token) -> Option<String> {
        if !self.tokens().contains(&token) {
            return None;
        }
        // SAFETY: the token is within the vocabulary; the string lives as long as it does.
        let text = unsafe { sys::llama_vocab_get_text(self.pointer, token) };
        // SAFETY: it is null or a string that ends with a zero.
        (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_str().map(str::to_owned).ok()).flatten()
    }

    /// Returns whether this is a special token.
    pub(crate) fn is_control(self, token: Token) -> bool {
        self.has_attribute(token, sys::LLAMA_TOKEN_ATTR_CONTROL | sys::LLAMA_TOKEN_ATTR_UNKNOWN)
    }

    /// Returns whether the token was added by the makers of the model.
    pub(crate) fn is_user_defined(self, token: Token) -> bool {
        self.has_attribute(token, sys::LLAMA_TOKEN_ATTR_USER_DEFINED)
    }

    fn has_attribute(self, token: Token, attributes: sys::llama_token_attr) -> bool {
        // SAFETY: the token is within the vocabulary.
        self.tokens().contains(&token) && unsafe { sys::llama_vocab_get_attr(self.pointer, token) } & attributes != 0
    }

    /// Returns whether the token ends an answer.
    pub(crate) fn is_end(self, token: Token) -> bool {
        // SAFETY: it looks the token up in a set.
        unsafe { sys::llama_vocab_is_eog(self.pointer, token) }
    }

    /// Returns the token that ends a sequence, where there is one.
    pub(crate) fn end_of_sequence(self) -> Option<Token> {
        // SAFETY: it reads a field.
        Some(unsafe { sys::llama_vocab_eos(self.pointer) }).filter(|token| *token >= 0)
    }

    /// Returns the token that begins a text, where the tokenizer puts one before every text.
    pub(crate) fn begin(self) -> Option<Token> {
        // SAFETY: it reads a field.
        Some(unsafe { sys::llama_vocab_bos(self.pointer) }).filter(|token| *token >= 0 && self.adds_begin())
    }

    /// Returns the tokens before a beginning, before an end and before what is to be filled in between them, where the
    /// model knows such.
    pub(crate) fn fill_in(self) -> Option<[Token; 3]> {
        // SAFETY: they read fields.
        let tokens = unsafe {
            [
                sys::llama_vocab_fim_pre(self.pointer),
                sys::llama_vocab_fim_suf(self.pointer),
                sys::llama_vocab_fim_mid(self.pointer),
            ]
        };
        tokens.iter().all(|token| self.tokens().contains(token)).then_some(tokens)
    }

    /// Returns whether the tokenizer puts a token before every text.
    pub(crate) fn adds_begin(self) -> bool {
        // SAFETY: it reads a field.
        unsafe { sys::llama_vocab_get_add_bos(self.pointer) }
    }

    /// Returns whether the tokenizer puts a token after every text.
    pub(crate) fn adds_end(self) -> bool {
        // SAFETY: it reads a field.
        unsafe { sys::llama_vocab_get_add_eos(self.pointer) }
    }

    /// Cuts a text in tokens, appending them. `whole` adds what the tokenizer puts around a text; `control` reads the
    /// texts of special tokens as those tokens.
    pub(crate) fn tokenize(self, text: &[u8], whole: bool, control: bool, tokens: &mut Vec<Token>) {
        let length = i32::try_from(text.len()).expect("prompts are far below 2 GiB");
        // A token is a byte at least, and at most two are added.
        let mut room = text.len() / 2 + 8;
        loop {
            let begin = tokens.len();
            tokens.reserve(room);
            let spare = i32::try_from(tokens.capacity() - begin).unwrap_or(i32::MAX);
            // SAFETY: text and spare room are valid for the lengths that are told.
            let count = unsafe {
                let end = tokens.as_mut_ptr().add(begin);
                sys::llama_tokenize(self.pointer, text.as_ptr().cast(), length, end, spare, whole, control)
            };
            if let Ok(count) = usize::try_from(count) {
                // SAFETY: so many were written behind those that were there.
                unsafe { tokens.set_len(begin + count) };
                return;
            }
            room = count.unsigned_abs() as usize;
        }
    }

    /// Returns the bytes that a token adds to a text; none for special tokens, unless their texts are wanted.
    pub(crate) fn piece(self, token: Token, control: bool) -> Vec<u8> {
        if !self.tokens().contains(&token) {
            return Vec::new();
        }
        let mut bytes = vec![0_u8; 32];
        loop {
            let room = i32::try_from(bytes.len()).unwrap_or(i32::MAX);
            // SAFETY: the token is within the vocabulary, and the buffer is as long as is told.
            let count = unsafe {
                sys::llama_token_to_piece(self.pointer, token, bytes.as_mut_ptr().cast::<c_char>(), room, 0, control)
            };
            let length = count.unsigned_abs() as usize;
            if count >= 0 {
                bytes.truncate(length);
                return bytes;
            }
            bytes.resize(length, 0);
        }
    }
}
