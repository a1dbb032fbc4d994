//! A batch: the tokens that one step evaluates together.

use llama_cpp_sys_2 as sys;

use super::Token;

/// The tokens of a batch, each with its position, its sequence, and whether its output is wanted.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    tokens: Vec<sys::llama_token>,
    positions: Vec<sys::llama_pos>,
    sequences: Vec<sys::llama_seq_id>,
    outputs: Vec<i8>,
    sequence_counts: Vec<i32>,
    sequence_pointers: Vec<*mut sys::llama_seq_id>,
}

// SAFETY: the pointers point into the batch's own buffers and are rebuilt before each use.
unsafe impl Send for Batch {}

impl Batch {
    pub(crate) fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.sequences.clear();
        self.outputs.clear();
    }

    /// Returns the number of tokens.
    pub(crate) fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Appends a token and returns its row.
    pub(crate) fn push(&mut self, token: Token, position: usize, sequence: i32, output: bool) -> usize {
        self.tokens.push(token);
        self.positions.push(i32::try_from(position).expect("contexts are far below 2^31 tokens"));
        self.sequences.push(sequence);
        self.outputs.push(i8::from(output));
        self.tokens.len() - 1
    }

    /// Returns the batch in llama.cpp's form; valid until the batch changes.
    pub(super) fn as_raw(&mut self) -> sys::llama_batch {
        self.sequence_counts.resize(self.tokens.len(), 1);
        self.sequence_pointers.clear();
        self.sequence_pointers.extend(self.sequences.iter_mut().map(std::ptr::from_mut));
        sys::llama_batch {
            n_tokens: self.tokens.len() as i32,
            token: self.tokens.as_mut_ptr(),
            embd: std::ptr::null_mut(),
            pos: self.positions.as_mut_ptr(),
            n_seq_id: self.sequence_counts.as_mut_ptr(),
            seq_id: self.sequence_pointers.as_mut_ptr(),
            logits: self.outputs.as_mut_ptr(),
        }
    }
}
