//! A llama.cpp context: the KV cache in which sequences of one model are evaluated.

use std::ffi::c_void;
use std::ptr::{self, NonNull};
use std::slice;
use std::sync::Arc;

use llama_cpp_sys_2 as sys;

use super::model::NO_ADAPTERS;
use super::{Adapter, Batch, Model, complaint, log};

/// The purpose and size of a context.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ContextOptions {
    /// The number of KV cache cells, shared by all sequences.
    pub(crate) cells: u32,
    /// The maximum number of tokens in a batch.
    pub(crate) batch_tokens: u32,
    /// The number of sequences, numbered from 0; at most 256.
    pub(crate) sequences: u32,
    /// The maximum number of output rows in a batch.
    pub(crate) outputs: u32,
    pub(crate) threads: i32,
    /// If set, the context computes embeddings instead of generating text.
    pub(crate) pooling: Option<Pooling>,
}

/// How token vectors are combined into the vector of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pooling {
    /// As the model's file specifies.
    OfModel,
    /// No pooling: each token keeps its own vector.
    Tokens,
    Mean,
    /// The vector of the first token.
    First,
    /// The vector of the last token.
    Last,
    /// The model's classifier makes a score of each text.
    Rank,
}

/// Why a batch was not evaluated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DecodeError {
    /// There are not enough free cells. The context is unchanged.
    #[error("the KV cache is full")]
    CacheFull,
    /// The caller asked to stop. The context is unchanged, provided the batch was no larger than `batch_tokens`.
    #[error("the evaluation was stopped")]
    Aborted,
    /// The batch or the model is faulty. The state of the KV cache is undefined.
    #[error("llama.cpp could not evaluate a batch: {0}")]
    Failed(String),
}

#[derive(Debug)]
pub(crate) struct Context {
    pointer: NonNull<sys::llama_context>,
    model: Arc<Model>,
    adapter: Option<Arc<Adapter>>,
    #[cfg(matrices)]
    watch: super::matrices::Watch,
}

// SAFETY: a context is used by one thread at a time, which `&mut self` and the lack of `Sync` guarantee.
unsafe impl Send for Context {}

impl Context {
    /// Creates an empty context, or returns llama.cpp's error.
    pub(crate) fn new(model: &Arc<Model>, options: ContextOptions) -> Result<Self, String> {
        let _ = log::take_errors();
        // SAFETY: the model is valid, and the parameters hold none of our pointers.
        let pointer = unsafe {
            let mut parameters = sys::llama_context_default_params();
            parameters.n_ctx = options.cells;
            parameters.n_batch = options.batch_tokens;
            parameters.n_ubatch = options.batch_tokens;
            parameters.n_seq_max = options.sequences;
            // llama.cpp keeps a row for each sequence anyway.
            parameters.n_outputs_max = options.outputs.max(options.sequences);
            parameters.n_threads = options.threads;
            parameters.n_threads_batch = options.threads;
            // One KV cache for all sequences: otherwise, copying a part of a sequence fails an assertion.
            parameters.kv_unified = true;
            // Sliding-window layers keep cells for all positions, so that a sequence can usually be truncated and
            // shared.
            parameters.swa_full = true;
            parameters.no_perf = true;
            if let Some(pooling) = options.pooling {
                parameters.embeddings = true;
                parameters.pooling_type = match pooling {
                    Pooling::OfModel => sys::LLAMA_POOLING_TYPE_UNSPECIFIED,
                    Pooling::Tokens => sys::LLAMA_POOLING_TYPE_NONE,
                    Pooling::Mean => sys::LLAMA_POOLING_TYPE_MEAN,
                    Pooling::First => sys::LLAMA_POOLING_TYPE_CLS,
                    Pooling::Last => sys::LLAMA_POOLING_TYPE_LAST,
                    Pooling::Rank => sys::LLAMA_POOLING_TYPE_RANK,
                };
            }
            sys::llama_init_from_model(model.as_ptr(), parameters)
        };
        let pointer = NonNull::new(pointer).ok_or_else(|| complaint("llama.cpp could not make a context"))?;
        Ok(Self {
            pointer,
            model: Arc::clone(model),
            adapter: None,
            // SAFETY: the context is valid, and is freed together with its watch.
            #[cfg(matrices)]
            watch: unsafe { super::matrices::Watch::new(pointer.as_ptr(), !model.without_kernels()) },
        })
    }

    pub(crate) fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Evaluates a batch until it is done or `stop` returns true. `stop` is called very often, on this thread.
    pub(crate) fn decode(&mut self, batch: &mut Batch, stop: &mut dyn FnMut() -> bool) -> Result<(), DecodeError> {
        unsafe extern "C" fn ask(stop: *mut c_void) -> bool {
            // SAFETY: this is the closure that `decode` lends until it returns.
            unsafe { (*stop.cast::<&mut dyn FnMut() -> bool>())() }
        }
        let mut stop = stop;
        let _ = log::take_errors();
        let context = self.as_ptr();
        // SAFETY: the closure outlives the callback, which is removed again; the batch lives for the call.
        let decode = || unsafe {
            sys::llama_set_abort_callback(context, Some(ask), (&raw mut stop).cast());
            let outcome = sys::llama_decode(context, batch.as_raw());
            // Devices may work on after the call and read data that the next call may change.
            sys::llama_synchronize(context);
            sys::llama_set_abort_callback(context, None, ptr::null_mut());
            outcome
        };
        #[cfg(matrices)]
        let outcome = self.watch.during(decode);
        #[cfg(not(matrices))]
        let outcome = decode();
        match outcome {
            0 => Ok(()),
            1 => Err(DecodeError::CacheFull),
            2 => Err(DecodeError::Aborted),
            code => Err(DecodeError::Failed(complaint(&format!("code {code}")))),
        }
    }

    /// Returns the logits of an output row of the last batch.
    pub(crate) fn logits(&self, row: usize) -> Option<&[f32]> {
        // SAFETY: llama.cpp checks the row. The result is as long as the vocabulary and valid until the next call.
        unsafe {
            let logits = sys::llama_get_logits_ith(self.as_ptr(), row as i32);
            (!logits.is_null()).then(|| slice::from_raw_parts(logits, self.model.vocabulary().len() as usize))
        }
    }

    /// Returns how token vectors are pooled into the vector of a text; `None` if they are not.
    pub(crate) fn pooling(&self) -> Option<Pooling> {
        // SAFETY: the call reads a field.
        match unsafe { sys::llama_pooling_type(self.as_ptr()) } {
            sys::LLAMA_POOLING_TYPE_MEAN => Some(Pooling::Mean),
            sys::LLAMA_POOLING_TYPE_CLS => Some(Pooling::First),
            sys::LLAMA_POOLING_TYPE_LAST => Some(Pooling::Last),
            sys::LLAMA_POOLING_TYPE_RANK => Some(Pooling::Rank),
            _ => None,
        }
    }

    /// Returns whether attention is causal.
    pub(crate) fn is_causal(&self) -> bool {
        // SAFETY: the call reads a field.
        unsafe { sys::llama_get_causal_attn(self.as_ptr()) }
    }

    /// Returns the vector of an output row of the last batch, in a context that keeps token vectors.
    pub(crate) fn token_vector(&self, row: usize) -> Option<&[f32]> {
        // SAFETY: llama.cpp checks the row. The length is the model's, and the vector is valid until the next call.
        unsafe {
            let vector = sys::llama_get_embeddings_ith(self.as_ptr(), row as i32);
            (!vector.is_null()).then(|| slice::from_raw_parts(vector, self.model.embedding_length() as usize))
        }
    }

    /// Returns the pooled vector of a sequence in the last batch, or the outputs of the classifier.
    pub(crate) fn pooled(&self, sequence: i32) -> Option<&[f32]> {
        let length = match self.pooling() {
            Some(Pooling::Rank) => self.model.classifier_outputs(),
            _ => self.model.embedding_length(),
        };
        // SAFETY: as above; llama.cpp keeps as many numbers for each sequence.
        unsafe {
            let vector = sys::llama_get_embeddings_seq(self.as_ptr(), sequence);
            (!vector.is_null()).then(|| slice::from_raw_parts(vector, length as usize))
        }
    }

    /// Sets the adapter for the following evaluations; `None` means the model alone.
    pub(crate) fn set_adapter(&mut self, adapter: Option<&Arc<Adapter>>) {
        let same = match (&self.adapter, adapter) {
            (None, None) => true,
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            _ => false,
        };
        if same {
            return;
        }
        // SAFETY: the adapter belongs to the model and is held below; llama.cpp copies the lists.
        unsafe {
            match adapter {
                Some(adapter) => {
                    let (mut pointer, mut scale) = (adapter.as_ptr(), 1.0_f32);
                    sys::llama_set_adapters_lora(self.as_ptr(), &raw mut pointer, 1, &raw mut scale);
                }
                None => {
                    sys::llama_set_adapters_lora(self.as_ptr(), NO_ADAPTERS, 0, ptr::null_mut());
                }
            }
        }
        self.adapter = adapter.cloned();
    }

    /// Removes a sequence from a position on. Returns false if it cannot be removed in part.
    pub(crate) fn remove(&mut self, sequence: i32, from: usize) -> bool {
        // SAFETY: the engine keeps sequences within bounds.
        unsafe { sys::llama_memory_seq_rm(self.memory(), sequence, from as i32, -1) }
    }

    /// Returns the first position of a sequence that every layer still holds; `None` if the sequence is empty.
    pub(crate) fn first_position(&self, sequence: i32) -> Option<usize> {
        // SAFETY: as above.
        usize::try_from(unsafe { sys::llama_memory_seq_pos_min(self.memory(), sequence) }).ok()
    }

    /// Makes the sequence `to` begin with the cells of `from`, up to a position. The cells are shared, not copied.
    pub(crate) fn share(&mut self, from: i32, to: i32, end: usize) {
        // SAFETY: as above; the cache is unified, so a part may be copied.
        unsafe { sys::llama_memory_seq_cp(self.memory(), from, to, 0, end as i32) }
    }

    pub(crate) fn clear(&mut self) {
        // SAFETY: the memory belongs to the context.
        unsafe { sys::llama_memory_clear(self.memory(), false) }
    }

    /// Copies a sequence's keys and values to host memory; `None` if that fails.
    pub(crate) fn save(&mut self, sequence: i32) -> Option<Vec<u8>> {
        // SAFETY: the buffer has the length that is passed.
        unsafe {
            let mut bytes = vec![0; sys::llama_state_seq_get_size(self.as_ptr(), sequence)];
            let written = sys::llama_state_seq_get_data(self.as_ptr(), bytes.as_mut_ptr(), bytes.len(), sequence);
            (written > 0 && written == bytes.len()).then_some(bytes)
        }
    }

    /// Restores what [`Context::save`] copied in a context of the same model. Returns whether there were enough
    /// cells.
    pub(crate) fn restore(&mut self, sequence: i32, bytes: &[u8]) -> bool {
        // SAFETY: the bytes come from `save`, in this process.
        unsafe { sys::llama_state_seq_set_data(self.as_ptr(), bytes.as_ptr(), bytes.len(), sequence) != 0 }
    }

    fn memory(&self) -> sys::llama_memory_t {
        // SAFETY: the context is valid.
        unsafe { sys::llama_get_memory(self.as_ptr()) }
    }

    fn as_ptr(&self) -> *mut sys::llama_context {
        self.pointer.as_ptr()
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: only this handle owns the context, and its model and adapter are dropped after it.
        unsafe { sys::llama_free(self.as_ptr()) }
    }
}
