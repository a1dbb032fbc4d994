//! The tokens of a model and their texts.

use std::ffi::{CStr, c_char};
use std::marker::PhantomData;

use llama_cpp_sys_2 as sys;

use super::Model;

/// A token id in llama.cpp's type; never negative within a vocabulary.
pub(crate) type Token = i32;

/// The vocabulary of a loaded model. It never changes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Vocabulary<'model> {
    pointer: *const sys::llama_vocab,
    model: PhantomData<&'model Model>,
}

// SAFETY: the vocabulary is only read.
unsafe impl Send for Vocabulary<'_> {}
// SAFETY: as above.
unsafe impl Sync for Vocabulary<'_> {}

impl Vocabulary<'_> {
    /// # Safety
    /// The pointer must be the vocabulary of a model that outlives the result.
    pub(super) unsafe fn new(pointer: *const sys::llama_vocab) -> Self {
        Self { pointer, model: PhantomData }
    }

    /// Returns the number of tokens.
    pub(crate) fn len(self) -> u32 {
        // SAFETY: here and below, the pointer is valid as long as the model lives.
        unsafe { sys::llama_vocab_n_tokens(self.pointer) }.unsigned_abs()
    }

    pub(crate) fn tokens(self) -> std::ops::Range<Token> {
        0..self.len().cast_signed()
    }

    /// Returns the text of a token's vocabulary entry.
    pub(crate) fn text(self, token: Token) -> Option<String> {
        if !self.tokens().contains(&token) {
            return None;
        }
        // SAFETY: the token is within the vocabulary, and the string lives as long as the vocabulary does.
        let text = unsafe { sys::llama_vocab_get_text(self.pointer, token) };
        // SAFETY: it is null or a zero-terminated string.
        (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_str().map(str::to_owned).ok()).flatten()
    }

    /// Returns whether this is a special token or the unknown token.
    pub(crate) fn is_control(self, token: Token) -> bool {
        self.has_attribute(token, sys::LLAMA_TOKEN_ATTR_CONTROL | sys::LLAMA_TOKEN_ATTR_UNKNOWN)
    }

    /// Returns whether the model's authors added the token.
    pub(crate) fn is_user_defined(self, token: Token) -> bool {
        self.has_attribute(token, sys::LLAMA_TOKEN_ATTR_USER_DEFINED)
    }

    fn has_attribute(self, token: Token, attributes: sys::llama_token_attr) -> bool {
        // SAFETY: the token is within the vocabulary.
        self.tokens().contains(&token) && unsafe { sys::llama_vocab_get_attr(self.pointer, token) } & attributes != 0
    }

    /// Returns whether the token ends a generation (EOG).
    pub(crate) fn is_end(self, token: Token) -> bool {
        // SAFETY: the call looks the token up in a set.
        unsafe { sys::llama_vocab_is_eog(self.pointer, token) }
    }

    /// Returns the end-of-sequence token (EOS), if there is one.
    pub(crate) fn end_of_sequence(self) -> Option<Token> {
        // SAFETY: the call reads a field.
        Some(unsafe { sys::llama_vocab_eos(self.pointer) }).filter(|token| *token >= 0)
    }

    /// Returns the beginning-of-sequence token (BOS), if the tokenizer puts it before every text.
    pub(crate) fn begin(self) -> Option<Token> {
        // SAFETY: the call reads a field.
        Some(unsafe { sys::llama_vocab_bos(self.pointer) }).filter(|token| *token >= 0 && self.adds_begin())
    }

    /// Returns the fill-in-the-middle tokens for prefix, suffix and middle, if the model has them.
    pub(crate) fn fill_in(self) -> Option<[Token; 3]> {
        // SAFETY: the calls read fields.
        let tokens = unsafe {
            [
                sys::llama_vocab_fim_pre(self.pointer),
                sys::llama_vocab_fim_suf(self.pointer),
                sys::llama_vocab_fim_mid(self.pointer),
            ]
        };
        tokens.iter().all(|token| self.tokens().contains(token)).then_some(tokens)
    }

    /// Returns whether the tokenizer puts a BOS token before every text.
    pub(crate) fn adds_begin(self) -> bool {
        // SAFETY: the call reads a field.
        unsafe { sys::llama_vocab_get_add_bos(self.pointer) }
    }

    /// Returns whether the tokenizer puts an EOS token after every text.
    pub(crate) fn adds_end(self) -> bool {
        // SAFETY: the call reads a field.
        unsafe { sys::llama_vocab_get_add_eos(self.pointer) }
    }

    /// Returns the separator of two texts (SEP), if there is one.
    pub(crate) fn separator(self) -> Option<Token> {
        // SAFETY: the call reads a field.
        Some(unsafe { sys::llama_vocab_sep(self.pointer) }).filter(|token| *token >= 0)
    }

    /// Returns whether the tokenizer puts a separator between two texts.
    pub(crate) fn adds_separator(self) -> bool {
        // SAFETY: the call reads a field.
        unsafe { sys::llama_vocab_get_add_sep(self.pointer) }
    }

    /// Tokenises a text and appends the tokens. `whole` is llama.cpp's `add_special`: adds BOS and EOS if the model is
    /// configured so. `control` is its `parse_special`: parses the texts of special tokens as those tokens.
    pub(crate) fn tokenize(self, text: &[u8], whole: bool, control: bool, tokens: &mut Vec<Token>) {
        let length = i32::try_from(text.len()).expect("prompts are far below 2 GiB");
        // A guess: most tokens have several bytes. If it is too small, llama.cpp returns the required number, negated,
        // and the loop tries again.
        let mut room = text.len() / 2 + 8;
        loop {
            let begin = tokens.len();
            tokens.reserve(room);
            let spare = i32::try_from(tokens.capacity() - begin).unwrap_or(i32::MAX);
            // SAFETY: the text and the spare capacity are valid for the lengths that are passed.
            let count = unsafe {
                let end = tokens.as_mut_ptr().add(begin);
                sys::llama_tokenize(self.pointer, text.as_ptr().cast(), length, end, spare, whole, control)
            };
            if let Ok(count) = usize::try_from(count) {
                // SAFETY: `count` tokens were written after the existing ones.
                unsafe { tokens.set_len(begin + count) };
                return;
            }
            room = count.unsigned_abs() as usize;
        }
    }

    /// Returns the bytes that a token adds to a text. They are empty for special tokens, unless `control` (llama.cpp's
    /// `special`) is set.
    pub(crate) fn piece(self, token: Token, control: bool) -> Vec<u8> {
        if !self.tokens().contains(&token) {
            return Vec::new();
        }
        let mut bytes = vec![0_u8; 32];
        loop {
            let room = i32::try_from(bytes.len()).unwrap_or(i32::MAX);
            // SAFETY: the token is within the vocabulary, and the buffer has the length that is passed.
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
