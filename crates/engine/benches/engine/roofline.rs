//! How fast this machine could at most be.

use std::hint::black_box;
use std::thread;
use std::time::Instant;

use tether_engine::gguf::Header;

const BUFFER_BYTES: usize = 256 << 20;
const TRIES: usize = 8;

/// What one token costs at least.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Roofline {
    /// Bytes of weights that are read for each token of one stream.
    pub(crate) bytes_per_token: u64,
    /// Multiplications and additions for each token of a prompt, attention apart.
    pub(crate) operations_per_prompt_token: u64,
}

impl Roofline {
    pub(crate) fn of(header: &Header) -> Self {
        let matrices = || header.tensors.iter().filter(|tensor| tensor.dimensions.len() > 1);
        let is_embedding = |name: &str| name == "token_embd.weight";
        // One row of the embedding is read for a token, next to nothing, unless it is the output matrix as well.
        let tied = !matrices().any(|tensor| tensor.name == "output.weight");
        let read = matrices().filter(|tensor| tied || !is_embedding(&tensor.name));
        // The output matrix is needed for the last token of a prompt only.
        let layers = matrices().filter(|tensor| tensor.name.starts_with("blk."));
        Self {
            bytes_per_token: read.map(|tensor| tensor.bytes).sum(),
            operations_per_prompt_token: layers.map(|tensor| 2 * tensor.dimensions.iter().product::<u64>()).sum(),
        }
    }
}

/// Returns the bytes a second that one thread and two read from memory, the best of several tries.
pub(crate) fn bandwidth() -> [f64; 2] {
    [1, 2].map(|threads| {
        let buffers: Vec<Vec<u64>> = (0..threads).map(|_| vec![1; BUFFER_BYTES / size_of::<u64>()]).collect();
        let tries = (0..TRIES).map(|_| {
            let began = Instant::now();
            thread::scope(|scope| {
                for buffer in &buffers {
                    scope.spawn(|| black_box(buffer.iter().fold(0_u64, |sum, word| sum.wrapping_add(*word))));
                }
            });
            (threads * BUFFER_BYTES) as f64 / began.elapsed().as_secs_f64()
        });
        tries.fold(0.0, f64::max)
    })
}
