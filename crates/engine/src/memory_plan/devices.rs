//! Splits a model's memory between the host and the GPU when some of its layers are offloaded.

use super::{BATCH_TOKENS, Dimensions, is_packed, is_repacked, layers, plan};
use crate::gguf::{Header, Tensor};
use crate::model_runtime::{Kernels, LoadOptions};

/// GPU memory that each model leaves to the driver and to fragmentation.
pub const VRAM_SPARED_BYTES: u64 = 512 << 20;
/// The part of the embeddings that a batch pages in again: Linux maps 64 KiB around each access.
const LOOKED_UP_BYTES: u64 = (BATCH_TOKENS as u64) << 16;
const INPUT: &str = "token_embd.weight";
const OUTPUT: &str = "output.weight";

/// The part of a model that the host or the GPUs hold.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Share {
    pub(super) weights_bytes: u64,
    pub(super) repacked_bytes: u64,
    /// Bytes of the keys and values of one token.
    pub(super) cell_bytes: u64,
}

/// Returns the largest number of layers that fits the free memory of a GPU, counting the output as one; 0 if none
/// fits.
pub fn layers_that_fit(header: &Header, options: &LoadOptions, vram_free_bytes: u64) -> u32 {
    let fits = |layers: &u32| {
        let options = LoadOptions { gpu_layers: Some(*layers), ..options.clone() };
        plan(header, &options).is_ok_and(|plan| plan.vram_bytes.saturating_add(VRAM_SPARED_BYTES) <= vram_free_bytes)
    };
    (1..=layers(header)).rev().find(fits).unwrap_or(0)
}

/// Returns the parts of the host and of the GPUs. llama.cpp offloads the output first and then the layers from the
/// last one; the token embeddings stay on the host.
pub(super) fn split(header: &Header, model: &Dimensions, on_gpu: u32, kernels: Kernels) -> (Share, Share) {
    let layers = model.cell_bytes.len();
    let first_on_gpu = (layers + 1).saturating_sub(on_gpu as usize);
    let (mut host, mut device) = (Share::default(), Share::default());
    for (layer, bytes) in model.cell_bytes.iter().enumerate() {
        let share = if layer < first_on_gpu { &mut host } else { &mut device };
        share.cell_bytes = share.cell_bytes.saturating_add(*bytes);
    }
    // A model without an output matrix computes its logits with the token embeddings.
    let is_tied = !header.tensors.iter().any(|tensor| tensor.name == OUTPUT);
    for tensor in &header.tensors {
        let is_input = tensor.name == INPUT;
        if !is_input && layer_of(tensor).unwrap_or(layers) >= first_on_gpu {
            device.weights_bytes = device.weights_bytes.saturating_add(tensor.bytes);
            continue;
        }
        let makes_logits = is_input && is_tied;
        let is_multiplied = (makes_logits && on_gpu == 0) || !is_input;
        if makes_logits && on_gpu > 0 {
            device.weights_bytes = device.weights_bytes.saturating_add(tensor.bytes);
        }
        if is_multiplied && (is_packed(tensor, kernels) || is_repacked(tensor)) {
            host.repacked_bytes = host.repacked_bytes.saturating_add(tensor.bytes);
        }
        // Our kernels release the file's pages. Of embeddings that are looked up, some are paged in again.
        let mapped = match is_multiplied && is_packed(tensor, kernels) {
            false => tensor.bytes,
            true if is_input => tensor.bytes.min(LOOKED_UP_BYTES),
            true => 0,
        };
        host.weights_bytes = host.weights_bytes.saturating_add(mapped);
    }
    (host, device)
}

/// Returns the layer of a tensor, from its name.
fn layer_of(tensor: &Tensor) -> Option<usize> {
    tensor.name.strip_prefix("blk.")?.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory_plan::tests::plain;

    fn options(gpu_layers: u32) -> LoadOptions {
        LoadOptions { gpu_layers: Some(gpu_layers), ..LoadOptions::default() }
    }

    #[test]
    fn what_leaves_the_host_arrives_on_the_gpu() {
        let header = plain();
        let model = Dimensions::of(&header);
        let whole = split(&header, &model, 0, Kernels::Auto);
        assert_eq!(whole.1, Share::default());
        let tied = header.tensors.iter().find(|tensor| tensor.name == INPUT).map_or(0, |tensor| tensor.bytes);
        for on_gpu in 1..=5 {
            let (host, device) = split(&header, &model, on_gpu, Kernels::Auto);
            assert_eq!(host.cell_bytes + device.cell_bytes, whole.0.cell_bytes);
            // The tiny model has no output matrix, so both sides hold the token embeddings.
            assert_eq!(host.weights_bytes + device.weights_bytes, header.tensor_bytes() + tied, "{on_gpu} layers");
        }
        let all = split(&header, &model, 99, Kernels::Auto);
        assert_eq!((all.0.weights_bytes, all.0.cell_bytes), (tied, 0));
    }

    #[test]
    fn more_layers_need_more_of_the_gpu_and_no_more_of_the_host() {
        let plans: Vec<_> =
            (0..=5).map(|layers| plan(&plain(), &options(layers)).expect("it can be planned")).collect();
        for pair in plans.windows(2) {
            assert!(pair[0].vram_bytes < pair[1].vram_bytes, "{pair:?}");
            assert!(pair[0].total_bytes() >= pair[1].total_bytes(), "{pair:?}");
        }
    }

    #[test]
    fn as_many_layers_are_placed_as_fit() {
        let needs =
            |layers| plan(&plain(), &options(layers)).expect("it can be planned").vram_bytes + VRAM_SPARED_BYTES;
        assert_eq!(layers_that_fit(&plain(), &LoadOptions::default(), 0), 0);
        assert_eq!(layers_that_fit(&plain(), &LoadOptions::default(), needs(3)), 3);
        assert_eq!(layers_that_fit(&plain(), &LoadOptions::default(), needs(3) - 1), 2);
        assert_eq!(layers_that_fit(&plain(), &LoadOptions::default(), u64::MAX), 5);
    }

    #[test]
    fn layers_are_read_from_names() {
        let named = |name: &str| Tensor { name: name.into(), dimensions: vec![], kind: 0, offset: 0, bytes: 0 };
        assert_eq!(layer_of(&named("blk.17.attn_q.weight")), Some(17));
        assert_eq!(layer_of(&named("output_norm.weight")), None);
        assert_eq!(layer_of(&named("blk.x")), None);
    }
}
