//! Loaded models and their adapters.

use std::ffi::{c_char, c_void};
use std::fs::File;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use llama_cpp_sys_2 as sys;

use super::{Stream, Vocabulary, complaint, log, path_of, start};

#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ModelOptions {
    /// The number of layers to offload to GPUs.
    pub(crate) gpu_layers: u32,
    /// Loads only the vocabulary.
    pub(crate) vocabulary_only: bool,
    /// Reads the weights into memory instead of mapping the file.
    pub(crate) without_mmap: bool,
    /// Uses only ggml's own kernels.
    pub(crate) without_kernels: bool,
}

/// How far back the layers of a model attend, if some of them are limited.
///
/// llama.cpp discards keys and values outside the window as soon as it needs their cells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Window {
    All,
    /// The last positions, including the current one.
    Sliding(usize),
    /// The positions in the same chunk.
    Chunk(usize),
}

impl Window {
    /// Returns the first position that every layer needs to evaluate the token at `position`.
    pub(crate) fn first_seen(self, position: usize) -> usize {
        match self {
            Self::All => 0,
            Self::Sliding(width) => (position + 1).saturating_sub(width),
            Self::Chunk(width) => position / width * width,
        }
    }
}

#[derive(Debug)]
pub(crate) struct Model {
    pointer: NonNull<sys::llama_model>,
    without_kernels: bool,
}

// SAFETY: a loaded model is only read, except for its list of adapters, which `Adapter` guards.
unsafe impl Send for Model {}
// SAFETY: as above.
unsafe impl Sync for Model {}

impl Model {
    /// Loads a model from its open files, in order. `progress` receives the completed share and returns whether to
    /// continue.
    ///
    /// Returns llama.cpp's error if loading fails.
    pub(crate) fn load<F>(files: &[&File], options: ModelOptions, mut progress: F) -> Result<Self, String>
    where
        F: FnMut(f32) -> bool,
    {
        unsafe extern "C" fn report<F: FnMut(f32) -> bool>(share: f32, progress: *mut c_void) -> bool {
            // SAFETY: this is the closure that `load` lends for the length of the call.
            unsafe { (*progress.cast::<F>())(share) }
        }
        start();
        // A single file is passed open. The parts of a split model can only be named.
        let stream = match files {
            [file] => Some(Stream::over(file).map_err(|error| format!("the file cannot be read: {error}"))?),
            _ => None,
        };
        let paths: Vec<_> = files.iter().map(|file| path_of(file)).collect();
        let mut paths: Vec<*const c_char> = paths.iter().map(|path| path.as_ptr()).collect();
        let _ = log::take_errors();
        // SAFETY: stream, paths and closure live until the load returns, and llama.cpp does not keep them.
        let load = || unsafe {
            let mut parameters = sys::llama_model_default_params();
            parameters.n_gpu_layers = i32::try_from(options.gpu_layers).unwrap_or(i32::MAX);
            parameters.vocab_only = options.vocabulary_only;
            if options.without_mmap {
                parameters.load_mode = sys::LLAMA_LOAD_MODE_NONE;
            }
            parameters.progress_callback = Some(report::<F>);
            parameters.progress_callback_user_data = (&raw mut progress).cast();
            match &stream {
                Some(stream) => sys::llama_model_load_from_file_ptr(stream.as_ptr(), parameters),
                None => sys::llama_model_load_from_splits(paths.as_mut_ptr(), paths.len(), parameters),
            }
        };
        #[cfg(matrices)]
        let pointer = super::matrices::load_with(!options.without_kernels, load);
        #[cfg(not(matrices))]
        let pointer = load();
        let pointer = NonNull::new(pointer).ok_or_else(|| complaint("llama.cpp refuses it"))?;
        Ok(Self { pointer, without_kernels: options.without_kernels })
    }

    pub(crate) fn vocabulary(&self) -> Vocabulary<'_> {
        // SAFETY: the vocabulary is part of the model, which the result borrows.
        unsafe { Vocabulary::new(sys::llama_model_get_vocab(self.as_ptr())) }
    }

    /// Returns the length of an embedding vector.
    pub(crate) fn embedding_length(&self) -> u32 {
        // SAFETY: the pointer is valid, here and below.
        unsafe { sys::llama_model_n_embd_out(self.as_ptr()) }.unsigned_abs()
    }

    /// Returns the number of outputs of a reranker's classifier.
    pub(crate) fn classifier_outputs(&self) -> u32 {
        // SAFETY: the call reads a field.
        unsafe { sys::llama_model_n_cls_out(self.as_ptr()) }
    }

    /// Returns whether only ggml's own kernels are used.
    #[cfg(matrices)]
    pub(super) fn without_kernels(&self) -> bool {
        self.without_kernels
    }

    /// Returns whether a sequence can be cut back to an earlier position. Recurrent state cannot be.
    pub(crate) fn can_rewind(&self) -> bool {
        // SAFETY: it reads fields.
        unsafe { !sys::llama_model_is_recurrent(self.as_ptr()) && !sys::llama_model_is_hybrid(self.as_ptr()) }
    }

    /// Returns the attention window of its layers.
    pub(crate) fn window(&self) -> Window {
        // SAFETY: the calls read fields. The text buffer has the length that is passed, including the terminating
        // zero.
        let (width, architecture) = unsafe {
            let mut text = [0_u8; 32];
            let key = c"general.architecture".as_ptr();
            sys::llama_model_meta_val_str(self.as_ptr(), key, text.as_mut_ptr().cast(), text.len());
            (sys::llama_model_n_swa(self.as_ptr()), text)
        };
        match usize::try_from(width).unwrap_or(0) {
            0 => Window::All,
            // The only architecture with chunked attention, which llama.cpp does not report otherwise.
            width if architecture.starts_with(b"llama4\0") => Window::Chunk(width),
            width => Window::Sliding(width),
        }
    }

    /// Returns whether the model needs an encoder pass, which this runtime does not support.
    pub(crate) fn has_encoder(&self) -> bool {
        // SAFETY: the call reads a field.
        unsafe { sys::llama_model_has_encoder(self.as_ptr()) }
    }

    pub(super) fn as_ptr(&self) -> *mut sys::llama_model {
        self.pointer.as_ptr()
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        // SAFETY: contexts and adapters hold the model, so none is left.
        unsafe { sys::llama_model_free(self.as_ptr()) }
    }
}

/// A LoRA adapter of a loaded model.
#[derive(Debug)]
pub(crate) struct Adapter {
    pointer: NonNull<sys::llama_adapter_lora>,
    _model: Arc<Model>,
}

// SAFETY: an adapter is only read after it is loaded.
unsafe impl Send for Adapter {}
// SAFETY: as above.
unsafe impl Sync for Adapter {}

impl Adapter {
    /// Loads an adapter from its open file. Only the engine's thread may load and drop adapters, because the model
    /// keeps a list of them.
    pub(crate) fn load(model: &Arc<Model>, file: &File) -> Result<Self, String> {
        let stream = Stream::over(file).map_err(|error| format!("the file cannot be read: {error}"))?;
        let _ = log::take_errors();
        // SAFETY: the stream lives for the call, and llama.cpp does not keep it.
        let pointer = unsafe { sys::llama_adapter_lora_init_from_file_ptr(model.as_ptr(), stream.as_ptr()) };
        let pointer = NonNull::new(pointer).ok_or_else(|| complaint("llama.cpp refuses the adapter"))?;
        Ok(Self { pointer, _model: Arc::clone(model) })
    }

    pub(super) fn as_ptr(&self) -> *mut sys::llama_adapter_lora {
        self.pointer.as_ptr()
    }
}

impl Drop for Adapter {
    fn drop(&mut self) {
        // SAFETY: contexts that use the adapter hold it, so no context uses it any more.
        unsafe { sys::llama_adapter_lora_free(self.as_ptr()) }
    }
}

/// A null list of adapters.
pub(super) const NO_ADAPTERS: *mut *mut sys::llama_adapter_lora = ptr::null_mut();

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_slides_by_positions_and_a_chunk_by_its_length() {
        assert_eq!(Window::All.first_seen(1_000), 0);
        assert_eq!([3, 4, 5, 100].map(|position| Window::Sliding(4).first_seen(position)), [0, 1, 2, 97]);
        assert_eq!([3, 4, 7, 8].map(|position| Window::Chunk(4).first_seen(position)), [0, 4, 4, 8]);
    }
}
